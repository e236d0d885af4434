"""Bias and variance of the choices of Psi side by side: what the pictures of the documentation show."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

from upslope.algorithms import Reinforce
from upslope.algorithms.reinforce import Psi
from upslope.auditing.audit import audit
from upslope.auditing.declared import Circumstances
from upslope.auditing.setting import Critic


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One choice of Psi under one critic.

    Attributes:
        label: of the choice.
        critic: what the critic knew.
        squared_bias: relative to the squared length of the gradient.
        variance: of one trajectory, likewise.
    """

    label: str
    critic: Critic
    squared_bias: float
    variance: float


def six_psi(problem: str = "six-state", *, gae_lambda: float = 0.5) -> Iterator[Point]:
    """The six choices of Psi_t, with the true critic and with a wrong one."""
    for critic in get_args(Critic):
        for psi in get_args(Psi):
            yield _point(
                Reinforce(gamma=_GAMMA, psi=psi, gae_lambda=gae_lambda), psi.replace("_", " "), critic, problem
            )


def gae_over_lambda(problem: str = "six-state", *, steps: int = 10) -> Iterator[Point]:
    """GAE from lambda = 0 to 1, with the true critic and with a wrong one."""
    for critic in get_args(Critic):
        for step in range(steps + 1):
            algorithm = Reinforce(gamma=_GAMMA, psi="advantage", gae_lambda=step / steps)
            yield _point(algorithm, f"{step / steps:g}", critic, problem)


_GAMMA = 0.8


def _point(algorithm: Reinforce, label: str, critic: Critic, problem: str) -> Point:
    report = audit(algorithm, problem, circumstances=Circumstances(critic=critic))
    return Point(
        label=label, critic=critic, squared_bias=report.relative_bias**2, variance=report.variance_per_trajectory
    )
