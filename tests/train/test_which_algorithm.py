"""The table of algorithms in the documentation: every filled cell is a training run, and every run a filled cell."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from tiny_language import COMPLETIONS, MODEL, WITH_VALUE_HEAD, some_task, tiny_language
from tiny_runs import bits

import upslope.algorithms as algorithms
from upslope import (
    A2C,
    GRPO,
    KTO,
    NPG,
    PPO,
    RLOO,
    SFT,
    TRPO,
    ActorCriticConfig,
    CheckpointConfig,
    EnvironmentConfig,
    EvaluationConfig,
    ImportanceSampled,
    LogConfig,
    MemoryConfig,
    OneStepActorCritic,
    OptimizerConfig,
    Preference,
    Reinforce,
    RewardModel,
    RolloutConfig,
    Run,
    VTraceActorCritic,
)
from upslope.algorithms import ActorCriticLambda, AverageReward, TDLambda, Traces
from upslope.auditing.table import exported
from upslope.collect.experience import DemonstrationConfig, PairConfig
from upslope.collect.given_data import RecordedConfig, SegmentPairsConfig
from upslope.train import Snapshot, train
from upslope.train.config import AlgorithmConfig
from upslope.train.language import LanguageRun
from upslope.train.record import record_run

PAGE = Path(__file__).parents[2] / "docs" / "which-algorithm.md"
WORLDS = ("tables", "control", "language")
ABILITIES = ("discrete", "continuous", "memory", "masks", "off-policy")

CONTROL: dict[str, AlgorithmConfig] = {
    "Reinforce": Reinforce(psi="baselined"),
    "OneStepActorCritic": OneStepActorCritic(),
    "A2C": A2C(),
    "ActorCriticLambda": ActorCriticLambda(),
    "TDLambda": TDLambda(),
    "AverageReward": AverageReward(method=A2C(gamma=1.0)),
    "NPG": NPG(critic_epochs=1, critic_minibatches=1),
    "TRPO": TRPO(critic_epochs=1, critic_minibatches=1),
    "PPO": PPO(epochs=2, minibatches=1),
    "VTraceActorCritic": VTraceActorCritic(),
    "ImportanceSampled": ImportanceSampled(fewest_effective=0.0),
    "RLOO": RLOO(),
    "GRPO": GRPO(epochs=2),
    "SFT": SFT(),
    "Preference": Preference(),
    "KTO": KTO(),
}
OFF_POLICY: dict[str, tuple[AlgorithmConfig, dict[str, Any]]] = {
    "PPO": (PPO(epochs=2, minibatches=1), {"batches": 2}),
    "VTraceActorCritic": (VTraceActorCritic(), {"lag": 2}),
    "ImportanceSampled": (ImportanceSampled(fewest_effective=0.0), {"behaviour": "other"}),
    "RLOO": (RLOO(ratio="sequence_sum"), {"lag": 1}),
    "GRPO": (GRPO(ratio="sequence"), {"lag": 1}),
}
"""What corrects for another policy's data, and whose data it is given; given data are anybody's."""
NATURAL = {"experience": COMPLETIONS, "optimizer": OptimizerConfig()}
LANGUAGE: dict[str, dict[str, Any]] = {
    "Reinforce": {"algorithm": Reinforce(gamma=1.0), "experience": COMPLETIONS},
    "RLOO": {"algorithm": RLOO(), "experience": COMPLETIONS},
    "GRPO": {"algorithm": GRPO(), "experience": COMPLETIONS},
    "PPO": {"algorithm": PPO(minibatches=1), "experience": COMPLETIONS, "model": WITH_VALUE_HEAD},
    "A2C": {"algorithm": A2C(gamma=1.0), "experience": COMPLETIONS, "model": WITH_VALUE_HEAD},
    "VTraceActorCritic": {
        "algorithm": VTraceActorCritic(gamma=1.0),
        "experience": COMPLETIONS,
        "model": WITH_VALUE_HEAD,
    },
    "TRPO": {"algorithm": TRPO(gamma=1.0, psi="reward_to_go"), **NATURAL},
    "NPG": {"algorithm": NPG(gamma=1.0, psi="reward_to_go"), **NATURAL},
    "ImportanceSampled": {
        "algorithm": ImportanceSampled(gamma=1.0, fewest_effective=0.0),
        "experience": COMPLETIONS,
    },
    "SFT": {"algorithm": SFT(), "experience": DemonstrationConfig(rows=4)},
    "Preference": {"algorithm": Preference(), "experience": PairConfig(pairs=2), "reference": "start"},
    "KTO": {"algorithm": KTO(), "experience": PairConfig(pairs=2), "reference": "start"},
    "RewardModel": {"algorithm": RewardModel(), "experience": PairConfig(pairs=2), "model": WITH_VALUE_HEAD},
}
QUIET = {
    "evaluation": EvaluationConfig(times=0, final_episodes=0),
    "checkpoint": CheckpointConfig(times=0),
    "log": LogConfig(tensorboard=False, progress=False, diagnose_every=0),
}
ENVIRONMENTS = {
    "tables": EnvironmentConfig(id="problem/six-state", count=4),
    "continuing tables": EnvironmentConfig(id="problem/access-control", count=4),
    "discrete": EnvironmentConfig(id="CartPole-v1", count=4, time_limit=40),
    "continuous": EnvironmentConfig(id="Pendulum-v1", count=4, time_limit=8),
    "masks": EnvironmentConfig(id="Gated-v0", count=4, vectorization="sync", action_mask="info"),
    "continuing masks": EnvironmentConfig(id="EndlessGated-v0", count=4, vectorization="sync", action_mask="info"),
}
FRAGMENTS, EPISODES = 96, 600
"""Steps of a run, a few updates each."""
Given = Callable[[str], Path]


class Gated(gymnasium.Env[np.ndarray, np.int64]):
    """Eight steps, or no end; one of three actions is invalid at each, and taking it is an error."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,))
    action_space = gymnasium.spaces.Discrete(3)

    def __init__(self, steps: int | None = 8) -> None:
        self._steps = steps

    def _seen(self) -> tuple[np.ndarray, dict[str, Any]]:
        self._mask = np.arange(3) != self._time % 3
        return self.np_random.uniform(-1.0, 1.0, 2).astype(np.float32), {"action_mask": self._mask.astype(np.int8)}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self._time = 0
        return self._seen()

    def step(self, action: Any) -> Any:
        assert self._mask[action], "an invalid action was taken"
        self._time += 1
        seen, info = self._seen()
        return seen, float(action), self._time == self._steps, False, info


