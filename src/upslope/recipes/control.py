"""Complete, vetted configurations for Gymnasium environments. Each function is a recipe: call it, or train it by name.

Where a setting comes from a published one, the docstring says so. Steps are environment steps over all environments.
"""

from __future__ import annotations

from upslope.algorithms import A2C, PPO, OneStepActorCritic, Reinforce
from upslope.collect import EnvironmentConfig
from upslope.policies import ActorCriticConfig
from upslope.train import EvaluationConfig, OptimizerConfig, RolloutConfig, Run


def cartpole_reinforce() -> Run:
    """REINFORCE with reward to go on CartPole-v1."""
    return Run(
        recipe="cartpole-reinforce",
        environment=EnvironmentConfig(id="CartPole-v1", count=8),
        policy=ActorCriticConfig(critic=False),
        algorithm=Reinforce(psi="reward_to_go", normalize_advantage=True),
        rollout=RolloutConfig(steps=None, episodes=16),
        optimizer=OptimizerConfig(learning_rate=3e-3, max_gradient_norm=None),
        steps=400_000,
    )


def cartpole_baseline() -> Run:
    """REINFORCE with a learned baseline on CartPole-v1."""
    return Run(
        recipe="cartpole-baseline",
        environment=EnvironmentConfig(id="CartPole-v1", count=8),
        algorithm=Reinforce(psi="baselined", normalize_advantage=True),
        rollout=RolloutConfig(steps=None, episodes=16),
        optimizer=OptimizerConfig(learning_rate=3e-3, max_gradient_norm=None),
        steps=400_000,
    )


def cartpole_actor_critic() -> Run:
    """One-step actor-critic on CartPole-v1: a step of learning for every step of 32 environments."""
    return Run(
        recipe="cartpole-actor-critic",
        environment=EnvironmentConfig(id="CartPole-v1", count=32),
        algorithm=OneStepActorCritic(gamma=0.98),
        rollout=RolloutConfig(steps=1),
        optimizer=OptimizerConfig(learning_rate=3e-4, schedule="linear"),
        steps=500_000,
    )


def cartpole_a2c() -> Run:
    """A2C on CartPole-v1: fragments of 16 steps, RMSprop, standardised advantages."""
    return Run(
        recipe="cartpole-a2c",
        environment=EnvironmentConfig(id="CartPole-v1", count=8),
        algorithm=A2C(gamma=0.98, gae_lambda=0.9, normalize_advantage=True),
        rollout=RolloutConfig(steps=16),
        optimizer=OptimizerConfig(kind="rmsprop", learning_rate=1e-3, schedule="linear"),
        steps=400_000,
    )


def cartpole_ppo() -> Run:
    """PPO on CartPole-v1: 8 environments, short fragments, many passes, everything annealed (RL Zoo's settings)."""
    return Run(
        recipe="cartpole-ppo",
        environment=EnvironmentConfig(id="CartPole-v1", count=8),
        algorithm=PPO(
            gamma=0.98, gae_lambda=0.8, epochs=20, minibatches=1, clip_schedule="linear", value_coefficient=1.0
        ),
        rollout=RolloutConfig(steps=32),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="linear"),
        steps=100_000,
    )


def acrobot_ppo() -> Run:
    """PPO on Acrobot-v1: 16 environments, normalised observations (RL Zoo's settings)."""
    return Run(
        recipe="acrobot-ppo",
        environment=EnvironmentConfig(id="Acrobot-v1", count=16),
        policy=ActorCriticConfig(normalize_observation=True, normalize_reward=True),
        algorithm=PPO(gae_lambda=0.94, epochs=4, minibatches=64, value_coefficient=1.0),
        rollout=RolloutConfig(steps=256),
        optimizer=OptimizerConfig(learning_rate=3e-4),
        steps=500_000,
    )


def mountaincar_continuous_ppo() -> Run:
    """PPO on MountainCarContinuous-v0: a wide first distribution and a long horizon carry it up the hill."""
    return Run(
        recipe="mountaincar-continuous-ppo",
        environment=EnvironmentConfig(id="MountainCarContinuous-v0", count=4),
        policy=ActorCriticConfig(normalize_observation=True, normalize_reward=True, log_std_init=0.5),
        algorithm=PPO(gamma=0.999, gae_lambda=0.95, epochs=10, minibatches=16),
        rollout=RolloutConfig(steps=1000),
        optimizer=OptimizerConfig(learning_rate=3e-4),
        steps=200_000,
    )


