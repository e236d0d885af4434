"""Recipes for worlds that must be remembered: CartPole whose velocities are hidden."""

from __future__ import annotations

from dataclasses import replace

from upslope.algorithms import PPO
from upslope.collect import EnvironmentConfig
from upslope.policies import ActorCriticConfig, MemoryConfig
from upslope.train import OptimizerConfig, RolloutConfig, Run


def cartpole_hidden_gru() -> Run:
    """PPO with gated recurrent units on CartPole-v1 without velocities."""
    return _hidden("cartpole-hidden-gru", MemoryConfig(kind="gru"))


def cartpole_hidden_lstm() -> Run:
    """PPO with long short-term memory on CartPole-v1 without velocities."""
    return _hidden("cartpole-hidden-lstm", MemoryConfig(kind="lstm"))


def cartpole_hidden_transformer() -> Run:
    """PPO with attention to the last 16 steps on CartPole-v1 without velocities: one memory, and twice the steps."""
    memory = MemoryConfig(kind="transformer", context=16, shared=True)
    return replace(_hidden("cartpole-hidden-transformer", memory), steps=200_000)


def cartpole_hidden_memoryless() -> Run:
    """PPO without memory on CartPole-v1 without velocities: what cannot be seen cannot be learnt."""
    return _hidden("cartpole-hidden-memoryless", None)


def _hidden(name: str, memory: MemoryConfig | None) -> Run:
    return Run(
        recipe=name,
        environment=EnvironmentConfig(id="CartPole-v1", count=8, observation_entries=(0, 2)),
        policy=ActorCriticConfig(hidden=(64,), memory=memory, normalize_observation=True, normalize_reward=True),
        algorithm=PPO(epochs=5, minibatches=4),
        rollout=RolloutConfig(steps=128, row_steps=32),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="linear"),
        steps=100_000,
    )
