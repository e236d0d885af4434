"""The advantage of a trajectory among those that share its start: shared by GRPO and RLOO."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from upslope.algorithms.reference_kl import ReferenceKL
from upslope.errors import UsageError
from upslope.estimators import group_relative, reward_to_go
from upslope.trajectory import Signal, Trajectory

Baseline: TypeAlias = Literal["mean", "leave_one_out"]
"""The mean of the group, or of its other members."""

Scale: TypeAlias = Literal["none", "group", "batch", "leave_one_out"]
"""What the difference is divided by: nothing, or a standard deviation."""


def group_signal(
    trajectory: Trajectory,
    *,
    baseline: Baseline,
    scale: Scale,
    epsilon: float,
    reference_kl: ReferenceKL,
    clip: float | None = None,
) -> Signal:
    """Psi_t of whole trajectories: R_i among its group at every chosen step, 0 elsewhere.

    Args:
        trajectory: with `group`; the total reward R_i of each row is that of its chosen steps and of its end, which
            counts in a row of which nothing is learnt, too.
        baseline, scale, epsilon: as in `group_relative`.
        reference_kl: a penalty in the reward comes before the baseline, or else from each step on after it.
        clip: keeps the scaled difference within +-clip, before a penalty that comes after the baseline.

    Raises:
        UsageError: if there is no `group`.
    """
    if trajectory.group is None:
        raise UsageError(
            "a group's baseline needs rows that share a start, and these have no group: collect several completions of "
            "each prompt, or take an algorithm without a group's baseline"
        )
    mask = trajectory.mask
    total = _total(reference_kl.rewarded(trajectory).reward, mask | trajectory.terminated | trajectory.truncated)
    one = group_relative(total, trajectory.group, baseline=baseline, scale=scale, epsilon=epsilon)
    if clip is not None:
        one = one.clamp(-clip, clip)
    advantage = torch.where(mask, one.unsqueeze(-1), 0.0)
    if reference_kl.on and reference_kl.place == "reward" and not reference_kl.baselined:
        ahead = reward_to_go(
            -reference_kl.of_reward(trajectory), trajectory.discount(1.0), trajectory.cut, mask=trajectory.partial_mask
        )
        advantage = advantage + ahead
    return Signal(advantage=advantage)


def _total(reward: Tensor, counted: Tensor) -> Tensor:
    return torch.where(counted, reward, 0.0).sum(-1)


def describe_baseline(baseline: Baseline, scale: Scale, epsilon: float) -> dict[str, str]:
    """Baseline and scale in words."""
    words = {
        "none": "none",
        "group": f"standard deviation of the group (ddof 1) + {epsilon}",
        "batch": f"standard deviation of the batch's totals (ddof 1) + {epsilon}",
        "leave_one_out": f"standard deviation of the others (ddof 1) + {epsilon}; none where they are equal",
    }
    means = {"mean": "mean of the group", "leave_one_out": "mean of the others of the group"}
    return {"baseline": means[baseline], "advantage scale": words[scale]}


def scale_bias(scale: str) -> tuple[str, ...]:
    """What a scale does to the direction, in words."""
    of = {"group": "group's", "batch": "batch's", "leave_one_out": "others'"}
    return () if scale == "none" else (f"the {of[scale]} standard deviation divides the advantage",)
