"""Masks, memories, observations, actions and environments compose in every algorithm of control.

Every pair of choices occurs in some run of two updates, which trains, is stopped, goes on to the same bits and acts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from composed_world import WORLD, Composed, covering
from tiny_runs import remains, tiny

from upslope import (
    A2C,
    GRPO,
    KTO,
    PPO,
    RLOO,
    SFT,
    ActorCriticConfig,
    CheckpointConfig,
    EnvironmentConfig,
    EvaluationConfig,
    OneStepActorCritic,
    Preference,
    Reinforce,
    RolloutConfig,
    Run,
    load,
)
from upslope.algorithms import (
    NPG,
    TRPO,
    ActorCriticLambda,
    AverageReward,
    ImportanceSampled,
    TDLambda,
    VTraceActorCritic,
)
from upslope.collect.given_data import RecordedConfig, SegmentPairsConfig
from upslope.policies.config import MemoryConfig
from upslope.train import Snapshot, resume, train
from upslope.train.config import AlgorithmConfig
from upslope.train.log import read_metrics
from upslope.train.record import record_run

EPISODES, FRAGMENTS = RolloutConfig(steps=None, episodes=4), RolloutConfig(steps=8)
GROUPS = RolloutConfig(steps=None, episodes=4, group_size=2)
PAIRS = SegmentPairsConfig(episodes=4, drawn=20, length=3, pairs=4)

HOW: dict[str, tuple[Any, Any, int]] = {
    "PPO": (PPO(epochs=2, minibatches=2, entropy_coefficient=0.01), FRAGMENTS, 16),
    "A2C": (A2C(entropy_coefficient=0.01), FRAGMENTS, 16),
    "OneStepActorCritic": (OneStepActorCritic(), FRAGMENTS, 16),
    "Reinforce": (Reinforce(psi="baselined"), EPISODES, 48),
    "GRPO": (GRPO(epochs=2), GROUPS, 48),
    "RLOO": (RLOO(), GROUPS, 48),
    "SFT": (SFT(), "recorded", 12),
    "Preference": (Preference(), PAIRS, 12),
    "KTO": (KTO(), PAIRS, 12),
    "ActorCriticLambda": (ActorCriticLambda(), RolloutConfig(steps=1), 4),
    "TDLambda": (TDLambda(), RolloutConfig(steps=1), 4),
    "AverageReward": (AverageReward(method=PPO(gamma=1.0, epochs=2, minibatches=2)), FRAGMENTS, 16),
    "TRPO": (TRPO(conjugate_gradient_iterations=3, critic_epochs=1, critic_minibatches=2), FRAGMENTS, 16),
    "NPG": (NPG(conjugate_gradient_iterations=3, critic_epochs=1, critic_minibatches=2), FRAGMENTS, 16),
    "VTraceActorCritic": (VTraceActorCritic(), RolloutConfig(steps=8, lag=1), 16),
    "ImportanceSampled": (ImportanceSampled(), EPISODES, 48),
}
"""Each algorithm, what an update of it sees, and steps per environment of two updates."""

CHOICES = covering(
    {
        "algorithm": list(HOW),
        "memory": ["none", "recurrent", "transformer"],
        "seen": ["vector", "image", "both"],
        "acts": ["discrete", "several", "real"],
        "mask": ["info", "method", "none"],
        "count": ["4", "2"],
    }
)


def label(row: dict[str, str]) -> str:
    return " ".join(row.values())


def composed(row: dict[str, str], directory: Path) -> Run:
    algorithm, rollout, steps = HOW[row["algorithm"]]
    endless = row["algorithm"] == "AverageReward"
    count = int(row["count"])
    kind = {"recurrent": ("gru", "lstm")[list(HOW).index(row["algorithm"]) % 2]}.get(row["memory"], "transformer")
    memory = None if row["memory"] == "none" else MemoryConfig(kind=kind, size=8, heads=2, context=4)  # pyright: ignore[reportArgumentType]
    environment = EnvironmentConfig(
        id=WORLD,
        count=count,
        vectorization="sync",
        kwargs={"seen": row["seen"], "acts": row["acts"], "endless": endless},
        action_mask=row["mask"],  # pyright: ignore[reportArgumentType]
        continuing=endless,
    )
    if rollout == "recorded":
        file = directory.parent / "episodes.safetensors"
        if not file.exists():
            demonstrator = train(composed({**row, "algorithm": "A2C"}, directory.parent / "demonstrated"))
            record_run(demonstrator.directory, file, episodes=4, seed=1)
        rollout = RecordedConfig(file=file, rows=4)
    return tiny(
        directory,
        algorithm,
        environment=environment,
        policy=ActorCriticConfig(hidden=(8,), memory=memory, normalize_observation=True),
        rollout=rollout,
        steps=steps * count if row["algorithm"] not in ("Reinforce", "GRPO", "RLOO", "ImportanceSampled") else steps,
        evaluation=EvaluationConfig(times=0, episodes=2, final_episodes=2, environments=2, horizon=8),
        checkpoint=CheckpointConfig(times=2, keep=3),
    )


class PulledPlugError(RuntimeError):
    pass


def pull_plug_at(update: int) -> Callable[[Snapshot], None]:
    def callback(snapshot: Snapshot) -> None:
        if snapshot.update == update:
            raise PulledPlugError

    return callback


def test_every_algorithm_of_control_is_tried() -> None:
    assert set(HOW) == {kind.__name__ for kind in get_args(AlgorithmConfig)}


@pytest.mark.parametrize("row", CHOICES, ids=label)
def test_choices_compose(row: dict[str, str], tmp_path: Path) -> None:
    straight, stopped = (composed(row, tmp_path / name) for name in ("straight", "stopped"))
    train(straight)
    with pytest.raises(PulledPlugError):
        train(stopped, callbacks=[pull_plug_at(1)])
    resume(stopped.directory / "run")
    assert remains(stopped.directory / "run") == remains(straight.directory / "run")
    for record in read_metrics(straight.directory / "run" / "metrics.jsonl"):
        assert all(number == number for number in record.values() if isinstance(number, float)), record
    plays(row, straight.directory / "run")


def plays(row: dict[str, str], directory: Path) -> None:
    """An episode of the saved policy in the environment as Gymnasium has it: never an invalid action under a mask."""
    policy, world, masked = load(directory), Composed(row["seen"], row["acts"]), row["mask"] != "none"
    memory, ended = policy.start(), False
    observation, info = world.reset(seed=0)
    generator = np.random.default_rng(0)
    while not ended:
        mask = info["action_mask"] if masked else None
        action = policy.act(observation, memory=memory, action_mask=mask, deterministic=False, generator=generator)
        observation, _, ended, _, info = world.step(action)
        assert not (masked and info["invalid"])
