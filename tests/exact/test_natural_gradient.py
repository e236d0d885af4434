"""Fisher matrix, natural gradient, compatible features and performance difference are what their theorems say."""

import pytest
import torch

from upslope.exact import (
    PROBLEMS,
    LinearPolicy,
    TabularPolicy,
    compatible_value,
    fisher_matrix,
    natural_gradient,
    performance_difference,
    policy_gradient,
    problem,
    solve,
    state_weights,
)
from upslope.exact.gradient import Gradient

NAMES = [name for name in PROBLEMS if name not in ("baird", "cliff-walking")]


def the_gradient(name: str) -> Gradient:
    return "average_reward" if problem(name).mdp.kind == "continuing" else "discounted"


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_the_fisher_matrix_of_a_table_by_hand() -> None:
    """eta(s) (diag pi - pi pi') in the block of each state."""
    named = problem("six-state")
    policy = named.policy(0)
    weight, pi = state_weights(named.mdp, policy), solve(named.mdp, policy).policy.detach()
    blocks = [w * (torch.diag(p) - torch.outer(p, p)) for w, p in zip(weight, pi, strict=True)]
    close(fisher_matrix(named.mdp, policy, parameters=[policy.theta]), torch.block_diag(*blocks), 1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_the_fisher_matrix_takes_the_natural_gradient_to_the_gradient(name: str) -> None:
    named, kind = problem(name), the_gradient(name)
    policy = named.policy(0)
    fisher = fisher_matrix(named.mdp, policy, gradient=kind)
    close(fisher, fisher.mT, 1e-14)
    assert torch.linalg.eigvalsh(fisher).min() > -1e-10 * fisher.abs().max()
    slope = policy_gradient(named.mdp, policy, gradient=kind)
    close(fisher @ natural_gradient(named.mdp, policy, gradient=kind), slope)


@pytest.mark.parametrize("name", NAMES)
def test_the_compatible_weight_is_the_natural_gradient(name: str) -> None:
    named, kind = problem(name), the_gradient(name)
    policy = named.policy(0)
    fit = compatible_value(named.mdp, policy, gradient=kind)
    close(fit.weight, natural_gradient(named.mdp, policy, gradient=kind))


@pytest.mark.parametrize("limit", [None, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_compatible_values_in_place_of_the_true_ones_leave_the_gradient(seed: int, limit: int | None) -> None:
    """Though two parameters for six states cannot represent q."""
    named = problem("six-state")
    generator = torch.Generator().manual_seed(seed)
    policy = LinearPolicy(torch.randn(7, 2, 2, generator=generator), torch.randn(2, generator=generator))
    fit = compatible_value(named.mdp, policy, limit=limit, parameters=[policy.theta])
    weight = state_weights(named.mdp, policy, limit=limit).unsqueeze(-1)
    solution = solve(named.mdp, policy)
    (slope,) = torch.autograd.grad((weight * solution.policy * fit.action_value).sum(), [policy.theta])
    close(slope, policy_gradient(named.mdp, policy, limit=limit, parameters=[policy.theta]), 1e-12)
    assert float((fit.action_value - solution.advantage.detach())[:6].abs().max()) > 0.1


def test_of_a_table_the_fit_is_the_advantage_itself() -> None:
    named = problem("six-state")
    policy = named.policy(0)
    fit = compatible_value(named.mdp, policy)
    close(fit.action_value, solve(named.mdp, policy).advantage.detach(), 1e-11)


def test_the_natural_gradient_is_the_same_however_the_policy_is_written() -> None:
    """Features times an invertible matrix: the change of preferences is the same."""
    named = problem("six-state")
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(7, 2, 3, generator=generator, dtype=torch.float64)
    mix = torch.tensor([[2.0, 0.0, 1.0], [0.0, -0.5, 0.0], [0.3, 0.0, 1.0]], dtype=torch.float64)
    theta = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    plain = LinearPolicy(features, theta)
    mixed = LinearPolicy(features @ mix, torch.linalg.solve(mix, theta))
    close(plain.preferences().detach(), mixed.preferences().detach())
    change, same = (
        policy.features @ natural_gradient(named.mdp, policy, parameters=[policy.theta]) for policy in (plain, mixed)
    )
    close(change, same)
    ordinary, other = (
        policy.features @ policy_gradient(named.mdp, policy, parameters=[policy.theta]) for policy in (plain, mixed)
    )
    assert float((ordinary - other).abs().max()) > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_the_performance_difference_is_the_advantage_met(name: str) -> None:
    named = problem(name)
    difference, identity = performance_difference(named.mdp, named.policy(0), named.policy(1))
    close(difference, identity, 1e-9)
    assert abs(float(difference)) > 1e-3
    back, _ = performance_difference(named.mdp, named.policy(1), named.policy(0))
    close(back, -difference, 1e-12)


def test_an_action_that_is_never_taken_has_no_score() -> None:
    preferences = torch.zeros(7, 2, dtype=torch.float64)
    preferences[0, 1] = -torch.inf
    policy = TabularPolicy(7, 2, preferences)
    fit = compatible_value(problem("six-state").mdp, policy)
    assert fit.weight.isfinite().all()
    assert fit.action_value[0].tolist() == pytest.approx([0.0, 0.0])
