"""Reductions: golden weights, padding, splitting, trajectories within rows, hidden rubbish."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from upslope.estimators import (
    fixed_length,
    step_count,
    step_mean,
    trajectory_count,
    trajectory_mean,
    trajectory_sum,
    weighted_sum,
)

MASK = torch.tensor([[True, True, True, False], [False, True, False, False], [False] * 4])
REDUCTIONS: dict[str, Callable[[Tensor, int | None], Tensor]] = {
    "step_mean": lambda m, n: step_mean(m, steps=n, dtype=torch.float64),
    "trajectory_mean": lambda m, n: trajectory_mean(m, trajectories=n, dtype=torch.float64),
    "trajectory_sum": lambda m, n: trajectory_sum(m, trajectories=n, dtype=torch.float64),
    "fixed_length": lambda m, n: fixed_length(m, 8, trajectories=n, dtype=torch.float64),
}


def denominator(name: str, mask: Tensor) -> int:
    return step_count(mask) if name == "step_mean" else trajectory_count(mask)


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("step_mean", 1 / 4, 1 / 4),
        ("trajectory_mean", 1 / 6, 1 / 2),
        ("trajectory_sum", 1 / 2, 1 / 2),
        ("fixed_length", 1 / 16, 1 / 16),
    ],
)
def test_weights_by_hand(name: str, first: float, second: float) -> None:
    weight = REDUCTIONS[name](MASK, None)
    assert weight[0].tolist() == pytest.approx([first, first, first, 0.0])
    assert weight[1].tolist() == pytest.approx([0.0, second, 0.0, 0.0])
    assert weight[2].tolist() == [0.0] * 4


@pytest.mark.parametrize("name", list(REDUCTIONS))
def test_padding_changes_nothing(name: str) -> None:
    wide = torch.zeros(5, 9, dtype=torch.bool)
    wide[1:4, 2:6] = MASK
    assert torch.equal(REDUCTIONS[name](wide, None)[1:4, 2:6], REDUCTIONS[name](MASK, None))


@pytest.mark.parametrize("name", list(REDUCTIONS))
@given(st.integers(0, 2**31), st.integers(1, 7))
def test_micro_batches_add_up_to_the_same_gradient(name: str, seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(9, 5, generator=generator) < 0.5
    mask[4] = False
    mask[0, 0] = True
    value = torch.randn(9, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    whole = weighted_sum(value, REDUCTIONS[name](mask, None))
    count = denominator(name, mask)
    parts = [
        weighted_sum(v, REDUCTIONS[name](m, count)) for v, m in zip(value.split(size), mask.split(size), strict=True)
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(sum(parts), value)[0]
    torch.testing.assert_close(found, torch.autograd.grad(whole, value)[0], rtol=1e-12, atol=1e-12)


def test_several_trajectories_in_a_row_are_as_good_as_rows_of_their_own() -> None:
    mask = torch.tensor([[True, True, False, True, False, True]])
    cut = torch.tensor([[False, True, True, False, True, False]])
    rows = torch.zeros(4, 6, dtype=torch.bool)
    rows[0, :2], rows[1, 2:3], rows[2, 3:5], rows[3, 5:] = mask[0, :2], mask[0, 2:3], mask[0, 3:5], mask[0, 5:]
    assert trajectory_count(mask, cut=cut) == trajectory_count(rows) == 3
    for split, apart in (
        (trajectory_mean(mask, cut=cut), trajectory_mean(rows)),
        (trajectory_sum(mask, cut=cut), trajectory_sum(rows)),
        (fixed_length(mask, 4, cut=cut), fixed_length(rows, 4)),
    ):
        assert torch.equal(split[0], apart.sum(0))
    assert trajectory_mean(mask, cut=cut)[0].tolist() == pytest.approx([1 / 6, 1 / 6, 0, 1 / 3, 0, 1 / 3])


def test_totals() -> None:
    assert float(step_mean(MASK).sum()) == pytest.approx(1.0)
    assert float(trajectory_mean(MASK).sum()) == pytest.approx(1.0)
    assert float(trajectory_sum(MASK).sum()) == pytest.approx(2.0)


def test_one_dimension() -> None:
    assert trajectory_mean(MASK[0]).tolist() == pytest.approx([1 / 3] * 3 + [0.0])


@pytest.mark.parametrize("rubbish", [torch.nan, torch.inf, -torch.inf])
def test_weighted_sum_hides_rubbish_and_its_gradient(rubbish: float) -> None:
    value = torch.tensor([2.0, rubbish], requires_grad=True)
    found = weighted_sum(value, torch.tensor([0.5, 0.0]))
    found.backward()
    assert float(found.detach()) == 1.0
    assert value.grad is not None
    assert value.grad.tolist() == [0.5, 0.0]


def test_weighted_sum_shows_a_fault_where_it_counts() -> None:
    assert torch.isnan(weighted_sum(torch.tensor([torch.nan]), torch.tensor([0.5])))


@pytest.mark.parametrize("name", list(REDUCTIONS))
def test_an_empty_mask(name: str) -> None:
    empty = torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="mask has no True position"):
        REDUCTIONS[name](empty, None)
    assert (REDUCTIONS[name](empty, 5) == 0).all()
    with pytest.raises(ValueError, match="must be at least 1; got 0"):
        REDUCTIONS[name](MASK, 0)
    with pytest.raises(ValueError, match="mask must be a boolean tensor"):
        REDUCTIONS[name](MASK.float(), None)


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"weight must have the shape of value, \(2, 3\); got \(3,\)"):
        weighted_sum(torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="cut must have the shape of mask"):
        trajectory_mean(MASK, cut=MASK[:1])
    with pytest.raises(ValueError, match="length must be at least 1"):
        fixed_length(MASK, 0)
