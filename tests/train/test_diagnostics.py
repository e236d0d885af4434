"""Runs broken on purpose get their verdict, and healthy ones get none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from tiny_runs import bits, tiny
from torch import Tensor, nn

from upslope import (
    A2C,
    PPO,
    ActorCritic,
    ActorCriticConfig,
    CheckpointConfig,
    EvaluationConfig,
    LogConfig,
    MemoryConfig,
    OptimizerConfig,
    Reinforce,
    RolloutConfig,
    Run,
)
from upslope.algorithms import Algorithm, Loss, Now
from upslope.algorithms.protocol import State
from upslope.diagnostics import Meter, verdicts
from upslope.recipes import cartpole_ppo
from upslope.spaces import Box, Discrete
from upslope.train import resume, train
from upslope.train.checkpoint import latest_checkpoint
from upslope.train.control import _actor_gradient  # pyright: ignore[reportPrivateUsage]
from upslope.train.log import Value, read_metrics
from upslope.train.optimizer import FlatOptimizer
from upslope.trajectory import Batch, Evaluation

HEALTHY = PPO(gamma=0.9, gae_lambda=0.8, epochs=10, minibatches=2)


def each_update(directory: Path, **changes: Any) -> Run:
    """PPO on two CartPoles, every one of 24 updates looked at and recorded."""
    settings: dict[str, Any] = {
        "algorithm": HEALTHY,
        "rollout": RolloutConfig(steps=64),
        "optimizer": OptimizerConfig(learning_rate=1e-2),
        "log": LogConfig(every_steps=1, diagnose_every=1, tensorboard=False, progress=False),
        "evaluation": EvaluationConfig(times=0, final_episodes=0),
        "checkpoint": CheckpointConfig(times=0),
        "steps": 24 * 128,
    }
    return tiny(directory, **{**settings, **changes})


def records_of(run: Run, **given: Any) -> list[dict[str, Value]]:
    train(run, **given)
    return [record for record in read_metrics(run.directory / "run" / "metrics.jsonl") if record["kind"] == "train"]


def names(records: list[dict[str, Value]]) -> set[str]:
    return {verdict.name for verdict in verdicts(records)}


def test_a_healthy_run_is_not_warned_of(tmp_path: Path) -> None:
    records = records_of(each_update(tmp_path))
    assert not any("verdict" in record for record in records)


def test_a_closer_look_at_an_algorithm_without_ratios_knows_who_acted(tmp_path: Path) -> None:
    changes = {"algorithm": A2C(), "rollout": RolloutConfig(steps=5), "steps": 40}
    log = LogConfig(every_steps=1, diagnose_every=20, tensorboard=False, progress=False)
    records = records_of(each_update(tmp_path, **changes, log=log))
    looked = [record for record in records if "first_ratio_error" in record]
    assert 0 < len(looked) < len(records)
    assert all(float(record["first_ratio_error"]) < 1e-6 and float(record["kl"]) > 0.0 for record in looked)


def test_the_recipe_of_cartpole_is_not_warned_of(tmp_path: Path) -> None:
    quiet = LogConfig(every_steps=1000, tensorboard=False, progress=False)
    run = replace(cartpole_ppo(), steps=16_000, directory=tmp_path, name="run", log=quiet)
    records = records_of(replace(run, evaluation=EvaluationConfig(times=0, final_episodes=0)))
    assert len(records) >= 12
    assert not any("verdict" in record for record in records)
    assert float(records[-1]["episode_return"]) > 60.0


def test_a_critic_that_does_not_learn(tmp_path: Path) -> None:
    records = records_of(each_update(tmp_path, algorithm=replace(HEALTHY, value_coefficient=0.0)))
    assert names(records) == {"critic explains nothing"}
    assert str(records[-1]["verdict"]).startswith("the critic explains nothing: explained variance ")


def test_steps_that_are_far_too_long(tmp_path: Path) -> None:
    algorithm = replace(HEALTHY, minibatches=8)
    records = records_of(each_update(tmp_path, algorithm=algorithm, optimizer=OptimizerConfig(learning_rate=0.1)))
    assert "policy jumps" in names(records) <= {"policy jumps", "dead gradient", "few steps count"}
    assert "the policy jumps: each update moves it by a KL of " in str(records[-1]["verdict"])


def test_a_policy_that_is_decided_at_once(tmp_path: Path) -> None:
    records = records_of(each_update(tmp_path, optimizer=OptimizerConfig(learning_rate=1.0)))
    assert names(records) == {"exploration over"}


def test_a_clip_that_leaves_no_gradient(tmp_path: Path) -> None:
    records = records_of(each_update(tmp_path, algorithm=replace(HEALTHY, clip=1e-5)))
    assert "dead gradient" in names(records)
    assert "% of the batch has no gradient" in str(records[-1]["verdict"])
    assert "policy jumps" not in names(records)


class Wavering(nn.Module):
    """An encoder with noise in it, so that what learns is not what acted."""

    features = 4

    def forward(self, observation: Tensor) -> Tensor:
        return observation + torch.randn_like(observation)


def test_a_network_with_noise_in_it(tmp_path: Path) -> None:
    records = records_of(each_update(tmp_path, policy=ActorCriticConfig(hidden=(16,))), encoder=Wavering())
    assert "ratio not 1" in names(records)
    assert "acting and learning disagree" in str(records[-1]["verdict"])


class Endless(gymnasium.Env[Any, Any]):
    """Never ends, always pays the same."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,))
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self._observation(), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self._observation(), self._reward(action), False, False, {}

    def _observation(self) -> np.ndarray:
        return self.np_random.uniform(-1.0, 1.0, 2).astype(np.float32)

    def _reward(self, action: int) -> float:
        return 1.0


