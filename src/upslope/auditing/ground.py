"""Where an algorithm is audited: a problem, looked at with a policy, as the setting whose batches it learns from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import nn

from upslope.algorithms import Algorithm
from upslope.auditing.checks import check_circumstances, check_on_states
from upslope.auditing.declared import Circumstances, unit_of
from upslope.auditing.groups import GroupSetting
from upslope.auditing.setting import Audited, FiniteSetting
from upslope.auditing.tokens import Network, TokenSetting
from upslope.errors import UsageError, checking_usage
from upslope.exact import PROBLEMS, TOKEN_PROBLEMS, FiniteMDP, NamedProblem, StatePolicy, TokenMDP
from upslope.exact import problem as named_problem
from upslope.exact._named import random_table

Problem: TypeAlias = str | NamedProblem | FiniteMDP | TokenMDP
"""By name, or one of one's own."""

AlgorithmSetting: TypeAlias = TokenSetting | GroupSetting | FiniteSetting[Audited]
"""Completions; groups of episodes; episodes or fragments of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ground:
    """What an algorithm is audited on.

    Attributes:
        problem: which one.
        policy: to look at states with; the problem's own if None.
        circumstances: critic, behaviour, time limit; an exact critic, on-policy and the problem's own limit if None.
        network: what completes prompts.
        seed: of the parameters of a problem's own policy.
    """

    problem: Problem
    policy: Audited | None
    circumstances: Circumstances | None
    network: Network
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchShape:
    """What a batch is.

    Attributes:
        rows: per drawn batch.
        row_steps: T of a fragment.
        size: G, completions or episodes in a group; None for 2 where the algorithm compares a group, else 1.
        groups: N in the smallest batch of completions.
    """

    rows: int
    row_steps: int
    size: int | None
    groups: int


def setting_of(algorithm: Algorithm, ground: Ground, shape: BatchShape) -> tuple[AlgorithmSetting, Circumstances]:
    """The setting, and the circumstances as they are in it: time limit, unit, critic, and whether states look alike.

    Raises:
        UsageError: if the problem is unknown, or the algorithm, the policy or the shape does not go with it.
    """
    given = ground.circumstances or Circumstances()
    check_circumstances(given)
    problem = ground.problem
    if isinstance(problem, TokenMDP) or (isinstance(problem, str) and problem in TOKEN_PROBLEMS):
        return _on_completions(algorithm, problem, ground, shape, given)
    check_on_states(algorithm, shape.size, shape.groups, ground.network)
    named = _named(problem, average_reward=algorithm.target.gradient == "average_reward")
    policy, given = _policy(named, algorithm, ground, given)
    setting, given = _on_states(algorithm, named, policy, shape, given)
    if algorithm.passes.groups:
        return GroupSetting(alone=setting, size=2 if shape.size is None else shape.size), given
    return setting, given


def _on_completions(
    algorithm: Algorithm, problem: str | TokenMDP, ground: Ground, shape: BatchShape, given: Circumstances
) -> tuple[TokenSetting, Circumstances]:
    if ground.policy is not None:
        raise UsageError("completion problems have a policy of their own: leave policy out")
    if algorithm.gamma != 1.0:
        raise UsageError(f"completions have no discount: set gamma to 1 (it is {algorithm.gamma})")
    if given.limit is not None:
        raise UsageError("a completion problem has a length limit of its own: leave limit out")
    if given.unit == "fragments":
        raise UsageError("completions come whole: leave unit out")
    size = shape.size
    if size is None:
        size = 2 if algorithm.passes.groups else 1
    if algorithm.passes.groups and size < 2:
        raise UsageError(f"{type(algorithm).__name__} compares the completions of a group: ask for a size of 2 or more")
    penalty = algorithm.target.penalty
    setting = TokenSetting.build(
        problem,
        size=size,
        groups=shape.groups,
        network=ground.network,
        critic=given.critic,
        stale=given.behaviour == "stale",
        rows=shape.rows,
        seed=ground.seed,
        beta=penalty.coefficient if penalty is not None and penalty.of == "trajectories" else 0.0,
    )
    return setting, replace(given, limit_in_task=True, unit="episodes")


def _named(problem: object, *, average_reward: bool = False) -> NamedProblem:
    if isinstance(problem, str) and problem in PROBLEMS:
        named = named_problem(problem)
    elif isinstance(problem, NamedProblem):
        named = problem
    elif isinstance(problem, FiniteMDP):
        named = NamedProblem(name="a problem of your own", summary="", mdp=problem, policy=_random_table(problem))
    else:
        what = f"no problem {problem!r}" if isinstance(problem, str) else f"no auditing on a {type(problem).__name__}"
        raise UsageError(
            f"there is {what}; there are: {', '.join((*PROBLEMS, *TOKEN_PROBLEMS))}, and any "
            "FiniteMDP, NamedProblem or TokenMDP"
        )
    if named.mdp.kind == "continuing" and not average_reward:
        raise UsageError(f"{named.name} goes on without end, and this algorithm follows no average reward")
    if named.mdp.kind != "continuing" and average_reward:
        endless = [name for name in PROBLEMS if named_problem(name).mdp.kind == "continuing"]
        raise UsageError(
            f"this algorithm follows the average reward of a task without end, and {named.name} has ends: audit it on "
            f"{', '.join(endless)}"
        )
    return named


def _random_table(mdp: FiniteMDP) -> Callable[[int], StatePolicy]:
    def build(seed: int) -> StatePolicy:
        if mdp.observation.dim() != 1 or mdp.observation.is_floating_point() or int(mdp.observation.min()) < 0:
            raise UsageError("the observations of this problem are no whole numbers from 0: say which policy sees them")
        return random_table(int(mdp.observation.max()) + 1, mdp.actions)(seed)

    return build


def _policy(
    named: NamedProblem, algorithm: Algorithm, ground: Ground, given: Circumstances
) -> tuple[Audited, Circumstances]:
    """The policy to look at the problem with, and the circumstances with what its critic knows."""
    policy = ground.policy
    if policy is None:
        return named.policy(ground.seed), given
    if not isinstance(policy, nn.Module):
        raise UsageError(f"policy must be an nn.Module that is a Policy, got {type(policy).__name__}")
    if policy.sequential:
        raise UsageError(
            "this policy looks at earlier steps of its row: an audit needs one whose steps stand on their own"
        )
    if any(parameter.dtype != torch.float64 for parameter in policy.parameters()):
        raise UsageError("an audit computes in float64: give policy.double()")
    if not isinstance(policy, StatePolicy):
        if given.critic == "exact" and ground.circumstances is not None and algorithm.passes.critic:
            raise UsageError(
                "the critic of this policy is its own, and not the exact one: say "
                "circumstances=Circumstances(critic='perturbed')"
            )
        given = replace(given, critic="perturbed")
    return copy.deepcopy(policy), given


def _on_states(
    algorithm: Algorithm, named: NamedProblem, policy: Audited, shape: BatchShape, given: Circumstances
) -> tuple[FiniteSetting[Audited], Circumstances]:
    """The setting, and the circumstances as they are in it: time limit, unit, and whether states look alike."""
    if given.unit == "fragments" and algorithm.passes.whole_episodes:
        raise UsageError(f"{type(algorithm).__name__} learns from whole episodes: leave unit out, or say 'episodes'")
    unit = given.unit or unit_of(algorithm)
    with checking_usage():
        setting = FiniteSetting.of(
            named,
            policy,
            gamma=algorithm.gamma,
            unit=unit,
            critic=given.critic,
            behaviour=given.behaviour,
            limit=given.limit,
            rows=shape.rows,
            row_steps=shape.row_steps,
        )
        return setting, replace(given, limit=setting.limit, unit=unit, aliased=setting.aliased)
