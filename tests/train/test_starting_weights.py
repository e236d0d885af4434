"""Runs that begin with another policy, stay close to a frozen one, and have their rewards shaped."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import bits, remains, tiny

from upslope import (
    A2C,
    PPO,
    ActorCritic,
    ActorCriticConfig,
    EnvironmentConfig,
    MemoryConfig,
    OptimizerConfig,
    ReferenceKL,
    Reinforce,
    RolloutConfig,
    Run,
    ShapingConfig,
    Snapshot,
)
from upslope.errors import UsageError
from upslope.spaces import Box, Discrete
from upslope.train import load, resume, train
from upslope.train.config_file import recorded_frozen
from upslope.train.log import read_metrics
from upslope.train.optimizer import FlatOptimizer
from upslope.train.session import ResumeError
from upslope.train.starting_weights import Hold

NORMALISED = ActorCriticConfig(hidden=(16,), normalize_observation=True)
SMALL_NETWORK = ActorCriticConfig(hidden=(4,))
SMALL = {"policy": NORMALISED, "steps": 256}
POTENTIAL = """
import torch

def upright(observation):
    return -observation[:, 2].abs()

def columns(observation):
    return observation
"""


class PulledPlugError(RuntimeError):
    pass


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to begin with: its policy has moved, and its normaliser has seen something."""
    return train(tiny(tmp_path_factory.mktemp("first"), **SMALL)).directory


@pytest.fixture
def potential(tmp_path: Path) -> str:
    file = tmp_path / "potential.py"
    file.write_text(POTENTIAL)
    return f"{file}:upright"


def near(directory: Path, trained: Path, algorithm: Any, **changes: Any) -> Run:
    return tiny(directory, algorithm, **{**SMALL, "start_from": str(trained), **changes})


def watching(name: str) -> tuple[list[float], Callable[[Snapshot[Any, Any]], None]]:
    found: list[float] = []
    return found, lambda snapshot: found.append(snapshot.metrics[name])


def test_a_run_begins_with_the_weights_and_statistics_it_is_given(trained: Path, tmp_path: Path) -> None:
    still = near(tmp_path, trained, PPO(), optimizer=replace(tiny(tmp_path).optimizer, learning_rate=0.0))
    result = train(still)
    given, begun, ended = (
        load(place).state_dict() for place in (trained, result.directory / "start", result.directory)
    )
    assert bits(begun) == bits(given)
    moved = {name for name in ended if bits(ended[name]) != bits(given[name])}
    assert moved
    assert all(name.startswith("observation_normalizer.") for name in moved)


PLACES: list[ReferenceKL] = [
    ReferenceKL(coefficient=3.0, place="loss"),
    ReferenceKL(coefficient=3.0, place="loss", estimator="exact"),
    ReferenceKL(coefficient=3.0, place="loss", estimator="k3"),
    ReferenceKL(coefficient=3.0, place="reward"),
]


@pytest.mark.parametrize("kind", PLACES, ids=lambda kind: f"{kind.place}-{kind.estimate}")
def test_a_penalty_keeps_the_policy_close_to_where_it_began(kind: ReferenceKL, trained: Path, tmp_path: Path) -> None:
    distances: list[float] = []
    for name, coefficient in (("free", 1e-9), ("held", 3.0)):
        algorithm = PPO(epochs=4, minibatches=2, reference_kl=replace(kind, coefficient=coefficient))
        found, watch = watching("reference_kl")
        train(near(tmp_path, trained, algorithm, name=name, steps=640), callbacks=[watch])
        distances.append(found[-1])
    assert distances[1] < 0.5 * distances[0]


def with_potential(potential: str) -> dict[str, Any]:
    return {"shaping": ShapingConfig(potential=potential, scale=0.5)}


