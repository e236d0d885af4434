"""Complete, vetted configurations of the natural policy gradient and of TRPO. Each function is a recipe.

The optimiser's learning rate is the critic's: the actor moves by natural steps alone.
"""

from __future__ import annotations

from upslope.algorithms import NPG, TRPO
from upslope.collect import EnvironmentConfig
from upslope.policies import ActorCriticConfig
from upslope.train import OptimizerConfig, RolloutConfig, Run


def cartpole_trpo() -> Run:
    """TRPO on CartPole-v1: 1024 steps per update from 8 environments, 20 passes of the critic."""
    return Run(
        recipe="cartpole-trpo",
        environment=EnvironmentConfig(id="CartPole-v1", count=8),
        algorithm=TRPO(critic_epochs=20, critic_minibatches=4),
        rollout=RolloutConfig(steps=128),
        optimizer=OptimizerConfig(learning_rate=1e-3, max_gradient_norm=None),
        steps=100_000,
    )


def cartpole_npg() -> Run:
    """The natural policy gradient on CartPole-v1: as `cartpole_trpo`, without a line search."""
    return Run(
        recipe="cartpole-npg",
        environment=EnvironmentConfig(id="CartPole-v1", count=8),
        algorithm=NPG(critic_epochs=20, critic_minibatches=4),
        rollout=RolloutConfig(steps=128),
        optimizer=OptimizerConfig(learning_rate=1e-3, max_gradient_norm=None),
        steps=100_000,
    )


def pendulum_trpo() -> Run:
    """TRPO on Pendulum-v1, whose episodes only ever end by truncation."""
    return Run(
        recipe="pendulum-trpo",
        environment=EnvironmentConfig(id="Pendulum-v1", count=4),
        policy=ActorCriticConfig(normalize_observation=True, normalize_reward=True),
        algorithm=TRPO(gamma=0.9, max_divergence=0.02, critic_epochs=20),
        rollout=RolloutConfig(steps=512),
        optimizer=OptimizerConfig(learning_rate=1e-3, max_gradient_norm=None),
        steps=200_000,
    )


def hopper_trpo() -> Run:
    """TRPO on MuJoCo's Hopper-v5: normalised observations, a wider trust region than RL Zoo's."""
    return _mujoco("hopper-trpo", "Hopper-v5")


def halfcheetah_trpo() -> Run:
    """TRPO on MuJoCo's HalfCheetah-v5, as `hopper_trpo`."""
    return _mujoco("halfcheetah-trpo", "HalfCheetah-v5")


def _mujoco(recipe: str, environment: str) -> Run:
    return Run(
        recipe=recipe,
        environment=EnvironmentConfig(id=environment, count=1),
        policy=ActorCriticConfig(normalize_observation=True, normalize_reward=True),
        algorithm=TRPO(max_divergence=0.02, conjugate_gradient_iterations=15),
        rollout=RolloutConfig(steps=2048),
        optimizer=OptimizerConfig(learning_rate=1e-3, max_gradient_norm=None),
        steps=1_000_000,
    )
