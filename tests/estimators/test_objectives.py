"""Objectives: golden values, gradients at ratio 1, sequence ratios, value errors."""

import pytest
import torch
from torch import Tensor

from upslope.estimators import (
    adapted_coefficient,
    cispo,
    clipped,
    clipped_ratio,
    clipped_value_error,
    importance_weighted,
    kl_penalised,
    score_function,
    sequence_log_ratio,
    squared_value_error,
    trajectory_mean,
    weighted_sum,
)

GENERATOR = torch.Generator().manual_seed(3)
LOG_PROB = -torch.rand(4, 6, generator=GENERATOR, dtype=torch.float64)
ADVANTAGE = torch.randn(4, 6, generator=GENERATOR, dtype=torch.float64)


def gradient(value: Tensor, log_prob: Tensor) -> Tensor:
    return torch.autograd.grad(value.sum(), log_prob)[0]


def leaf(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_()


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [
        (1.0, 2.0, 2.0, 2.0),
        (1.3, 2.0, 2.5, 0.0),
        (0.5, 2.0, 1.0, 1.0),
        (1.3, -2.0, -2.6, -2.6),
        (0.5, -2.0, -1.6, 0.0),
        (0.9, -2.0, -1.8, -1.8),
        (9.0, -2.0, -18.0, -18.0),
    ],
)
def test_clipped_by_hand(ratio: float, advantage: float, value: float, slope: float) -> None:
    proximal = torch.tensor([-0.7], dtype=torch.float64)
    log_prob = leaf(proximal + torch.tensor(ratio, dtype=torch.float64).log())
    found = clipped(log_prob, proximal, torch.tensor([advantage], dtype=torch.float64), low=0.2, high=0.25)
    assert float(found.detach()) == pytest.approx(value)
    assert float(gradient(found, log_prob)) == pytest.approx(slope)


def test_dual_clip_bounds_only_negative_advantages() -> None:
    ratio = leaf(torch.tensor([9.0, 9.0, 2.0]))
    advantage = torch.tensor([-2.0, 2.0, -2.0])
    found = clipped_ratio(ratio, advantage, low=0.2, high=0.2, dual_clip=3.0)
    assert found.tolist() == pytest.approx([-6.0, 2.4, -4.0])
    assert gradient(found, ratio).tolist() == [0.0, 0.0, -2.0]


def test_truncated_importance_sampling_detaches_the_weight() -> None:
    behaviour = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    log_prob = leaf(behaviour + torch.tensor([4.0, 0.5], dtype=torch.float64).log())
    psi = torch.tensor([1.0, 1.0], dtype=torch.float64)
    assert gradient(importance_weighted(log_prob, behaviour, psi, cap=2.0), log_prob).tolist() == pytest.approx(
        [2.0, 0.5]
    )
    assert gradient(importance_weighted(log_prob, behaviour, psi), log_prob).tolist() == pytest.approx([4.0, 0.5])


def test_cispo_keeps_a_gradient_where_clipped_has_none() -> None:
    proximal = torch.full((3,), -1.0, dtype=torch.float64)
    log_prob = leaf(proximal + torch.tensor([4.0, 0.5, 1.1], dtype=torch.float64).log())
    advantage = torch.tensor([1.0, -1.0, 3.0], dtype=torch.float64)
    both = cispo(log_prob, proximal, advantage, low=0.2, high=0.2)
    assert gradient(both, log_prob).tolist() == pytest.approx([1.2, -0.8, 3.3])
    upper = cispo(log_prob, proximal, advantage, high=0.2)
    assert gradient(upper, log_prob).tolist() == pytest.approx([1.2, -0.5, 3.3])
    ppo = clipped(log_prob, proximal, advantage, low=0.2, high=0.2)
    assert gradient(ppo, log_prob).tolist() == pytest.approx([0.0, 0.0, 3.3])


def test_no_gradient_flows_into_numbers() -> None:
    numbers = [leaf(LOG_PROB - 0.1) for _ in range(2)]
    log_prob = leaf(LOG_PROB)
    for found in (
        score_function(log_prob, numbers[0]),
        importance_weighted(log_prob, *numbers),
        importance_weighted(log_prob, *numbers, cap=2.0),
        clipped(log_prob, *numbers, low=0.2, high=0.2),
        cispo(log_prob, *numbers, high=0.2),
        squared_value_error(log_prob, numbers[0]),
        clipped_value_error(log_prob, *numbers, clip=0.2),
    ):
        gradients = torch.autograd.grad(found.sum(), [log_prob, *numbers], allow_unused=True)
        assert gradients[0] is not None
        assert gradients[1:] == (None, None)


