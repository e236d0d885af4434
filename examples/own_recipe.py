"""A recipe of one's own: an environment, an algorithm and all settings, as a function that returns a `Run`.

    upslope train examples/own_recipe.py:short_pole
    upslope train examples/own_recipe.py:short_pole --algorithm.psi_scale 0.5 --seed 2
    upslope resume runs/short-pole-seed1 --recipe examples/own_recipe.py:short_pole

The environment is registered with Gymnasium when this file is read. The algorithm is A2C with Psi scaled by a constant
that is an option like any other; resuming needs the file again, since its class is not the library's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import gymnasium
from gymnasium.envs.classic_control import CartPoleEnv
from torch import Tensor

from upslope import EnvironmentConfig, OptimizerConfig, RolloutConfig, Run
from upslope.algorithms import Loss, Now, Passes, Target
from upslope.algorithms.actor_critic import score_and_value_loss
from upslope.estimators import gae, step_mean
from upslope.trajectory import Batch, Evaluation, Signal, Trajectory


class ShortPole(CartPoleEnv):
    """CartPole with a pole that falls faster."""

    def __init__(self, length: float = 0.25, render_mode: str | None = None) -> None:
        super().__init__(render_mode=render_mode)
        self.length = length
        self.polemass_length = self.masspole * length


if "ShortPole-v0" not in gymnasium.registry:
    gymnasium.register("ShortPole-v0", entry_point=ShortPole, max_episode_steps=200)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaledActorCritic:
    """A2C with a constant in front of the advantage."""

    gamma: float = 0.99
    """Discount factor per step."""
    gae_lambda: float = 0.95
    """1 trusts the returns, 0 trusts the critic."""
    psi_scale: float = 1.0
    """Multiplier of the advantage, against the critic's and the entropy's weight."""
    value_coefficient: float = 0.5
    """Multiplier of 0.5 (V - target)^2."""
    entropy_coefficient: float = 0.01
    """Weight of the entropy bonus."""

    @property
    def passes(self) -> Passes:
        return Passes()

    @property
    def target(self) -> Target:
        return Target(
            gradient="undiscounted_states",
            per="step",
            factor=self.psi_scale,
            requires=("on_policy", "exact_critic", "fixed_steps"),
            biased_by=("the entropy bonus adds its own gradient",) if self.entropy_coefficient != 0.0 else (),
        )

    def initial_state(self) -> Mapping[str, float]:
        return {}

    def advantage(self, trajectory: Trajectory, value: Tensor | None, next_value: Tensor | None, now: Now) -> Signal:
        assert value is not None
        assert next_value is not None
        discount = trajectory.discount(self.gamma)
        advantage = gae(
            trajectory.reward,
            discount,
            value,
            next_value,
            trajectory.cut,
            gae_lambda=self.gae_lambda,
            mask=trajectory.partial_mask,
        )
        return Signal(advantage=self.psi_scale * advantage, value_target=advantage + value)

    def prepare(self, batch: Batch) -> Batch:
        return replace(batch, weight=step_mean(batch.mask))

    def loss(self, batch: Batch, evaluation: Evaluation, now: Now) -> Loss:
        return score_and_value_loss(batch, evaluation, self.value_coefficient, self.entropy_coefficient)

    def adapt(self, state: Mapping[str, float], metrics: Mapping[str, float]) -> Mapping[str, float]:
        return state

    def describe(self) -> Mapping[str, str]:
        return {
            "Psi": f"{self.psi_scale} x GAE(gamma={self.gamma}, lambda={self.gae_lambda})",
            "ratio": "none (score function)",
            "reduction": "step_mean over the batch",
        }


def short_pole() -> Run:
    """The scaled actor-critic on a pole half as long as usual."""
    return Run(
        recipe="short-pole",
        environment=EnvironmentConfig(id="ShortPole-v0", count=8),
        algorithm=ScaledActorCritic(),
        rollout=RolloutConfig(steps=16),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="linear"),
        steps=100_000,
    )
