"""Importance-sampled policy gradient: the gradient of one policy from whole episodes of another.

    w_t = product over k <= t of e^{l_k - b_k},  W = product over all t      l of the learner before the update
    per decision:  Psi_t = sum over k >= t of gamma^{k-t} w_k r_k - w_t V_t   a reward needs what was decided before it
    trajectory:    Psi_t = W (G_t - V_t)                                      the episode counts by its probability
    loss = sum_{b,t} m_bt / N [ -gamma^t l_t Psi_t + c_V * 0.5 (V_t - v_t)^2 - c_H H_t ]

V is 0 without a baseline, and v_t the V-trace target with truncation at 1 where there is one. Both weights leave the
mean alone (Precup, Sutton & Singh 2000) and both grow apart with the length of episodes: a cap makes them smaller and
biased, dividing by their mean over the batch (self-normalised) likewise. `effective_sample_size` says what share of the
episodes they leave.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from upslope.algorithms.critic_advantage import vtrace_of
from upslope.algorithms.protocol import (
    Condition,
    Loss,
    Now,
    Passes,
    ScheduleName,
    Stateless,
    Target,
    entropy_bias,
    scheduled,
    scheduled_in_words,
)
from upslope.algorithms.reference_kl import NO_PENALTY
from upslope.algorithms.reinforce import episode_loss
from upslope.errors import OffPolicyError
from upslope.estimators import (
    baselined,
    discount_weight,
    effective_sample_size,
    per_decision_log_weight,
    reward_to_go,
    self_normalised_weight,
    trajectory_sum,
)
from upslope.trajectory import Batch, Evaluation, Signal, Trajectory


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportanceSampled(Stateless):
    """The score-function estimator over whole episodes of any policy; one optimiser step per batch."""

    gamma: float = 0.99
    """Discount factor per step."""
    weights: Literal["per_decision", "trajectory"] = "per_decision"
    """What a reward is weighted by: the ratio of all that was decided before it, or of the whole episode."""
    cap: float | None = None
    """Largest weight, at least 1: less variance, and bias; None for none."""
    self_normalised: bool = False
    """Divide weights by their mean over the batch: less variance, and bias that goes with the number of episodes."""
    baseline: Literal["none", "critic"] = "none"
    """What is subtracted from the return: nothing, or the critic's value."""
    discounted_states: bool = False
    """True keeps the theorem's gamma^t: the gradient of J_gamma. False drops it."""
    fewest_effective: float = 0.1
    """The update is refused where weights leave a smaller share of the batch than this as effective sample size."""
    value_coefficient: float = 0.5
    """Multiplier of 0.5 (V - v)^2, where there is a critic."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus at the start of the run."""
    entropy_schedule: ScheduleName = "constant"
    """How that weight moves over the run."""

    def __post_init__(self) -> None:
        """Refuse settings that have no meaning."""
        if self.cap is not None and not self.cap >= 1.0:
            raise ValueError(f"cap is the largest weight, at least 1 (all are 1 on-policy), or None; got {self.cap}")
        if not 0.0 <= self.fewest_effective <= 1.0:
            raise ValueError(f"fewest_effective is a share from 0 (never refuse) to 1, got {self.fewest_effective}")

    @property
    def passes(self) -> Passes:
        """One step on whole episodes, with the learner's own log-probs of what was done."""
        return Passes(critic=self.baseline == "critic", whole_episodes=True, proximal="advantage")

    @property
    def target(self) -> Target:
        """The sum over each whole trajectory, whoever acted; on-policy alone where weights are capped or normalised.

        A baseline may be any function of the state. Without a critic a time limit counts as part of the task.
        """
        bent = self.cap is not None or self.self_normalised
        at_the_end: Condition = "exact_critic_at_limit" if self.baseline == "critic" else "no_time_limit"
        biased = entropy_bias(self.entropy_coefficient)
        return Target(
            gradient="discounted" if self.discounted_states else "undiscounted_states",
            per="trajectory",
            requires=("on_policy", at_the_end) if bent else (at_the_end,),
            biased_by=biased,
            batchwise=self.self_normalised,
        )

    def advantage(self, trajectory: Trajectory, value: Tensor | None, next_value: Tensor | None, now: Now) -> Signal:
        """Psi_t by the chosen weights, times gamma^t if asked for, and what share of the batch they leave.

        Raises:
            OffPolicyError: if that is less than `fewest_effective`, or a weight is too large to be a number.
        """
        weight, metrics = self._weights(trajectory)
        reward, discount, cut = trajectory.reward, trajectory.discount(self.gamma), trajectory.cut
        mask, target = trajectory.partial_mask, None
        if value is None or next_value is None:
            psi = reward_to_go(reward * weight, discount, cut, mask=mask)
        else:
            psi = reward_to_go(reward * weight, discount, cut, bootstrap=next_value * weight, mask=mask)
            psi = baselined(psi, weight * value)
            values = (trajectory, value, next_value)
            found = vtrace_of(*values, gamma=self.gamma, trace_decay=1.0, rho_clip=1.0, trace_clip=1.0)
            target = found.value_target
        if self.discounted_states:
            psi = psi * discount_weight(trajectory.time, self.gamma, dtype=psi.dtype)
        return Signal(advantage=psi, value_target=target, metrics=metrics)

    def _weights(self, trajectory: Trajectory) -> tuple[Tensor, dict[str, Tensor]]:
        """w_t [B, T], or W at every t, and what one watches of them."""
        assert trajectory.proximal_log_prob is not None
        mask = trajectory.mask
        log_weight = per_decision_log_weight(trajectory.proximal_log_prob, trajectory.behaviour_log_prob, mask)
        if self.weights == "trajectory":
            log_weight = log_weight[:, -1:].expand_as(log_weight)
        if self.cap is not None:
            log_weight = log_weight.clamp(max=math.log(self.cap))
        share = effective_sample_size(log_weight)
        share = (share * mask.sum(0)).sum() / mask.sum().clamp(min=1)
        largest = log_weight[mask].max() if bool(mask.any()) else log_weight.new_zeros(())
        weight = self_normalised_weight(log_weight) if self.self_normalised else log_weight.exp()
        self._refuse(float(share), len(mask), representable=bool(weight.isfinite().all()))
        metrics = {
            "effective_sample_size": share,
            "effective_trajectories": share * len(mask),
            "largest_weight": largest.exp(),
        }
        return weight, metrics

    def _refuse(self, share: float, rows: int, *, representable: bool) -> None:
        if share >= self.fewest_effective and representable:
            return
        wrong = (
            f"the weights leave {share:.2%} of the {rows} episodes as effective sample size, less than "
            f"algorithm.fewest_effective = {self.fewest_effective:.2%}"
            if representable
            else "an importance weight is too large to be a number"
        )
        raise OffPolicyError(
            f"{wrong}: the policy that learns has gone too far from the one that acted for its data to say anything "
            "about it. Let a nearer policy act (a smaller rollout.lag, another rollout.behaviour, or the one that "
            "learns), take more episodes or shorter ones, a lower learning rate, per_decision weights, a cap or "
            "self_normalised=True; lower fewest_effective only to see what happens"
        )

    def prepare(self, batch: Batch) -> Batch:
        """Each trajectory's sum counts the same."""
        return replace(batch, weight=trajectory_sum(batch.mask, dtype=batch.advantage.dtype))

    def loss(self, batch: Batch, evaluation: Evaluation, now: Now) -> Loss:
        """The negative score-function objective, plus the critic's error and the entropy bonus."""
        coefficient = scheduled(self.entropy_schedule, self.entropy_coefficient, now.progress)
        return episode_loss(
            batch,
            evaluation,
            value_coefficient=self.value_coefficient,
            entropy_coefficient=coefficient,
            reference_kl=NO_PENALTY,
        )

    def describe(self) -> Mapping[str, str]:
        """The estimator in words."""
        product = "of all that was decided up to a reward" if self.weights == "per_decision" else "of the whole episode"
        cap = "" if self.cap is None else f", at most {self.cap}"
        normalised = ", divided by their mean over the batch" if self.self_normalised else ""
        baseline = "none" if self.baseline == "none" else "V, weighted likewise"
        return {
            "Psi": f"importance-weighted reward to go(gamma={self.gamma})",
            "ratio": f"{self.weights} weights: exp(sum of l - behaviour) {product}{cap}{normalised}; l: the learner "
            "before the update",
            "refused": f"below an effective sample size of {self.fewest_effective:.0%} of the batch",
            "baseline": baseline,
            "state weights": "gamma^t kept: the gradient of J_gamma" if self.discounted_states else "gamma^t dropped",
            "advantage scale": "none",
            "value error": "no critic"
            if self.baseline == "none"
            else f"{self.value_coefficient} x 0.5 (V - v)^2; target = v of V-trace, truncated at 1",
            "entropy bonus": scheduled_in_words(self.entropy_schedule, self.entropy_coefficient),
            "reduction": "trajectory_sum: sum over steps, mean over trajectories",
            "passes": "1 step per batch of whole episodes",
        }
