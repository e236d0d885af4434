"""Supervised fine-tuning on demonstrations: the negative log-likelihood of what somebody else chose.

    loss = sum_t w_t [ -l_t ]

Nobody sampled these actions: the behaviour log-prob is never read. Of the demonstrator's completions the mean gradient
of `trajectory_sum` is that of KL(demonstrator || pi).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from upslope.algorithms.protocol import (
    Loss,
    Now,
    Passes,
    Stateless,
    Target,
    Undiscounted,
    check_passes,
    passes_in_words,
)
from upslope.algorithms.ratios import chosen_log_prob, describe_reduction, reduced, step_average
from upslope.estimators import negative_log_likelihood, weighted_sum
from upslope.trajectory import Batch, Evaluation, Signal, Trajectory

_HALF = math.log(0.5)
"""A step whose probability is above a half is surely the most likely one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SFT(Undiscounted, Stateless):
    """Imitates demonstrations."""

    reduction: Literal["step_mean", "trajectory_mean", "trajectory_sum"] = "step_mean"
    """What each step weighs: step_mean counts all tokens alike, trajectory_mean all answers."""
    epochs: int = 1
    """Passes over each batch."""
    minibatches: int = 1
    """Optimiser steps per pass."""

    def __post_init__(self) -> None:
        """Refuse settings that have no meaning."""
        check_passes(self.epochs, self.minibatches)

    @property
    def passes(self) -> Passes:
        """Rows of demonstrations."""
        return Passes(epochs=self.epochs, minibatches=self.minibatches, critic=False, whole_episodes=True)

    @property
    def target(self) -> Target:
        """No policy gradient: there is no return."""
        return Target(gradient="given_data", per="step" if self.reduction == "step_mean" else "trajectory")

    def advantage(self, trajectory: Trajectory, value: Tensor | None, next_value: Tensor | None, now: Now) -> Signal:
        """1 at every chosen step: each is to become more likely."""
        return Signal(advantage=trajectory.mask.to(trajectory.reward.dtype))

    def prepare(self, batch: Batch) -> Batch:
        """The weights of the reduction."""
        return replace(batch, weight=reduced(batch, self.reduction, None))

    def loss(self, batch: Batch, evaluation: Evaluation, now: Now) -> Loss:
        """The weighted negative log-likelihood."""
        log_prob = chosen_log_prob(batch, evaluation)
        value = weighted_sum(negative_log_likelihood(log_prob), batch.weight)
        metrics = {
            "loss": value.detach(),
            "nll": step_average(-log_prob.detach(), batch),
            "entropy": step_average(evaluation.entropy.detach(), batch),
            "likely_share": step_average((log_prob.detach() > _HALF).to(log_prob.dtype), batch),
        }
        return Loss(value=value, metrics=metrics)

    def describe(self) -> Mapping[str, str]:
        """The estimator in words."""
        return {
            "loss": "negative log-likelihood of the demonstrations",
            "ratio": "none: nobody sampled these",
            "reduction": describe_reduction(self.reduction, None),
            "passes": f"{passes_in_words(self.epochs, self.minibatches)} of whole rows",
        }
