"""From the configuration of an agent's run to a training that stands ready."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from upslope.collect import EnvironmentConfig, Source, make_environments, resolve_environments
from upslope.errors import UsageError, checking_usage
from upslope.train.config import Run
from upslope.train.config_file import read_evaluation, read_run, recorded_frozen
from upslope.train.control import ControlSession
from upslope.train.evaluate import Evaluator
from upslope.train.given import check_recorded, given_id, split_source, was_given
from upslope.train.log import require_wandb
from upslope.train.loop import Callback, Result, Training
from upslope.train.prepare import check_same, config_file, new_directory, threads
from upslope.train.problems import check_ends, environments_of
from upslope.train.run_directory import RunDirectory
from upslope.train.shaping import potential_again
from upslope.train.starting_weights import Places, check_hashes, keep, places_in, places_of
from upslope.train.storage import write_file_atomically

_PACKAGES = ("upslope", "torch", "numpy", "gymnasium", "safetensors")


@dataclass(frozen=True, slots=True)
class Given:
    """What the configuration of an agent's run cannot hold."""

    environments: Source | None
    evaluation_environments: Source | None
    encoder: nn.Module | None
    start: Path | None
    """The folder that `start_from` stands for."""
    potential: str | None = None
    """The potential of a run that goes on, where it is a function of the user's own."""


def train_agent(run: Run, given: Given, callbacks: Sequence[Callback]) -> Result:
    """`upslope.train.train` for an agent."""
    with threads(run.threads), ExitStack() as used:
        with checking_usage():
            environment, source = split_source(given.environments, run.environment)
            given = replace(given, environments=source)
            if source is not None:
                environment = replace(environment, id=given_id(source))
            made_of = environments_of(environment, source)
            separate = run.acting.group_size is not None
            resolution = resolve_environments(made_of, environment, separate=separate)
            run = replace(run, environment=resolution.config)
            check_ends(run, made_of)
            evaluator = _evaluator(run, given)
            session = used.enter_context(_session(run, given, places_of(run, given.start)))
            directory = used.enter_context(new_directory(run))
            keep(session.beginning, directory)
            write_file_atomically(directory.config_path, _config_file(run, session))
            notes = (*resolution.notes, *session.beginning.notes)
            training = Training(session, directory, evaluator, callbacks, notes=notes)
        return training.finish()


def resume_agent(
    directory: RunDirectory, run: Run | None, steps: int | None, given: Given, callbacks: Sequence[Callback]
) -> Result:
    """`upslope.train.resume` for an agent; the directory is locked."""
    with ExitStack() as used:
        with checking_usage():
            recorded, _ = read_evaluation(directory.path)
            check_recorded(recorded, given.environments)
            run = _recorded(directory.path, given.potential) if run is None else run
            environment, source = split_source(given.environments, run.environment)
            given = replace(given, environments=source)
            run = _same(replace(run, environment=environment), directory.path, recorded, source)
            if steps is not None:
                run = replace(run, steps=steps)
            if run.log.wandb:
                require_wandb()
            check_ends(run, environments_of(run.environment, source))
            used.enter_context(threads(run.threads))
            session = used.enter_context(_session(run, given, places_in(run, directory)))
            check_hashes(session.beginning.hashes, recorded_frozen(directory.path))
            training = Training(session, directory, _evaluator(run, given), callbacks, resumed=True)
            write_file_atomically(directory.config_path, _config_file(run, session))
        return training.finish()


def _recorded(directory: Path, potential: str | None) -> Run:
    run = read_run(directory)
    assert isinstance(run, Run)
    return potential_again(run, potential)


def _config_file(run: Run, session: ControlSession) -> bytes:
    return config_file(run, _PACKAGES, {"frozen": session.beginning.hashes})


@contextmanager
def _session(run: Run, given: Given, places: Places) -> Iterator[ControlSession]:
    source = environments_of(run.environment, given.environments)
    environments = make_environments(source, run.environment)
    try:
        session = ControlSession(run, environments, encoder=given.encoder, places=places)
    except BaseException:
        environments.close()
        raise
    try:
        yield session
    finally:
        session.close()


def _evaluator(run: Run, given: Given) -> Evaluator:
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
    return Evaluator(environment, run.evaluation, seed=run.seed, source=source)


def _same(run: Run, directory: Path, recorded: EnvironmentConfig, source: Source | None) -> Run:
    """The given configuration with the environments' recorded ways, if it differs only in what may change."""
    environment = replace(run.environment, vectorization=recorded.vectorization, resume=recorded.resume)
    if source is not None:
        environment = replace(environment, id=recorded.id)
    run = replace(run, environment=environment)
    given = ("environment.id",) if was_given(recorded) else ()
    moved = ("shaping.potential",) if run.shaping is not None and run.shaping.by_function else ()
    check_same(run, directory, also=(*given, *moved))
    return run
