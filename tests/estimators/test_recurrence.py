"""y_t = x_t + k_t y_{t+1}: against a loop, and through autograd, on both ways of solving it."""

import naive_twins
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from upslope.estimators import backward_recurrence

SHAPES = [(1,), (2,), (3, 4), (2, 2, 9), (5, 31), (5, 32), (5, 33), (1, 700), (80, 64), (1025, 3), (0, 5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bound", [0.5, 1.0])
def test_equals_the_loop(shape: tuple[int, ...], bound: float) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    k = bound * torch.rand(shape, generator=generator, dtype=torch.float64)
    if 0 in shape:
        assert backward_recurrence(x, k).shape == shape
        return
    torch.testing.assert_close(backward_recurrence(x, k), naive_twins.recurrence(x, k), rtol=1e-9, atol=1e-9)


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 70))
def test_equals_the_loop_with_zeros_and_signs(seed: int, rows: int, length: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, length, generator=generator, dtype=torch.float64)
    k = torch.rand(rows, length, generator=generator, dtype=torch.float64) * 2 - 1
    k[torch.rand(rows, length, generator=generator) < 0.2] = 0.0
    torch.testing.assert_close(backward_recurrence(x, k), naive_twins.recurrence(x, k), rtol=1e-9, atol=1e-9)


def test_special_cases() -> None:
    x = torch.tensor([[1.0, 2.0, 4.0]])
    assert backward_recurrence(x, torch.zeros_like(x)).tolist() == [[1.0, 2.0, 4.0]]
    assert backward_recurrence(x, torch.ones_like(x)).tolist() == [[7.0, 6.0, 4.0]]
    assert backward_recurrence(x, torch.tensor([[2.0, -1.0, 99.0]])).tolist() == [[-3.0, -2.0, 4.0]]


def test_products_that_underflow_do_no_harm() -> None:
    x, k = torch.ones(1, 1000), torch.full((1, 1000), 1e-30)
    assert torch.equal(backward_recurrence(x, k), x)
    assert torch.isfinite(backward_recurrence(torch.ones(60, 128), torch.full((60, 128), 1e-30))).all()


def test_arguments_are_left_alone() -> None:
    for shape in [(2, 8), (300, 40)]:
        x, k = torch.randn(shape), torch.rand(shape)
        before = x.clone(), k.clone()
        backward_recurrence(x, k)
        assert torch.equal(x, before[0])
        assert torch.equal(k, before[1])


@pytest.mark.parametrize("shape", [(2, 5), (257, 1, 2), (1, 1)])
def test_gradients(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    k = torch.rand(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    check = torch.autograd.gradcheck if x.numel() > 100 else torch.autograd.gradgradcheck
    assert torch.autograd.gradcheck(backward_recurrence, (x, k), fast_mode=True)
    assert check(backward_recurrence, (x, k), fast_mode=True)


def test_gradient_equals_that_of_the_loop_at_a_large_shape() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(70, 80, generator=generator, dtype=torch.float64, requires_grad=True)
    k = torch.rand(70, 80, generator=generator, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(70, 80, generator=generator, dtype=torch.float64)
    found = torch.autograd.grad(backward_recurrence(x, k), (x, k), cotangent)
    rows = [torch.zeros(70, dtype=torch.float64)]
    for t in reversed(range(80)):
        rows.insert(0, x[:, t] + k[:, t] * rows[0])
    expected = torch.autograd.grad(torch.stack(rows[:-1], -1), (x, k), cotangent)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_only_one_argument_needs_a_gradient() -> None:
    x = torch.randn(2, 4, requires_grad=True)
    backward_recurrence(x, torch.rand(2, 4)).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        assert not backward_recurrence(x, torch.rand(2, 4)).requires_grad


def test_dtypes() -> None:
    x = torch.tensor([1.0, 2.0])
    assert backward_recurrence(x, x.double()).dtype == torch.float64
    assert backward_recurrence(x.bfloat16(), x.bfloat16()).tolist() == [3.0, 2.0]


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"k must have the shape of x, \(2, 3\); got \(2, 4\)"):
        backward_recurrence(torch.zeros(2, 3), torch.zeros(2, 4))
    for shape in [(), (3, 0)]:
        with pytest.raises(ValueError, match=r"x must have shape \[\.\.\., T\] with time last and at least one"):
            backward_recurrence(torch.zeros(shape), torch.zeros(shape))
