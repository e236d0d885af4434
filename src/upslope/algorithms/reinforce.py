"""REINFORCE (Williams 1992) with any of the six choices of Psi_t, over whole trajectories.

    grad J = E[ sum_t gamma^t grad l_t Psi_t ]
    loss = sum_{b,t} w_bt [ -gamma^t l_t Psi_t + c_V * 0.5 (V_t - target_t)^2 - c_H H_t ],  w_bt = m_bt / N

With psi="baselined" this is REINFORCE with a learned baseline (Sutton & Barto section 13.4). Choices that have a critic
bootstrap from it at a time limit. "total_reward" and "reward_to_go" have none and take the time limit as part of the
task: what would follow counts as 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from torch import Tensor

from upslope.algorithms.protocol import (
    DISCOUNT_DROPPED,
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
from upslope.algorithms.ratios import chosen_log_prob, step_average
from upslope.algorithms.reference_kl import ReferenceKL
from upslope.estimators import (
    baselined,
    discount_weight,
    gae,
    lambda_return,
    reward_to_go,
    score_function,
    squared_value_error,
    standardise,
    total_reward,
    trajectory_sum,
    weighted_sum,
)
from upslope.trajectory import Batch, Evaluation, Signal, Trajectory

Psi: TypeAlias = Literal["total_reward", "reward_to_go", "baselined", "action_value", "advantage", "td_residual"]
"""What multiplies the score function."""

_WITHOUT_CRITIC = ("total_reward", "reward_to_go")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reinforce(Stateless):
    """The score-function estimator over whole episodes; one optimiser step per batch."""

    gamma: float = 0.99
    """Discount factor per step."""
    psi: Psi = "reward_to_go"
    """What multiplies the score: total_reward, reward_to_go, baselined, action_value, advantage or td_residual."""
    gae_lambda: float = 0.95
    """For action_value (lambda-return) and advantage (GAE)."""
    discounted_states: bool = False
    """True keeps the theorem's gamma^t: the gradient of J_gamma. False, as nearly everyone does, drops it."""
    normalize_advantage: bool = False
    """Standardise Psi over the batch: steadier steps, no longer unbiased."""
    value_coefficient: float = 0.5
    """Multiplier of 0.5 (V - target)^2, where psi uses a critic."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus at the start of the run."""
    entropy_schedule: ScheduleName = "constant"
    """How that weight moves over the run."""
    reference_kl: ReferenceKL = field(default_factory=lambda: ReferenceKL(place="reward"))
    """The penalty on the distance from a frozen reference; in the reward of each step unless it says otherwise."""

    def __post_init__(self) -> None:
        """Refuse settings that have no meaning."""
        if not self.reference_kl.baselined:
            raise ValueError("reference_kl.baselined=False speaks of a group's baseline, and Reinforce has none")

    @property
    def passes(self) -> Passes:
        """One step on whole episodes."""
        return Passes(
            critic=self.psi not in _WITHOUT_CRITIC,
            whole_episodes=True,
            reference=self.reference_kl.needs,
            whole_rows=self.reference_kl.needs == "distribution",
        )

    @property
    def target(self) -> Target:
        """The sum over each whole trajectory; which critics leave the mean alone depends on Psi.

        A baseline may be any function of the state, and GAE at lambda = 1 is one: there the critic matters only where a
        time limit cuts the episode. Choices without a critic take a time limit as part of the task.
        """
        with_any_critic = self.psi == "baselined" or (
            self.psi in ("action_value", "advantage") and self.gae_lambda == 1.0
        )
        requires: tuple[Condition, ...] = ("on_policy",)
        if self.psi in _WITHOUT_CRITIC:
            requires += ("no_time_limit",)
        else:
            requires += ("exact_critic_at_limit",) if with_any_critic else ("exact_critic",)
        discounted = self.discounted_states or self.psi == "total_reward"
        biases = ("the batch's standard deviation divides Psi",) if self.normalize_advantage else ()
        biases += entropy_bias(self.entropy_coefficient)
        return Target(
            gradient="discounted" if discounted else "undiscounted_states",
            per="trajectory",
            requires=requires,
            biased_by=biases + self.reference_kl.biased_by,
            batchwise=self.normalize_advantage,
            penalty=self.reference_kl.penalty,
        )

    def advantage(self, trajectory: Trajectory, value: Tensor | None, next_value: Tensor | None, now: Now) -> Signal:
        """Psi_t by the chosen row of the table, times gamma^t if asked for."""
        trajectory = self.reference_kl.rewarded(trajectory)
        reward, cut, discount = trajectory.reward, trajectory.cut, trajectory.discount(self.gamma)
        mask, target = trajectory.partial_mask, None
        if self.psi == "total_reward":
            psi = total_reward(reward, discount, cut, mask=mask)
        elif self.psi == "reward_to_go":
            psi = reward_to_go(reward, discount, cut, mask=mask)
        else:
            assert value is not None
            assert next_value is not None
            if self.psi == "baselined":
                target = reward_to_go(reward, discount, cut, bootstrap=next_value, mask=mask)
                psi = baselined(target, value)
            else:
                decay = 0.0 if self.psi == "td_residual" else self.gae_lambda
                target = lambda_return(reward, discount, next_value, cut, trace_decay=self.gae_lambda, mask=mask)
                psi = target
                if self.psi != "action_value":
                    psi = gae(reward, discount, value, next_value, cut, gae_lambda=decay, mask=mask)
        if self.discounted_states and self.psi != "total_reward":
            psi = psi * discount_weight(trajectory.time, self.gamma, dtype=psi.dtype)
        return Signal(advantage=psi, value_target=target)

    def prepare(self, batch: Batch) -> Batch:
        """Each trajectory's sum counts the same."""
        advantage = standardise(batch.advantage, batch.mask) if self.normalize_advantage else batch.advantage
        return replace(batch, advantage=advantage, weight=trajectory_sum(batch.mask, dtype=batch.advantage.dtype))

    def loss(self, batch: Batch, evaluation: Evaluation, now: Now) -> Loss:
        """The negative score-function objective, plus the critic's error and the entropy bonus."""
        coefficient = scheduled(self.entropy_schedule, self.entropy_coefficient, now.progress)
        return episode_loss(
            batch,
            evaluation,
            value_coefficient=self.value_coefficient,
            entropy_coefficient=coefficient,
            reference_kl=self.reference_kl,
        )

    def describe(self) -> Mapping[str, str]:
        """The estimator in words."""
        kept = "gamma^t kept: the gradient of J_gamma" if self.discounted_states else DISCOUNT_DROPPED
        if self.psi == "total_reward":
            kept = "none needed: gamma is inside the return"
        with_lambda = self.psi in ("action_value", "advantage")
        return {
            "Psi": f"{self.psi}(gamma={self.gamma}" + (f", lambda={self.gae_lambda})" if with_lambda else ")"),
            "state weights": kept,
            "advantage scale": "standardised over the batch" if self.normalize_advantage else "none",
            "ratio": "none (score function)",
            "KL": self.reference_kl.describe(),
            "value error": self._describe_value_error(),
            "entropy bonus": scheduled_in_words(self.entropy_schedule, self.entropy_coefficient),
            "reduction": "trajectory_sum: sum over steps, mean over trajectories",
            "passes": "1 step per batch of whole episodes",
        }

    def _describe_value_error(self) -> str:
        if not self.passes.critic:
            return "no critic"
        target = "reward to go" if self.psi == "baselined" else f"lambda-return(lambda={self.gae_lambda})"
        return f"{self.value_coefficient} x 0.5 (V - target)^2; target = {target}"


