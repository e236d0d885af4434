"""Named problems of `upslope.exact` as environments: what the id `problem/NAME` stands for."""

from __future__ import annotations

from dataclasses import replace

from upslope.collect import EnvironmentConfig, FiniteFactory, Source
from upslope.errors import UsageError
from upslope.exact.problems import problem
from upslope.train.config import Run

PROBLEM_PREFIX = "problem/"
"""Before the name of a problem it is the id of an environment."""


def named_problem(config: EnvironmentConfig) -> FiniteFactory | None:
    """The environments of `problem/NAME`, with the time limit asked for or else the problem's own; None for other ids.

    Raises:
        UsageError: if there is no problem of that name, or images are asked of it.
    """
    if not config.id.startswith(PROBLEM_PREFIX):
        return None
    if config.preprocessing != "none" or config.kwargs:
        raise UsageError(
            f"{config.id} is made of tables: it takes no environment.kwargs, and its preprocessing is 'none'"
        )
    found = problem(config.id.removeprefix(PROBLEM_PREFIX))
    own = None if config.continuing else found.limit
    return FiniteFactory(found.mdp, own if config.time_limit is None else config.time_limit)


def environments_of(config: EnvironmentConfig, source: Source | None) -> Source:
    """What `make_environments` is to be given: an object if there is one, a named problem, or the config itself.

    Raises:
        UsageError: as `named_problem` does.
    """
    if source is not None:
        return source
    return named_problem(config) or config


def evaluation_environments_of(config: EnvironmentConfig, source: Source | None, horizon: int) -> Source:
    """The same for evaluation, which waits for the ends of episodes: tables without a time limit get one, `horizon`.

    The most likely actions of a policy need never come to an end in a problem where those it samples do.

    Raises:
        UsageError: as `named_problem` does.
    """
    made_of = environments_of(config, source)
    if isinstance(made_of, FiniteFactory) and made_of.time_limit is None and config.time_limit is None:
        return replace(made_of, time_limit=horizon)
    return made_of


def has_no_end(config: EnvironmentConfig, source: Source | None) -> bool:
    """Whether the task goes on without end, so that its average reward is what counts.

    Raises:
        UsageError: as `named_problem` does.
    """
    made_of = environments_of(config, source)
    return config.continuing or (config.time_limit is None and isinstance(made_of, FiniteFactory) and made_of.endless)


def check_ends(run: Run, source: Source) -> None:
    """Refuse to collect whole episodes where they have no end.

    Args:
        run: the configuration.
        source: as `environments_of` gives it.

    Raises:
        UsageError: if there is no terminal state and no time limit.
    """
    if run.acting.episodes is None or run.environment.time_limit is not None:
        return
    if isinstance(source, FiniteFactory) and source.endless:
        raise UsageError(
            f"episodes of {run.environment.id} never end, and rollout.episodes={run.acting.episodes} asks for whole "
            "ones: set environment.time_limit (1000, say), or take an algorithm that learns from fragments (A2C, PPO, "
            "OneStepActorCritic) with rollout.steps"
        )
