"""Starting a run and going on with one, of either kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from torch import nn

from upslope.collect import Source
from upslope.collect.tasks.protocol import Task
from upslope.errors import UsageError
from upslope.policies import ActorCritic
from upslope.train.config import Run
from upslope.train.config_file import recorded_run
from upslope.train.control_start import Given, resume_agent, train_agent
from upslope.train.evaluate import EvaluationReport
from upslope.train.language.config import LanguageRun
from upslope.train.language.start import LanguageGiven, resume_language, train_language
from upslope.train.log import require_wandb
from upslope.train.loop import Callback, Result
from upslope.train.run_directory import RunDirectory
from upslope.train.session import AnyRun

if TYPE_CHECKING:
    from upslope.policies.language.policy import LanguagePolicy
    from upslope.train.language.evaluate import LanguageReport


@overload
def train(
    run: Run,
    *,
    environments: Source | None = None,
    evaluation_environments: Source | None = None,
    encoder: nn.Module | None = None,
    start: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
) -> Result[ActorCritic, EvaluationReport]: ...


@overload
def train(
    run: LanguageRun,
    *,
    task: Task | None = None,
    start: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
) -> Result[LanguagePolicy, LanguageReport]: ...


@overload
def train(run: AnyRun, *, start: str | Path | None = None) -> Result[Any, Any]: ...


def train(
    run: AnyRun,
    *,
    environments: Source | None = None,
    evaluation_environments: Source | None = None,
    encoder: nn.Module | None = None,
    task: Task | None = None,
    start: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
) -> Result[Any, Any]:
    """Train from the start, in a new run directory.

    Args:
        run: the configuration, for example `upslope.recipes.cartpole_ppo()`.
        environments: of an agent: what to train in instead of `run.environment.id`: a function that makes an
            environment, an environment, a Gymnasium VectorEnv, an id, or a config in place of `run.environment`.
        evaluation_environments: the same for evaluation; needed where `environments` is an object, of which no second
            one can be made, unless the run never evaluates.
        encoder: of an agent: a module of the user's own to read observations with.
        task: of a language model: prompts and rewards of the user's own, in place of what `run.task` builds.
        start: the folder (or run directory) that `run.start_from` stands for; needed where that is the name of a
            recipe.
        callbacks: called after every update.

    Returns:
        Where everything is, the policy and its final evaluation.

    Raises:
        RunDirectoryError: if the directory holds a run already or is in use.
        UsageError: if environment, spaces, model, task or settings do not go together.
        ModuleNotFoundError: if Weights & Biases is asked for and not installed, or the packages of language models are
            needed and not.
    """
    if run.log.wandb:
        require_wandb()
    begun = None if start is None else Path(start)
    given, language = Given(environments, evaluation_environments, encoder, begun), LanguageGiven(task, begun)
    _check_given(isinstance(run, LanguageRun), given, language)
    if isinstance(run, LanguageRun):
        return train_language(run, language, callbacks)
    return train_agent(run, given, callbacks)


def resume(
    directory: str | Path,
    *,
    run: AnyRun | None = None,
    steps: int | None = None,
    environments: Source | None = None,
    evaluation_environments: Source | None = None,
    encoder: nn.Module | None = None,
    task: Task | None = None,
    potential: str | None = None,
    callbacks: Sequence[Callback] = (),
) -> Result[Any, Any]:
    """Go on with a run from its newest whole checkpoint, as if it had never stopped.

    Args:
        directory: the run directory.
        run: its configuration, needed only where the recipe uses classes of the user's own.
        steps: a new total of environment steps, or of a language model's updates.
        environments, evaluation_environments, encoder, task, callbacks: as given to `train`. An environment with an id
            `module:Name-v0` has to be named again, since making it imports the module. What a run started from lies in
            the run directory.
        potential: the user's own function that shapes the rewards, path/to/file.py:function: it has to be named again,
            since its file is run.

    Raises:
        RunDirectoryError: if there is no run there or it is in use.
        UsageError: if the environment or the task has to be passed again.
        ResumeError: if the configuration, the spaces, the network or the frozen policies changed.
    """
    given, language = Given(environments, evaluation_environments, encoder, None, potential), LanguageGiven(task, None)
    with RunDirectory.open(Path(directory)) as opened:
        speaks = recorded_run(opened.path).get("class") == LanguageRun.__name__
        if run is not None and isinstance(run, LanguageRun) != speaks:
            raise UsageError(f"{directory} holds another kind of run than the configuration given: give its own recipe")
        _check_given(speaks, given, language)
        if isinstance(run, LanguageRun) or (run is None and speaks):
            return resume_language(opened, run, steps, language, callbacks)
        return resume_agent(opened, run, steps, given, callbacks)


def _check_given(speaks: bool, given: Given, language: LanguageGiven) -> None:
    """Refuse what belongs to the other kind of run."""
    if speaks and given.potential is not None:
        raise UsageError("a potential shapes the rewards of an agent: leave it out for a language model")
    if speaks and not (given.environments is None and given.evaluation_environments is None and given.encoder is None):
        raise UsageError("a language model is trained on a task: give task=..., not environments or an encoder")
    if not speaks and language.task is not None:
        raise UsageError("an agent is trained in environments: give environments=..., not task")