def episode_loss(
    batch: Batch,
    evaluation: Evaluation,
    *,
    value_coefficient: float,
    entropy_coefficient: float,
    reference_kl: ReferenceKL,
) -> Loss:
    """sum_t w_t [ -l_t Psi_t + penalty + c_V * 0.5 (V_t - target_t)^2 - c_H H_t ], and its parts as means over steps.

    Args:
        batch: with the weights of the reduction, and the critic's targets where there is a critic.
        evaluation: of the policy.
        value_coefficient: c_V.
        entropy_coefficient: c_H, as it stands now.
        reference_kl: whose penalty may be a term of the loss.
    """
    log_prob = chosen_log_prob(batch, evaluation)
    objective = score_function(log_prob, batch.advantage)
    per_step = -objective
    metrics: dict[str, Tensor] = {}
    penalty = reference_kl.of_loss(batch, evaluation, log_prob)
    if penalty is not None:
        per_step = per_step + penalty
    distance = reference_kl.watched(batch, log_prob, penalty)
    if distance is not None:
        metrics["reference_kl"] = step_average(distance, batch)
    if batch.value_target is not None and evaluation.value is not None:
        value_error = squared_value_error(evaluation.value, batch.value_target)
        per_step = per_step + value_coefficient * value_error
        metrics["value_loss"] = step_average(value_error, batch)
    if entropy_coefficient != 0.0:
        per_step = per_step - entropy_coefficient * evaluation.entropy
    metrics["policy_loss"] = -weighted_sum(objective.detach(), batch.weight)
    metrics["entropy"] = step_average(evaluation.entropy, batch)
    return Loss(value=weighted_sum(per_step, batch.weight), metrics=metrics)
