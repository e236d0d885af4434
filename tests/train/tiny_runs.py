"""Small runs of every kind, and how to compare what two of them left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from upslope import (
    A2C,
    PPO,
    ActorCriticConfig,
    ActorCriticLambda,
    CheckpointConfig,
    EnvironmentConfig,
    EvaluationConfig,
    LogConfig,
    OneStepActorCritic,
    OptimizerConfig,
    Reinforce,
    RolloutConfig,
    Run,
)
from upslope.algorithms import Algorithm
from upslope.train import resume, train
from upslope.train.checkpoint import latest_checkpoint, load_policy_folder
from upslope.train.log import read_metrics

TIMES = ("collect_seconds", "learn_seconds", "steps_per_second")
"""What two equal runs may differ in."""


def tiny(directory: Path, algorithm: Algorithm | None = None, **changes: Any) -> Run:
    """PPO on two CartPoles: 8 updates, two evaluations and four checkpoints."""
    settings: dict[str, Any] = {
        "recipe": "tiny",
        "environment": EnvironmentConfig(id="CartPole-v1", count=2, vectorization="sync"),
        "policy": ActorCriticConfig(hidden=(16,)),
        "algorithm": PPO(epochs=2, minibatches=2) if algorithm is None else algorithm,
        "rollout": RolloutConfig(steps=32),
        "optimizer": OptimizerConfig(learning_rate=3e-3, schedule="linear"),
        "evaluation": EvaluationConfig(times=2, episodes=2, final_episodes=2, environments=2),
        "checkpoint": CheckpointConfig(times=4, keep=3),
        "log": LogConfig(every_steps=100, tensorboard=False, progress=False),
        "steps": 512,
        "name": "run",
        "directory": directory,
    }
    return Run(**{**settings, **changes})


NORMALISED = ActorCriticConfig(hidden=(16,), normalize_observation=True, normalize_reward=True)
EPISODES = {"rollout": RolloutConfig(steps=None, episodes=3), "steps": 600}


def cases(directory: Path) -> dict[str, Run]:
    """One run for every algorithm and every kind of environment."""
    adaptive = PPO(epochs=2, minibatches=2, clip=None, kl_coefficient=1.0, kl_target=0.003)
    without_critic = ActorCriticConfig(hidden=(16,), critic=False)
    rmsprop = OptimizerConfig(kind="rmsprop", learning_rate=3e-3)
    ppo = PPO(epochs=2, minibatches=2, value_clip=0.2, entropy_coefficient=0.01, recompute_advantage=True)
    return {
        "reinforce": tiny(directory, Reinforce(), policy=without_critic, **EPISODES),
        "baseline": tiny(
            directory,
            Reinforce(psi="baselined"),
            policy=ActorCriticConfig(hidden=(16,), normalize_observation=True),
            **EPISODES,
        ),
        "one_step": tiny(directory, OneStepActorCritic(), policy=NORMALISED, rollout=RolloutConfig(steps=1), steps=400),
        "a2c": tiny(directory, A2C(), policy=NORMALISED, rollout=RolloutConfig(steps=5), optimizer=rmsprop),
        "ppo": tiny(directory, ppo, policy=NORMALISED, steps=1024),
        "ppo_kl": tiny(directory, adaptive, policy=NORMALISED, steps=1024),
        "pendulum": tiny(
            directory,
            ppo,
            policy=NORMALISED,
            environment=_one("Pendulum-v1"),
            rollout=RolloutConfig(steps=70),
            steps=1200,
        ),
        "hopper": tiny(
            directory, ppo, policy=NORMALISED, environment=_one("Hopper-v5"), rollout=RolloutConfig(steps=50), steps=800
        ),
        "lunarlander": tiny(
            directory,
            ppo,
            policy=NORMALISED,
            environment=_one("LunarLander-v3"),
            rollout=RolloutConfig(steps=50),
            steps=800,
        ),
        "traces": tiny(
            directory,
            ActorCriticLambda(discounted_states=True),
            policy=NORMALISED,
            rollout=RolloutConfig(steps=1),
            optimizer=OptimizerConfig(kind="sgd", learning_rate=1e-3),
            steps=400,
        ),
    }


def _one(name: str) -> EnvironmentConfig:
    return EnvironmentConfig(id=name, count=2, vectorization="sync", time_limit=60)


def start(case: str, directory: Path) -> None:
    """Train; for a process of its own."""
    train(cases(directory)[case])


def go_on(directory: Path) -> None:
    """Resume; for a process of its own."""
    resume(directory / "run")


def remains(path: Path) -> dict[str, Any]:
    """Everything a run leaves behind that must not depend on how often it was interrupted, as comparable values."""
    damaged: list[str] = []
    checkpoint = latest_checkpoint(path / "checkpoints", on_damaged=lambda place, _: damaged.append(place.name))
    assert checkpoint is not None
    assert not damaged
    records = [
        {name: repr(value) for name, value in record.items() if name not in TIMES}
        for record in read_metrics(path / "metrics.jsonl")
    ]
    return {
        "step": checkpoint.step,
        "session": bits(checkpoint.state["session"]),
        "best": checkpoint.state["best"],
        "metrics": records,
        "policy": bits(load_policy_folder(path / "policy")[0]),
        "best policy": bits(load_policy_folder(path / "best")[0]),
    }


def bits(tree: Any) -> Any:
    """Tensors and arrays as type, shape and bytes: equal only if equal to the last bit."""
    if isinstance(tree, dict):
        return {key: bits(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [bits(value) for value in tree]
    if isinstance(tree, torch.Tensor):
        return bits(tree.detach().numpy())
    if isinstance(tree, np.ndarray):
        return (str(tree.dtype), tree.shape, tree.tobytes())
    return repr(tree)