def cases(directory: Path, trained: Path, potential: str) -> dict[str, Run]:
    exact = PPO(epochs=2, minibatches=2, reference_kl=ReferenceKL(coefficient=0.1, place="loss", estimator="exact"))
    reward = A2C(entropy_coefficient=0.01, entropy_schedule="linear", reference_kl=ReferenceKL(coefficient=0.1))
    episodes = {"rollout": RolloutConfig(steps=None, episodes=3), "steps": 400}
    whole = Reinforce(psi="baselined", reference_kl=ReferenceKL(coefficient=0.1, place="reward"))
    return {
        "exact": near(directory, trained, exact, critic_first=2),
        "in reward, of its own beginning": tiny(directory, reward, **SMALL),
        "whole episodes, another one": tiny(directory, whole, reference=str(trained), **{**SMALL, **episodes}),
        "function": tiny(directory, **SMALL, **with_potential(potential)),
        "value": near(directory, trained, PPO(), **with_potential(str(trained))),
        "pendulum": tiny(
            directory,
            A2C(reference_kl=ReferenceKL(coefficient=0.1, place="loss", estimator="exact")),
            environment=EnvironmentConfig(id="Pendulum-v1", count=2, vectorization="sync", time_limit=60),
            **SMALL,
        ),
    }


CASES = ["exact", "in reward, of its own beginning", "whole episodes, another one", "function", "value", "pendulum"]


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_is_interrupted_ends_where_it_would_have(
    case: str, trained: Path, potential: str, tmp_path: Path
) -> None:
    elsewhere = shutil.copytree(trained, tmp_path / "elsewhere")
    straight = train(cases(tmp_path / "straight", elsewhere, potential)[case]).directory
    seen: list[int] = []

    def pull(snapshot: Snapshot[Any, Any]) -> None:
        seen.append(snapshot.update)
        if len(seen) == 3:
            raise PulledPlugError

    with pytest.raises(PulledPlugError):
        train(cases(tmp_path / "killed", elsewhere, potential)[case], callbacks=[pull])
    shutil.rmtree(elsewhere)
    again = potential if case == "function" else None
    killed = resume(tmp_path / "killed" / "run", potential=again).directory
    assert remains(killed) == remains(straight)
    assert recorded_frozen(killed) == recorded_frozen(straight)


def test_the_critic_alone_moves_in_the_first_updates(trained: Path, tmp_path: Path) -> None:
    result = train(near(tmp_path, trained, PPO(), critic_first=99))
    before, after = load(trained).state_dict(), load(result.directory).state_dict()
    for name in before:
        if not name.startswith("observation_normalizer."):
            assert (bits(before[name]) != bits(after[name])) == name.startswith("critic."), name


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_what_was_held_begins_with_steps_of_the_usual_length(kind: Any) -> None:
    """Adam's first step is as long as the learning rate, and here, where every gradient is 1, so is each of sgd's."""
    policy = ActorCritic(Box((2,), -1.0, 1.0), Discrete(2), SMALL_NETWORK, generator=torch.Generator().manual_seed(0))
    optimizer = FlatOptimizer(policy, OptimizerConfig(kind=kind, max_gradient_norm=None))
    hold = Hold(policy, optimizer, updates=5)
    for update in range(6):
        before = {name: entry.detach().clone() for name, entry in policy.named_parameters()}
        hold.before(update)
        optimizer.gradient.fill_(1.0)
        optimizer.step(1e-2)
        for name, entry in policy.named_parameters():
            expected = 1e-2 if update == 5 or name.startswith("critic.") else 0.0
            torch.testing.assert_close(before[name] - entry, torch.full_like(entry, expected), rtol=1e-3, atol=0.0)


def test_a_policy_without_a_critic_gets_one(tmp_path: Path) -> None:
    without = ActorCriticConfig(hidden=(16,), critic=False)
    first = tiny(tmp_path, Reinforce(), policy=without, rollout=RolloutConfig(steps=None, episodes=2), steps=60)
    actor = train(replace(first, name="first")).policy.actor.state_dict()
    result = train(tiny(tmp_path, PPO(), start_from=str(tmp_path / "first"), steps=64))
    begun = load(result.directory / "start")
    assert begun.critic is not None
    assert bits(begun.actor.state_dict()) == bits(actor)


