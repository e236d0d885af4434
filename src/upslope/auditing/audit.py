"""Run the code that trains many times at fixed parameters, and hold its mean against the exact gradient."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from upslope.auditing.moments import Moments, exact_moments, sampled_moments
from upslope.auditing.report import AuditReport
from upslope.auditing.setting import Setting
from upslope.auditing.source import Source


def measure(setting: Setting, source: Source, *, batches: int | None = None, seed: int = 0) -> tuple[Moments, int]:
    """The moments of the ascent direction, and how many batches they come from.

    Args:
        setting: where.
        source: what computes the ascent of a batch.
        batches: how many to draw; None weights every batch of one row there is.
        seed: of the drawing.
    """
    policy, parameters = setting.policy, setting.parameters
    if batches is None:
        weighted = [(p, source.ascent(policy, parameters, trajectory)) for p, trajectory in setting.every()]
        return exact_moments(weighted), len(weighted)
    ascents = [source.ascent(policy, parameters, trajectory) for trajectory in setting.drawn(batches, seed)]
    return sampled_moments(torch.stack(ascents)), batches


def report(
    setting: Setting,
    source: Source,
    *,
    subject: str,
    target: Tensor,
    target_name: str,
    declared: Literal["unbiased", "biased"] | None = None,
    reason: str = "",
    batches: int | None = None,
    seed: int = 0,
) -> AuditReport:
    """Measure and hold against one exact gradient.

    Args:
        setting: where.
        source: what computes the ascent of a batch.
        subject: what to call it.
        target: [P] the exact gradient.
        target_name: that in words.
        declared: what is declared of it here.
        reason: what biases it here.
        batches: how many to draw; None weights every batch there is.
        seed: of the drawing.
    """
    moments, count = measure(setting, source, batches=batches, seed=seed)
    rows = 1 if batches is None else setting.rows
    return AuditReport(
        subject=subject,
        problem=setting.name,
        target_name=target_name,
        target=target,
        moments=moments,
        trajectories=rows * setting.trajectories_per_row,
        steps=rows * setting.steps_per_row,
        batches=count,
        declared=declared,
        reason=reason,
    )
