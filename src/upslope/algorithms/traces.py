"""Eligibility traces (Sutton & Barto 12.2, 13.5, 13.6): every step moves the parameters, towards what led up to it.

    delta_t = r_t + g_t V'_t - V_t                    continuing: r_t - r_bar + V'_t - V_t
    z_w     = gamma lambda_w z_w + grad V_t           w     += alpha_w delta_t z_w
    z_theta = gamma lambda_theta z_theta + I_t grad l_t   theta += alpha_theta delta_t z_theta
                                                      continuing: r_bar += eta alpha_theta delta_t

This is the backward view, which `upslope.train.traces` follows online. `advantage`, `prepare` and `loss` are the
forward view of the same: with the parameters held still, the steps of an episode add up to minus the gradient of the
loss, in which Psi is I_t times GAE and the critic's target is the lambda-return.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from upslope.algorithms.actor_critic import score_and_value_loss
from upslope.algorithms.average_reward import refuse_ends
from upslope.algorithms.critic_advantage import gae_signal
from upslope.algorithms.protocol import Condition, Loss, Now, Passes, State, Stateless, Target, Traces
from upslope.estimators import discount_weight, squared_value_error, step_mean, trajectory_sum, weighted_sum
from upslope.trajectory import Batch, Evaluation, Signal, Trajectory


@dataclass(frozen=True, kw_only=True, slots=True)
class TDLambda(Stateless):
    """TD(lambda) prediction: the critic learns the values of the policy there is, which stays as it is.

    What the two share and the normaliser of observations, which are part of the policy, stay too.
    """

    gamma: float = 0.99
    """Discount factor per step."""
    trace_decay: float = 0.9
    """lambda: 0 is one-step TD, 1 is every-visit Monte Carlo."""

    def __post_init__(self) -> None:
        """Refuse a lambda outside 0 to 1."""
        _check_decays(trace_decay=self.trace_decay)

    @property
    def passes(self) -> Passes:
        """One update per step, of the critic alone; alpha_w is the run's learning rate."""
        traces = Traces(discount=self.gamma, critic_decay=self.gamma * self.trace_decay, actor_decay=None)
        return Passes(rule=traces, behaviour_log_prob=False)

    @property
    def target(self) -> Target:
        """No gradient of the policy: the critic moves towards the mean lambda-return of every state."""
        return Target(gradient="prediction", per="trajectory", requires=("on_policy",))

    def advantage(self, trajectory: Trajectory, value: Tensor | None, next_value: Tensor | None, now: Now) -> Signal:
        """Forward view: how far the lambda-return is from V_t, and the lambda-return."""
        return gae_signal(trajectory, value, next_value, gamma=self.gamma, gae_lambda=self.trace_decay)

    def prepare(self, batch: Batch) -> Batch:
        """Each trajectory's sum counts the same."""
        return replace(batch, weight=trajectory_sum(batch.mask, dtype=batch.advantage.dtype))

    def loss(self, batch: Batch, evaluation: Evaluation, now: Now) -> Loss:
        """0.5 (V_t - G^lambda_t)^2."""
        assert evaluation.value is not None
        assert batch.value_target is not None
        error = weighted_sum(squared_value_error(evaluation.value, batch.value_target), batch.weight)
        return Loss(value=error, metrics={"value_loss": error.detach()})

    def describe(self) -> Mapping[str, str]:
        """The estimator in words."""
        return {
            "Psi": "none: the policy stays as it is",
            "value error": f"TD residual(gamma={self.gamma}) along the trace(lambda={self.trace_decay})",
            "reduction": "mean over the environments' traces",
            "passes": "1 step per step of each environment",
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class ActorCriticLambda:
    """Actor-critic with eligibility traces for both, online; episodic, or continuing with an average reward."""

    gamma: float = 0.99
    """Discount factor per step; 1 where there is an average reward."""
    actor_trace_decay: float = 0.9
    """lambda_theta, of the actor's trace."""
    critic_trace_decay: float = 0.9
    """lambda_w, of the critic's trace."""
    discounted_states: bool = False
    """True keeps the book's I = gamma^t, the gradient of J_gamma; False drops it."""
    value_ratio: float = 1.0
    """alpha_w / alpha_theta: the critic's step size as a multiple of the learning rate, which is the actor's (sgd)."""
    average_reward_ratio: float | None = None
    """eta = alpha_r / alpha_theta: a task without end, whose average reward is learnt with this multiple of the
    learning rate; None for episodes and gamma."""

    def __post_init__(self) -> None:
        """Refuse settings that have no meaning."""
        _check_decays(actor_trace_decay=self.actor_trace_decay, critic_trace_decay=self.critic_trace_decay)
        if not self.value_ratio > 0.0:
            raise ValueError(f"value_ratio must be positive, got {self.value_ratio}")
        if self.average_reward_ratio is None:
            return
        if not self.average_reward_ratio > 0.0:
            raise ValueError(
                f"average_reward_ratio must be positive, or None for episodes, got {self.average_reward_ratio}"
            )
        if self.gamma != 1.0 or self.discounted_states:
            raise ValueError(
                "an average reward goes without discount: with average_reward_ratio, set gamma to 1 and "
                f"discounted_states to False (they are {self.gamma} and {self.discounted_states})"
            )

    @property
    def continuing(self) -> bool:
        """Whether what is learnt is the average reward of a task without end."""
        return self.average_reward_ratio is not None

    @property
    def passes(self) -> Passes:
        """One update per step of each environment."""
        return Passes(
            rule=Traces(
                discount=self.gamma,
                actor_decay=self.gamma * self.actor_trace_decay,
                critic_decay=self.gamma * self.critic_trace_decay,
                state_discount=self.gamma if self.discounted_states else 1.0,
                value_ratio=self.value_ratio,
                average_reward_ratio=self.average_reward_ratio,
            ),
            behaviour_log_prob=False,
        )

    @property
    def target(self) -> Target:
        """Of an episode's steps together, at fixed parameters. At lambda = 1 the critic is a mere baseline.

        In a task without end it is the mean over steps.
        """
        if self.continuing:
            return Target(gradient="average_reward", per="trajectory", requires=("on_policy", "exact_critic"))
        critic: Condition = "exact_critic_at_limit" if self.actor_trace_decay == 1.0 else "exact_critic"
        return Target(
            gradient="discounted" if self.discounted_states else "undiscounted_states",
            per="trajectory",
            requires=("on_policy", critic),
        )

    def initial_state(self) -> State:
        """r_bar, where there is one."""
        return {"average_reward": 0.0} if self.continuing else {}

    def advantage(self, trajectory: Trajectory, value: Tensor | None, next_value: Tensor | None, now: Now) -> Signal:
        """Forward view: I_t times GAE(lambda_theta), and the lambda_w-return; r_bar stays where it is."""
        metrics = dict[str, Tensor]()
        if self.continuing:
            refuse_ends(trajectory)
            metrics["average_reward"] = torch.tensor(now.state["average_reward"], dtype=torch.float64)
            trajectory = replace(trajectory, reward=trajectory.reward - now.state["average_reward"])
        values = (trajectory, value, next_value)
        psi = gae_signal(*values, gamma=self.gamma, gae_lambda=self.actor_trace_decay).advantage
        if self.discounted_states:
            psi = psi * discount_weight(trajectory.time, self.gamma, dtype=psi.dtype)
        critic = gae_signal(*values, gamma=self.gamma, gae_lambda=self.critic_trace_decay)
        return replace(critic, advantage=psi, metrics=metrics)

    def prepare(self, batch: Batch) -> Batch:
        """Each trajectory's sum counts the same; without trajectories, each step."""
        reduction = step_mean if self.continuing else trajectory_sum
        return replace(batch, weight=reduction(batch.mask, dtype=batch.advantage.dtype))

    def loss(self, batch: Batch, evaluation: Evaluation, now: Now) -> Loss:
        """Score function and value error."""
        return score_and_value_loss(batch, evaluation, self.value_ratio, 0.0)

    def adapt(self, state: State, metrics: Mapping[str, float]) -> State:
        """The average reward as the update left it."""
        return {"average_reward": metrics["average_reward"]} if self.continuing else state

    def describe(self) -> Mapping[str, str]:
        """The estimator in words."""
        kept = "I = gamma^t kept: the gradient of J_gamma" if self.discounted_states else "gamma^t dropped"
        residual = f"TD residual(gamma={self.gamma})"
        if self.continuing:
            kept = "none needed: every step counts the same"
            residual = f"TD residual(average reward, eta={self.average_reward_ratio})"
        return {
            "Psi": f"{residual} along the trace(lambda={self.actor_trace_decay})",
            "state weights": kept,
            "advantage scale": "none",
            "ratio": "none (score function)",
            "value error": f"{residual} along the trace(lambda={self.critic_trace_decay}), "
            f"{self.value_ratio} x the step",
            "reduction": "mean over the environments' traces",
            "passes": "1 step per step of each environment",
        }


def _check_decays(**decays: float) -> None:
    for name, decay in decays.items():
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"{name} is a lambda from 0 to 1, got {decay}")
