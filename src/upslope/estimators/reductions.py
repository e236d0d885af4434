"""Reductions: weights per step w, so that the objective is sum over steps of w * value.

| function | w | known from |
|---|---|---|
| `step_mean` | m / sum(m) | DAPO, most control code |
| `trajectory_mean` | m / (len_i * N) | the GRPO paper |
| `trajectory_sum` | m / N | REINFORCE, RLOO |
| `fixed_length` | m / (L * N) | Dr. GRPO |

m is the mask, len_i the number of chosen steps of trajectory i, N the number of trajectories with a chosen step.
A trajectory is a row, or with `cut` what lies between two cuts of a row. Compute the weights once for the
whole optimiser step and split them with the data, or give each part the denominators of the whole
(`step_count`, `trajectory_count`): then the parts add up to the same gradient, however they were split.
"""

import math

import torch
from torch import Tensor

from upslope.estimators._checks import require_bool, require_same_shape


def step_count(mask: Tensor) -> int:
    """Count the chosen steps: sum(m).

    >>> step_count(torch.tensor([[True, True], [True, False]]))
    3

    Args:
        mask: `[..., T]`, boolean.

    Raises:
        ValueError: `mask` is not boolean.
    """
    require_bool("mask", mask)
    return int(mask.sum())


def trajectory_count(mask: Tensor, *, cut: Tensor | None = None) -> int:
    """Count the trajectories that have a chosen step: N.

    >>> mask, cut = torch.tensor([[True, True, True], [False, False, False]]), torch.tensor([[True, False, True]] * 2)
    >>> trajectory_count(mask), trajectory_count(mask, cut=cut)
    (1, 2)

    Args:
        mask: `[..., T]`, boolean.
        cut: `[..., T]`, boolean, where rows hold several trajectories.

    Raises:
        ValueError: shapes differ, or a tensor is not boolean.
    """
    return int((_lengths(mask, cut) > 0).sum())


def step_mean(mask: Tensor, *, steps: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Mean over all chosen steps: w = m / sum(m).

    >>> step_mean(torch.tensor([[True, True], [True, False]]))
    tensor([[0.3333, 0.3333],
            [0.3333, 0.0000]])

    Args:
        mask: `[..., T]`, boolean.
        steps: denominator, `step_count` of the whole optimiser step where `mask` is a part of it.
        dtype: of the weights.

    Raises:
        ValueError: `mask` is not boolean; it is empty and `steps` is not given; or `steps` < 1.
    """
    require_bool("mask", mask)
    return mask.to(dtype) * (1.0 / _denominator("steps", steps, mask))


def trajectory_mean(
    mask: Tensor,
    *,
    cut: Tensor | None = None,
    trajectories: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Mean over trajectories of the mean over their chosen steps: w = m / (len_i * N).

    >>> trajectory_mean(torch.tensor([[True, True], [True, False]]))
    tensor([[0.2500, 0.2500],
            [0.5000, 0.0000]])

    Args:
        mask: `[..., T]`, boolean. Parts must hold whole trajectories.
        cut: `[..., T]`, boolean, where rows hold several trajectories.
        trajectories: N, `trajectory_count` of the whole optimiser step where `mask` is a part of it.
        dtype: of the weights.

    Raises:
        ValueError: shapes differ or a tensor is not boolean; `mask` is empty and N not given; or N < 1.
    """
    lengths = _lengths(mask, cut)
    count = _denominator("trajectories", trajectories, lengths > 0)
    per_step = lengths if cut is None else lengths.gather(-1, _trajectory_index(cut))
    return mask.to(dtype) / (per_step.clamp(min=1) * count)


def trajectory_sum(
    mask: Tensor,
    *,
    cut: Tensor | None = None,
    trajectories: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Mean over trajectories of the sum over their chosen steps: w = m / N.

    >>> trajectory_sum(torch.tensor([[True, True], [True, False]]))
    tensor([[0.5000, 0.5000],
            [0.5000, 0.0000]])

    Args:
        mask: `[..., T]`, boolean.
        cut: `[..., T]`, boolean, where rows hold several trajectories.
        trajectories: N, `trajectory_count` of the whole optimiser step where `mask` is a part of it.
        dtype: of the weights.

    Raises:
        ValueError: shapes differ or a tensor is not boolean; `mask` is empty and N not given; or N < 1.
    """
    count = _denominator("trajectories", trajectories, _lengths(mask, cut) > 0)
    return mask.to(dtype) * (1.0 / count)


def fixed_length(
    mask: Tensor,
    length: int,
    *,
    cut: Tensor | None = None,
    trajectories: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Mean over trajectories of the sum over their chosen steps, over a constant length: w = m / (L * N).

    >>> fixed_length(torch.tensor([[True, True], [True, False]]), 4)
    tensor([[0.1250, 0.1250],
            [0.1250, 0.0000]])

    Args:
        mask: `[..., T]`, boolean.
        length: L, at least 1; a constant of the run, never the padded length of a batch.
        cut: `[..., T]`, boolean, where rows hold several trajectories.
        trajectories: N, `trajectory_count` of the whole optimiser step where `mask` is a part of it.
        dtype: of the weights.

    Raises:
        ValueError: as `trajectory_sum`, or length < 1.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1; got {length}")
    count = _denominator("trajectories", trajectories, _lengths(mask, cut) > 0)
    return mask.to(dtype) * (1.0 / (length * count))


def weighted_sum(value: Tensor, weight: Tensor) -> Tensor:
    """Weighted sum over everything: sum of w * value, where w = 0 hides even NaN and infinity.

    >>> weighted_sum(torch.tensor([1.0, 2.0, torch.nan]), torch.tensor([0.5, 0.25, 0.0]))
    tensor(1.)

    Args:
        value: `[..., T]`, with gradient; none flows where the weight is 0.
        weight: `[..., T]`, from a reduction.

    Returns:
        A scalar.

    Raises:
        ValueError: shapes differ.
    """
    if value.shape != weight.shape:
        raise ValueError(f"weight must have the shape of value, {tuple(value.shape)}; got {tuple(weight.shape)}")
    if value.is_cpu:
        total = torch.dot(value, weight) if value.ndim == 1 and value.dtype == weight.dtype else (value * weight).sum()
        if math.isfinite(total.item()):  # 0 * NaN and 0 * inf would show: there is nothing to hide
            return total
    return (value.masked_fill(weight == 0, 0.0) * weight).sum()


def _denominator(name: str, given: int | None, counted: Tensor) -> int:
    count = int(counted.sum()) if given is None else given
    if count >= 1:
        return count
    if given is None:
        raise ValueError(
            f"mask has no True position, so there is nothing to average; drop the batch, or if it is one part "
            f"of an optimiser step give {name}=, the count over the whole of it"
        )
    raise ValueError(f"{name} must be at least 1; got {given}")


def _lengths(mask: Tensor, cut: Tensor | None) -> Tensor:
    """Return the number of chosen steps: `[..., 1]` per row, or with `cut` `[..., T]`, entry i of trajectory i."""
    require_same_shape("mask", mask)
    require_bool("mask", mask)
    if cut is None:
        return mask.sum(-1, keepdim=True)
    require_same_shape("mask", mask, ("cut", cut))
    require_bool("cut", cut)
    chosen = mask.long()
    return torch.zeros_like(chosen).scatter_add(-1, _trajectory_index(cut), chosen)


def _trajectory_index(cut: Tensor) -> Tensor:
    """Return which trajectory of its row a step belongs to: the number of cuts before it."""
    return cut.long().cumsum(-1) - cut.long()
