"""`upslope resume`: go on with a run."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from upslope.commands.common import conclude
from upslope.options import as_recorded, parse


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Go on with a run from its newest whole checkpoint.

    After a crash or a kill -9 it is exactly as if the run had never stopped. So it is after Ctrl-C and SIGTERM, except
    where environments are made anew at checkpoints (environment.resume is rebuild): the checkpoint that the signal adds
    makes them anew once more.
    """

    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Its directory."""
    steps: int | None = None
    """A new total of environment steps, or of a language model's updates; `1e6` may be written."""
    recipe: str | None = None
    """The recipe that made it, path/to/file.py:function; needed only where that uses classes of your own."""
    environment: str | None = None
    """The id of its environment; needed only where that is module:Name-v0, since making it imports the module."""
    potential: str | None = None
    """The function that shapes its rewards, path/to/file.py:function; needed only where there is one, as it is run."""


def act(arguments: Sequence[str]) -> int:
    """Run the command."""
    command = parse(Resume, arguments, program="upslope resume")
    from upslope.recipes import load_recipe
    from upslope.train import resume
    from upslope.train.config_file import read_run, recorded_run
    from upslope.train.language import LanguageRun

    given = None if command.recipe is None else as_recorded(load_recipe(command.recipe), recorded_run(command.run))
    run = read_run(command.run) if given is None else given
    start = time.monotonic()
    result = resume(
        command.run, run=given, steps=command.steps, environments=command.environment, potential=command.potential
    )
    if command.steps is not None:
        run = dataclasses.replace(run, steps=command.steps)
    if command.environment is not None and not isinstance(run, LanguageRun):
        run = dataclasses.replace(run, environment=dataclasses.replace(run.environment, id=command.environment))
    return conclude(
        result,
        run,
        time.monotonic() - start,
        recipe=command.recipe,
        steps=command.steps,
        resumed=True,
        another=None,
    )
