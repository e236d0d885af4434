"""What became of the steps of a batch: which still had a gradient, and how far the policy went from what acted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def effective_sample_size(log_ratio: Tensor) -> Tensor:
    """The share of steps that importance weights leave: (sum w)^2 / (n sum w^2), w = e^log_ratio; 1 for equal weights.

    >>> effective_sample_size(torch.tensor([3.0, 1.0]).log())
    tensor(0.8000)

    Args:
        log_ratio: [n], l - b.
    """
    weight = (log_ratio - log_ratio.max()).exp()
    return weight.sum().square() / (weight.numel() * weight.square().sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """The chosen steps of one piece of one optimiser step, all [n] and detached.

    Attributes:
        log_ratio: l - b.
        advantage: as the loss saw it.
        gradient: of the loss by l, or None where the loss does not depend on it.
    """

    log_ratio: Tensor
    advantage: Tensor
    gradient: Tensor | None


def gradient_shares(records: list[StepRecord]) -> dict[str, Tensor]:
    """Which steps had no gradient left, by what the loss itself passed back to each log-prob.

    | name | steps without gradient | among |
    |---|---|---|
    | dead_gradient_share | all of them | all steps |
    | clip_share_positive | those with ratio > 1 | steps with A > 0 |
    | clip_share_negative | those with ratio < 1 | steps with A < 0 |

    No clip range has to be known for that, so that it holds for any clip shape. A share among no steps is 0.
    """
    gradients = [record.gradient for record in records if record.gradient is not None]
    if len(gradients) != len(records):
        return {}
    dead = torch.cat(gradients) == 0.0
    advantage = torch.cat([record.advantage for record in records])
    log_ratio = torch.cat([record.log_ratio for record in records])
    positive, negative = advantage > 0.0, advantage < 0.0
    above, below = dead & positive & (log_ratio > 0.0), dead & negative & (log_ratio < 0.0)
    counts = torch.stack([dead, above, positive, below, negative]).sum(1).double()
    return {
        "dead_gradient_share": counts[0] / dead.numel(),
        "clip_share_positive": counts[1] / counts[2].clamp(min=1.0),
        "clip_share_negative": counts[3] / counts[4].clamp(min=1.0),
    }
