"""J, its gradient by two roads, divergences and the regularised optimum of completion problems."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from upslope.estimators import categorical_kl
from upslope.exact import (
    TOKEN_PROBLEMS,
    PrefixTable,
    TinyTransformer,
    TokenMDP,
    TokenPolicy,
    enumerate_completions,
    exact_critic,
    regularised_optimum,
    sequence_kl,
    sequence_kl_gradient,
    solve_tokens,
    token_gradient,
    token_objective,
    token_problem,
    token_theorem_gradient,
)

EXACT = {"rtol": 0.0, "atol": 1e-12}


def golden() -> tuple[TokenMDP, PrefixTable]:
    """Prompt (1,), end 0, limit 2: pi(1 | first) = 1/4, pi(1 | second) = 1/3."""
    reward = {(0,): 0.0, (1, 0): 1.0, (1, 1): 0.5}
    problem = TokenMDP(vocabulary=2, end=0, limit=2, prompts=((1,),), reward=lambda prompt, done: reward[done])
    table = PrefixTable(problem)
    table.theta.data[table.number[(1,)]] = torch.tensor([3.0, 1.0], dtype=torch.float64).log()
    table.theta.data[table.number[(1, 1)]] = torch.tensor([2.0, 1.0], dtype=torch.float64).log()
    return problem, table


def policies(problem: TokenMDP, seed: int = 0) -> list[TokenPolicy]:
    table = PrefixTable(problem)
    table.theta.data.copy_(torch.randn(table.theta.shape, generator=torch.Generator().manual_seed(seed)))
    return [table, TinyTransformer(problem.vocabulary, problem.positions, seed=seed)]


def reference_for(problem: TokenMDP) -> TinyTransformer:
    return TinyTransformer(problem.vocabulary, problem.positions, layers=2, seed=9)


def test_the_smallest_case_worked_out_by_hand() -> None:
    problem, table = golden()
    # J = p [(1 - q) 1 + q / 2] = p (1 - q / 2), p = 1/4, q = 1/3
    assert token_objective(problem, table).item() == pytest.approx(5 / 24, abs=1e-15)
    solution = solve_tokens(problem, table)
    assert solution.value[1].item() == pytest.approx(5 / 6, abs=1e-15)
    torch.testing.assert_close(solution.action_value[1].flatten(), torch.tensor([1.0, 0.5], dtype=torch.float64))
    torch.testing.assert_close(solution.action_value[0].flatten(), torch.tensor([0, 5 / 6], dtype=torch.float64))
    assert solution.mean_length.item() == pytest.approx(5 / 4, abs=1e-15)
    # dJ/da = p (1 - p) (1 - q / 2), dJ/db = -p q (1 - q) / 2 for the logits a, b of token 1
    expected = torch.zeros_like(table.theta.data)
    expected[table.number[(1,)]] = torch.tensor([-5 / 32, 5 / 32], dtype=torch.float64)
    expected[table.number[(1, 1)]] = torch.tensor([1 / 36, -1 / 36], dtype=torch.float64)
    for gradient in (token_gradient, token_theorem_gradient):
        torch.testing.assert_close(gradient(problem, table, [table.theta]), expected.flatten(), **EXACT)


def test_divergences_of_the_smallest_case_worked_out_by_hand() -> None:
    problem, table = golden()
    uniform = PrefixTable(problem)
    first = 3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2)
    second = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    assert sequence_kl(problem, table, uniform).item() == pytest.approx(first + second / 4, abs=1e-15)
    first = 1 / 2 * math.log(2 / 3) + 1 / 2 * math.log(2)
    second = 1 / 2 * math.log(3 / 4) + 1 / 2 * math.log(3 / 2)
    assert sequence_kl(problem, uniform, table).item() == pytest.approx(first + second / 2, abs=1e-15)


def test_the_regularised_optimum_of_the_smallest_case_worked_out_by_hand() -> None:
    problem, _ = golden()
    # exp(r / beta) = 1, 4, 2 for rewards 0, 1, 1/2: weights 1/2, 4/4, 2/4 under the uniform reference
    best = regularised_optimum(problem, PrefixTable(problem), 1 / math.log(4))
    probability = enumerate_completions(problem, best).behaviour_probability
    torch.testing.assert_close(probability, torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("name", sorted(TOKEN_PROBLEMS))
@pytest.mark.parametrize(("gamma", "beta"), [(1.0, 0.0), (0.9, 0.0), (1.0, 0.3), (0.8, 0.3)])
def test_both_roads_to_the_gradient_meet(name: str, gamma: float, beta: float) -> None:
    problem = token_problem(name)
    reference = reference_for(problem)
    for policy in policies(problem):
        parameters = list(policy.parameters())
        by_sum = token_gradient(problem, policy, parameters, gamma=gamma, reference=reference, beta=beta)
        theorem = token_theorem_gradient(problem, policy, parameters, gamma=gamma, reference=reference, beta=beta)
        torch.testing.assert_close(theorem, by_sum, **EXACT)
        solution = solve_tokens(problem, policy, gamma=gamma, reference=reference, beta=beta)
        objective = token_objective(problem, policy, gamma=gamma, reference=reference, beta=beta)
        torch.testing.assert_close(solution.objective, objective, **EXACT)
        through_solve = torch.autograd.grad(solution.objective, parameters, allow_unused=True, materialize_grads=True)
        torch.testing.assert_close(torch.cat([part.flatten() for part in through_solve]), by_sum, **EXACT)
        assert by_sum.norm() > 0.05


def test_dropping_gamma_from_the_states_makes_another_vector() -> None:
    problem = token_problem("tokens")
    policy = policies(problem)[0]
    parameters = list(policy.parameters())
    gradient = token_gradient(problem, policy, parameters, gamma=0.5)
    dropped = token_theorem_gradient(problem, policy, parameters, gamma=0.5, discounted_states=False)
    assert torch.cosine_similarity(gradient, dropped, dim=0) < 0.98
    same = token_theorem_gradient(problem, policy, parameters, discounted_states=False)
    torch.testing.assert_close(same, token_gradient(problem, policy, parameters), **EXACT)


@pytest.mark.parametrize("name", sorted(TOKEN_PROBLEMS))
def test_the_gradient_is_the_slope_of_the_objective(name: str) -> None:
    problem = token_problem(name)
    reference = reference_for(problem)
    for policy in policies(problem):
        parameters = list(policy.parameters())
        gradient = token_gradient(problem, policy, parameters, reference=reference, beta=0.2)
        start = torch.nn.utils.parameters_to_vector(parameters).detach()
        direction = torch.randn(start.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        ends: list[float] = []
        for step in (1e-5, -1e-5):
            torch.nn.utils.vector_to_parameters(start + step * direction, parameters)
            ends.append(token_objective(problem, policy, reference=reference, beta=0.2).item())
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx((gradient @ direction).item(), rel=1e-6)


@pytest.mark.parametrize("name", sorted(TOKEN_PROBLEMS))
def test_divergences_of_tokens_sum_to_that_of_the_sequence(name: str) -> None:
    """KL = sum_prefix eta(prefix) KL(pi(.|prefix) || ref(.|prefix)): only chosen tokens count."""
    problem = token_problem(name)
    reference = reference_for(problem)
    for policy in policies(problem):
        ours, theirs = solve_tokens(problem, policy), solve_tokens(problem, reference)
        total = torch.zeros((), dtype=torch.float64)
        for visits, own, other in zip(ours.visits, ours.policy, theirs.policy, strict=True):
            total = total + (visits * categorical_kl(own.log(), other.log())).sum()
        torch.testing.assert_close(sequence_kl(problem, policy, reference), total, **EXACT)
        rows = enumerate_completions(problem, policy)
        log_reference = reference.log_prob(rows.trajectory.observation, rows.trajectory.action)
        log_ratio = (rows.behaviour_probability / rows.probability(log_reference)).log()
        by_sequence = (rows.behaviour_probability * log_ratio).sum()
        torch.testing.assert_close(sequence_kl(problem, policy, reference), by_sequence, **EXACT)
        assert total.item() > 0.01


def test_gradients_of_both_directions_of_the_divergence() -> None:
    problem = token_problem("tokens")
    reference = reference_for(problem)
    for policy in policies(problem):
        parameters = list(policy.parameters())
        reverse = sequence_kl_gradient(problem, policy, reference, parameters)
        forward = sequence_kl_gradient(problem, reference, policy, parameters)
        difference = token_gradient(problem, policy, parameters) - token_gradient(
            problem, policy, parameters, reference=reference, beta=1.0
        )
        torch.testing.assert_close(reverse, difference, **EXACT)
        # grad KL(ref || pi) = -E_ref[ grad log pi ]
        rows = enumerate_completions(problem, reference)
        log_prob = policy.log_prob(rows.trajectory.observation, rows.trajectory.action)
        expected = -(rows.behaviour_probability * log_prob.masked_fill(~rows.trajectory.mask, 0.0).sum(-1)).sum()
        parts = torch.autograd.grad(expected, parameters, allow_unused=True, materialize_grads=True)
        torch.testing.assert_close(forward, torch.cat([part.flatten() for part in parts]), **EXACT)
        assert torch.cosine_similarity(reverse, forward, dim=0) < 0.999
        same = sequence_kl_gradient(problem, policy, policy, parameters)
        torch.testing.assert_close(same, torch.zeros_like(same), **EXACT)


@pytest.mark.parametrize("name", sorted(TOKEN_PROBLEMS))
@pytest.mark.parametrize("beta", [0.05, 0.5, 5.0])
def test_the_regularised_optimum_is_stationary_and_best(name: str, beta: float) -> None:
    problem = token_problem(name)
    reference = reference_for(problem)
    best = regularised_optimum(problem, reference, beta)
    for gradient in (token_gradient, token_theorem_gradient):
        found = gradient(problem, best, [best.theta], reference=reference, beta=beta)
        torch.testing.assert_close(found, torch.zeros_like(found), **EXACT)
    top = token_objective(problem, best, reference=reference, beta=beta)
    rows = enumerate_completions(problem, reference)
    each = rows.behaviour_probability / rows.luck * (rows.trajectory.reward.sum(-1) / beta).exp()
    partition = each.view(len(problem.prompts), -1).sum(-1)
    log_partition = (torch.tensor(problem.chance, dtype=torch.float64) * partition.log()).sum() * beta
    torch.testing.assert_close(top, log_partition, **EXACT)
    probability = enumerate_completions(problem, best).behaviour_probability
    expected = rows.luck.view(len(problem.prompts), -1) * each.view(len(problem.prompts), -1) / partition.unsqueeze(-1)
    torch.testing.assert_close(probability, expected.flatten(), **EXACT)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        moved = PrefixTable(problem, best.theta.data + 0.3 * torch.randn(best.theta.shape, generator=generator))
        assert token_objective(problem, moved, reference=reference, beta=beta) < top


def test_the_exact_critic_makes_td_residuals_average_to_zero() -> None:
    """E[r_t + gamma V'_t - V_t] = 0 at every prefix, so its mean over all rows is 0 at each time."""
    problem = token_problem("tokens")
    policy = policies(problem)[0]
    assert isinstance(policy, PrefixTable)
    policy.value.data.copy_(exact_critic(problem, policy, solve_tokens(problem, policy, gamma=0.9)))
    rows = enumerate_completions(problem, policy)
    seen = rows.trajectory
    with torch.no_grad():
        value, next_value = policy.values(seen)
    residual = seen.reward + seen.discount(0.9) * next_value - value
    for time in range(problem.limit):
        now: Tensor = seen.mask & (seen.time == time)
        assert abs(float((rows.behaviour_probability.unsqueeze(-1) * residual)[now].sum())) < 1e-12
        assert float(residual[now].abs().max()) > 0.01


def test_a_penalty_needs_a_reference() -> None:
    problem, table = golden()
    for function in (solve_tokens, token_objective):
        with pytest.raises(ValueError, match="no reference policy"):
            function(problem, table, beta=0.1)
    with pytest.raises(ValueError, match="positive penalty"):
        regularised_optimum(problem, table, 0.0)