class Lottery(Endless):
    """Pays by chance; what one does hardly matters."""

    def _reward(self, action: int) -> float:
        return float(self.np_random.normal()) + 1e-3 * action


def test_a_reward_that_never_changes(tmp_path: Path) -> None:
    records = records_of(each_update(tmp_path), environments=Endless)
    assert names(records) == {"nothing to learn"}


def test_a_batch_too_small_for_the_noise(tmp_path: Path) -> None:
    episodes = RolloutConfig(steps=None, episodes=4)
    policy = ActorCriticConfig(hidden=(16,), critic=False)
    run = each_update(tmp_path, rollout=episodes, steps=4000, policy=policy, algorithm=Reinforce(gamma=0.9))
    run = replace(run, environment=replace(run.environment, time_limit=10))
    records = records_of(run, environments=Lottery)
    found = verdicts(records)
    assert [(verdict.level, verdict.name) for verdict in found] == [("hint", "batch too small")]
    assert "verdict" not in records[-1]


def test_figures_of_a_run_with_one_step_per_update(tmp_path: Path) -> None:
    records = records_of(each_update(tmp_path, algorithm=A2C(), steps=6 * 128))
    assert "gradient_snr" not in records[0]
    assert {"gradient_snr", "noise_scale", "dead_gradient_share", "entropy_share", "variance/psi"} <= records[-1].keys()
    assert not {"clip_share_positive", "effective_sample_size"} & records[-1].keys()
    assert all(record["first_ratio_error"] == 0.0 for record in records)
    first = records[0]
    assert first["variance/baselined"] == pytest.approx(first["variance/psi"])


def test_how_far_an_update_went_where_the_loss_does_not_say(tmp_path: Path) -> None:
    run = each_update(tmp_path, algorithm=A2C(), rollout=RolloutConfig(steps=512), steps=3 * 1024)
    records = records_of(run)
    watched = [float(record["kl"]) for record in records]
    assert all(1e-4 < kl < 0.05 for kl in watched)
    reported = PPO(epochs=1, minibatches=1, gamma=0.99, normalize_advantage=False)
    by_ppo = records_of(replace(run, directory=tmp_path / "ppo", algorithm=reported))
    assert [record["kl"] for record in by_ppo] == [0.0] * 3


@pytest.mark.parametrize(
    ("algorithm", "rollout", "steps"),
    [
        pytest.param(A2C(), RolloutConfig(steps=64), 10 * 128, id="a2c"),
        pytest.param(Reinforce(psi="baselined"), RolloutConfig(steps=None, episodes=8), 24 * 128, id="reinforce"),
    ],
)
def test_single_steps_that_are_far_too_long(
    tmp_path: Path, algorithm: Algorithm, rollout: RolloutConfig, steps: int
) -> None:
    longer = OptimizerConfig(learning_rate=0.12)
    records = records_of(each_update(tmp_path, algorithm=algorithm, rollout=rollout, optimizer=longer, steps=steps))
    assert "policy jumps" in names(records)


@dataclass(frozen=True, kw_only=True)
class Silent(A2C):
    """An algorithm of a user's own that reports nothing."""

    def loss(self, batch: Batch, evaluation: Evaluation, now: Now) -> Loss:
        return Loss(value=super().loss(batch, evaluation, now).value, metrics={})


def test_a_loss_that_reports_nothing(tmp_path: Path) -> None:
    records = records_of(each_update(tmp_path, algorithm=Silent(), steps=6 * 128))
    assert not {"entropy", "entropy_share", "policy_loss"} & records[-1].keys()
    assert {"kl", "gradient_norm", "gradient_snr"} <= records[-1].keys()