def test_rewards_that_are_logged_stay_raw_and_those_that_are_learnt_from_do_not(
    potential: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collected: list[Any] = []
    from upslope.train.shaping import Shaping

    original = Shaping.shaped

    def noted(self: Shaping, trajectory: Any, gamma: float) -> Any:
        shaped = original(self, trajectory, gamma)
        collected.append((trajectory, shaped, gamma))
        return shaped

    monkeypatch.setattr(Shaping, "shaped", noted)
    result = train(tiny(tmp_path, steps=192, **with_potential(potential)))
    for trajectory, shaped, gamma in collected:
        assert bool((trajectory.reward[trajectory.mask] == 1.0).all())
        phi = -0.5 * trajectory.observation[..., 2].abs()
        after = trajectory.next_value(phi, -0.5 * trajectory.final_observation[:, 2].abs())
        expected = (1.0 + trajectory.discount(gamma) * after - phi)[trajectory.mask]
        torch.testing.assert_close(shaped.reward[trajectory.mask], expected)
        assert bool((shaped.reward[~trajectory.mask] == trajectory.reward[~trajectory.mask]).all())
    returns = [
        record["episode_return"]
        for record in read_metrics(result.directory / "metrics.jsonl")
        if "episode_return" in record
    ]
    assert returns
    assert min(map(float, returns)) >= 8.0


def other(**changes: Any) -> ActorCriticConfig:
    return replace(NORMALISED, **changes)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "hidden": ({"policy": other(hidden=(8, 8))}, r"policy.hidden is \(16,\) there and \(8, 8\) here"),
    "activation": ({"policy": other(activation="relu")}, r"policy.activation is 'tanh' there and 'relu' here"),
    "normaliser": ({"policy": other(normalize_observation=False)}, "policy.normalize_observation is True there"),
    "actions": ({"environment": EnvironmentConfig(id="Acrobot-v1", count=2)}, "sees other observations"),
    "nowhere": ({"start_from": "no/such/folder"}, "is no folder"),
    "reference": ({"reference": "start"}, "has no reference: set reference to None"),
    "reference nowhere": (
        {"reference": "no/such/folder", "algorithm": PPO(reference_kl=ReferenceKL(coefficient=1.0))},
        "reference='no/such/folder' is no folder",
    ),
    "potential nowhere": (with_potential("no/such/folder"), "shaping.potential='no/such/folder' is no folder"),
    "no potential function": (with_potential("no/such/file.py:phi"), "there is no file"),
}


def test_a_reference_with_a_memory_needs_whole_episodes(tmp_path: Path) -> None:
    """In the middle of an episode nobody knows what it would remember."""
    algorithm = PPO(epochs=1, minibatches=1, reference_kl=ReferenceKL(coefficient=0.1))
    policy = ActorCriticConfig(hidden=(16,), memory=MemoryConfig(size=8))
    with pytest.raises(UsageError, match="learn from whole episodes"):
        train(tiny(tmp_path, algorithm, policy=policy, steps=64))
    found, watch = watching("reference_kl")
    train(
        tiny(tmp_path, algorithm, policy=policy, rollout=RolloutConfig(steps=None, episodes=3), steps=200),
        callbacks=[watch],
    )
    assert found[0] == pytest.approx(0.0, abs=1e-9)
    assert found[-1] > 0.0


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_named(case: str, trained: Path, tmp_path: Path) -> None:
    changes, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        train(replace(near(tmp_path, trained, PPO()), **changes))


def test_a_potential_is_one_finite_number_per_observation(potential: str, tmp_path: Path) -> None:
    columns = potential.replace("upright", "columns")
    with pytest.raises(UsageError, match=r"expected shape \(64,\), got a tensor of shape \(64, 4\)"):
        train(tiny(tmp_path, **with_potential(columns)))


def test_a_run_directory_does_not_run_a_file_that_nobody_named(potential: str, tmp_path: Path) -> None:
    directory = train(tiny(tmp_path, steps=64, **with_potential(potential))).directory
    with pytest.raises(UsageError, match="--potential"):
        resume(directory, steps=128)
    with pytest.raises(UsageError, match="the function 'upright'"):
        resume(directory, steps=128, potential=potential.replace("upright", "columns"))
    moved = Path(potential.rpartition(":")[0]).rename(tmp_path / "moved.py")
    assert resume(directory, steps=128, potential=f"{moved}:upright").steps == 128
    moved.write_text(POTENTIAL.replace("abs()", "square()"))
    with pytest.raises(ResumeError, match="potential in the run directory"):
        resume(directory, steps=192, potential=f"{moved}:upright")


def test_a_start_that_was_exchanged_is_seen(trained: Path, tmp_path: Path) -> None:
    result = train(near(tmp_path, trained, PPO(), steps=64))
    shutil.rmtree(result.directory / "start")
    shutil.copytree(result.directory / "policy", result.directory / "start")
    with pytest.raises(ResumeError, match="start in the run directory"):
        resume(result.directory, steps=128)
