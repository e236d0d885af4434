"""Ratios to the policy that acted, per step or per sequence, and what one watches of them: shared by GRPO and RLOO."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from upslope.algorithms.reference_kl import ReferenceKL
from upslope.estimators import (
    cispo,
    clipped_ratio,
    fixed_length,
    k3,
    sequence_log_ratio,
    step_mean,
    trajectory_mean,
    trajectory_sum,
)
from upslope.trajectory import Batch, Evaluation

RatioLevel: TypeAlias = Literal["step", "sequence", "sequence_sum"]
"""e^{l-p} of each step; e^{mean of l-p} of a sequence (GSPO); e^{sum of l-p}, the ratio of its probabilities."""

Reduction: TypeAlias = Literal["step_mean", "trajectory_mean", "trajectory_sum", "fixed_length"]
"""What each step weighs."""

Correction: TypeAlias = Literal["truncate", "mask"]
"""Weights beyond the cap become the cap, or 0."""

RATIO_IN_WORDS: dict[RatioLevel, str] = {
    "step": "per step, exp(l - {anchor})",
    "sequence": "one per sequence, exp(mean over its steps of l - {anchor})",
    "sequence_sum": "one per sequence, exp(sum over its steps of l - {anchor})",
}


def log_ratio_of(level: RatioLevel, log_prob: Tensor, anchor: Tensor, mask: Tensor) -> Tensor:
    """The log-ratio at each step, [..., T]: its own, or the one of its sequence."""
    if level == "step":
        return log_prob - anchor
    one = sequence_log_ratio(log_prob, anchor, mask, length_normalised=level == "sequence")
    return one.unsqueeze(-1).expand_as(log_prob)


def surrogate(
    log_ratio: Tensor,
    log_prob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    level: RatioLevel,
    low: float | None,
    high: float | None,
    dual_clip: float | None = None,
    as_weight: bool = False,
) -> Tensor:
    """The objective at each step; at ratio 1 its gradient is that of l_t A_t, whatever the level.

    Args:
        log_ratio: [..., T] from `log_ratio_of`, with gradient.
        log_prob: [..., T] l, with gradient.
        advantage: [..., T].
        mask: [..., T], the chosen steps.
        level: of the ratio. A sum over a sequence has the gradient of all its steps at each: it is shared out.
        low: the clip below 1; None for none.
        high: the clip above 1; None for none.
        dual_clip: as in `clipped_ratio`.
        as_weight: the clipped ratio is a number that multiplies A_t l_t (CISPO), so that every step keeps a gradient.
    """
    ceiling = torch.inf if high is None else high
    if as_weight:
        return cispo(log_prob, log_prob.detach() - log_ratio.detach(), advantage, low=low, high=ceiling)
    floor = 1.0 if low is None else low
    objective = clipped_ratio(log_ratio.exp(), advantage, low=floor, high=ceiling, dual_clip=dual_clip)
    return objective / mask.sum(-1, keepdim=True).clamp(min=1) if level == "sequence_sum" else objective


@torch.no_grad()
def importance_weight(
    anchor: Tensor, behaviour: Tensor, mask: Tensor, *, cap: float, level: RatioLevel, correction: Correction
) -> Tensor:
    """min(cap, e^{p-b}) at each step, or 0 beyond the cap; of a sequence where that is the level. A number."""
    weight = log_ratio_of(level, anchor, behaviour, mask).exp()
    return weight.clamp(max=cap) if correction == "truncate" else weight.masked_fill(weight > cap, 0.0)


def reduced(batch: Batch, reduction: Reduction, length: int | None) -> Tensor:
    """The weights of a reduction."""
    mask, dtype = batch.mask, batch.advantage.dtype
    if reduction == "step_mean":
        return step_mean(mask, dtype=dtype)
    if reduction == "trajectory_mean":
        return trajectory_mean(mask, dtype=dtype)
    if reduction == "trajectory_sum":
        return trajectory_sum(mask, dtype=dtype)
    assert length is not None
    return fixed_length(mask, length, dtype=dtype)


def chosen_log_prob(batch: Batch, evaluation: Evaluation) -> Tensor:
    """L, and 0 where nothing was chosen."""
    return evaluation.log_prob if batch.mask.dim() == 1 else torch.where(batch.mask, evaluation.log_prob, 0.0)


@torch.no_grad()
def step_average(value: Tensor, batch: Batch) -> Tensor:
    """The part of the mean over all chosen steps that the steps of this batch bring."""
    return value[batch.mask].sum() * (batch.share / max(int(batch.mask.sum()), 1))


@torch.no_grad()
def watched(
    batch: Batch,
    evaluation: Evaluation,
    log_prob: Tensor,
    *,
    log_ratio: Tensor | None,
    low: float | None,
    high: float | None,
    reference_kl: ReferenceKL,
    penalty: Tensor | None,
) -> dict[str, Tensor]:
    """What one watches: entropy, KL(old || new), steps with a signal, steps beyond the clip by sign, reference KL.

    Args:
        batch: of the loss.
        evaluation: of the policy.
        log_prob: l, 0 where nothing was chosen.
        log_ratio: the one that is clipped; None where there is none.
        low, high: the clip.
        reference_kl: the penalty.
        penalty: its term of the loss.
    """
    advantage, dtype = batch.advantage, log_prob.dtype
    values = {
        "entropy": evaluation.entropy,
        "kl": k3(batch.behaviour_log_prob, log_prob),
        "live_share": (advantage != 0.0).to(dtype),
    }
    if log_ratio is not None and high is not None:
        values["clip_fraction_positive"] = ((advantage > 0.0) & (log_ratio.expm1() > high)).to(dtype)
    if log_ratio is not None and low is not None:
        values["clip_fraction_negative"] = ((advantage < 0.0) & (log_ratio.expm1() < -low)).to(dtype)
    distance = reference_kl.watched(batch, log_prob, penalty)
    if distance is not None:
        values["reference_kl"] = distance
    return {name: step_average(value, batch) for name, value in values.items()}


def check_clip(low: float | None, high: float | None, dual_clip: float | None) -> None:
    """Refuse bounds that have no meaning.

    Raises:
        ValueError: if one is out of its range, or a dual clip has nothing to bound.
    """
    if low is not None and not 0.0 < low <= 1.0:
        raise ValueError(f"clip_low is a distance below 1, in (0, 1], or None for off; got {low}")
    if high is not None and not high > 0.0:
        raise ValueError(f"clip_high is a distance above 1, positive, or None for off; got {high}")
    if dual_clip is not None and dual_clip <= 1.0:
        raise ValueError(f"dual_clip must be greater than 1, got {dual_clip}")
    if dual_clip is not None and low is None and high is None:
        raise ValueError("dual_clip bounds the clipped objective: set clip_low or clip_high too")


def describe_clip(low: float | None, high: float | None, dual_clip: float | None) -> str:
    """The clip in words."""
    if low is None and high is None:
        return "none"
    floor, ceiling = "0" if low is None else f"1 - {low}", "infinity" if high is None else f"1 + {high}"
    return f"ratio clipped to [{floor}, {ceiling}]" + ("" if dual_clip is None else f", dual clip {dual_clip}")


def reduction_bias(reduction: str) -> tuple[str, ...]:
    """What a reduction does to the direction, in words."""
    biased = reduction == "trajectory_mean"
    return ("each trajectory is averaged over its own length: steps of long ones weigh less",) if biased else ()


def describe_reduction(reduction: str, length: int | None) -> str:
    """The reduction in words."""
    words = {
        "step_mean": "mean over all chosen steps of the optimiser step",
        "trajectory_mean": "mean over trajectories of the mean over their steps",
        "trajectory_sum": "mean over trajectories of the sum over their steps",
        "fixed_length": f"mean over trajectories of the sum over their steps, divided by L={length}",
    }
    return f"{reduction}: {words[reduction]}"
