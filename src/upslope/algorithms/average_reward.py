"""Continuing tasks: whatever learns from advantages, on differential values instead of discounted ones.

    delta_t = r_t - r_bar + V'_t - V_t                      differential TD residual
    A_t     = delta_t + lambda (1 - c_t) A_{t+1}            differential GAE; target = A_t + V_t
    r_bar  += rate * mean(delta)                            after the update; at first the mean reward

Sutton & Barto 10.3 and 13.6; Wan, Naik & Sutton (2021) for r_bar by the TD residual; Ma et al. (2021) for PPO and for
holding the mean of V, which nothing else determines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from torch import Tensor

from upslope.algorithms.actor_critic import A2C, OneStepActorCritic
from upslope.algorithms.ppo import PPO
from upslope.algorithms.protocol import Loss, Now, Passes, State, Target, Undiscounted
from upslope.errors import UsageError
from upslope.estimators import differential_td_residual
from upslope.trajectory import Batch, Evaluation, Signal, Trajectory

Discounted: TypeAlias = PPO | A2C | OneStepActorCritic
"""Algorithms that need nothing but advantages of fragments: at gamma = 1, of r - r_bar, they follow the average."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AverageReward(Undiscounted):
    """An actor-critic or PPO for a task without end: maximises the average reward per step."""

    method: Discounted = field(default_factory=lambda: PPO(gamma=1.0))
    """What makes a loss of the differential advantages; its gamma must be 1."""
    average_reward_rate: float = 0.1
    """How far each update moves r_bar towards what it saw: r_bar += rate * mean(delta)."""
    value_centring: float = 0.1
    """Lower the critic's targets by this share of their mean: differential values are only known up to a constant, and
    this one keeps their mean at 0. No advantage depends on it."""

    def __post_init__(self) -> None:
        """Refuse settings that have no meaning."""
        if self.method.gamma != 1.0:
            raise ValueError(
                f"an average reward goes without discount: set gamma of {type(self.method).__name__} to 1 "
                f"(it is {self.method.gamma})"
            )
        if isinstance(self.method, OneStepActorCritic) and self.method.discounted_states:
            raise ValueError("without discount gamma^t is 1: leave discounted_states False")
        penalty = None if isinstance(self.method, OneStepActorCritic) else self.method.reference_kl
        if penalty is not None and penalty.on and penalty.place == "reward":
            raise ValueError(
                "a penalty in the reward lowers the average that is learnt from, which r_bar would not know: set place "
                f'of reference_kl of {type(self.method).__name__} to "loss"'
            )
        for name, share in (
            ("average_reward_rate", self.average_reward_rate),
            ("value_centring", self.value_centring),
        ):
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"{name} is a share from 0 to 1, got {share}")

    @property
    def passes(self) -> Passes:
        """Those of the method."""
        return self.method.passes

    @property
    def target(self) -> Target:
        """The mean over steps is grad r_bar itself; r_bar is one number, a baseline that need not be right."""
        inner = self.method.target
        requires = tuple(condition for condition in inner.requires if condition != "fixed_steps")
        return replace(inner, gradient="average_reward", per="trajectory", requires=requires)

    def initial_state(self) -> State:
        """What the method carries; r_bar is not known before the first update."""
        return self.method.initial_state()

    def advantage(self, trajectory: Trajectory, value: Tensor | None, next_value: Tensor | None, now: Now) -> Signal:
        """The method's Psi and target, of rewards less the average one; nothing is discounted."""
        assert value is not None
        assert next_value is not None
        refuse_ends(trajectory)
        reward, mask = trajectory.reward, trajectory.mask
        known = "average_reward" in now.state
        average = now.state["average_reward"] if known else float(reward[mask].mean())
        signal = self.method.advantage(replace(trajectory, reward=reward - average), value, next_value, now)
        assert signal.value_target is not None
        residual = differential_td_residual(reward, average, value, next_value)[mask].mean()
        moved = average + self.average_reward_rate * residual if known else reward[mask].mean()
        excess = self.value_centring * signal.value_target[mask].mean()
        return replace(
            signal,
            value_target=signal.value_target - excess,
            metrics={**signal.metrics, "average_reward": moved},
        )

    def prepare(self, batch: Batch) -> Batch:
        """As the method does."""
        return self.method.prepare(batch)

    def loss(self, batch: Batch, evaluation: Evaluation, now: Now) -> Loss:
        """The method's."""
        return self.method.loss(batch, evaluation, now)

    def adapt(self, state: State, metrics: Mapping[str, float]) -> State:
        """What the method carries, and r_bar."""
        return {**self.method.adapt(state, metrics), "average_reward": metrics["average_reward"]}

    def describe(self) -> Mapping[str, str]:
        """The estimator in words."""
        words = dict(self.method.describe())
        return {
            "method": type(self.method).__name__,
            **words,
            "Psi": words["Psi"] + " of r - r_bar: differential",
            "average reward": f"r_bar += {self.average_reward_rate} x mean TD residual; first the mean reward",
            "value error": f"{words['value error']}, less {self.value_centring} x the mean target",
        }


def refuse_ends(trajectory: Trajectory) -> None:
    """An average reward is one of a task without end.

    Raises:
        UsageError: if a step terminated.
    """
    if bool(trajectory.terminated.any()):
        raise UsageError(
            "a step of the environment ended its episode for good, and an average reward is that of a task without "
            "end: take an algorithm with a discount (PPO, A2C, ActorCriticLambda without average_reward_ratio), or an "
            "environment that never terminates (with environment.truncation 'bootstrap', if a time limit did it)"
        )
