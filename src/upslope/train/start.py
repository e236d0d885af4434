"""Starting a run and going on with one: from a configuration to a training that stands ready."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits
from torch import nn

from upslope.collect import EnvironmentConfig, Source, make_environments, resolve_environments
from upslope.errors import UsageError, checking_usage
from upslope.train.config import Run
from upslope.train.config_file import config_to_tree, differences, read_evaluation, read_run, recorded_run
from upslope.train.describe import describe_run
from upslope.train.evaluate import Evaluator
from upslope.train.given import check_recorded, given_id, split_source, was_given
from upslope.train.log import require_wandb
from upslope.train.loop import Callback, Result, Training
from upslope.train.problems import check_ends, environments_of
from upslope.train.run_directory import RunDirectory, run_name
from upslope.train.session import ResumeError, Session
from upslope.train.storage import write_file_atomically

_MAY_CHANGE = ("steps", "log.", "checkpoint.", "evaluation.", "name", "directory", "threads", "recipe")


def train(
    run: Run,
    *,
    environments: Source | None = None,
    evaluation_environments: Source | None = None,
    encoder: nn.Module | None = None,
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Train from the start, in a new run directory.

    Args:
        run: the configuration, for example `upslope.recipes.cartpole_ppo()`.
        environments: what to train in instead of `run.environment.id`: a function that makes an environment, an
            environment, a Gymnasium VectorEnv, an id, or a config in place of `run.environment`.
        evaluation_environments: the same for evaluation; needed where `environments` is an object, of which no second
            one can be made, unless the run never evaluates.
        encoder: a module of the user's own to read observations with.
        callbacks: called after every update.

    Returns:
        Where everything is, the policy and its final evaluation.

    Raises:
        RunDirectoryError: if the directory holds a run already or is in use.
        UsageError: if environment, spaces or settings do not go together.
        ModuleNotFoundError: if Weights & Biases is asked for and not installed.
    """
    if run.log.wandb:
        require_wandb()
    with _threads(run.threads), ExitStack() as used:
        with checking_usage():
            environment, source = split_source(environments, run.environment)
            given = _Given(source, evaluation_environments, encoder, callbacks)
            if source is not None:
                environment = replace(environment, id=given_id(source))
            made_of = environments_of(environment, source)
            resolution = resolve_environments(made_of, environment)
            run = replace(run, environment=resolution.config)
            check_ends(run, made_of)
            evaluator = _evaluator(run, given)
            session = used.enter_context(_session(run, given))
            directory = used.enter_context(_new_directory(run))
            write_file_atomically(directory.config_path, _config_file(run))
            training = Training(session, directory, evaluator, given.callbacks, notes=resolution.notes)
        return training.finish()


def resume(
    directory: str | Path,
    *,
    run: Run | None = None,
    steps: int | None = None,
    environments: Source | None = None,
    evaluation_environments: Source | None = None,
    encoder: nn.Module | None = None,
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Go on with a run from its newest whole checkpoint, as if it had never stopped.

    Args:
        directory: the run directory.
        run: its configuration, needed only where the recipe uses classes of the user's own.
        steps: a new total of environment steps.
        environments, evaluation_environments, encoder, callbacks: as given to `train`. An environment with an id
            `module:Name-v0` has to be named again, since making it imports the module.

    Raises:
        RunDirectoryError: if there is no run there or it is in use.
        UsageError: if the environment has to be passed again.
        ResumeError: if the configuration, the spaces or the network changed.
    """
    directory = Path(directory)
    with RunDirectory.open(directory) as opened, ExitStack() as used:
        with checking_usage():
            recorded, _ = read_evaluation(directory)
            check_recorded(recorded, environments)
            run = read_run(directory) if run is None else run
            environment, source = split_source(environments, run.environment)
            run = _same(replace(run, environment=environment), directory, recorded, source)
            if steps is not None:
                run = replace(run, steps=steps)
            if run.log.wandb:
                require_wandb()
            check_ends(run, environments_of(run.environment, source))
            given = _Given(source, evaluation_environments, encoder, callbacks)
            used.enter_context(_threads(run.threads))
            session = used.enter_context(_session(run, given))
            training = Training(session, opened, _evaluator(run, given), given.callbacks, resumed=True)
            write_file_atomically(opened.config_path, _config_file(run))
        return training.finish()


@dataclass(frozen=True, slots=True)
class _Given:
    """What a configuration cannot hold."""

    environments: Source | None
    evaluation_environments: Source | None
    encoder: nn.Module | None
    callbacks: Sequence[Callback]


@contextmanager
def _session(run: Run, given: _Given) -> Iterator[Session]:
    source = environments_of(run.environment, given.environments)
    session = Session(run, make_environments(source, run.environment), encoder=given.encoder)
    try:
        yield session
    finally:
        session.close()


def _evaluator(run: Run, given: _Given) -> Evaluator:
    environment, source = split_source(given.evaluation_environments, run.environment)
    if given.evaluation_environments is None and given.environments is not None:
        if not isinstance(given.environments, Callable):
            if run.evaluation.times or run.evaluation.final_episodes:
                raise UsageError(
                    "an environment passed as an object cannot be evaluated on separately: pass a function that makes "
                    "one, or evaluation_environments, or EvaluationConfig(times=0, final_episodes=0) to go without"
                )
        else:
            source = given.environments
    wanted = run.evaluation
    episodes = min(wanted.episodes, wanted.final_episodes or wanted.episodes)
    environments = min(wanted.environments, episodes)
    return Evaluator(environment, environments=environments, seed=run.seed, source=source)


@contextmanager
def _new_directory(run: Run) -> Iterator[RunDirectory]:
    if run.name is None:
        directory = RunDirectory.create_numbered(run.directory, run_name(run.recipe, run.seed))
    else:
        directory = RunDirectory.create(run.directory, run.name)
    with directory:
        yield directory


def _config_file(run: Run) -> bytes:
    packages = ("upslope", "torch", "numpy", "gymnasium", "safetensors")
    tree = {
        "run": config_to_tree(run),
        "estimator": describe_run(run),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }
    return (json.dumps(tree, indent=2) + "\n").encode()


def _same(run: Run, directory: Path, recorded: EnvironmentConfig, source: Source | None) -> Run:
    """The given configuration with the environments' recorded ways, if it differs only in what may change."""
    environment = replace(run.environment, vectorization=recorded.vectorization, resume=recorded.resume)
    if source is not None:
        environment = replace(environment, id=recorded.id)
    run = replace(run, environment=environment)
    given = json.loads(json.dumps(config_to_tree(run)))
    may_change = (*_MAY_CHANGE, "environment.id") if was_given(recorded) else _MAY_CHANGE
    found = differences(recorded_run(directory), given)
    changed = {name: pair for name, pair in found.items() if not name.startswith(may_change)}
    if changed:
        listed = ", ".join(f"{name}: {old!r} -> {new!r}" for name, (old, new) in changed.items())
        raise ResumeError(f"the configuration is not the one the run was started with ({listed}); start a new run")
    return run


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(limits=count):
            yield
    finally:
        torch.set_num_threads(before)