def test_gspo_is_one_ratio_per_sequence() -> None:
    """The published form, sequence by sequence, equals the composition weighted per trajectory."""
    mask = torch.rand(4, 6, generator=GENERATOR) < 0.7
    mask[:, 0] = True
    proximal = LOG_PROB + 0.3 * torch.randn(4, 6, generator=GENERATOR, dtype=torch.float64)
    advantage = ADVANTAGE[:, 0]
    log_prob = leaf(LOG_PROB)
    ratio = sequence_log_ratio(log_prob, proximal, mask).exp()
    per_step = clipped_ratio(ratio, advantage, low=0.2, high=0.2).unsqueeze(-1).expand(4, 6)
    found = weighted_sum(per_step, trajectory_mean(mask, dtype=torch.float64))
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(4):
        chosen = mask[i]
        s = ((log_prob[i, chosen] - proximal[i, chosen]).sum() / int(chosen.sum())).exp()
        expected = expected + torch.min(s * advantage[i], s.clamp(0.8, 1.2) * advantage[i]) / 4
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(found, log_prob), gradient(expected, log_prob), rtol=1e-12, atol=1e-12)
    again = sequence_log_ratio(log_prob, proximal, mask)
    assert (gradient(again, log_prob)[~mask] == 0).all()


def test_sequences_do_not_read_what_was_not_chosen() -> None:
    mask = torch.tensor([[True, False], [False, False]])
    log_prob = leaf(torch.tensor([[1.0, torch.nan], [torch.inf, torch.nan]]))
    found = sequence_log_ratio(log_prob, torch.zeros(2, 2), mask)
    assert found.tolist() == [1.0, 0.0]
    assert gradient(found, log_prob).tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_adapted_coefficient() -> None:
    assert adapted_coefficient(3.0, 0.0151, target=0.01) == 6.0
    assert adapted_coefficient(3.0, 0.0149, target=0.01) == 3.0
    assert adapted_coefficient(3.0, 0.0067, target=0.01) == 3.0
    assert adapted_coefficient(3.0, 0.0066, target=0.01) == 1.5
    with pytest.raises(ValueError, match="target must be positive"):
        adapted_coefficient(1.0, 0.1, target=0.0)


def test_squared_value_error_has_the_plain_residual_as_gradient() -> None:
    value = leaf(ADVANTAGE)
    found = squared_value_error(value, LOG_PROB)
    assert torch.equal(found, 0.5 * (ADVANTAGE - LOG_PROB) ** 2)
    torch.testing.assert_close(gradient(found, value), ADVANTAGE - LOG_PROB, rtol=1e-12, atol=0)


def test_clipped_value_error_by_hand() -> None:
    before = torch.zeros(3)
    target = torch.tensor([2.0, 2.0, -1.0])
    value = leaf(torch.tensor([0.1, 1.0, 1.0]))
    largest = clipped_value_error(value, target, before, clip=0.2)
    assert largest.tolist() == pytest.approx([0.5 * 1.9**2, 0.5 * 1.8**2, 0.5 * 2.0**2])
    assert gradient(largest, value).tolist() == pytest.approx([-1.9, 0.0, 2.0])
    alone = clipped_value_error(value, target, before, clip=0.2, pessimistic=False)
    assert alone.tolist() == pytest.approx([0.5 * 1.9**2, 0.5 * 1.8**2, 0.5 * 1.2**2])


def test_errors_name_the_argument() -> None:
    ok = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"advantage must have the shape of log_prob, \(2, 3\); got \(2, 1\)"):
        clipped(ok, ok, ok[:, :1], low=0.2, high=0.2)
    with pytest.raises(ValueError, match=r"low must lie in \[0, 1\]"):
        clipped(ok, ok, ok, low=1.2, high=0.2)
    with pytest.raises(ValueError, match="dual_clip must be greater than 1"):
        clipped(ok, ok, ok, low=0.2, high=0.2, dual_clip=1.0)
    with pytest.raises(ValueError, match="high must be at least 0"):
        cispo(ok, ok, ok, high=-0.1)
    with pytest.raises(ValueError, match="cap must be positive"):
        importance_weighted(ok, ok, ok, cap=0.0)
    with pytest.raises(ValueError, match="kl must have the shape of log_prob"):
        kl_penalised(ok, ok, ok, torch.zeros(3), coefficient=1.0)
    with pytest.raises(ValueError, match="coefficient must be at least 0"):
        kl_penalised(ok, ok, ok, ok, coefficient=-1.0)
    with pytest.raises(ValueError, match="target must have the shape of value"):
        squared_value_error(ok, torch.zeros(2, 3, 1))
    with pytest.raises(ValueError, match="clip must be positive"):
        clipped_value_error(ok, ok, ok, clip=0.0)
    with pytest.raises(ValueError, match="mask must be a boolean tensor"):
        sequence_log_ratio(ok, ok, ok)
    with pytest.raises(ValueError, match="psi must have the shape of log_prob"):
        score_function(ok, ok[0])
