"""What starting and resuming have in common for both kinds of run."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from upslope.errors import UsageError
from upslope.train.config_file import config_to_tree, differences, recorded_run
from upslope.train.describe import describe_run
from upslope.train.run_directory import RunDirectory, run_name
from upslope.train.session import AnyRun, ResumeError

_MAY_CHANGE = ("steps", "log.", "checkpoint.", "evaluation.", "name", "directory", "threads", "recipe")


@contextmanager
def new_directory(run: AnyRun) -> Iterator[RunDirectory]:
    """The locked directory of a new run; if it was made here, and the run is refused before any result, it is removed.

    Raises:
        RunDirectoryError: if it holds a run already or is in use.
    """
    made = run.name is None or not (run.directory / run.name).exists()
    if run.name is None:
        directory = RunDirectory.create_numbered(run.directory, run_name(run.recipe, run.seed))
    else:
        directory = RunDirectory.create(run.directory, run.name)
    with directory:
        try:
            yield directory
        except UsageError:
            if made and not directory.holds_results():
                shutil.rmtree(directory.path, ignore_errors=True)
            raise


def config_file(run: AnyRun, packages: tuple[str, ...], more: Mapping[str, Any] | None = None) -> bytes:
    """The content of `config.json`: the configuration, its estimator in words, versions.

    Args:
        run: resolved.
        packages: whose versions matter.
        more: other entries.
    """
    tree = {
        "run": config_to_tree(run),
        "estimator": describe_run(run),
        **({} if more is None else more),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }
    return (json.dumps(tree, indent=2) + "\n").encode()


def check_same(run: AnyRun, directory: Path, *, also: tuple[str, ...] = ()) -> None:
    """Refuse to go on with a configuration that differs from the recorded one in more than what may change.

    Args:
        run: to go on with.
        directory: of the run.
        also: beginnings of dotted names of other settings that may change.

    Raises:
        ResumeError: naming what differs.
    """
    given = json.loads(json.dumps(config_to_tree(run)))
    found = differences(recorded_run(directory), given)
    changed = {name: pair for name, pair in found.items() if not name.startswith((*_MAY_CHANGE, *also))}
    if changed:
        listed = ", ".join(f"{name}: {old!r} -> {new!r}" for name, (old, new) in changed.items())
        raise ResumeError(f"the configuration is not the one the run was started with ({listed}); start a new run")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with this many CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(limits=count):
            yield
    finally:
        torch.set_num_threads(before)
