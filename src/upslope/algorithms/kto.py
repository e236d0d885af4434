"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024): answers that are each desirable or not, without pairs.

    d = sum_t (l_t - f_t) of an answer
    loss = mean over answers of  w_d (1 - s(beta (d - z)))  where desirable,  w_u (1 - s(beta (z - d)))  elsewhere
    z = max(0, mean over the answers of the optimiser step of d before the update)

z stands for KL(pi || ref). The paper estimates it from answers to other prompts; this takes the answers at hand, in one
more pass of the policy before the update's first step, so that it is one number per optimiser step however that is
split. Nobody sampled these answers: the behaviour log-prob is never read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from upslope.algorithms.pairs import labels, row_weight
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
from upslope.algorithms.ratios import chosen_log_prob, step_average
from upslope.errors import UsageError
from upslope.estimators import kto, sequence_log_prob, sequence_log_ratio, trajectory_mean
from upslope.trajectory import Batch, Evaluation, Signal, Trajectory


@dataclass(frozen=True, kw_only=True, slots=True)
class KTO(Undiscounted, Stateless):
    """Rows with reward +1 (desirable) or -1."""

    beta: float = 0.1
    """Strength."""
    desirable_weight: float = 1.0
    """w_d; the paper asks for (w_d n_d) / (w_u n_u) between 1 and 4 / 3."""
    undesirable_weight: float = 1.0
    """w_u."""
    epochs: int = 1
    """Passes over each batch."""
    minibatches: int = 1
    """Optimiser steps per pass."""

    def __post_init__(self) -> None:
        """Refuse settings that have no meaning."""
        for name, number in (
            ("beta", self.beta),
            ("desirable_weight", self.desirable_weight),
            ("undesirable_weight", self.undesirable_weight),
        ):
            if not number > 0.0:
                raise ValueError(f"{name} must be positive, got {number}")
        check_passes(self.epochs, self.minibatches)

    @property
    def passes(self) -> Passes:
        """Whole rows, with the policy's own log-probs before the update."""
        return Passes(
            epochs=self.epochs,
            minibatches=self.minibatches,
            critic=False,
            whole_episodes=True,
            reference="log_prob",
            proximal="prepare",
            whole_rows=True,
        )

    @property
    def target(self) -> Target:
        """No policy gradient: there is no return."""
        return Target(gradient="given_data", per="trajectory")

    def advantage(self, trajectory: Trajectory, value: Tensor | None, next_value: Tensor | None, now: Now) -> Signal:
        """+1 at the steps of desirable rows, -1 of others.

        Raises:
            UsageError: if a row's reward is neither, or a row has no chosen step.
        """
        label = labels(trajectory)
        if not bool((label.abs() == 1.0).all()):
            raise UsageError(f"KTO needs rows with reward +1 (desirable) or -1; got {label[:8].tolist()}")
        return Signal(advantage=torch.where(trajectory.mask, label.unsqueeze(-1), 0.0))

    def prepare(self, batch: Batch) -> Batch:
        """Each answer counts the same, and z is that of the whole optimiser step."""
        assert batch.proximal_log_prob is not None
        point = self._log_ratio(batch.proximal_log_prob, batch).mean().clamp(min=0.0)
        return replace(
            batch,
            weight=trajectory_mean(batch.mask, dtype=batch.advantage.dtype),
            reference_point=point.expand_as(batch.weight),
        )

    def loss(self, batch: Batch, evaluation: Evaluation, now: Now) -> Loss:
        """The mean over answers."""
        assert batch.reference_point is not None
        log_prob, weight = chosen_log_prob(batch, evaluation), row_weight(batch)
        log_ratio, desirable = self._log_ratio(log_prob, batch), (batch.advantage > 0.0).any(-1)
        point = batch.reference_point.flatten()[0]
        each = kto(
            log_ratio,
            desirable,
            point,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )
        value = (each * weight).sum()
        with torch.no_grad():
            gain = torch.where(desirable, log_ratio - point, point - log_ratio)
            watched = {
                "gain": self.beta * gain,
                "accuracy": (gain > 0.0).to(weight.dtype),
                "log_prob": sequence_log_prob(log_prob, batch.mask),
                "desirable_share": desirable.to(weight.dtype),
                "reference_point": point.expand_as(weight),
            }
            metrics = {name: (each_row * weight).sum() for name, each_row in watched.items()}
        metrics |= {"loss": value.detach(), "entropy": step_average(evaluation.entropy.detach(), batch)}
        return Loss(value=value, metrics=metrics)

    def _log_ratio(self, log_prob: Tensor, batch: Batch) -> Tensor:
        assert batch.reference_log_prob is not None
        return sequence_log_ratio(log_prob, batch.reference_log_prob, batch.mask, length_normalised=False)

    def describe(self) -> Mapping[str, str]:
        """The estimator in words."""
        return {
            "loss": "w_d (1 - s(beta (d - z))) where desirable, w_u (1 - s(beta (z - d))) elsewhere",
            "beta": str(self.beta),
            "weights": f"w_d={self.desirable_weight}, w_u={self.undesirable_weight}",
            "z": (
                "mean log-ratio of the optimiser step's own answers before the update, at least 0 (the paper and TRL: "
                "of answers paired with the prompts of others)"
            ),
            "reference": "frozen; d = sum over tokens of l - f",
            "ratio": "none: nobody sampled these",
            "reduction": "mean over answers",
            "passes": f"{passes_in_words(self.epochs, self.minibatches)} of whole rows",
        }
