"""The natural gradient, compatible action values, and the difference between two policies, computed exactly.

    F = sum_s w(s) sum_a pi(a|s) grad log pi(a|s) grad log pi(a|s)'          natural gradient: F^-1 grad J

Kakade (2001); Sutton et al. (1999), theorem 2; Kakade & Langford (2002), lemma 6.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from upslope.estimators import flatten
from upslope.exact.finite import FiniteMDP
from upslope.exact.gradient import Gradient, parameters_of, policy_gradient, state_weights
from upslope.exact.solve import action_probabilities, solve
from upslope.trajectory import Policy

RANK_TOLERANCE = 1e-10
"""Directions in which the Fisher matrix is smaller than this times its largest eigenvalue count as flat."""


class CompatibleValue(NamedTuple):
    """Action values linear in the compatible features grad log pi(a|s).

    Attributes:
        weight: [P] w, of smallest norm among the best.
        action_value: [S, A] w . grad log pi(a|s): the fit to q - v.
    """

    weight: Tensor
    action_value: Tensor


class PerformanceDifference(NamedTuple):
    """Both sides of J(other) - J(policy) = sum_s w_other(s) sum_a other(a|s) A_policy(s, a)."""

    difference: Tensor
    identity: Tensor


def fisher_matrix(
    mdp: FiniteMDP,
    policy: Policy,
    *,
    gradient: Gradient = "discounted",
    limit: int | None = None,
    parameters: Sequence[nn.Parameter] | None = None,
) -> Tensor:
    """F = sum_s w(s) sum_a pi(a|s) grad log pi grad log pi', [P, P] float64.

    w are the state weights of the gradient it goes with (`state_weights`): eta_gamma, eta_1 or mu. They are visits,
    not shares: over the sum of w it is the mean Fisher matrix of a step.

    Args:
        mdp, policy, gradient, limit, parameters: as in `policy_gradient`.
    """
    weight, score = _scores(mdp, policy, gradient, limit, parameters)
    return torch.einsum("sa,sap,saq->pq", weight, score, score)


def natural_gradient(
    mdp: FiniteMDP,
    policy: Policy,
    *,
    gradient: Gradient = "discounted",
    limit: int | None = None,
    parameters: Sequence[nn.Parameter] | None = None,
) -> Tensor:
    """F^-1 grad J, [P] float64, by the pseudo-inverse: the solution of smallest norm where F is singular.

    A table of preferences always has flat directions (a constant added to a state's row), in which the result is 0.

    Args:
        mdp, policy, gradient, limit, parameters: as in `policy_gradient`; F has the same state weights.
    """
    fisher = fisher_matrix(mdp, policy, gradient=gradient, limit=limit, parameters=parameters)
    slope = policy_gradient(mdp, policy, gradient=gradient, limit=limit, parameters=parameters)
    return _smallest_solution(fisher, slope)


def compatible_value(
    mdp: FiniteMDP,
    policy: Policy,
    *,
    gradient: Gradient = "discounted",
    limit: int | None = None,
    parameters: Sequence[nn.Parameter] | None = None,
) -> CompatibleValue:
    """The least-squares fit of w . grad log pi(a|s) to q(s, a) under w(s) pi(a|s).

    The gradient with the fit in place of q is exactly the gradient, and its weight is the natural gradient.

    Args:
        mdp, policy, gradient, limit, parameters: as in `policy_gradient`.
    """
    weight, score = _scores(mdp, policy, gradient, limit, parameters)
    with torch.no_grad():
        action_value = solve(mdp, policy).action_value
    reached = weight > 0
    root = weight[reached].sqrt()
    design = score[reached] * root.unsqueeze(-1)
    fitted = torch.linalg.pinv(design, rtol=RANK_TOLERANCE**0.5) @ (root * action_value[reached])
    return CompatibleValue(fitted, score @ fitted)


def performance_difference(mdp: FiniteMDP, policy: Policy, other: Policy) -> PerformanceDifference:
    """J(other) - J(policy), and the same as the advantages of `policy` met by `other`.

    w_other is eta_gamma of the other policy; in a continuing problem mu, with J = r_bar and differential advantages.

    Args:
        mdp: the problem.
        policy: whose advantages are used.
        other: who acts.
    """
    with torch.no_grad():
        here, there = solve(mdp, policy), solve(mdp, other)
        weight = there.on_policy if mdp.kind == "continuing" else there.visits
        met = weight > 0
        gain = (there.policy[met] * here.advantage[met]).sum(-1)
        return PerformanceDifference(there.objective - here.objective, weight[met] @ gain)


def _scores(
    mdp: FiniteMDP,
    policy: Policy,
    gradient: Gradient,
    limit: int | None,
    parameters: Sequence[nn.Parameter] | None,
) -> tuple[Tensor, Tensor]:
    """w(s) pi(a|s), [S, A], and grad log pi(a|s), [S, A, P]; 0 where an action has no probability."""
    weight = state_weights(mdp, policy, gradient=gradient, limit=limit)
    probabilities = action_probabilities(mdp, policy)
    flat, wanted = probabilities.flatten(), parameters_of(policy, parameters)
    rows = [flatten(_gradient_of(entry, wanted)) for entry in flat]
    slope = torch.stack(rows).to(torch.float64).view(*probabilities.shape, -1)
    chance = probabilities.detach()
    score = torch.where((chance > 0).unsqueeze(-1), slope / chance.unsqueeze(-1), 0.0)
    return weight.unsqueeze(-1) * chance, score


def _gradient_of(entry: Tensor, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True)


def _smallest_solution(matrix: Tensor, vector: Tensor) -> Tensor:
    return torch.linalg.pinv(matrix, rtol=RANK_TOLERANCE, hermitian=True) @ vector
