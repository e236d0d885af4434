"""A named problem solved whole: what the best policy is worth, and the exact ways there, beside what a learner did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from upslope.exact import (
    PROBLEMS,
    Ascent,
    Direction,
    FiniteMDP,
    LocalSearch,
    NamedProblem,
    PolicyIteration,
    best_policy,
    deterministic,
    expected_return,
    gradient_ascent,
    policy_iteration,
    problem,
)
from upslope.train.config import EvaluationConfig
from upslope.train.problems import PROBLEM_PREFIX

MEASURED = ("deterministic_mean", "stochastic_mean")
"""The figures of an evaluation that an exact return stands beside."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimum:
    """The best policy of a named problem, among those that see what a learner sees.

    Attributes:
        policy: [S, A] pi(a|s).
        objective: J, or the average reward of a continuing problem.
        search: how it was found where states look alike, by local searches that prove nothing; None where policy
            iteration found it, which does.
    """

    policy: Tensor
    objective: float
    search: LocalSearch | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Solved:
    """A named problem and the ways to its optimum.

    Attributes:
        named: the problem.
        optimum: of those who see what a learner sees.
        iteration: policy iteration, which sees the state.
        plain, natural: exact gradient ascent from the problem's own policy.
    """

    named: NamedProblem
    optimum: Optimum
    iteration: PolicyIteration
    plain: Ascent
    natural: Ascent

    def measured(self, policy: Tensor, *, limit: int | None = None) -> float:
        """The mean return that an evaluation of this policy, [S, A], would come to with endless patience.

        Args:
            policy: pi(a|s).
            limit: steps of an episode; those of an evaluation if None.
        """
        return expected_return(self.named.mdp, policy, limit=evaluation_limit(self.named) if limit is None else limit)


def solve_problem(name: str, *, iterations: int, step_size: float | None, seed: int, restarts: int) -> Solved:
    """All of it.

    Args:
        name: of the problem.
        iterations: most steps of each ascent.
        step_size: of each step of gradient ascent; None searches for one along the line.
        seed: of the policy the ascents begin with.
        restarts: local searches where states look alike.

    Raises:
        UsageError: if there is no such problem.
        ValueError: as `gradient_ascent` and `best_policy` do.
    """
    named = problem(name)
    iteration = policy_iteration(named.mdp)
    begin, searched = named.policy(seed), step_size is None
    size = 1.0 if step_size is None else step_size
    plain, natural = (
        gradient_ascent(
            named.mdp, begin, direction=direction, iterations=iterations, step_size=size, line_search=searched
        )
        for direction in get_args(Direction)
    )
    return Solved(
        named=named,
        optimum=_optimum(named, iteration, restarts),
        iteration=iteration,
        plain=plain,
        natural=natural,
    )


def optimum(name: str, *, restarts: int = 4) -> Optimum:
    """The best policy of a named problem.

    Args:
        name: of the problem.
        restarts: local searches where states look alike.

    Raises:
        UsageError: if there is no such problem.
    """
    named = problem(name)
    return _optimum(named, policy_iteration(named.mdp), restarts)


def looks_alike(mdp: FiniteMDP) -> bool:
    """Whether a policy cannot tell some states apart in which it has to act."""
    seen = mdp.observation[~mdp.terminal]
    return len(torch.unique(seen, dim=0)) < len(seen)


def evaluation_limit(named: NamedProblem, settings: Mapping[str, Any] | None = None) -> int:
    """Steps after which an evaluation on this problem cuts an episode.

    Args:
        named: the problem.
        settings: of a run, as recorded; None for what runs do if nothing else is said.
    """
    environment, evaluation = ({}, {}) if settings is None else (settings["environment"], settings["evaluation"])
    limits = [
        environment.get("time_limit"),
        None if environment.get("continuing") else named.limit,
        evaluation.get("horizon"),
        EvaluationConfig().horizon,
    ]
    return next(limit for limit in limits if limit is not None)


def problem_of(settings: Mapping[str, Any]) -> str | None:
    """The name of the problem that a run learns on, by its recorded settings; None for another environment."""
    environment = settings.get("environment")
    identity = str(environment.get("id")) if isinstance(environment, Mapping) else ""
    name = identity.removeprefix(PROBLEM_PREFIX)
    return name if name != identity and name in PROBLEMS else None


def best_return(runs: Sequence[Mapping[str, Any]], metric: str) -> float | None:
    """The exact mean return of the best policy in the evaluations of these runs; None where there is no one such.

    Args:
        runs: recorded settings, all on one named problem if there is to be a return.
        metric: what is drawn of them.
    """
    names = {problem_of(settings) for settings in runs}
    name = names.pop() if len(names) == 1 else None
    if name is None or metric not in MEASURED:
        return None
    named = problem(name)
    limits = {evaluation_limit(named, settings) for settings in runs}
    return expected_return(named.mdp, optimum(name).policy, limit=limits.pop()) if len(limits) == 1 else None


def _optimum(named: NamedProblem, iteration: PolicyIteration, restarts: int) -> Optimum:
    if not looks_alike(named.mdp):
        best = iteration.best
        return Optimum(policy=deterministic(named.mdp, best.actions), objective=best.objective, search=None)
    search = best_policy(named.mdp, named.policy, restarts=restarts)
    return Optimum(policy=search.best.policy[-1], objective=float(search.best.objective[-1]), search=search)
