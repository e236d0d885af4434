"""Proximal policy optimisation (Schulman et al. 2017): several optimiser steps per batch, held near the old policy.

    rho_t = exp(l_t - b_t)
    objective_t = min(rho_t A_t, clip(rho_t, 1 - clip, 1 + clip) A_t)                     clip
    objective_t = rho_t A_t - beta KL(old || new)                                         KL penalty
    loss = sum_t w_t [ -objective_t + c_V * 0.5 (V_t - target_t)^2 - c_H H_t ],  w_t = m_t / sum(m)

Left out on purpose: no reward clipping, no early episode cuts; a time limit bootstraps from the true last observation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from upslope.algorithms.critic_advantage import gae_signal
from upslope.algorithms.protocol import (
    DISCOUNT_DROPPED,
    Loss,
    Now,
    Passes,
    ScheduleName,
    State,
    Target,
    check_passes,
    entropy_bias,
    passes_in_words,
    scheduled,
    scheduled_in_words,
)
from upslope.algorithms.ratios import chosen_log_prob
from upslope.algorithms.reference_kl import ReferenceKL
from upslope.algorithms.stale import StaleData
from upslope.estimators import (
    adapted_coefficient,
    clipped,
    clipped_value_error,
    k3,
    kl_penalised,
    squared_value_error,
    standardise,
    step_mean,
    weighted_sum,
)
from upslope.trajectory import Batch, Evaluation, Signal, Trajectory


@dataclass(frozen=True, kw_only=True, slots=True)
class PPO:
    """PPO with a clipped ratio by default; every departure from that is an option and off."""

    gamma: float = 0.99
    """Discount factor per step."""
    gae_lambda: float = 0.95
    """1 trusts the returns, 0 trusts the critic."""
    epochs: int = 4
    """Passes over each batch."""
    minibatches: int = 4
    """Optimiser steps per pass."""
    clip: float | None = 0.2
    """How far the ratio may leave 1 before its gradient stops; None for no clipping (with a KL penalty)."""
    clip_schedule: ScheduleName = "constant"
    """How the clip moves over the run."""
    normalize_advantage: bool = True
    """Standardise advantages within each minibatch."""
    value_coefficient: float = 0.5
    """Multiplier of 0.5 (V - target)^2. SB3's vf_coef=0.5 is 1.0 here; CleanRL's 0.5 is 0.5."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus at the start of the run."""
    entropy_schedule: ScheduleName = "constant"
    """How that weight moves over the run."""
    dual_clip: float | None = None
    """For negative advantages, never let the objective fall below this multiple (> 1) of the advantage."""
    value_clip: float | None = None
    """Keep V within this distance of its old prediction (max of the clipped and the unclipped error)."""
    value_clip_pessimistic: bool = True
    """False takes the clipped error alone, as SB3 does."""
    kl_coefficient: float = 0.0
    """beta: weight of the exact KL(old || new) penalty at the start of the run."""
    kl_target: float | None = None
    """Adapt beta to this KL: doubled beyond 1.5 of it, halved below 1 / 1.5 of it; None keeps beta."""
    target_kl: float | None = None
    """Stop an update early when the estimated KL(old || new) passes this."""
    kl_stop: Literal["before_step", "after_epoch"] = "before_step"
    """Look before every step (beyond 1.5 target_kl), or after each pass (beyond target_kl)."""
    recompute_advantage: bool = False
    """Compute advantages anew with the current critic before each pass after the first."""
    reference_kl: ReferenceKL = field(default_factory=lambda: ReferenceKL(place="reward"))
    """The penalty on the distance from a frozen reference; in the reward of each step unless it says otherwise."""
    stale: StaleData = field(default_factory=StaleData)
    """What is done about data that older policies collected."""

    def __post_init__(self) -> None:
        """Refuse settings that have no meaning."""
        if not self.reference_kl.baselined:
            raise ValueError("reference_kl.baselined=False speaks of a group's baseline, and PPO has a critic")
        if self.clip is None and self.kl_coefficient == 0.0:
            raise ValueError("PPO needs something to hold it: set clip (0.2 is usual) or kl_coefficient > 0")
        if self.clip is not None and not 0.0 < self.clip < 1.0:
            raise ValueError(f"clip is a distance from 1 between 0 and 1, got {self.clip}")
        if self.dual_clip is not None and self.dual_clip <= 1.0:
            raise ValueError(f"dual_clip must be greater than 1, got {self.dual_clip}")
        if self.dual_clip is not None and self.clip is None:
            raise ValueError("dual_clip bounds the clipped objective: set clip too")
        if self.kl_coefficient < 0.0:
            raise ValueError(f"kl_coefficient must be at least 0, got {self.kl_coefficient}")
        for name, bound in (
            ("value_clip", self.value_clip),
            ("kl_target", self.kl_target),
            ("target_kl", self.target_kl),
        ):
            if bound is not None and bound <= 0.0:
                raise ValueError(f"{name} must be positive, or None for off, got {bound}")
        if self.kl_target is not None and self.kl_coefficient == 0.0:
            raise ValueError("kl_target adapts the penalty: set kl_coefficient to its first value, for example 1.0")
        check_passes(self.epochs, self.minibatches)

    @property
    def passes(self) -> Passes:
        """Several passes of shuffled minibatches."""
        return Passes(
            epochs=self.epochs,
            minibatches=self.minibatches,
            behaviour_distribution=self.kl_coefficient > 0.0,
            recompute_advantage=self.recompute_advantage,
            target_kl=self.target_kl,
            kl_stop=self.kl_stop,
            reference=self.reference_kl.needs,
            proximal=self.stale.needs,
        )

    @property
    def target(self) -> Target:
        """At ratio 1, where the clip is not felt, the mean over steps; away from it a surrogate's gradient."""
        biases = ("the minibatch's standard deviation divides the advantage",) if self.normalize_advantage else ()
        biases += entropy_bias(self.entropy_coefficient)
        return Target(
            gradient="undiscounted_states",
            per="step",
            requires=("on_policy", "exact_critic", "fixed_steps"),
            biased_by=biases + self.reference_kl.biased_by,
            batchwise=self.normalize_advantage,
            penalty=self.reference_kl.penalty,
        )

    def initial_state(self) -> State:
        """The penalty's coefficient is the only number carried."""
        return {"kl_coefficient": self.kl_coefficient} if self.kl_coefficient > 0.0 else {}

    def advantage(self, trajectory: Trajectory, value: Tensor | None, next_value: Tensor | None, now: Now) -> Signal:
        """A_t = GAE(gamma, lambda), the critic's target is A_t + V_t; or both of V-trace."""
        trajectory = self.reference_kl.rewarded(trajectory)
        if self.stale.corrects_advantage:
            return self.stale.signal(trajectory, value, next_value, gamma=self.gamma, trace_decay=self.gae_lambda)
        return gae_signal(trajectory, value, next_value, gamma=self.gamma, gae_lambda=self.gae_lambda)

    def prepare(self, batch: Batch) -> Batch:
        """Every step counts the same; advantages are standardised over the optimiser step."""
        advantage = standardise(batch.advantage, batch.mask) if self.normalize_advantage else batch.advantage
        return replace(batch, advantage=advantage, weight=step_mean(batch.mask, dtype=batch.advantage.dtype))

    def loss(self, batch: Batch, evaluation: Evaluation, now: Now) -> Loss:
        """Clipped or penalised surrogate, value error and entropy bonus."""
        assert evaluation.value is not None
        clip = None if self.clip is None else scheduled(self.clip_schedule, self.clip, now.progress)
        old = self.stale.old_log_prob(batch, evaluation.log_prob)
        advantage, weighing = self.stale.weighted(batch.advantage, old, batch)
        kl = beta = None
        if self.kl_coefficient > 0.0:
            assert batch.behaviour_distribution is not None
            kl, beta = batch.behaviour_distribution.kl(evaluation.distribution), now.state["kl_coefficient"]
        if clip is not None:
            bounds = {"low": clip, "high": clip, "dual_clip": self.dual_clip}
            objective = clipped(evaluation.log_prob, old, advantage, **bounds)
            if kl is not None and beta is not None:
                objective = objective - beta * kl
        else:
            assert kl is not None
            assert beta is not None
            objective = kl_penalised(evaluation.log_prob, old, advantage, kl, coefficient=beta)
        value_error = self.value_error(batch, evaluation.value)
        per_step = self.value_coefficient * value_error - objective
        if self.entropy_coefficient != 0.0:
            coefficient = scheduled(self.entropy_schedule, self.entropy_coefficient, now.progress)
            per_step = per_step - coefficient * evaluation.entropy
        metrics = weighing | surrogate_metrics(batch, evaluation, old, objective, value_error, clip)
        if self.reference_kl.on:
            log_prob = chosen_log_prob(batch, evaluation)
            penalty = self.reference_kl.of_loss(batch, evaluation, log_prob)
            per_step = per_step if penalty is None else per_step + penalty
            distance = self.reference_kl.watched(batch, log_prob, penalty)
            assert distance is not None
            metrics["reference_kl"] = weighted_sum(distance, batch.weight)
        if kl is not None:
            metrics["kl_exact"] = weighted_sum(kl.detach(), batch.weight)
        return Loss(value=weighted_sum(per_step, batch.weight), metrics=metrics)

    def value_error(self, batch: Batch, value: Tensor) -> Tensor:
        """0.5 (V - target)^2 per step, clipped if asked for."""
        assert batch.value_target is not None
        if self.value_clip is None:
            return squared_value_error(value, batch.value_target)
        assert batch.behaviour_value is not None
        return clipped_value_error(
            value,
            batch.value_target,
            batch.behaviour_value,
            clip=self.value_clip,
            pessimistic=self.value_clip_pessimistic,
        )

    def adapt(self, state: State, metrics: Mapping[str, float]) -> State:
        """beta doubles when KL > 1.5 target and halves when KL < target / 1.5 (paper, section 4)."""
        if self.kl_target is None:
            return state
        beta, kl = state["kl_coefficient"], metrics["kl_after"]
        return {"kl_coefficient": adapted_coefficient(beta, kl, target=self.kl_target)}

    def describe(self) -> Mapping[str, str]:
        """The estimator in words."""
        low = "no clip" if self.clip is None else f"ratio clipped to [1 - {self.clip}, 1 + {self.clip}]"
        adaptive = f", adapted to {self.kl_target}" if self.kl_target is not None else ""
        value = "0.5 (V - target)^2"
        if self.value_clip is not None:
            value += f", V clipped to +-{self.value_clip} around the old" + (
                ", the larger of the two errors" if self.value_clip_pessimistic else ", the clipped error alone"
            )
        return {
            "Psi": self.stale.advantage_in_words(self.gamma, self.gae_lambda),
            "state weights": DISCOUNT_DROPPED,
            "advantage scale": "standardised per minibatch" if self.normalize_advantage else "none",
            "ratio": self.stale.ratio_in_words(),
            "clip": f"{low} ({self.clip_schedule})" + (f", dual clip {self.dual_clip}" if self.dual_clip else ""),
            "KL": f"exact KL(old || new) in the loss, beta={self.kl_coefficient}{adaptive}"
            if self.kl_coefficient
            else "none",
            "reference KL": self.reference_kl.describe(),
            "KL stop": "never" if self.target_kl is None else f"{self.kl_stop}, target {self.target_kl} (k3 estimate)",
            "value error": f"{self.value_coefficient} x {value}; target = "
            + ("v of V-trace" if self.stale.corrects_advantage else "GAE + V"),
            "entropy bonus": scheduled_in_words(self.entropy_schedule, self.entropy_coefficient),
            "reduction": "step_mean over each minibatch",
            "passes": passes_in_words(self.epochs, self.minibatches)
            + (", advantages recomputed before each pass" if self.recompute_advantage else ""),
        }


def surrogate_metrics(
    batch: Batch, evaluation: Evaluation, old: Tensor, objective: Tensor, value_error: Tensor, clip: float | None
) -> dict[str, Tensor]:
    """Means over the batch of what one watches in a surrogate method."""
    with torch.no_grad():
        log_ratio = evaluation.log_prob - old
        watched = {
            "policy_loss": -objective,
            "value_loss": value_error,
            "entropy": evaluation.entropy,
            "kl": k3(old, evaluation.log_prob),
        }
        if clip is not None:
            watched["clip_fraction"] = (log_ratio.expm1_().abs_() > clip).to(batch.weight.dtype)
        means = torch.stack(list(watched.values())).flatten(1) @ batch.weight.flatten()
        return dict(zip(watched, means, strict=True))
