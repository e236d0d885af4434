"""Rows in pairs, the chosen one first and then the rejected: shared by preference losses and reward models."""

from __future__ import annotations

import torch
from torch import Tensor

from upslope.errors import UsageError
from upslope.trajectory import Batch, Signal, Trajectory


def pair_signal(trajectory: Trajectory) -> Signal:
    """+1 at every chosen step of a chosen row, -1 of a rejected one.

    Raises:
        UsageError: if the rows are not such pairs, or a row has no chosen step.
    """
    label = labels(trajectory)
    pairs = label.view(-1, 2) if len(label) % 2 == 0 else label.new_zeros(1, 2)
    if not bool(((pairs[:, 0] == 1.0) & (pairs[:, 1] == -1.0)).all()):
        raise UsageError(
            "expected pairs of rows, a chosen one (reward +1) and then a rejected one (reward -1); got "
            f"{len(label)} rows that begin with rewards {label[:8].tolist()}"
        )
    return Signal(advantage=torch.where(trajectory.mask, label.unsqueeze(-1), 0.0))


def labels(trajectory: Trajectory) -> Tensor:
    """[B] the total reward of each row, a label.

    Raises:
        UsageError: if a row has no chosen step.
    """
    empty = (~trajectory.mask.any(-1)).nonzero().flatten()
    if empty.numel():
        raise UsageError(f"rows {empty[:8].tolist()} have no chosen step: an answer holds one token at least, its end")
    return torch.where(trajectory.mask, trajectory.reward, 0.0).sum(-1)


def row_weight(batch: Batch) -> Tensor:
    """[B] what each row weighs in the optimiser step: 1 / N, from weights of `trajectory_mean`."""
    return batch.weight.sum(-1)


def pair_weight(batch: Batch) -> Tensor:
    """[B / 2] what each pair weighs in the optimiser step: one over their number."""
    return row_weight(batch).view(-1, 2).sum(-1)


def told_right(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 where the chosen one is worth more, 0 where the rejected one is, 1/2 where nothing tells them apart.

    >>> told_right(torch.tensor([2.0, 1.0, 1.0]), torch.tensor([1.0, 2.0, 1.0]))
    tensor([1.0000, 0.0000, 0.5000])
    """
    difference = chosen - rejected
    return torch.heaviside(difference, difference.new_tensor(0.5))