def pendulum_ppo() -> Run:
    """PPO on Pendulum-v1, which only ever ends by truncation: the place to see whether that is handled."""
    return Run(
        recipe="pendulum-ppo",
        environment=EnvironmentConfig(id="Pendulum-v1", count=1),
        policy=ActorCriticConfig(normalize_observation=True, normalize_reward=True),
        algorithm=PPO(epochs=10, minibatches=32),
        rollout=RolloutConfig(steps=2048),
        optimizer=OptimizerConfig(learning_rate=3e-4, schedule="linear"),
        steps=150_000,
    )


def lunarlander_ppo() -> Run:
    """PPO on LunarLander-v3 (RL Zoo's settings)."""
    return Run(
        recipe="lunarlander-ppo",
        environment=EnvironmentConfig(id="LunarLander-v3", count=16),
        algorithm=PPO(
            gamma=0.999,
            gae_lambda=0.98,
            epochs=4,
            minibatches=256,
            value_coefficient=1.0,
            entropy_coefficient=0.01,
        ),
        rollout=RolloutConfig(steps=1024),
        optimizer=OptimizerConfig(learning_rate=3e-4),
        steps=1_000_000,
    )


def bipedalwalker_ppo() -> Run:
    """PPO on BipedalWalker-v3 (RL Zoo's settings)."""
    return Run(
        recipe="bipedalwalker-ppo",
        environment=EnvironmentConfig(id="BipedalWalker-v3", count=32),
        policy=ActorCriticConfig(normalize_observation=True, normalize_reward=True),
        algorithm=PPO(gamma=0.999, clip=0.18, epochs=10, minibatches=1024, value_coefficient=1.0),
        rollout=RolloutConfig(steps=2048),
        optimizer=OptimizerConfig(learning_rate=3e-4),
        steps=5_000_000,
    )


def hopper_ppo() -> Run:
    """PPO on MuJoCo's Hopper-v5 with CleanRL's continuous settings."""
    return _mujoco("hopper-ppo", "Hopper-v5")


def halfcheetah_ppo() -> Run:
    """PPO on MuJoCo's HalfCheetah-v5 with CleanRL's continuous settings."""
    return _mujoco("halfcheetah-ppo", "HalfCheetah-v5")


def walker2d_ppo() -> Run:
    """PPO on MuJoCo's Walker2d-v5 with CleanRL's continuous settings."""
    return _mujoco("walker2d-ppo", "Walker2d-v5")


def breakout_ppo() -> Run:
    """PPO on Atari Breakout from pixels: Nature-CNN, four stacked grey frames, CleanRL's PPO settings for Atari.

    Unlike CleanRL, an episode is a whole game of at most 5 minutes and not one life, balls are served by the
    environment, rewards are divided by the spread of returns where CleanRL takes their sign, and a tenth of its 10
    million steps is taken.
    """
    return Run(
        recipe="breakout-ppo",
        environment=EnvironmentConfig(id="ALE/Breakout-v5", count=8, preprocessing="atari", time_limit=4500),
        policy=ActorCriticConfig(encoder="nature_cnn", shared=True, hidden=(), normalize_reward=True),
        algorithm=PPO(clip=0.1, value_clip=0.1, entropy_coefficient=0.01),
        rollout=RolloutConfig(steps=128),
        optimizer=OptimizerConfig(learning_rate=2.5e-4, schedule="linear"),
        evaluation=EvaluationConfig(times=5, episodes=4, environments=4, final_episodes=8),
        steps=1_000_000,
        threads=2,
    )


def _mujoco(recipe: str, environment: str) -> Run:
    return Run(
        recipe=recipe,
        environment=EnvironmentConfig(id=environment, count=1),
        policy=ActorCriticConfig(normalize_observation=True, normalize_reward=True),
        algorithm=PPO(epochs=10, minibatches=32, value_clip=0.2),
        rollout=RolloutConfig(steps=2048),
        optimizer=OptimizerConfig(learning_rate=3e-4, schedule="linear"),
        steps=1_000_000,
    )
