"""The one recurrence under every return, advantage and trace: y_t = x_t + k_t * y_{t+1}.

Two exact ways of solving it without a loop over time:

- as the unit bidiagonal linear system (I - N) y = x, where N carries k above its diagonal: one
  back substitution, the fastest where rows times T squared is small;
- by doubling (Hillis and Steele 1986): log2(T) passes, each composing the affine maps of neighbours,
  the fastest everywhere else.

Neither divides by a product of k, so k = 0 (a cut) and long decays are exact.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from upslope.estimators._checks import require_same_shape

_LARGEST_SYSTEM = 2**18
_MOST_SYSTEMS = 2**8
_SOLVABLE = (torch.float32, torch.float64)
_solve_triangular: Callable[..., Tensor] = torch.linalg.solve_triangular  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def backward_recurrence(x: Tensor, k: Tensor) -> Tensor:
    """Solve y_t = x_t + k_t * y_{t+1} along the last axis, with y = 0 beyond the end.

    k = 1 gives the reversed cumulative sum of x; k = 0 gives x itself; `k = discount` with 0 where a
    trajectory is cut gives the reward to go. Differentiable, twice and more, in both arguments.

    >>> backward_recurrence(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 0.5, 0.5]))
    tensor([2.7500, 3.5000, 3.0000])
    >>> backward_recurrence(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 1.0, 1.0]))
    tensor([1., 5., 3.])

    Args:
        x: `[..., T]`, finite.
        k: `[..., T]`, finite, usually in [-1, 1]; its last entry on the time axis is never used.

    Returns:
        y, `[..., T]`, in the wider of the two dtypes.

    Raises:
        ValueError: x and k differ in shape, or have no time axis.
    """
    require_same_shape("x", x, ("k", k))
    if x.dtype != k.dtype:
        dtype = torch.promote_types(x.dtype, k.dtype)
        x, k = x.to(dtype), k.to(dtype)
    if torch.is_grad_enabled() and (x.requires_grad or k.requires_grad):
        return _differentiable(x, k)
    return _solve(x, k)


def _solve(x: Tensor, k: Tensor) -> Tensor:
    length, size = x.shape[-1], x.numel()
    small = size * length <= _LARGEST_SYSTEM and size <= _MOST_SYSTEMS * length
    if small and x.is_cpu and x.dtype in _SOLVABLE:
        return _by_substitution(x, k)
    return _by_doubling(x, k)


def _by_substitution(x: Tensor, k: Tensor) -> Tensor:
    system = torch.diag_embed(k[..., :-1].neg(), 1)
    return _solve_triangular(system, x.unsqueeze(-1), upper=True, unitriangular=True).squeeze(-1)


def _by_doubling(x: Tensor, k: Tensor) -> Tensor:
    y = x.clone()
    distance, length = 1, x.shape[-1] - 1
    if length <= 0:
        return y
    k = k.narrow(-1, 0, length)
    while True:
        y.narrow(-1, 0, length).add_(k * y.narrow(-1, distance, length))
        remaining = length - distance
        if remaining <= 0:
            return y
        k = k.narrow(-1, 0, remaining) * k.narrow(-1, distance, remaining)
        distance *= 2
        length = x.shape[-1] - distance
        if length <= 0:
            return y
        k = k.narrow(-1, 0, length)


class _BackwardRecurrence(torch.autograd.Function):
    """The recurrence with its adjoint: dL/dx_t = dL/dy_t + k_{t-1} dL/dx_{t-1}, dL/dk_t = dL/dx_t y_{t+1}."""

    @staticmethod
    def forward(x: Tensor, k: Tensor) -> Tensor:
        return _solve(x, k)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1], output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None]:
        k, y = ctx.saved_tensors
        grad_x = backward_recurrence(grad_outputs[0].flip(-1), k.flip(-1).roll(-1, -1)).flip(-1)
        if not ctx.needs_input_grad[1]:
            return grad_x, None
        following = torch.cat((y[..., 1:], torch.zeros_like(y[..., :1])), -1)
        return grad_x, grad_x * following


_differentiable: Callable[[Tensor, Tensor], Tensor] = _BackwardRecurrence.apply  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
