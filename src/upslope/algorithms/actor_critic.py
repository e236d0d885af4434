"""Actor-critic methods that learn from fragments of trajectories: one-step (Sutton & Barto 13.5) and A2C.

    delta_t = r_t + g_t V'_t - V_t                        one step: Psi_t = delta_t, target = r_t + g_t V'_t
    A_t = delta_t + g_t lambda (1 - c_t) A_{t+1}          A2C: Psi_t = GAE, target = A_t + V_t
    loss = sum_t w_t [ -l_t Psi_t + c_V * 0.5 (V_t - target_t)^2 - c_H H_t ],  w_t = m_t / sum(m)

The two differ in lambda alone (0 for one step), in the length of the fragments, and in gamma^t.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from upslope.algorithms.critic_advantage import gae_signal
from upslope.algorithms.protocol import (
    DISCOUNT_DROPPED,
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
from upslope.algorithms.reference_kl import ReferenceKL
from upslope.estimators import (
    discount_weight,
    score_function,
    squared_value_error,
    standardise,
    step_mean,
    weighted_sum,
)
from upslope.trajectory import Batch, Evaluation, Signal, Trajectory


@dataclass(frozen=True, kw_only=True, slots=True)
class OneStepActorCritic(Stateless):
    """One-step actor-critic: the TD residual is both the critic's error and the actor's Psi."""

    gamma: float = 0.99
    """Discount factor per step."""
    discounted_states: bool = False
    """True keeps the book's I = gamma^t, the gradient of J_gamma; False drops it."""
    value_coefficient: float = 0.5
    """Multiplier of 0.5 (V - target)^2."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus at the start of the run."""
    entropy_schedule: ScheduleName = "constant"
    """How that weight moves over the run."""

    @property
    def passes(self) -> Passes:
        """One step on each fragment."""
        return Passes(behaviour_log_prob=False)

    @property
    def target(self) -> Target:
        """The mean over steps: state weights mu, and so the gradient over the mean length of an episode."""
        return Target(
            gradient="discounted" if self.discounted_states else "undiscounted_states",
            per="step",
            requires=("on_policy", "exact_critic", "fixed_steps"),
            biased_by=entropy_bias(self.entropy_coefficient),
        )

    def advantage(self, trajectory: Trajectory, value: Tensor | None, next_value: Tensor | None, now: Now) -> Signal:
        """delta_t (GAE at lambda = 0), times gamma^t if asked for; the critic's target is delta_t + V_t."""
        signal = gae_signal(trajectory, value, next_value, gamma=self.gamma, gae_lambda=0.0)
        if not self.discounted_states:
            return signal
        weight = discount_weight(trajectory.time, self.gamma, dtype=signal.advantage.dtype)
        return replace(signal, advantage=signal.advantage * weight)

    def prepare(self, batch: Batch) -> Batch:
        """Every step counts the same."""
        return replace(batch, weight=step_mean(batch.mask, dtype=batch.advantage.dtype))

    def loss(self, batch: Batch, evaluation: Evaluation, now: Now) -> Loss:
        """Score function, value error, entropy bonus."""
        bonus = scheduled(self.entropy_schedule, self.entropy_coefficient, now.progress)
        return score_and_value_loss(batch, evaluation, self.value_coefficient, bonus)

    def describe(self) -> Mapping[str, str]:
        """The estimator in words."""
        return {
            "Psi": f"TD residual(gamma={self.gamma})",
            "state weights": "gamma^t kept: the gradient of J_gamma" if self.discounted_states else DISCOUNT_DROPPED,
            "advantage scale": "none",
            "ratio": "none (score function)",
            "value error": f"{self.value_coefficient} x 0.5 (V - target)^2; target = r + gamma V'",
            "entropy bonus": scheduled_in_words(self.entropy_schedule, self.entropy_coefficient),
            "reduction": "step_mean over the fragment",
            "passes": "1 step per fragment",
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class A2C(Stateless):
    """Advantage actor-critic (Mnih et al. 2016, synchronous): one score-function step per short fragment."""

    gamma: float = 0.99
    """Discount factor per step."""
    gae_lambda: float = 1.0
    """1 gives n-step advantages up to the fragment's end."""
    normalize_advantage: bool = False
    """Standardise advantages over the batch."""
    value_coefficient: float = 1.0
    """Multiplier of 0.5 (V - target)^2; SB3's vf_coef=0.5 is 1.0 here."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus at the start of the run."""
    entropy_schedule: ScheduleName = "constant"
    """How that weight moves over the run."""
    reference_kl: ReferenceKL = field(default_factory=lambda: ReferenceKL(place="reward"))
    """The penalty on the distance from a frozen reference; in the reward of each step unless it says otherwise."""

    def __post_init__(self) -> None:
        """Refuse settings that have no meaning."""
        if not self.reference_kl.baselined:
            raise ValueError("reference_kl.baselined=False speaks of a group's baseline, and A2C has a critic")

    @property
    def passes(self) -> Passes:
        """One step on each fragment."""
        return Passes(reference=self.reference_kl.needs, behaviour_log_prob=self.reference_kl.on)

    @property
    def target(self) -> Target:
        """The mean over steps; fragments bootstrap, so that the critic matters at any lambda."""
        scaled = ("the batch's standard deviation divides the advantage",) if self.normalize_advantage else ()
        return Target(
            gradient="undiscounted_states",
            per="step",
            requires=("on_policy", "exact_critic", "fixed_steps"),
            biased_by=scaled + entropy_bias(self.entropy_coefficient) + self.reference_kl.biased_by,
            batchwise=self.normalize_advantage,
            penalty=self.reference_kl.penalty,
        )

    def advantage(self, trajectory: Trajectory, value: Tensor | None, next_value: Tensor | None, now: Now) -> Signal:
        """A_t = GAE(gamma, lambda); the critic's target is A_t + V_t."""
        trajectory = self.reference_kl.rewarded(trajectory)
        return gae_signal(trajectory, value, next_value, gamma=self.gamma, gae_lambda=self.gae_lambda)

    def prepare(self, batch: Batch) -> Batch:
        """Every step counts the same."""
        advantage = standardise(batch.advantage, batch.mask) if self.normalize_advantage else batch.advantage
        return replace(batch, advantage=advantage, weight=step_mean(batch.mask, dtype=batch.advantage.dtype))

    def loss(self, batch: Batch, evaluation: Evaluation, now: Now) -> Loss:
        """Score function, value error, entropy bonus, penalty."""
        bonus = scheduled(self.entropy_schedule, self.entropy_coefficient, now.progress)
        loss = score_and_value_loss(batch, evaluation, self.value_coefficient, bonus)
        return self.reference_kl.added(loss, batch, evaluation)

    def describe(self) -> Mapping[str, str]:
        """The estimator in words."""
        return {
            "Psi": f"GAE(gamma={self.gamma}, lambda={self.gae_lambda})",
            "state weights": DISCOUNT_DROPPED,
            "advantage scale": "standardised over the batch" if self.normalize_advantage else "none",
            "ratio": "none (score function)",
            "reference KL": self.reference_kl.describe(),
            "value error": f"{self.value_coefficient} x 0.5 (V - target)^2; target = GAE + V",
            "entropy bonus": scheduled_in_words(self.entropy_schedule, self.entropy_coefficient),
            "reduction": "step_mean over the batch",
            "passes": "1 step per batch",
        }


def score_and_value_loss(
    batch: Batch, evaluation: Evaluation, value_coefficient: float, entropy_coefficient: float
) -> Loss:
    """sum_t w_t [ -l_t Psi_t + c_V * 0.5 (V_t - target_t)^2 - c_H H_t ] with its parts as metrics."""
    assert evaluation.value is not None
    assert batch.value_target is not None
    policy_loss = -weighted_sum(score_function(evaluation.log_prob, batch.advantage), batch.weight)
    value_loss = weighted_sum(squared_value_error(evaluation.value, batch.value_target), batch.weight)
    entropy = weighted_sum(evaluation.entropy, batch.weight)
    loss = policy_loss + value_coefficient * value_loss
    if entropy_coefficient != 0.0:
        loss = loss - entropy_coefficient * entropy
    metrics = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
    return Loss(value=loss, metrics={name: metric.detach() for name, metric in metrics.items()})