gymnasium.register("Gated-v0", lambda **_: Gated())
gymnasium.register("EndlessGated-v0", lambda **_: Gated(steps=None))


def table() -> list[tuple[str, str]]:
    """Filled cells, as (algorithm, column)."""
    (block,) = re.findall(r"^\| algorithm \|.*(?:\n\|.*)*", PAGE.read_text("utf-8"), re.MULTILINE)
    lines = block.splitlines()
    columns = [cell.strip() for cell in lines[0].strip("|").split("|")][1:]
    assert tuple(columns) == WORLDS + ABILITIES
    found: list[tuple[str, str]] = []
    for line in lines[2:]:
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert set(cells) <= {"✓", ""}, line
        found += [(name.strip("`"), column) for column, cell in zip(columns, cells, strict=True) if cell]
    return found


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    """Runs in each kind of environment and, beside each, episodes of its policy; made when they are asked for."""
    place, made = tmp_path_factory.mktemp("given"), dict[str, Path]()

    def find(world: str) -> Path:
        if world not in made:
            policy = ActorCriticConfig(hidden=(8,), memory=MemoryConfig(size=8) if world == "memory" else None)
            environment = ENVIRONMENTS["discrete" if world == "memory" else world]
            first = Run(environment=environment, policy=policy, rollout=RolloutConfig(steps=8), **QUIET)
            first = replace(first, algorithm=A2C(), steps=32, name=world.replace(" ", "-"), directory=place)
            made[world] = train(first).directory
            record_run(made[world], place / f"{made[world].name}.safetensors", episodes=4, seed=1)
        return made[world]

    return find


