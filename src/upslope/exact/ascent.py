"""Policy gradient ascent without sampling: the exact gradient of J, step by step.

    plain       theta <- theta + alpha grad J
    natural     theta <- theta + alpha F^-1 grad J

J is d_0 . v of an episodic problem, with its gamma, and the average reward of a continuing one. It is a local search:
on a table of free preferences, one row per state, it finds the optimum in the limit; where states look alike, or the
policy cannot represent every table, it may end in a policy that is only better than those around it.

Sutton et al. (1999); Kakade (2001); Agarwal, Kakade, Lee & Mahajan (2021).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from upslope.exact.finite import FiniteMDP
from upslope.exact.gradient import Gradient, parameters_of, policy_gradient
from upslope.exact.natural import natural_gradient
from upslope.exact.policies import StatePolicy
from upslope.exact.solve import action_probabilities, solve

Direction: TypeAlias = Literal["plain", "natural"]
"""Along the gradient, or along the natural gradient."""

_ENOUGH = 1e-4
"""Of the gain that the slope promises, the share that a step has to bring (Armijo)."""
_HALVINGS = 50
_FARTHEST = 1.0
"""No parameter moves by more in one step of a line search: a longer one may jump to a policy that is all but
deterministic, and bad, from which the gradient is too small to lead away."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ascent:
    """The whole of an ascent of N steps.

    Attributes:
        direction: which.
        objective: [N + 1] J before the first step and after each.
        policy: [N + 1, S, A] pi(a|s).
        slope: [N + 1] the largest entry of grad J in magnitude.
        step_size: [N] alpha of each step.
        converged: it ended since grad J was within the tolerance, or no step of any size improved J.
        final: the policy at the end.
    """

    direction: Direction
    objective: Tensor
    policy: Tensor
    slope: Tensor
    step_size: Tensor
    converged: bool
    final: StatePolicy


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalSearch:
    """Ascents from several policies.

    Attributes:
        ascents: in the order of their seeds.
    """

    ascents: tuple[Ascent, ...]

    @property
    def best(self) -> Ascent:
        """The one that came highest."""
        return max(self.ascents, key=lambda ascent: float(ascent.objective[-1]))


def gradient_ascent(
    mdp: FiniteMDP,
    policy: StatePolicy,
    *,
    direction: Direction = "plain",
    iterations: int = 200,
    step_size: float = 1.0,
    line_search: bool = True,
    tolerance: float = 1e-9,
) -> Ascent:
    """Follow the exact gradient from a policy, which stays as it is.

    Args:
        mdp: the problem.
        policy: where to begin; all its parameters that J depends on are moved.
        direction: along grad J or F^-1 grad J.
        iterations: most steps.
        step_size: alpha of every step; with a line search, of the first.
        line_search: double alpha after each step, and halve it until no parameter moves by more than 1 and the step
            brings at least 1e-4 of what its slope promises: J never falls.
        tolerance: end when no entry of grad J is larger than this.

    Raises:
        ValueError: for numbers without meaning, or as `solve` does; if a step without line search leads to a policy
            whose J is not defined.
    """
    if iterations < 1 or not step_size > 0.0 or not tolerance >= 0.0:
        raise ValueError(
            "an ascent takes at least 1 iteration with a step_size above 0 and a tolerance of at least 0; got "
            f"iterations={iterations}, step_size={step_size}, tolerance={tolerance}"
        )
    climber = _Climber(mdp, copy.deepcopy(policy), direction)
    objective, policies, slopes, sizes = [climber.objective()], [climber.table()], list[float](), list[float]()
    converged, size = False, step_size
    while not converged:
        slope, along = climber.directions()
        slopes.append(float(slope.abs().max()))
        if slopes[-1] <= tolerance or len(sizes) == iterations:
            converged = slopes[-1] <= tolerance
            break
        taken = climber.search(objective[-1], slope, along, size) if line_search else climber.step(along, size)
        if taken is None:
            converged = True
            break
        reached, used = taken
        objective.append(reached)
        policies.append(climber.table())
        sizes.append(used)
        size = 2.0 * used if line_search else step_size
    return Ascent(
        direction=direction,
        objective=torch.tensor(objective, dtype=torch.float64),
        policy=torch.stack(policies),
        slope=torch.tensor(slopes, dtype=torch.float64),
        step_size=torch.tensor(sizes, dtype=torch.float64),
        converged=converged,
        final=climber.policy,
    )


