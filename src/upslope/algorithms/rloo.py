"""REINFORCE with the mean of the others as baseline (Kool et al. 2019; Ahmadian et al. 2024): unbiased, no critic.

    A_i  = R_i - mean of the others of its group,   R_i = sum_t [ r_t - beta (b_t - f_t) ]
    loss = sum_t w_t [ -l_t A_i ],   w_t = m_t / N

With a ratio, for several steps on one batch or for completions of another policy, -l_t A_i gives way to the importance
weight times A_i, clipped if asked for. With ratio="sequence_sum" and no clip the direction is right whoever acted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from upslope.algorithms.group_baseline import describe_baseline, group_signal
from upslope.algorithms.protocol import (
    Condition,
    Loss,
    Now,
    Passes,
    ScheduleName,
    Stateless,
    Target,
    Undiscounted,
    check_passes,
    entropy_bias,
    passes_in_words,
    scheduled,
    scheduled_in_words,
)
from upslope.algorithms.ratios import (
    RATIO_IN_WORDS,
    check_clip,
    chosen_log_prob,
    describe_clip,
    describe_reduction,
    log_ratio_of,
    reduced,
    surrogate,
    watched,
)
from upslope.algorithms.reference_kl import ReferenceKL
from upslope.estimators import score_function, weighted_sum
from upslope.trajectory import Batch, Evaluation, Signal, Trajectory


@dataclass(frozen=True, kw_only=True, slots=True)
class RLOO(Undiscounted, Stateless):
    """Leave-one-out over whole trajectories: the policy gradient itself. gamma is 1."""

    ratio: Literal["none", "step", "sequence", "sequence_sum"] = "none"
    """None for the score function; per step, or one per sequence from the mean or the sum over its steps."""
    clip_low: float | None = None
    """How far the ratio may fall below 1; None for any distance."""
    clip_high: float | None = None
    """How far the ratio may rise above 1; None for any distance."""
    reference_kl: ReferenceKL = field(default_factory=lambda: ReferenceKL(place="reward"))
    """The penalty on the distance from the reference: in the reward, before the baseline."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus at the start of the run."""
    entropy_schedule: ScheduleName = "constant"
    """How that weight moves over the run."""
    epochs: int = 1
    """Passes over each batch."""
    minibatches: int = 1
    """Optimiser steps per pass."""

    def __post_init__(self) -> None:
        """Refuse settings that have no meaning."""
        check_clip(self.clip_low, self.clip_high, None)
        if self.ratio == "none" and (self.clip_low is not None or self.clip_high is not None):
            raise ValueError('a clip bounds a ratio: set ratio="sequence_sum" (or "step", "sequence") too')
        check_passes(self.epochs, self.minibatches)
        if self.ratio == "none" and self.epochs * self.minibatches > 1:
            raise ValueError("several optimiser steps on one batch leave the policy that acted behind: set a ratio")

    @property
    def passes(self) -> Passes:
        """Groups of whole trajectories."""
        return Passes(
            epochs=self.epochs,
            minibatches=self.minibatches,
            critic=False,
            whole_episodes=True,
            reference=self.reference_kl.needs,
            groups=True,
            whole_rows=self.ratio not in ("none", "step") or self.reference_kl.needs == "distribution",
        )

    @property
    def target(self) -> Target:
        """The gradient itself."""
        corrected = self.ratio == "sequence_sum" and self.clip_low is None and self.clip_high is None
        requires: tuple[Condition, ...] = ("no_time_limit",)
        biases = entropy_bias(self.entropy_coefficient)
        return Target(
            gradient="undiscounted_states",
            per="trajectory",
            requires=requires if corrected and not self.reference_kl.on else ("on_policy", *requires),
            biased_by=biases + self.reference_kl.biased_by,
            penalty=self.reference_kl.penalty,
        )

    def advantage(self, trajectory: Trajectory, value: Tensor | None, next_value: Tensor | None, now: Now) -> Signal:
        """A_i at every chosen step of trajectory i."""
        return group_signal(
            trajectory, baseline="leave_one_out", scale="none", epsilon=0.0, reference_kl=self.reference_kl
        )

    def prepare(self, batch: Batch) -> Batch:
        """Each trajectory's sum counts the same."""
        return replace(batch, weight=reduced(batch, "trajectory_sum", None))

    def loss(self, batch: Batch, evaluation: Evaluation, now: Now) -> Loss:
        """The negative score-function objective, or the importance-weighted one."""
        log_prob, log_ratio = chosen_log_prob(batch, evaluation), None
        if self.ratio == "none":
            objective = score_function(log_prob, batch.advantage)
        else:
            log_ratio = log_ratio_of(self.ratio, log_prob, batch.behaviour_log_prob, batch.mask)
            objective = surrogate(
                log_ratio,
                log_prob,
                batch.advantage,
                batch.mask,
                level=self.ratio,
                low=self.clip_low,
                high=self.clip_high,
            )
        per_step = -objective
        penalty = self.reference_kl.of_loss(batch, evaluation, log_prob)
        if penalty is not None:
            per_step = per_step + penalty
        if self.entropy_coefficient != 0.0:
            coefficient = scheduled(self.entropy_schedule, self.entropy_coefficient, now.progress)
            per_step = per_step - coefficient * evaluation.entropy
        metrics = {"policy_loss": -weighted_sum(objective.detach(), batch.weight)} | watched(
            batch,
            evaluation,
            log_prob.detach(),
            log_ratio=None if log_ratio is None else log_ratio.detach(),
            low=self.clip_low,
            high=self.clip_high,
            reference_kl=self.reference_kl,
            penalty=penalty,
        )
        return Loss(value=weighted_sum(per_step, batch.weight), metrics=metrics)

    def describe(self) -> Mapping[str, str]:
        """The estimator in words."""
        ratio = "none (score function)" if self.ratio == "none" else RATIO_IN_WORDS[self.ratio].format(anchor="p")
        return {
            "Psi": "total reward of the trajectory (gamma=1) less its group's baseline, at every step",
            **describe_baseline("leave_one_out", "none", 0.0),
            "ratio": ratio if self.ratio == "none" else f"{ratio}; p: what generated",
            "clip": describe_clip(self.clip_low, self.clip_high, None),
            "KL": self.reference_kl.describe(),
            "entropy bonus": scheduled_in_words(self.entropy_schedule, self.entropy_coefficient),
            "reduction": describe_reduction("trajectory_sum", None),
            "passes": f"{passes_in_words(self.epochs, self.minibatches)} of whole trajectories",
        }
