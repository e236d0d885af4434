"""Group-relative policy optimisation (Shao et al. 2024) and what grew out of it, as independent choices.

    R_i   = total reward of trajectory i (less beta k(b - f) of its steps, with the KL in the reward)
    A_i   = (R_i - baseline of its group) / scale
    rho   = e^{l-p}: per step; e^{mean(l-p)} or e^{sum(l-p)} of a sequence
    loss  = sum_t w_t [ -min(rho A, clip(rho, 1 - low, 1 + high) A) + beta k(l_t - f_t) - c_H H_t ]

The defaults are the paper's, with its KL off (it has k3 in the loss, 0.04): the group's standard deviation as scale, a
ratio per step clipped at 0.2, the mean over trajectories of the mean over their steps. Both that scale and that mean
bias the direction; `scale="none", reduction="trajectory_sum"` follows the gradient.

    DAPO        reduction="step_mean", clip_high=0.28
    Dr. GRPO    scale="none", reduction="fixed_length", fixed_length=the length limit
    GSPO        ratio="sequence", clip_low=3e-4, clip_high=4e-4
    CISPO       clip_shape="weight", clip_low=None, reduction="step_mean"
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from upslope.algorithms.group_baseline import describe_baseline, group_signal, scale_bias
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
    importance_weight,
    log_ratio_of,
    reduced,
    reduction_bias,
    step_average,
    surrogate,
    watched,
)
from upslope.algorithms.reference_kl import ReferenceKL
from upslope.estimators import weighted_sum
from upslope.trajectory import Batch, Evaluation, Signal, Trajectory


@dataclass(frozen=True, kw_only=True, slots=True)
class GRPO(Undiscounted, Stateless):
    """Whole trajectories, each judged by its group; no critic. gamma is 1."""

    baseline: Literal["mean", "leave_one_out"] = "mean"
    """The mean of the group, or of its other members (G / (G - 1) times the difference)."""
    scale: Literal["none", "group", "batch", "leave_one_out"] = "group"
    """What the difference is divided by: a standard deviation (ddof 1) of the group, of the batch, of the others."""
    scale_epsilon: float = 1e-6
    """Added to that standard deviation."""
    advantage_clip: float | None = None
    """Keep the scaled difference within this distance of 0."""
    ratio: Literal["step", "sequence", "sequence_sum"] = "step"
    """Per step, or one per sequence: from the mean over its steps (GSPO) or from their sum."""
    clip_low: float | None = 0.2
    """How far the ratio may fall below 1; None for any distance."""
    clip_high: float | None = 0.2
    """How far the ratio may rise above 1; None for any distance."""
    dual_clip: float | None = None
    """For negative advantages, never let the objective fall below this multiple (> 1) of the advantage."""
    clip_shape: Literal["surrogate", "weight"] = "surrogate"
    """PPO's minimum, or CISPO's: the clipped ratio is a number that weighs A l."""
    probability_low: float | None = None
    """DPPO: drop steps with A < 0 whose probability has fallen by more than this; None drops none."""
    probability_high: float | None = None
    """DPPO: drop steps with A > 0 whose probability has risen by more than this; None drops none."""
    squared_log_ratio: float = 0.0
    """Weight of (l - p)^2 in the loss, at every step."""
    reduction: Literal["step_mean", "trajectory_mean", "trajectory_sum", "fixed_length"] = "trajectory_mean"
    """What each step weighs."""
    fixed_length: int | None = None
    """L of reduction="fixed_length": a constant of the run, such as the length limit."""
    reference_kl: ReferenceKL = field(default_factory=ReferenceKL)
    """The penalty on the distance from the reference."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus at the start of the run."""
    entropy_schedule: ScheduleName = "constant"
    """How that weight moves over the run."""
    epochs: int = 1
    """Passes over each batch."""
    minibatches: int = 1
    """Optimiser steps per pass."""
    anchor: Literal["behaviour", "proximal"] = "behaviour"
    """p: the log-prob of what generated, or of the learner before the update (always so with an importance_cap)."""
    importance_cap: float | None = None
    """Weigh steps by e^{p-b} where what generated and what learns differ, at most this much; None for no weight."""
    importance_level: Literal["step", "sequence", "sequence_sum"] = "step"
    """The level of that weight, as of the ratio."""
    importance_correction: Literal["truncate", "mask"] = "truncate"
    """Beyond the cap the weight is the cap (TIS), or 0."""

    def __post_init__(self) -> None:
        """Refuse settings that have no meaning."""
        positive = {"advantage_clip": self.advantage_clip, "importance_cap": self.importance_cap}
        positive |= {"probability_low": self.probability_low, "probability_high": self.probability_high}
        for name, number in positive.items():
            if number is not None and number <= 0.0:
                raise ValueError(f"{name} must be positive, or None for off, got {number}")
        check_clip(self.clip_low, self.clip_high, self.dual_clip)
        if self.dual_clip is not None and self.clip_shape == "weight":
            raise ValueError('dual_clip bounds the surrogate: leave it out with clip_shape="weight"')
        if (self.reduction == "fixed_length") != (self.fixed_length is not None):
            raise ValueError('reduction="fixed_length" and fixed_length=L go together: set both or neither')
        if self.fixed_length is not None and self.fixed_length < 1:
            raise ValueError(f"fixed_length must be at least 1, got {self.fixed_length}")
        if self.scale_epsilon < 0.0 or self.squared_log_ratio < 0.0:
            raise ValueError("scale_epsilon and squared_log_ratio must be at least 0")
        check_passes(self.epochs, self.minibatches)

    @property
    def anchored(self) -> bool:
        """Whether p is of the learner itself."""
        return self.anchor == "proximal" or self.importance_cap is not None

    @property
    def passes(self) -> Passes:
        """Groups of whole trajectories; rows stay whole where a ratio is one per sequence."""
        one_per_row = self.ratio != "step" or (self.importance_cap is not None and self.importance_level != "step")
        return Passes(
            epochs=self.epochs,
            minibatches=self.minibatches,
            critic=False,
            whole_episodes=True,
            reference=self.reference_kl.needs,
            proximal="loss" if self.anchored else "none",
            groups=True,
            whole_rows=one_per_row or self.reference_kl.needs == "distribution",
        )

    @property
    def target(self) -> Target:
        """At ratio 1, where no clip is felt; (G - 1) / G of it with the mean of the group as baseline."""
        biases = scale_bias(self.scale) + reduction_bias(self.reduction)
        if self.advantage_clip is not None:
            biases += ("the advantage is clipped",)
        biases += entropy_bias(self.entropy_coefficient)
        whoever_acted = self.ratio == "sequence_sum" and self.clip_low is None and self.clip_high is None
        whoever_acted = whoever_acted and not (self.anchored or self.reference_kl.on or self.squared_log_ratio)
        whoever_acted = whoever_acted and self.probability_low is None and self.probability_high is None
        requires: tuple[Condition, ...] = ("no_time_limit",)
        requires = requires if whoever_acted else ("on_policy", *requires)
        return Target(
            gradient="undiscounted_states",
            per="step" if self.reduction == "step_mean" else "trajectory",
            factor=1.0 if self.fixed_length is None else 1.0 / self.fixed_length,
            requires=(*requires, "fixed_steps") if self.reduction == "step_mean" else requires,
            biased_by=biases + self.reference_kl.biased_by,
            batchwise=self.scale == "batch",
            group_mean=self.baseline == "mean",
            penalty=self.reference_kl.penalty,
        )

    def advantage(self, trajectory: Trajectory, value: Tensor | None, next_value: Tensor | None, now: Now) -> Signal:
        """A_i at every chosen step of trajectory i."""
        return group_signal(
            trajectory,
            baseline=self.baseline,
            scale=self.scale,
            epsilon=self.scale_epsilon,
            reference_kl=self.reference_kl,
            clip=self.advantage_clip,
        )

    def prepare(self, batch: Batch) -> Batch:
        """The weights of the reduction."""
        return replace(batch, weight=reduced(batch, self.reduction, self.fixed_length))

    def loss(self, batch: Batch, evaluation: Evaluation, now: Now) -> Loss:
        """Clipped surrogate, penalties and entropy bonus."""
        log_prob, anchor = chosen_log_prob(batch, evaluation), batch.behaviour_log_prob
        if self.anchored:
            anchor = log_prob.detach() if batch.proximal_log_prob is None else batch.proximal_log_prob
            anchor = torch.where(batch.mask, anchor, 0.0)
        log_ratio = log_ratio_of(self.ratio, log_prob, anchor, batch.mask)
        objective = surrogate(
            log_ratio,
            log_prob,
            batch.advantage,
            batch.mask,
            level=self.ratio,
            low=self.clip_low,
            high=self.clip_high,
            dual_clip=self.dual_clip,
            as_weight=self.clip_shape == "weight",
        )
        kept, metrics = self._kept(log_prob, anchor, batch)
        per_step = -objective if kept is None else -objective * kept
        if self.squared_log_ratio != 0.0:
            per_step = per_step + self.squared_log_ratio * (log_prob - anchor).square()
        penalty = self.reference_kl.of_loss(batch, evaluation, log_prob)
        if penalty is not None:
            per_step = per_step + penalty
        if self.entropy_coefficient != 0.0:
            coefficient = scheduled(self.entropy_schedule, self.entropy_coefficient, now.progress)
            per_step = per_step - coefficient * evaluation.entropy
        metrics["policy_loss"] = -weighted_sum(objective.detach(), batch.weight)
        metrics |= watched(
            batch,
            evaluation,
            log_prob.detach(),
            log_ratio=log_ratio.detach(),
            low=self.clip_low,
            high=self.clip_high,
            reference_kl=self.reference_kl,
            penalty=penalty,
        )
        return Loss(value=weighted_sum(per_step, batch.weight), metrics=metrics)

    @torch.no_grad()
    def _kept(self, log_prob: Tensor, anchor: Tensor, batch: Batch) -> tuple[Tensor | None, dict[str, Tensor]]:
        """What multiplies the objective of each step: DPPO's mask and the importance weight; None for 1."""
        kept, metrics = None, dict[str, Tensor]()
        if self.probability_low is not None or self.probability_high is not None:
            risen, advantage = log_prob.exp() - anchor.exp(), batch.advantage
            high = torch.inf if self.probability_high is None else self.probability_high
            low = torch.inf if self.probability_low is None else self.probability_low
            kept = (~((advantage > 0.0) & (risen > high) | (advantage < 0.0) & (risen < -low))).to(log_prob.dtype)
            metrics["dropped_share"] = step_average(1.0 - kept, batch)
        if self.importance_cap is not None:
            weight = importance_weight(
                anchor,
                batch.behaviour_log_prob,
                batch.mask,
                cap=self.importance_cap,
                level=self.importance_level,
                correction=self.importance_correction,
            )
            metrics["importance_weight"] = step_average(weight, batch)
            kept = weight if kept is None else kept * weight
        return kept, metrics

    def describe(self) -> Mapping[str, str]:
        """The estimator in words."""
        clip = describe_clip(self.clip_low, self.clip_high, self.dual_clip)
        if self.clip_shape == "weight":
            clip += "; the clipped ratio is a detached weight of A l"
        if self.probability_low is not None or self.probability_high is not None:
            clip += (
                f"; steps dropped whose probability rose by more than {self.probability_high} (A > 0) or fell by more "
                f"than {self.probability_low} (A < 0)"
            )
        before = "the learner before the update" if self.anchored else "what generated"
        importance = "none"
        if self.importance_cap is not None:
            importance = RATIO_IN_WORDS[self.importance_level].format(anchor="behaviour").replace("l -", "p -")
            importance += f", {self.importance_correction} at {self.importance_cap}"
        return {
            "Psi": "total reward of the trajectory (gamma=1) less its group's baseline, at every step",
            **describe_baseline(self.baseline, self.scale, self.scale_epsilon),
            "advantage clip": "none" if self.advantage_clip is None else f"+-{self.advantage_clip}",
            "ratio": RATIO_IN_WORDS[self.ratio].format(anchor="p") + f"; p: {before}",
            "clip": clip,
            "KL": self.reference_kl.describe(),
            "squared log-ratio": str(self.squared_log_ratio),
            "importance correction": importance,
            "entropy bonus": scheduled_in_words(self.entropy_schedule, self.entropy_coefficient),
            "reduction": describe_reduction(self.reduction, self.fixed_length),
            "passes": f"{passes_in_words(self.epochs, self.minibatches)} of whole trajectories",
        }
