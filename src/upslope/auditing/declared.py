"""What an algorithm's target says of given circumstances, and the circumstances that put it to the test."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from upslope.algorithms import Algorithm, Condition, Target, Traces
from upslope.auditing.setting import Behaviour, Critic, Unit

_BROKEN: dict[Condition, str] = {
    "exact_critic": "the critic is wrong",
    "exact_critic_at_limit": "the critic is wrong where a limit cuts trajectories",
    "on_policy": "another policy acted",
    "fixed_steps": "whole trajectories of unequal length are averaged by step: a ratio, biased less the more there are",
    "no_time_limit": "a time limit cuts episodes, and what would follow counts as 0",
}

_ALIASED = "states look alike, so that no critic of what is seen is exact"


@dataclass(frozen=True, kw_only=True, slots=True)
class Circumstances:
    """What a target's conditions speak of.

    Attributes:
        critic: what the critic knows.
        behaviour: who acted.
        limit: time limit of the environment in steps, or None.
        limit_in_task: whether a limit is part of the task, as the length limit of a completion is.
        unit: what rows are; what the algorithm learns from if None.
        aliased: whether states of different value look alike; the audit finds out by itself.
    """

    critic: Critic = "exact"
    behaviour: Behaviour = "on_policy"
    limit: int | None = None
    limit_in_task: bool = False
    unit: Unit | None = None
    aliased: bool = False

    def meet(self, condition: Condition) -> bool:
        """Whether the condition holds."""
        right = self.critic == "exact" and not self.aliased
        if condition == "exact_critic":
            return right
        if condition == "exact_critic_at_limit":
            return right or (self.limit is None and not self.limit_in_task)
        if condition == "on_policy":
            return self.behaviour == "on_policy"
        if condition == "fixed_steps":
            return self.unit != "episodes"
        return self.limit is None

    def __str__(self) -> str:
        """In words."""
        words = [f"{self.critic} critic", "on-policy" if self.behaviour == "on_policy" else "another policy acted"]
        words += [f"time limit {self.limit}"] if self.limit is not None else []
        words += [f"in {self.unit}"] if self.unit is not None else []
        words += ["states look alike"] if self.aliased else []
        return ", ".join(words)


def declaration(target: Target, circumstances: Circumstances) -> tuple[Literal["unbiased", "biased"], str]:
    """What the algorithm says of itself here, and why."""
    reasons = list(target.biased_by)
    reasons += [_broken(condition, circumstances) for condition in target.requires if not circumstances.meet(condition)]
    return ("biased", "; ".join(reasons)) if reasons else ("unbiased", "")


def _broken(condition: Condition, circumstances: Circumstances) -> str:
    about_the_critic = condition in ("exact_critic", "exact_critic_at_limit")
    return _ALIASED if about_the_critic and circumstances.aliased else _BROKEN[condition]


def in_words(target: Target) -> str:
    """The target as a formula."""
    formula = {
        "discounted": "grad J_gamma",
        "undiscounted_states": "sum_s eta_1(s) sum_a grad pi(a|s) q_gamma(s,a)",
        "average_reward": "grad r_bar",
        "given_data": "the gradient of its own loss",
        "prediction": "the critic's own update",
    }[target.gradient]
    factor = "" if target.factor == 1.0 else f"{target.factor:.4g} x "
    shrunk, penalty = "(G - 1)/G x " if target.group_mean else "", target.penalty
    if penalty is not None:
        of = "" if penalty.of == "trajectories" else " of each step"
        shared = shrunk if penalty.baselined else ""
        formula = f"{shrunk}{formula} - {shared}{penalty.coefficient:g} x grad KL(pi || ref){of}"
        formula = f"{factor}[{formula}]" if factor else formula
    else:
        formula = f"{factor}{shrunk}{formula}"
    return (
        f"({formula}) / mean length"
        if penalty and target.per == "step"
        else (formula + (" / mean length" if target.per == "step" else ""))
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """An exact gradient that an ascent direction is held against, and what is declared of the two.

    Attributes:
        target: [P] the exact gradient.
        target_name: that in words.
        declared: what is declared here, or None where nothing is.
        reason: what biases the ascent here, if it is declared biased.
    """

    target: Tensor
    target_name: str
    declared: Literal["unbiased", "biased"] | None = None
    reason: str = ""


def claim_of(target: Target, exact: Tensor, circumstances: Circumstances) -> Claim:
    """What an algorithm says of itself here.

    Args:
        target: what it declares.
        exact: [P] that gradient.
        circumstances: in which it is audited.
    """
    declared, reason = declaration(target, circumstances)
    return Claim(target=exact, target_name=in_words(target), declared=declared, reason=reason)


def put_to_the_test(target: Target, *, limit: int) -> Iterator[Circumstances]:
    """Circumstances that meet all conditions with as little as they ask for, and ones that break each alone.

    Args:
        target: with its conditions.
        limit: a time limit.
    """
    needed: Critic = "exact" if "exact_critic" in target.requires else "perturbed"
    yield Circumstances(critic=needed)
    if "no_time_limit" not in target.requires:
        yield Circumstances(critic="exact", limit=limit)
    for condition in target.requires:
        if condition == "exact_critic":
            yield Circumstances(critic="perturbed")
        elif condition == "on_policy":
            yield Circumstances(critic=needed, behaviour="stale")
        elif condition == "fixed_steps":
            yield Circumstances(critic=needed, unit="episodes")
        else:
            yield Circumstances(critic="perturbed", limit=limit)


def unit_of(algorithm: Algorithm) -> Unit:
    """What rows the algorithm learns from."""
    passes = algorithm.passes
    whole = isinstance(passes.rule, Traces) and algorithm.target.gradient != "average_reward"
    return "episodes" if passes.whole_episodes or whole else "fragments"
