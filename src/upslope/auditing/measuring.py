"""Run code that turns batches into ascent directions many times at fixed parameters, and hold its mean to a claim."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import TypeAlias

import torch
from torch import Tensor

from upslope.auditing.declared import Claim
from upslope.auditing.moments import Moments, exact_moments, sampled_moments
from upslope.auditing.report import AuditReport
from upslope.auditing.setting import Setting
from upslope.auditing.source import Source
from upslope.errors import UsageError, checking_usage
from upslope.trajectory import Trajectory

DEFAULT_SAMPLES = 100_000
"""Trajectories drawn where not every batch can be weighted."""

Progress: TypeAlias = Callable[[int, int], None]
"""Told after each drawn batch how many there are so far, and of how many."""

_FEWEST_BATCHES = 20
_NO_GRADIENT = 1e-13


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """Whether batches are weighted or drawn, and how.

    Attributes:
        samples: how many trajectories to draw; None weights every batch there is, and draws `DEFAULT_SAMPLES`
            trajectories where there are too many batches for that.
        seed: of the drawing.
        progress: told of each drawn batch.
    """

    samples: int | None = None
    seed: int = 0
    progress: Progress | None = None


def measure(
    setting: Setting, source: Source, *, batches: int | None = None, seed: int = 0, progress: Progress | None = None
) -> tuple[Moments, int]:
    """The moments of the ascent direction, and how many batches they come from.

    Args:
        setting: where.
        source: what computes the ascent of a batch.
        batches: how many to draw; None weights every batch of one row there is.
        seed: of the drawing.
        progress: told of each drawn batch.
    """
    if batches is None:
        weighted = _weighted(setting, source, setting.every())
        return exact_moments(weighted), len(weighted)
    policy, parameters, ascents = setting.policy, setting.parameters, list[Tensor]()
    for trajectory in setting.drawn(batches, seed):
        ascents.append(source.ascent(policy, parameters, trajectory))
        if progress is not None:
            progress(len(ascents), batches)
    return sampled_moments(torch.stack(ascents)), batches


def report(
    setting: Setting, source: Source, claim: Claim, *, subject: str, drawing: Drawing | None = None
) -> AuditReport:
    """Measure and hold against one exact gradient.

    Args:
        setting: where.
        source: what computes the ascent of a batch.
        claim: what it is held against.
        subject: what to call it.
        drawing: how batches come about; every one is weighted if None and there are not too many.

    Raises:
        UsageError: if these are too few samples, or the gradient is 0.
    """
    drawing = drawing or Drawing()
    with checking_usage():
        trajectories, steps = setting.trajectories_per_row, setting.steps_per_row
    if float(claim.target.norm()) < _NO_GRADIENT:
        raise UsageError(
            f"the exact gradient is 0 here: there is nothing to hold it against. With this policy and this discount no "
            f"action of {setting.name} is better than another: take another problem, gamma or policy"
        )
    found = _every_batch(setting, source) if drawing.samples is None else None
    rows = 1
    if found is None:
        rows = setting.rows
        batches = _batches(DEFAULT_SAMPLES if drawing.samples is None else drawing.samples, rows * trajectories)
        found = measure(setting, source, batches=batches, seed=drawing.seed, progress=drawing.progress)
    return AuditReport(
        subject=subject,
        problem=setting.name,
        target_name=claim.target_name,
        target=claim.target,
        moments=found[0],
        trajectories=rows * trajectories,
        steps=rows * steps,
        batches=found[1],
        declared=claim.declared,
        reason=claim.reason,
    )


def _every_batch(setting: Setting, source: Source) -> tuple[Moments, int] | None:
    """What `measure` finds of every batch of one row, or None where they are too many to list, or not all listed."""
    every = setting.every()
    try:
        first = next(every)
    except ValueError:
        return None
    weighted = _weighted(setting, source, chain([first], every))
    if abs(math.fsum(probability for probability, _ in weighted) - 1.0) > 1e-9:
        return None
    return exact_moments(weighted), len(weighted)


def _weighted(
    setting: Setting, source: Source, every: Iterable[tuple[float, Trajectory]]
) -> list[tuple[float, Tensor]]:
    policy, parameters = setting.policy, setting.parameters
    return [(probability, source.ascent(policy, parameters, trajectory)) for probability, trajectory in every]


def _batches(samples: int, trajectories: float) -> int:
    batches = math.ceil(samples / trajectories)
    if batches < _FEWEST_BATCHES:
        raise UsageError(
            f"{samples} samples make {batches} {'batch' if batches == 1 else 'batches'} of about {trajectories:.3g} "
            f"trajectories, too few to know their spread: ask for at least {math.ceil(_FEWEST_BATCHES * trajectories)} "
            "samples"
        )
    return batches
