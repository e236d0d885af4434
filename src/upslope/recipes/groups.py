"""Agents without a critic: groups of episodes (GRPO, RLOO), behaviour cloning, and preferences between segments.

The recipes of given data need files, which their docstrings say how to make.
"""

from __future__ import annotations

from pathlib import Path

from upslope.algorithms import GRPO, RLOO, SFT, Preference
from upslope.collect import EnvironmentConfig
from upslope.collect.given_data import RecordedConfig, SegmentPairsConfig
from upslope.policies import ActorCriticConfig
from upslope.train import EvaluationConfig, OptimizerConfig, RolloutConfig, Run

_ACTOR = ActorCriticConfig(critic=False)


def cartpole_grpo() -> Run:
    """GRPO on CartPole-v1: two groups of eight episodes per update, each from a start of its own."""
    return Run(
        recipe="cartpole-grpo",
        environment=EnvironmentConfig(id="CartPole-v1", count=16),
        policy=_ACTOR,
        algorithm=GRPO(epochs=10, minibatches=2),
        rollout=RolloutConfig(steps=None, episodes=16, group_size=8),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="linear"),
        steps=300_000,
    )


def cartpole_rloo() -> Run:
    """RLOO on CartPole-v1: the policy gradient itself, one optimiser step per update."""
    return Run(
        recipe="cartpole-rloo",
        environment=EnvironmentConfig(id="CartPole-v1", count=16),
        policy=_ACTOR,
        algorithm=RLOO(),
        rollout=RolloutConfig(steps=None, episodes=16, group_size=8),
        optimizer=OptimizerConfig(learning_rate=5e-3, schedule="linear"),
        steps=300_000,
    )


def inverted_pendulum_grpo() -> Run:
    """GRPO on InvertedPendulum-v5: continuous actions, and episodes that grow from 5 steps to the limit of 1000."""
    return Run(
        recipe="inverted-pendulum-grpo",
        environment=EnvironmentConfig(id="InvertedPendulum-v5", count=16),
        policy=ActorCriticConfig(critic=False, normalize_observation=True),
        algorithm=GRPO(epochs=10, minibatches=2),
        rollout=RolloutConfig(steps=None, episodes=16, group_size=8),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="linear"),
        steps=200_000,
    )


def cartpole_clone() -> Run:
    """Behaviour cloning on CartPole-v1, of episodes in cartpole.safetensors.

    The file is recorded with a policy that was trained before, well or not so well:

        upslope train cartpole-ppo --steps 12000
        upslope record runs/cartpole-ppo-seed1 --episodes 50 --out cartpole.safetensors
    """
    return Run(
        recipe="cartpole-clone",
        environment=EnvironmentConfig(id="CartPole-v1", count=8),
        policy=_ACTOR,
        algorithm=SFT(),
        rollout=RecordedConfig(file=Path("cartpole.safetensors"), rows=64, length=8),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        evaluation=EvaluationConfig(times=5, final_episodes=100),
        steps=200_000,
    )


def cartpole_segment_dpo() -> Run:
    """DPO on CartPole-v1: segments of episodes that the cloned policy plays, preferred by what followed them.

    It begins with the result of `cartpole-clone`, which needs its file of episodes.
    """
    return Run(
        recipe="cartpole-segment-dpo",
        start_from="cartpole-clone",
        environment=EnvironmentConfig(id="CartPole-v1", count=8),
        policy=_ACTOR,
        algorithm=Preference(beta=0.5),
        rollout=SegmentPairsConfig(episodes=1000, drawn=20_000, length=32, pairs=256),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        evaluation=EvaluationConfig(times=5, final_episodes=100),
        steps=2_000_000,
    )
