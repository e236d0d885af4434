"""Recipes where not every action is valid in every state."""

from __future__ import annotations

from upslope.algorithms import PPO
from upslope.collect import EnvironmentConfig
from upslope.policies import ActorCriticConfig
from upslope.train import EvaluationConfig, OptimizerConfig, RolloutConfig, Run


def taxi_ppo() -> Run:
    """PPO on Taxi-v4 with the masks of valid actions in its info: a table of preferences, 200 thousand steps.

    `--environment.action-mask none` is the same without masks.
    """
    return Run(
        recipe="taxi-ppo",
        environment=EnvironmentConfig(id="Taxi-v4", count=16, action_mask="info"),
        policy=ActorCriticConfig(hidden=()),
        algorithm=PPO(epochs=4, minibatches=8),
        rollout=RolloutConfig(steps=128),
        optimizer=OptimizerConfig(learning_rate=3e-2, schedule="linear"),
        evaluation=EvaluationConfig(episodes=50, final_episodes=200),
        steps=200_000,
        threads=1,
    )
