"""What a row of the table measures, and the row that a measurement becomes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from upslope.auditing.cases.case import Case
from upslope.auditing.moments import Moments
from upslope.auditing.report import AuditReport


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a measurement brings home: the exact vector, and the moments of the estimate of it.

    Attributes:
        problem: on what.
        target_name: the exact vector in words.
        target: [P] that vector.
        moments: of the estimate.
        trajectories: per batch.
        steps: per batch.
        batches: how many were weighted.
    """

    problem: str
    target_name: str
    target: Tensor
    moments: Moments
    trajectories: float = 1.0
    steps: float = 1.0
    batches: int = 1


def row(subject: str, setting: str, measure: Callable[[], Found], *, biased_by: str = "") -> Case:
    """One row of the table: declared unbiased, unless it says what biases it.

    Args:
        subject: the exported name.
        setting: what tells this row from the others of the subject.
        measure: what to do.
        biased_by: in words; empty where it is declared unbiased.
    """

    def run() -> AuditReport:
        found = measure()
        return AuditReport(
            subject=subject,
            problem=found.problem,
            target_name=found.target_name,
            target=found.target,
            moments=found.moments,
            trajectories=found.trajectories,
            steps=found.steps,
            batches=found.batches,
            declared="biased" if biased_by else "unbiased",
            reason=biased_by,
        )

    return Case(subject=subject, setting=setting, run=run)


def identity(found: Tensor, expected: Tensor, *, problem: str, target_name: str) -> Found:
    """Of something in which there is no chance.

    Args:
        found: what the code under test makes, any shape.
        expected: what it should be, of the same number of elements.
        problem: on what.
        target_name: `expected` in words.
    """
    moments = Moments(mean=found.detach().to(torch.float64).flatten(), variance=0.0)
    return Found(problem=problem, target_name=target_name, target=expected.detach().flatten(), moments=moments)


def row_gradients(objective: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The gradient of each entry of `objective` [R], flat over the parameters: [R, P]."""
    every = torch.eye(len(objective), dtype=objective.dtype)
    parts = torch.autograd.grad(
        objective, list(parameters), grad_outputs=every, is_grads_batched=True, materialize_grads=True
    )
    return torch.cat([part.reshape(len(objective), -1) for part in parts], dim=-1)


def weighted_moments(probability: Tensor, estimate: Tensor) -> Moments:
    """Of an estimate [R, P] that has the probability [R].

    Raises:
        ValueError: if the probabilities do not sum to 1.
    """
    weight = probability.detach()
    if abs(float(weight.sum()) - 1.0) > 1e-9:
        raise ValueError(f"the probabilities of all rows sum to {float(weight.sum())!r}, not to 1: some are missing")
    mean = weight @ estimate
    return Moments(mean=mean, variance=float(weight @ (estimate - mean).square().sum(-1)))