def best_policy(
    mdp: FiniteMDP,
    policy: Callable[[int], StatePolicy],
    *,
    restarts: int = 8,
    iterations: int = 200,
    direction: Direction = "natural",
) -> LocalSearch:
    """Ascents with a line search from several policies: the best policy of a kind, as far as such a search can tell.

    Nothing proves that a better one does not exist: J of policies that cannot tell all states apart has local maxima.

    Args:
        mdp: the problem.
        policy: seed -> where to begin, as `NamedProblem.policy`.
        restarts: seeds 0, 1, ..., restarts - 1.
        iterations, direction: as in `gradient_ascent`.

    Raises:
        ValueError: if there is nothing to begin with, or as `gradient_ascent` does.
    """
    if restarts < 1:
        raise ValueError(f"a search begins at one policy at least; got restarts={restarts}")
    return LocalSearch(
        ascents=tuple(
            gradient_ascent(mdp, policy(seed), direction=direction, iterations=iterations, line_search=True)
            for seed in range(restarts)
        )
    )


class _Climber:
    """A policy that is moved, and what is asked of it between two steps."""

    def __init__(self, mdp: FiniteMDP, policy: StatePolicy, direction: Direction) -> None:
        self.mdp, self.policy, self.direction = mdp, policy, direction
        self.parameters = _moved(mdp, policy)
        self.gradient: Gradient = "average_reward" if mdp.kind == "continuing" else "discounted"

    def objective(self) -> float:
        with torch.no_grad():
            return float(solve(self.mdp, self.policy).objective)

    def table(self) -> Tensor:
        with torch.no_grad():
            return action_probabilities(self.mdp, self.policy)

    def directions(self) -> tuple[Tensor, Tensor]:
        """grad J, and what a step goes along, [P] each."""
        slope = policy_gradient(self.mdp, self.policy, gradient=self.gradient, parameters=self.parameters)
        if self.direction == "plain":
            return slope, slope
        return slope, natural_gradient(self.mdp, self.policy, gradient=self.gradient, parameters=self.parameters)

    def step(self, along: Tensor, size: float) -> tuple[float, float]:
        self._move(size * along)
        reached = self.objective()
        if not math.isfinite(reached):
            raise ValueError(f"a step of size {size} led to a policy without a J: take a smaller one, or a line search")
        return reached, size

    def search(self, before: float, slope: Tensor, along: Tensor, size: float) -> tuple[float, float] | None:
        """The first size, halved from `size`, that improves J enough; None, and nothing moved, if none does."""
        origin = nn.utils.parameters_to_vector(self.parameters).detach().clone()
        promised = float(slope @ along)
        size = min(size, _FARTHEST / max(float(along.abs().max()), 1e-300))
        for _ in range(_HALVINGS):
            self._move(size * along)
            reached = self._defined()
            if reached > before and reached >= before + _ENOUGH * size * promised:
                return reached, size
            nn.utils.vector_to_parameters(origin, self.parameters)
            size *= 0.5
        return None

    def _defined(self) -> float:
        """J, -inf where it is not defined."""
        reached = self.objective()
        return reached if math.isfinite(reached) else -math.inf

    def _move(self, change: Tensor) -> None:
        now = nn.utils.parameters_to_vector(self.parameters).detach()
        nn.utils.vector_to_parameters(now + change, self.parameters)


def _moved(mdp: FiniteMDP, policy: StatePolicy) -> list[nn.Parameter]:
    """The parameters that the probabilities depend on; a critic stays out of the way."""
    parameters = parameters_of(policy, None)
    found = torch.autograd.grad(action_probabilities(mdp, policy)[..., 0].sum(), parameters, allow_unused=True)
    return [parameter for parameter, slope in zip(parameters, found, strict=True) if slope is not None]
