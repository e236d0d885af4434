"""Curvature: Fisher products against the explicit matrix, solvers, the line search, the two views of traces."""

import pytest
import torch

from upslope.estimators import (
    accumulate_trace,
    backtracking_line_search,
    categorical_kl,
    conjugate_gradient,
    fisher_vector_product,
    flatten,
    trust_region_scale,
)

GENERATOR = torch.Generator().manual_seed(5)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


def test_fisher_vector_product_is_the_covariance_of_the_score() -> None:
    inputs, weight, bias = random(7, 3), random(3, 4).requires_grad_(), random(4).requires_grad_()
    unused = random(2).requires_grad_()
    parameters = [weight, bias, unused]
    logits = inputs @ weight + bias
    fisher = torch.zeros(18, 18, dtype=torch.float64)
    for i in range(7):
        for action in range(4):
            log_prob = logits[i].log_softmax(-1)[action]
            score = flatten(torch.autograd.grad(log_prob, parameters, retain_graph=True, materialize_grads=True))
            fisher += log_prob.detach().exp() * torch.outer(score, score) / 7
    matvec = fisher_vector_product(
        lambda: categorical_kl(logits.detach(), inputs @ weight + bias).mean(), parameters, damping=0.1
    )
    for _ in range(3):
        vector = random(18)
        torch.testing.assert_close(matvec(vector), fisher @ vector + 0.1 * vector, rtol=1e-10, atol=1e-12)
    assert not matvec(random(18)).requires_grad
    with torch.no_grad():
        again = fisher_vector_product(
            lambda: categorical_kl(logits.detach(), inputs @ weight + bias).mean(), parameters
        )
    assert again(random(18)).shape == (18,)


def test_fisher_vector_product_errors() -> None:
    theta = random(2).requires_grad_()
    with pytest.raises(ValueError, match="damping must be at least 0"):
        fisher_vector_product(lambda: theta.sum(), [theta], damping=-1.0)
    with pytest.raises(ValueError, match=r"divergence must return one number.*\(2,\)"):
        fisher_vector_product(lambda: theta, [theta])


def test_conjugate_gradient_solves() -> None:
    root = random(6, 6)
    matrix, b = root @ root.mT + torch.eye(6, dtype=torch.float64), random(6)
    found = conjugate_gradient(matrix.mv, b, iterations=20, tolerance=1e-24)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, b), rtol=1e-8, atol=1e-10)
    calls: list[int] = []

    def scaled_identity(vector: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return 3.0 * vector

    torch.testing.assert_close(conjugate_gradient(scaled_identity, b, iterations=10), b / 3.0)
    assert len(calls) == 1


def test_conjugate_gradient_degenerate() -> None:
    assert conjugate_gradient(lambda v: v, torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]
    assert conjugate_gradient(lambda v: -v, torch.ones(3)).tolist() == [0.0, 0.0, 0.0]
    assert conjugate_gradient(torch.zeros_like, torch.ones(3)).tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="b must be a flat vector"):
        conjugate_gradient(lambda v: v, torch.zeros(2, 2))
    with pytest.raises(ValueError, match="iterations must be at least 1"):
        conjugate_gradient(lambda v: v, torch.zeros(2), iterations=0)


def test_trust_region_scale_meets_the_bound() -> None:
    root = random(4, 4)
    matrix, direction = root @ root.mT, random(4)
    scale = trust_region_scale(direction, matrix @ direction, max_divergence=0.01)
    step = scale * direction
    assert float(0.5 * step @ matrix @ step) == pytest.approx(0.01)
    assert trust_region_scale(direction, torch.zeros(4, dtype=torch.float64), max_divergence=0.01) == 0.0
    with pytest.raises(ValueError, match="max_divergence must be positive"):
        trust_region_scale(direction, direction, max_divergence=0.0)


def test_line_search_takes_the_first_step_that_is_better_and_near() -> None:
    start, step = torch.tensor([0.0]), torch.tensor([1.0])
    seen: list[float] = []

    def evaluate(x: torch.Tensor) -> tuple[float, float]:
        seen.append(float(x))
        return float(x), float(x) ** 2

    found = backtracking_line_search(evaluate, start, step, objective=0.0, max_divergence=0.5, backtrack=0.8)
    assert found.fraction == pytest.approx(0.64)
    assert seen == pytest.approx([1.0, 0.8, 0.64])
    assert found.objective == pytest.approx(0.64)
    assert found.divergence == pytest.approx(0.4096)


def test_line_search_errors() -> None:
    start = torch.zeros(1)
    with pytest.raises(ValueError, match="backtrack must lie strictly"):
        backtracking_line_search(lambda x: (0.0, 0.0), start, start, objective=0.0, max_divergence=1.0, backtrack=1.0)
    with pytest.raises(ValueError, match="attempts must be at least 1"):
        backtracking_line_search(lambda x: (0.0, 0.0), start, start, objective=0.0, max_divergence=1.0, attempts=0)


def test_trace_errors() -> None:
    with pytest.raises(ValueError, match="gradient must have the shape of trace"):
        accumulate_trace(torch.zeros(2, 3), torch.zeros(3), decay=0.5)
    with pytest.raises(ValueError, match="decay must lie between"):
        accumulate_trace(torch.zeros(3), torch.zeros(3), decay=1.5)
    with pytest.raises(ValueError, match=r"restart must have shape \(2,\)"):
        accumulate_trace(torch.zeros(2, 3), torch.zeros(2, 3), decay=0.5, restart=torch.zeros(3).bool())
