"""Fisher information, natural gradient and trust region: one matrix in three forms, and a step that keeps its bound."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from identity_strategies import PROPERTY, SEEDS, close, normal
from torch import Tensor

from upslope.estimators import (
    backtracking_line_search,
    categorical_kl,
    conjugate_gradient,
    fisher_vector_product,
    flatten,
    gaussian_kl,
    importance_weighted,
    trust_region_scale,
    unflatten,
)


def weights(seed: int, states: int) -> Tensor:
    return normal(seed, states).softmax(-1)


def scores(theta: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """pi [S, A] and grad log pi [S, A, P] of a softmax over theta . x(s, a)."""
    probability = (features @ theta).softmax(-1)
    mean = (probability.unsqueeze(-1) * features).sum(1, keepdim=True)
    return probability, features - mean


def matrix(product: Callable[[Tensor], Tensor], size: int) -> Tensor:
    return torch.stack([product(row) for row in torch.eye(size, dtype=torch.float64)])


@PROPERTY
@given(SEEDS, st.floats(0.0, 1.0))
def test_the_hessian_of_the_kl_is_the_fisher_matrix_in_either_direction(seed: int, damping: float) -> None:
    """Hessian of KL(old, new) = that of KL(new, old) = E[score score'] at new = old; damping on the diagonal."""
    features, share = normal(seed, 3, 4, 5), weights(seed + 1, 3)
    theta = normal(seed + 2, 5).requires_grad_()
    old = (features @ theta).detach()
    probability, score = scores(theta.detach(), features)
    fisher = torch.einsum("s,sa,sap,saq->pq", share, probability, score, score)

    def forward() -> Tensor:
        return share @ categorical_kl(old, features @ theta)

    def backward() -> Tensor:
        return share @ categorical_kl(features @ theta, old)

    for divergence in (forward, backward):
        found = matrix(fisher_vector_product(divergence, [theta], damping=damping), 5)
        close(found, fisher + damping * torch.eye(5, dtype=torch.float64))
    assert torch.linalg.eigvalsh(fisher).min() > -1e-12


@PROPERTY
@given(SEEDS)
def test_the_fisher_matrix_of_a_gaussian_is_known(seed: int) -> None:
    """1 / sigma^2 for the mean, 2 for log sigma, in either direction; several parameters as one vector."""
    mean, log_std = normal(seed, 2, 3)
    mean, log_std = mean.requires_grad_(), log_std.requires_grad_()
    old = mean.detach().clone(), log_std.detach().clone()
    expected = torch.cat(((-2.0 * old[1]).exp(), torch.full((3,), 2.0, dtype=torch.float64))).diag()
    for divergence in (lambda: gaussian_kl(*old, mean, log_std), lambda: gaussian_kl(mean, log_std, *old)):
        close(matrix(fisher_vector_product(divergence, [mean, log_std]), 6), expected)


@PROPERTY
@given(SEEDS, st.integers(1, 6))
def test_conjugate_gradient_is_the_inverse_and_shrinks_the_error_every_iteration(seed: int, size: int) -> None:
    root, b = normal(seed, size, size), normal(seed + 1, size)
    positive = root @ root.mT + torch.eye(size, dtype=torch.float64)
    exact = torch.linalg.solve(positive, b)
    close(conjugate_gradient(positive.mv, b, iterations=3 * size, tolerance=1e-26), exact)
    errors = [float(exact @ positive @ exact)]
    for iterations in range(1, size + 1):
        error = conjugate_gradient(positive.mv, b, iterations=iterations, tolerance=0.0) - exact
        errors.append(float(error @ positive @ error))
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(errors))
    close(conjugate_gradient(positive.mv, 2.0 * b, iterations=3 * size, tolerance=1e-26), 2.0 * exact)


