"""From the configuration of a language model's run to a training that stands ready."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from upslope.collect.tasks.protocol import Task
from upslope.errors import checking_usage
from upslope.policies.language.library import require_language
from upslope.train.config_file import read_run, recorded_frozen
from upslope.train.language.config import GivenTask, LanguageRun
from upslope.train.language.evaluate import LanguageEvaluator
from upslope.train.language.frozen import freeze_again, freeze_new, keep
from upslope.train.language.samples_file import SamplesFile
from upslope.train.language.session import LanguageSession
from upslope.train.log import require_wandb
from upslope.train.loop import Callback, Result, Training
from upslope.train.prepare import check_same, config_file, new_directory, threads
from upslope.train.run_directory import RunDirectory
from upslope.train.starting_weights import start_folder
from upslope.train.storage import write_file_atomically

_PACKAGES = ("upslope", "torch", "numpy", "safetensors", "transformers", "tokenizers")


@dataclass(frozen=True, slots=True)
class LanguageGiven:
    """What the configuration of a language model's run cannot hold.

    Attributes:
        task: of the user's own, in place of the configured one.
        start: the folder that `start_from` stands for.
    """

    task: Task | None
    start: Path | None


def train_language(run: LanguageRun, given: LanguageGiven, callbacks: Sequence[Callback]) -> Result[Any, Any]:
    """`upslope.train.train` for a language model."""
    require_language()
    with threads(run.threads), ExitStack() as used:
        with checking_usage():
            run, task = _task(run, given.task)
            frozen = freeze_new(run, task, start_folder(run.start_from, given.start))
            if frozen.rewards is not None:
                used.callback(frozen.rewards.close)
            session = used.enter_context(closing(LanguageSession(run, frozen)))
            LanguageEvaluator(run, frozen, None)
            directory = used.enter_context(new_directory(run))
            keep(frozen, run, directory)
            write_file_atomically(directory.config_path, config_file(run, _PACKAGES, {"frozen": frozen.hashes}))
            evaluator = LanguageEvaluator(run, frozen, SamplesFile(directory.samples_path))
            training = Training(session, directory, evaluator, callbacks)
        return training.finish()


def resume_language(
    directory: RunDirectory,
    run: LanguageRun | None,
    steps: int | None,
    given: LanguageGiven,
    callbacks: Sequence[Callback],
) -> Result[Any, Any]:
    """`upslope.train.resume` for a language model; the directory is locked."""
    require_language()
    with ExitStack() as used:
        with checking_usage():
            run = _recorded(directory.path) if run is None else run
            run, task = _task(run, given.task)
            check_same(run, directory.path)
            if steps is not None:
                run = replace(run, steps=steps)
            if run.log.wandb:
                require_wandb()
            used.enter_context(threads(run.threads))
            recorded = recorded_frozen(directory.path)
            frozen = freeze_again(run, task, directory, recorded)
            if frozen.rewards is not None:
                used.callback(frozen.rewards.close)
            session = used.enter_context(closing(LanguageSession(run, frozen)))
            evaluator = LanguageEvaluator(run, frozen, SamplesFile(directory.samples_path))
            training = Training(session, directory, evaluator, callbacks, resumed=True)
            write_file_atomically(directory.config_path, config_file(run, _PACKAGES, {"frozen": frozen.hashes}))
        return training.finish()


def _recorded(directory: Path) -> LanguageRun:
    run = read_run(directory)
    assert isinstance(run, LanguageRun)
    return run


def _task(run: LanguageRun, given: Task | None) -> tuple[LanguageRun, Task]:
    """The run with the task it is really trained on, and that task."""
    if given is None:
        return run, run.task.build(run.seed)
    return replace(run, task=GivenTask(name=given.name)), given