@dataclass(frozen=True, kw_only=True)
class Curious(A2C):
    """Carries what its metrics are called."""

    def initial_state(self) -> State:
        return {"metrics": 0.0}

    def adapt(self, state: State, metrics: Mapping[str, float]) -> State:
        return {"metrics": state["metrics"] + len(metrics)}


def test_what_looking_finds_is_not_for_the_algorithm(tmp_path: Path) -> None:
    run = each_update(tmp_path, algorithm=Curious(), steps=6 * 128)
    blind = replace(run, directory=tmp_path / "blind", log=replace(run.log, diagnose_every=0))
    assert records_of(run)[-1]["state/metrics"] == records_of(blind)[-1]["state/metrics"] == 36.0


class Changing(nn.Module):
    """An encoder that draws random numbers and keeps running means."""

    features = 4

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, observation: Tensor) -> Tensor:
        return self.norm(observation) + 0.01 * torch.randn_like(observation)


def test_looking_changes_nothing_in_a_network_that_changes_by_itself(tmp_path: Path) -> None:
    found: list[object] = []
    for every in (0, 1):
        torch.manual_seed(1)
        run = each_update(tmp_path / str(every), algorithm=A2C(), steps=4 * 128, policy=ActorCriticConfig(hidden=(16,)))
        result = train(replace(run, log=replace(run.log, diagnose_every=every)), encoder=Changing())
        found.append(bits(dict(result.policy.state_dict())))
    assert found[0] == found[1]


def test_looking_changes_nothing_that_is_learnt(tmp_path: Path) -> None:
    policies = {}
    for every in (0, 1, 300):
        run = each_update(tmp_path / str(every), steps=6 * 128)
        run = replace(run, log=replace(run.log, diagnose_every=every))
        records = records_of(run)
        assert sum("gradient_snr" in record for record in records) == {0: 0, 1: 6, 300: 2}[every]
        found = latest_checkpoint(run.directory / "run" / "checkpoints", on_damaged=lambda *_: None)
        assert found is not None
        policies[every] = bits(found.state["session"]["policy"])
    assert policies[0] == policies[1] == policies[300]


def test_looking_may_begin_after_a_resume(tmp_path: Path) -> None:
    run = each_update(tmp_path, steps=3 * 128)
    train(replace(run, log=replace(run.log, diagnose_every=0)))
    resume(tmp_path / "run", run=replace(run, steps=6 * 128))
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"]
    assert ["gradient_snr" in record for record in records] == [False] * 3 + [True] * 3


def test_a_meter_goes_on_from_its_state() -> None:
    gradient = torch.randn(5)
    meter, other = Meter(gradient), Meter(gradient)
    tree = meter.state()
    other.load_state(tree)
    assert bits(other.state()) == bits(tree)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"actor."}),
        ({"critic": False}, {"actor."}),
        ({"shared": True}, {"actor."}),
        ({"shared": True, "critic": False}, {"torso.", "actor."}),
        ({"memory": MemoryConfig(size=4)}, {"memory.actor.", "actor."}),
        ({"memory": MemoryConfig(size=4, shared=True)}, {"actor."}),
        ({"memory": MemoryConfig(size=4), "critic": False}, {"memory.actor.", "actor."}),
        ({"image": True}, {"encoder.", "actor."}),
        ({"image": True, "memory": MemoryConfig(size=4)}, {"encoder.", "memory.actor.", "actor."}),
        ({"image": True, "memory": MemoryConfig(size=4, shared=True)}, {"actor."}),
        ({"shared": True, "memory": MemoryConfig(size=4)}, {"memory.actor.", "actor."}),
    ],
    ids=lambda part: str(sorted(part) if isinstance(part, set) else part),
)
def test_the_gradient_that_is_watched_is_that_of_the_actor_alone(changes: dict[str, Any], expected: set[str]) -> None:
    """All of what only the actor uses, and nothing that the critic's error moves."""
    image = "image" in changes
    seen = Box((36, 36, 1), 0.0, 255.0, "uint8") if image else Box((3,), -1.0, 1.0)
    config = ActorCriticConfig(hidden=(4,), **{name: entry for name, entry in changes.items() if name != "image"})
    policy = ActorCritic(seen, Discrete(2), config, generator=torch.Generator().manual_seed(0))
    optimizer = FlatOptimizer(policy, OptimizerConfig())
    for name, parameter in policy.named_parameters():
        parameter.grad.fill_(float(any(name.startswith(prefix) for prefix in expected)))  # type: ignore[union-attr]
    parts = torch.cat(_actor_gradient(policy, optimizer))
    assert parts.all()
    assert len(parts) == int(optimizer.gradient.sum())