@PROPERTY
@given(SEEDS)
def test_compatible_features_give_the_natural_gradient(seed: int) -> None:
    """The w that fits A(s, a) best by w . score solves F w = grad J; and w . score in place of A has the gradient."""
    features, share, theta = normal(seed, 4, 3, 5), weights(seed + 1, 4), normal(seed + 2, 5).requires_grad_()
    probability, score = scores(theta.detach(), features)
    value = normal(seed + 3, 4, 3)
    advantage = value - (probability * value).sum(-1, keepdim=True)
    gradient = torch.einsum("s,sa,sap,sa->p", share, probability, score, advantage)
    chance = (share.unsqueeze(-1) * probability).sqrt().reshape(-1, 1)
    fit = torch.linalg.lstsq(chance * score.reshape(-1, 5), chance * advantage.reshape(-1, 1)).solution.squeeze(-1)
    old = (features @ theta).detach()
    product = fisher_vector_product(lambda: share @ categorical_kl(old, features @ theta), [theta])
    natural = conjugate_gradient(product, gradient, iterations=50, tolerance=1e-30)
    close(product(natural), gradient)
    torch.testing.assert_close(natural, fit, rtol=1e-6, atol=1e-8)
    fitted = score @ fit
    close(torch.einsum("s,sa,sap,sa->p", share, probability, score, fitted), gradient)
    changed = torch.einsum("s,sa,sap,sa->p", share, probability, score, advantage - fitted)
    close(changed, torch.zeros_like(changed))


@PROPERTY
@given(SEEDS)
def test_the_natural_gradient_does_not_depend_on_the_parameters(seed: int) -> None:
    """With theta = M phi the step M (natural step of phi) is the natural step of theta; the plain one is not."""
    features, share, theta = normal(seed, 4, 3, 4), weights(seed + 1, 4), normal(seed + 2, 4)
    mixing, value = normal(seed + 3, 4, 4) + 3.0 * torch.eye(4, dtype=torch.float64), normal(seed + 4, 4, 3)

    def natural(inputs: Tensor, at: Tensor) -> Tensor:
        parameter = at.clone().requires_grad_()
        objective = share @ ((inputs @ parameter).softmax(-1) * value).sum(-1)
        gradient = torch.autograd.grad(objective, parameter)[0]
        old = (inputs @ at).detach()
        product = fisher_vector_product(lambda: share @ categorical_kl(old, inputs @ parameter), [parameter])
        return torch.linalg.solve(matrix(product, 4), gradient)

    step = mixing @ natural(features @ mixing, torch.linalg.solve(mixing, theta))
    torch.testing.assert_close(step, natural(features, theta), rtol=1e-7, atol=1e-8)


@PROPERTY
@given(SEEDS, st.sampled_from([1e-4, 1e-2, 0.1, 1.0]), st.sampled_from([0.0, 0.1]))
def test_the_trust_region_step_obeys_its_bound(seed: int, bound: float, damping: float) -> None:
    """The full step has quadratic KL delta exactly; the step taken has true KL at most delta and a better surrogate."""
    states, actions = 4, 3
    theta = [normal(seed, states, actions).requires_grad_(), normal(seed + 1, actions).requires_grad_()]
    advantage, share = normal(seed + 2, states, actions), weights(seed + 3, states)

    def log_policy(parameters: list[Tensor]) -> Tensor:
        return (parameters[0] + parameters[1]).log_softmax(-1)

    old = log_policy(theta).detach()

    def surrogate(log_prob: Tensor) -> Tensor:
        return share @ (old.exp() * importance_weighted(log_prob, old, advantage)).sum(-1)

    start = surrogate(log_policy(theta))
    gradient = flatten(torch.autograd.grad(start, theta))
    product = fisher_vector_product(lambda: share @ categorical_kl(old, log_policy(theta)), theta, damping=damping)
    direction = conjugate_gradient(product, gradient, iterations=20)
    image = product(direction)
    scale = trust_region_scale(direction, image, max_divergence=bound)
    assert 0.5 * scale**2 * float(direction @ image) == pytest.approx(bound, rel=1e-9)
    before = flatten([part.detach() for part in theta])

    def evaluate(candidate: Tensor) -> tuple[float, float]:
        log_prob = log_policy(unflatten(candidate, theta))
        return float(surrogate(log_prob)), float(share @ categorical_kl(old, log_prob))

    step = scale * direction
    found = backtracking_line_search(
        evaluate, before, step, objective=float(start.detach()), max_divergence=bound, backtrack=0.8, attempts=30
    )
    assert found.fraction > 0.0
    assert torch.equal(found.parameters, before + found.fraction * step)
    assert (found.objective, found.divergence) == evaluate(found.parameters)
    assert found.divergence <= bound
    assert found.objective > float(start.detach())
    fraction = 1.0
    while fraction > found.fraction:
        reached, divergence = evaluate(before + fraction * step)
        assert reached <= float(start.detach()) or divergence > bound
        fraction *= 0.8
    assert fraction == found.fraction