def control_run(name: str, column: str, given: Given, directory: Path) -> Run:
    """A few updates of an algorithm in an environment of the kind that the column names."""
    world = {"control": "discrete", "memory": "discrete", "off-policy": "discrete"}.get(column, column)
    if name == "AverageReward":
        endless = {"tables": "continuing tables", "discrete": "continuing tables", "masks": "continuing masks"}
        world = endless.get(world, world)
        world = "continuous" if column == "control" else world
    algorithm, changes = CONTROL[name], dict[str, Any]()
    if column == "off-policy" and name in OFF_POLICY:
        algorithm, changes = OFF_POLICY[name]
        if "behaviour" in changes:
            changes = dict[str, Any](behaviour=str(given(world)))
    passes, environment, rollout = algorithm.passes, ENVIRONMENTS[world], RolloutConfig(steps=8, **changes)
    if name == "AverageReward" and world == "continuous":
        environment = replace(environment, continuing=True, time_limit=None)
    if algorithm.target.gradient == "given_data":
        file = given(world).with_suffix(".safetensors")
        rollout = RecordedConfig(file=file, rows=2)
        if name in ("Preference", "KTO"):
            rollout = SegmentPairsConfig(file=file, drawn=8, length=2, pairs=4)
    elif passes.whole_episodes:
        rollout = RolloutConfig(steps=None, episodes=4, group_size=4 if passes.groups else None, **changes)
    elif isinstance(passes.rule, Traces):
        rollout = RolloutConfig(steps=1)
    policy = ActorCriticConfig(
        hidden=(8,), critic=passes.critic, memory=MemoryConfig(size=8) if column == "memory" else None
    )
    optimizer = OptimizerConfig(kind="sgd" if isinstance(passes.rule, Traces) else "adam", learning_rate=1e-2)
    return Run(
        environment=environment,
        policy=policy,
        algorithm=algorithm,
        rollout=rollout,
        optimizer=optimizer,
        steps=EPISODES if passes.whole_episodes else FRAGMENTS,
        directory=directory,
        **QUIET,
    )


def language_run(name: str, directory: Path) -> LanguageRun:
    """Two updates of a tiny model."""
    return tiny_language(directory, **{"steps": 2, "model": MODEL, **LANGUAGE[name]})


def learns(name: str, column: str, given: Given, directory: Path) -> None:
    """Train; every figure is finite, and the policy (or, in prediction, the critic) moves."""
    run = language_run(name, directory) if column == "language" else control_run(name, column, given, directory)
    seen: list[dict[str, float]] = []
    parameters: list[Any] = []

    def look(snapshot: Snapshot[Any, Any]) -> None:
        seen.append(dict(snapshot.metrics))
        parameters.append(bits({key: value.clone() for key, value in snapshot.policy.named_parameters()}))

    if isinstance(run, LanguageRun):
        train(run, task=some_task(), callbacks=[look])
    else:
        train(run, callbacks=[look])
    assert len(seen) > 1
    assert all(math.isfinite(value) for metrics in seen for value in metrics.values())
    assert parameters[0] != parameters[-1]


@pytest.mark.parametrize(("name", "column"), table(), ids=lambda part: part)
def test_a_filled_cell_learns(name: str, column: str, given: Given, tmp_path: Path) -> None:
    learns(name, column, given, tmp_path)


def test_every_algorithm_has_a_row() -> None:
    named = {name for name in exported() if inspect.isclass(getattr(algorithms, name, None))}
    assert {name for name, _ in table()} == named
