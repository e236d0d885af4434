"""A reward model from pairs (Bradley & Terry 1952; Ouyang et al. 2022): the critic learns to tell chosen from rejected.

    score = V at the last chosen step of a row
    loss = mean over pairs of  -log s(score_w - score_l - margin) + c (score_w + score_l)^2

V has seen everything before the last chosen token: an answer without its end token. Scores are known up to a constant
per prompt; the second term, off by default, holds them near 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from upslope.algorithms.pairs import pair_signal, pair_weight, told_right
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
from upslope.estimators import trajectory_mean
from upslope.trajectory import Batch, Evaluation, Signal, Trajectory


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardModel(Undiscounted, Stateless):
    """Rows in adjacent pairs: the chosen one (reward +1), then the rejected one (reward -1)."""

    margin: float = 0.0
    """By how much the chosen score is to be larger."""
    centering_coefficient: float = 0.0
    """Weight of the squared sum of a pair's scores; 0.01 is usual where it is used."""
    epochs: int = 1
    """Passes over each batch."""
    minibatches: int = 1
    """Optimiser steps per pass."""

    def __post_init__(self) -> None:
        """Refuse settings that have no meaning."""
        if self.margin < 0.0 or self.centering_coefficient < 0.0:
            raise ValueError(
                f"margin and centering_coefficient must be at least 0, got {self.margin} and "
                f"{self.centering_coefficient}"
            )
        check_passes(self.epochs, self.minibatches)

    @property
    def passes(self) -> Passes:
        """Whole rows, two by two, with a critic that is not asked before the update."""
        return Passes(
            epochs=self.epochs,
            minibatches=self.minibatches,
            critic=True,
            whole_episodes=True,
            together=2,
            whole_rows=True,
            values_first=False,
        )

    @property
    def target(self) -> Target:
        """No policy gradient: there is no return."""
        return Target(gradient="given_data", per="trajectory")

    def advantage(self, trajectory: Trajectory, value: Tensor | None, next_value: Tensor | None, now: Now) -> Signal:
        """+1 at the steps of chosen rows, -1 of rejected ones."""
        return pair_signal(trajectory)

    def prepare(self, batch: Batch) -> Batch:
        """Each pair counts the same."""
        return replace(batch, weight=trajectory_mean(batch.mask, dtype=batch.advantage.dtype))

    def loss(self, batch: Batch, evaluation: Evaluation, now: Now) -> Loss:
        """The mean over pairs."""
        assert evaluation.value is not None
        position = torch.arange(batch.mask.shape[1], device=batch.mask.device)
        last = (batch.mask * position).amax(-1, keepdim=True)
        score = evaluation.value.gather(-1, last).squeeze(-1)
        chosen, rejected, weight = score[0::2], score[1::2], pair_weight(batch)
        each = -logsigmoid(chosen - rejected - self.margin)
        if self.centering_coefficient != 0.0:
            each = each + self.centering_coefficient * (chosen + rejected).square()
        value = (each * weight).sum()
        with torch.no_grad():
            watched = {
                "pair_accuracy": told_right(chosen, rejected),
                "score_margin": chosen - rejected,
                "chosen_score": chosen,
                "rejected_score": rejected,
            }
            metrics = {name: (each_pair.detach() * weight).sum() for name, each_pair in watched.items()}
        return Loss(value=value, metrics=metrics | {"loss": value.detach()})

    def describe(self) -> Mapping[str, str]:
        """The estimator in words."""
        return {
            "loss": f"-log s(score_w - score_l - {self.margin})",
            "score": "V at the last chosen step of a row",
            "centering": f"{self.centering_coefficient} x (score_w + score_l)^2",
            "reduction": "mean over pairs",
            "passes": f"{passes_in_words(self.epochs, self.minibatches)} of whole pairs",
        }
