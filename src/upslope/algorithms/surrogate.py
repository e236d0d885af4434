"""The importance-weighted surrogate that NPG and TRPO climb: Psi_t, weights, and its value and gradient.

    L(theta) = sum_t w_t [ e^{l_t - b_t} Psi_t + c_H H_t ]

At theta = theta_old its gradient is the policy gradient; the critic plays no part in it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from upslope.algorithms.critic_advantage import gae_signal
from upslope.algorithms.group_baseline import group_signal
from upslope.algorithms.protocol import (
    DISCOUNT_DROPPED,
    Condition,
    Loss,
    NaturalStep,
    Now,
    Passes,
    ScheduleName,
    Stateless,
    Target,
    entropy_bias,
    passes_in_words,
    scheduled,
    scheduled_in_words,
)
from upslope.algorithms.ratios import chosen_log_prob, step_average
from upslope.algorithms.reference_kl import NO_PENALTY
from upslope.estimators import (
    importance_weighted,
    reward_to_go,
    standardise,
    step_mean,
    trajectory_sum,
    weighted_sum,
)
from upslope.trajectory import Batch, Evaluation, Signal, Trajectory

SurrogatePsi: TypeAlias = Literal["gae", "reward_to_go", "group"]
"""GAE of a critic; without one the reward to go, or the total reward less the mean of the others of the group."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NaturalAscent(Stateless):
    """What climbs the surrogate by one natural step per batch; how far that goes is left to NPG and TRPO."""

    gamma: float = 0.99
    """Discount factor per step."""
    psi: SurrogatePsi = "gae"
    """What multiplies the ratio: "gae" with a critic; "reward_to_go" or "group" of whole episodes without one."""
    gae_lambda: float = 0.95
    """1 trusts the returns, 0 trusts the critic."""
    normalize_advantage: bool = True
    """Standardise Psi over the batch. Where the KL bounds the step its spread does not matter, its mean does."""
    damping: float = 0.1
    """Added to the diagonal of the Fisher matrix in the equation for the direction, not in the step's length."""
    conjugate_gradient_iterations: int = 10
    """Fisher-vector products per update, at most."""
    critic_epochs: int = 10
    """Passes of the critic over each batch."""
    critic_minibatches: int = 16
    """Optimiser steps of the critic per pass."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus in what is climbed."""
    entropy_schedule: ScheduleName = "constant"
    """How the entropy bonus moves over the run."""

    def __post_init__(self) -> None:
        """Refuse settings that have no meaning."""
        if self.psi == "group" and self.gamma != 1.0:
            raise ValueError(
                f'psi="group" compares total rewards, which have no discount: set gamma to 1, got {self.gamma}'
            )
        if self.damping < 0.0:
            raise ValueError(f"damping must be at least 0 (0.1 is usual), got {self.damping}")
        if self.conjugate_gradient_iterations < 1:
            raise ValueError(
                "conjugate_gradient_iterations must be at least 1 (10 is usual), got "
                f"{self.conjugate_gradient_iterations}"
            )
        if self.critic_epochs < 1 or self.critic_minibatches < 1:
            raise ValueError(
                f"critic_epochs and critic_minibatches must be at least 1, got {self.critic_epochs} and "
                f"{self.critic_minibatches}"
            )

    def _passes(self, step: NaturalStep) -> Passes:
        """One natural step on the whole batch; then the critic's passes."""
        without_critic = self.psi != "gae"
        return Passes(critic=not without_critic, whole_episodes=without_critic, groups=self.psi == "group", rule=step)

    @property
    def target(self) -> Target:
        """Of the surrogate's gradient g where theta is theta_old; the step then goes along (F + damping)^-1 g."""
        scaled = ("the batch's standard deviation divides the advantage",) if self.normalize_advantage else ()
        with_critic = self.psi == "gae"
        requires: tuple[Condition, ...] = (
            ("on_policy", "exact_critic", "fixed_steps") if with_critic else ("on_policy", "no_time_limit")
        )
        return Target(
            gradient="undiscounted_states",
            per="step" if with_critic else "trajectory",
            requires=requires,
            biased_by=scaled + entropy_bias(self.entropy_coefficient),
            batchwise=self.normalize_advantage,
        )

    def advantage(self, trajectory: Trajectory, value: Tensor | None, next_value: Tensor | None, now: Now) -> Signal:
        """Psi_t, and the critic's target A_t + V_t where there is one."""
        if self.psi == "gae":
            return gae_signal(trajectory, value, next_value, gamma=self.gamma, gae_lambda=self.gae_lambda)
        if self.psi == "group":
            return group_signal(
                trajectory, baseline="leave_one_out", scale="none", epsilon=0.0, reference_kl=NO_PENALTY
            )
        discount, mask = trajectory.discount(self.gamma), trajectory.partial_mask
        return Signal(advantage=reward_to_go(trajectory.reward, discount, trajectory.cut, mask=mask))

    def prepare(self, batch: Batch) -> Batch:
        """The mean over steps of fragments, of whole episodes each one's sum; Psi standardised if asked for."""
        advantage = standardise(batch.advantage, batch.mask) if self.normalize_advantage else batch.advantage
        reduction = step_mean if self.psi == "gae" else trajectory_sum
        return replace(batch, advantage=advantage, weight=reduction(batch.mask, dtype=batch.advantage.dtype))

    def loss(self, batch: Batch, evaluation: Evaluation, now: Now) -> Loss:
        """-L: what a natural step is to make smaller."""
        log_prob = chosen_log_prob(batch, evaluation)
        objective = importance_weighted(log_prob, batch.behaviour_log_prob, batch.advantage)
        per_step, coefficient = -objective, scheduled(self.entropy_schedule, self.entropy_coefficient, now.progress)
        if coefficient != 0.0:
            per_step = per_step - coefficient * evaluation.entropy
        with torch.no_grad():
            metrics = {
                "policy_loss": -weighted_sum(objective, batch.weight),
                "entropy": step_average(evaluation.entropy, batch),
            }
        return Loss(value=weighted_sum(per_step, batch.weight), metrics=metrics)

    def _words(self, step: str) -> dict[str, str]:
        """The estimator in words, and the step as the algorithm takes it."""
        psi = {
            "gae": f"GAE(gamma={self.gamma}, lambda={self.gae_lambda})",
            "reward_to_go": f"reward_to_go(gamma={self.gamma})",
            "group": "total reward of the trajectory (gamma=1) less the mean of the others of its group, at every step",
        }
        fit = (
            f"0.5 (V - target)^2, {passes_in_words(self.critic_epochs, self.critic_minibatches)} after the actor's "
            "step; target = GAE + V"
        )
        with_critic = self.psi == "gae"
        return {
            "Psi": psi[self.psi],
            "state weights": DISCOUNT_DROPPED,
            "advantage scale": "standardised over the batch" if self.normalize_advantage else "none",
            "ratio": "per step, exp(log_prob - behaviour_log_prob), unclipped",
            "value error": fit if with_critic else "no critic",
            "entropy bonus": scheduled_in_words(self.entropy_schedule, self.entropy_coefficient),
            "reduction": "step_mean over the batch" if with_critic else "trajectory_sum over the batch",
            "direction": f"(F + {self.damping}) x = grad L, {self.conjugate_gradient_iterations} iterations of "
            "conjugate gradient",
            "step": step,
            "passes": "1 natural step per batch",
        }
