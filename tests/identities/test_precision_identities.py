"""Single precision against double: every exported estimator on random inputs, within 1e-4."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from identity_strategies import PROPERTY, SEEDS
from torch import Tensor

from upslope import estimators as e

Inputs: TypeAlias = Callable[[int], Tensor]
"""Draw number i of this example: [4, 40] normal numbers, in the precision under test."""

SHAPE = (4, 40)
TIME = torch.arange(SHAPE[1]).expand(SHAPE)
CUT = (7 * TIME + torch.arange(4).unsqueeze(-1)) % 23 == 22
MASK = (5 * TIME + torch.arange(4).unsqueeze(-1)) % 7 != 3
GROUP = TIME // 8


def discount(like: Tensor) -> Tensor:
    return torch.full_like(like, 0.97).masked_fill(CUT & (TIME % 2 == 0), 0.0)


def negative(x: Tensor) -> Tensor:
    """A log-prob, bounded away from 0."""
    return -x.abs() - 0.05


def positive_definite(x: Tensor) -> Tensor:
    return x[:, :4] @ x[:, :4].mT + 4.0 * torch.eye(4, dtype=x.dtype)


def fisher(x: Inputs) -> Tensor:
    theta = x(0).clone().requires_grad_()
    product = e.fisher_vector_product(lambda: e.categorical_kl(x(0), theta).mean(), [theta], damping=0.1)
    return product(x(1).flatten())


def searched(x: Inputs) -> Tensor:
    """Where the quadratic bowl |x - 1|^2 is better and near enough."""
    start, step = x(0).flatten(), 3.0 * (1.0 - x(0).flatten())

    def evaluate(at: Tensor) -> tuple[float, float]:
        return -float((at - 1.0).square().mean()), 0.01 * float((at - start).square().mean())

    begin = evaluate(start)[0]
    found = e.backtracking_line_search(evaluate, start, step, objective=begin, max_divergence=1e3)
    return torch.cat((found.parameters, start.new_tensor(found[1:])))


def pair(x: Inputs) -> tuple[Tensor, Tensor]:
    return x(0)[:, 0], x(1)[:, 0]


def steps(x: Inputs) -> tuple[Tensor, Tensor]:
    return x(0), discount(x(0))


CASES: dict[str, Callable[[Inputs], Tensor]] = {
    "accumulate_trace": lambda x: e.accumulate_trace(x(0), x(1), decay=0.9, weight=x(2)[:, 0], restart=CUT[:, 22]),
    "adapted_coefficient": lambda x: x(0).new_tensor(e.adapted_coefficient(0.7, 0.5, target=0.1)),
    "backtracking_line_search": searched,
    "backward_recurrence": lambda x: e.backward_recurrence(x(0), discount(x(0)).masked_fill(CUT, 0.0)),
    "baselined": lambda x: e.baselined(x(0), x(1)),
    "categorical_entropy": lambda x: e.categorical_entropy(x(0)),
    "categorical_kl": lambda x: e.categorical_kl(x(0), x(1)),
    "cispo": lambda x: e.cispo(negative(x(0)), negative(x(1)), x(2), low=0.2, high=0.3),
    "clipped": lambda x: e.clipped(negative(x(0)), negative(x(1)), x(2), low=0.2, high=0.3, dual_clip=3.0),
    "clipped_ratio": lambda x: e.clipped_ratio(x(0).exp(), x(1), low=0.2, high=0.3),
    "clipped_value_error": lambda x: e.clipped_value_error(x(0), x(1), x(2), clip=0.3),
    "conjugate_gradient": lambda x: e.conjugate_gradient(positive_definite(x(0)).mv, x(1)[:, 0]),
    "differential_return": lambda x: e.differential_return(x(0), 0.1, x(1), CUT),
    "differential_td_residual": lambda x: e.differential_td_residual(x(0), 0.1, x(1), x(2)),
    "discount_weight": lambda x: e.discount_weight(TIME, 0.97, dtype=x(0).dtype),
    "dpo_sigmoid": lambda x: e.dpo_sigmoid(*pair(x), beta=0.5, label_smoothing=0.1),
    "effective_sample_size": lambda x: e.effective_sample_size(x(0)),
    "fisher_vector_product": fisher,
    "fixed_length": lambda x: e.fixed_length(MASK, 50, cut=CUT, dtype=x(0).dtype),
    "flatten": lambda x: e.flatten([x(0), x(1)]),
    "gae": lambda x: e.gae(*steps(x), x(1), x(2), CUT, gae_lambda=0.95, mask=MASK),
    "gaussian_entropy": lambda x: e.gaussian_entropy(x(0)),
    "gaussian_kl": lambda x: e.gaussian_kl(x(0), 0.3 * x(1), x(2), 0.3 * x(3)),
    "group_relative": lambda x: e.group_relative(x(0), GROUP, scale="group"),
    "hinge": lambda x: e.hinge(*pair(x), beta=0.5),
    "importance_weighted": lambda x: e.importance_weighted(negative(x(0)), negative(x(1)), x(2), cap=2.0),
    "ipo": lambda x: e.ipo(*pair(x), beta=0.5, length_normalised=False),
    "k1": lambda x: e.k1(negative(x(0)), negative(x(1))),
    "k2": lambda x: e.k2(negative(x(0)), negative(x(1))),
    "k3": lambda x: e.k3(negative(x(0)), negative(x(1))),
    "kl_penalised": lambda x: e.kl_penalised(negative(x(0)), negative(x(1)), x(2), x(3).abs(), coefficient=0.5),
    "kto": lambda x: e.kto(x(0), MASK, x(1)[0, 0].abs(), beta=0.5, desirable_weight=2.0),
    "lambda_return": lambda x: e.lambda_return(*steps(x), x(1), CUT, trace_decay=0.9, mask=MASK),
    "leave_one_out": lambda x: e.leave_one_out(x(0), GROUP),
    "n_step_return": lambda x: e.n_step_return(*steps(x), x(1), CUT, steps=5, mask=MASK),
    "negative_log_likelihood": lambda x: e.negative_log_likelihood(negative(x(0))),
    "orpo": lambda x: e.orpo(negative(x(0)), negative(x(1)), beta=0.5),
    "per_decision_log_weight": lambda x: e.per_decision_log_weight(negative(x(0)), negative(x(1)), MASK),
    "potential_shaping": lambda x: e.potential_shaping(discount(x(0)), x(1), x(2), CUT, mask=MASK),
    "reward_to_go": lambda x: e.reward_to_go(*steps(x), CUT, bootstrap=x(1), mask=MASK),
    "robust_dpo": lambda x: e.robust_dpo(*pair(x), beta=0.5, label_smoothing=0.1),
    "sampled_entropy": lambda x: e.sampled_entropy(negative(x(0))),
    "score_function": lambda x: e.score_function(negative(x(0)), x(1)),
    "self_normalised_weight": lambda x: e.self_normalised_weight(x(0)),
    "sequence_log_prob": lambda x: e.sequence_log_prob(negative(x(0)), MASK),
    "sequence_log_ratio": lambda x: e.sequence_log_ratio(negative(x(0)), negative(x(1)), MASK),
    "simpo": lambda x: e.simpo(*pair(x), beta=0.5, margin=0.3),
    "squared_value_error": lambda x: e.squared_value_error(x(0), x(1)),
    "standardise": lambda x: e.standardise(x(0), MASK),
    "step_count": lambda x: x(0).new_tensor(e.step_count(MASK)),
    "step_mean": lambda x: e.step_mean(MASK, dtype=x(0).dtype),
    "td_residual": lambda x: e.td_residual(*steps(x), x(1), x(2)),
    "total_reward": lambda x: e.total_reward(*steps(x), CUT, mask=MASK),
    "trajectory_count": lambda x: x(0).new_tensor(e.trajectory_count(MASK, cut=CUT)),
    "trajectory_mean": lambda x: e.trajectory_mean(MASK, cut=CUT, dtype=x(0).dtype),
    "trajectory_sum": lambda x: e.trajectory_sum(MASK, cut=CUT, dtype=x(0).dtype),
    "trust_region_scale": lambda x: x(0).new_tensor(
        e.trust_region_scale(x(0)[0], x(0)[0] + 0.1 * x(1)[0], max_divergence=0.01)
    ),
    "unflatten": lambda x: e.unflatten(x(0).flatten(), [x(1)])[0],
    "vtrace": lambda x: torch.stack(
        e.vtrace(negative(x(0)), negative(x(1)), *steps(x), x(2), x(3), CUT, trace_decay=0.9, mask=MASK)
    ),
    "weighted_sum": lambda x: e.weighted_sum(x(0), e.step_mean(MASK, dtype=x(0).dtype)),
}


def test_every_exported_estimator_has_a_row() -> None:
    """All but the two records that estimators return."""
    assert set(CASES) == set(e.__all__) - {"LineSearch", "VTrace"}


@pytest.mark.parametrize("name", list(CASES))
@settings(PROPERTY, max_examples=8)
@given(SEEDS, st.sampled_from([0.1, 1.0, 2.0]))
def test_float32_is_within_1e_4_of_float64(name: str, seed: int, size: float) -> None:
    """Of the same inputs, rounded once; the result keeps the precision it was given."""

    def draw(number: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed + number)
        return size * torch.randn(SHAPE, generator=generator, dtype=torch.float32)

    found = CASES[name](draw)
    assert found.dtype == torch.float32
    expected = CASES[name](lambda number: draw(number).double())
    assert expected.dtype == torch.float64
    assert expected.isfinite().all()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