@PROPERTY
@given(SEEDS, st.integers(1, 8), st.sampled_from(["worse", "equal", "too far", "nan", "nan far"]))
def test_a_trust_region_step_that_fails_restores_exactly(seed: int, attempts: int, why: str) -> None:
    """The very parameters, bit for bit, fraction 0, their own objective and no divergence; as many looks as asked."""
    before, step = normal(seed, 5).float(), normal(seed + 1, 5).float()
    copy, seen = before.clone(), list[Tensor]()
    nan = float("nan")
    outcome = {
        "worse": (-1.0, 0.0),
        "equal": (0.5, 0.0),
        "too far": (9.0, 0.2),
        "nan": (nan, 0.0),
        "nan far": (9.0, nan),
    }

    def evaluate(candidate: Tensor) -> tuple[float, float]:
        seen.append(candidate)
        return outcome[why]

    found = backtracking_line_search(evaluate, before, step, objective=0.5, max_divergence=0.1, attempts=attempts)
    assert found.parameters is before
    assert torch.equal(before, copy)
    assert found[1:] == (0.0, 0.5, 0.0)
    assert len(seen) == attempts


@PROPERTY
@given(SEEDS)
def test_flat_vectors_are_the_tensors_in_their_order(seed: int) -> None:
    parts = [normal(seed, 2, 3), normal(seed + 1, 4), normal(seed + 2, 1, 1)]
    vector = flatten(parts)
    assert vector.tolist() == [number for part in parts for number in part.flatten().tolist()]
    assert all(torch.equal(one, two) for one, two in zip(unflatten(vector, parts), parts, strict=True))


def test_settings_not_given_are_the_papers() -> None:
    """Ten shortenings by 0.8; ten iterations, or as few as bring the squared residual to 1e-10 of |b|^2."""
    seen: list[float] = []

    def evaluate(candidate: Tensor) -> tuple[float, float]:
        seen.append(float(candidate))
        return -1.0, 0.0

    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    backtracking_line_search(evaluate, zero, one, objective=0.0, max_divergence=0.1)
    assert seen == pytest.approx([0.8**j for j in range(10)], rel=1e-12)
    hard, b = torch.logspace(-6, 6, 40, dtype=torch.float64), torch.ones(40, dtype=torch.float64)
    found = conjugate_gradient(lambda v: hard * v, b)
    assert torch.equal(found, conjugate_gradient(lambda v: hard * v, b, iterations=10, tolerance=0.0))
    easy = torch.linspace(1.0, 2.0, 40, dtype=torch.float64)
    residuals = [
        float((b - easy * conjugate_gradient(lambda v: easy * v, b, iterations=n, tolerance=0.0)).square().sum())
        for n in range(1, 11)
    ]
    enough = 1 + next(n for n, residual in enumerate(residuals) if residual <= 1e-10 * 40)
    assert 1 < enough < 10
    stopped = conjugate_gradient(lambda v: easy * v, b)
    assert torch.equal(stopped, conjugate_gradient(lambda v: easy * v, b, iterations=enough, tolerance=0.0))
    assert conjugate_gradient(lambda v: -v, b).tolist() == [0.0] * 40
    assert conjugate_gradient(torch.zeros_like, b).tolist() == [0.0] * 40
    assert trust_region_scale(b, torch.zeros_like(b), max_divergence=0.1) == 0.0
