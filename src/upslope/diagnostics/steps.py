"""What became of the steps of a batch: which still had a gradient, and how far the policy went from what acted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenSteps:
    """Steps that the policy chose, as one or more optimiser steps saw them; all [n] and detached.

    Attributes:
        log_ratio: l - b.
        advantage: as the loss saw it.
        gradient: of the loss by l, or None where the loss does not depend on it.
    """

    log_ratio: Tensor
    advantage: Tensor
    gradient: Tensor | None


def gradient_shares(steps: ChosenSteps) -> dict[str, Tensor]:
    """Which steps had no gradient left, by what the loss itself passed back to each log-prob.

    | name | steps without gradient | among |
    |---|---|---|
    | dead_gradient_share | all of them | all steps |
    | clip_share_positive | those with ratio > 1 | steps with A > 0 |
    | clip_share_negative | those with ratio < 1 | steps with A < 0 |

    No clip range has to be known for that, so that it holds for any clip shape. A share among no steps is 0; without
    gradients there are no shares.
    """
    if steps.gradient is None:
        return {}
    dead, positive, negative = steps.gradient == 0.0, steps.advantage > 0.0, steps.advantage < 0.0
    above, below = dead & positive & (steps.log_ratio > 0.0), dead & negative & (steps.log_ratio < 0.0)
    counts = torch.stack([dead, above, positive, below, negative]).sum(1).double()
    return {
        "dead_gradient_share": counts[0] / dead.numel(),
        "clip_share_positive": counts[1] / counts[2].clamp(min=1.0),
        "clip_share_negative": counts[3] / counts[4].clamp(min=1.0),
    }
