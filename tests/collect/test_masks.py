"""Masks of valid actions at the door: wherever they come from, they are part of what the policy sees, and obeyed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from masked_worlds import LENGTH, SEVERAL, VALID, Masked, MaskedVector

from upslope import ActorCriticConfig, EnvironmentConfig
from upslope.collect import EnvironmentCollector, UnsupportedSpaceError, check_environment, make_environments
from upslope.collect.actions import RandomPolicy
from upslope.collect.check import Report
from upslope.collect.errors import ActionMaskError, EnvironmentFailureError
from upslope.collect.evaluation import evaluate_policy
from upslope.collect.vector import VectorEnvironment
from upslope.policies import ActorCritic
from upslope.spaces import ACTION_MASK, OBSERVATION, ActionMask, Composite
from upslope.trajectory import Trajectory

PLACES = ("info", "method", "observation")


def config(place: str = "info", **changes: Any) -> EnvironmentConfig:
    name = "legal" if place == "observation" else None
    settings = {"action_mask": place, "action_mask_name": name, "vectorization": "sync", "resume": "rebuild"}
    return EnvironmentConfig(**{**settings, **changes})


def environments(way: str, place: str, *, several: bool = False) -> VectorEnvironment:
    """Three of them, stepped this way."""
    make = partial(Masked, place, several=several)
    here = config(place, count=3)
    if way in ("sync", "async"):
        return make_environments(make, replace(here, vectorization=way))
    kind, mode = way.split()
    classes: dict[str, Callable[..., Any]] = {
        "SyncVectorEnv": lambda mode: SyncVectorEnv([make] * 3, autoreset_mode=mode),
        "AsyncVectorEnv": lambda mode: AsyncVectorEnv([make] * 3, autoreset_mode=mode),
        "custom": partial(MaskedVector, 3),
    }
    return make_environments(classes[kind](AutoresetMode[mode]), here)


def policy(world: VectorEnvironment) -> ActorCritic:
    generator = torch.Generator().manual_seed(0)
    settings = ActorCriticConfig(hidden=(8,), policy_gain=3.0, normalize_observation=True)
    return ActorCritic(world.observation_space, world.action_space, settings, generator=generator)


def counts(observation: Any) -> np.ndarray:
    """The count of each observation, [...]."""
    clock = observation[OBSERVATION if OBSERVATION in observation else "clock"]
    return np.rint(np.asarray(clock)[..., 0] * LENGTH).astype(int)


def obeyed(trajectory: Trajectory, table: np.ndarray, start: int | tuple[int, int] = 0) -> None:
    """Masks are those of the counts, and chosen actions, counted from `start`, are valid (else environments raise)."""
    observation: Any = trajectory.observation
    seen = counts(observation)
    chosen = trajectory.mask.numpy()
    assert np.array_equal(observation[ACTION_MASK].numpy()[chosen], table[seen][chosen].astype(bool))
    action = trajectory.action.numpy().reshape(*seen.shape, -1) - np.array(start)
    for column, part in enumerate(np.split(table, [2], axis=1) if action.shape[-1] == 2 else [table]):
        assert np.take_along_axis(part[seen], action[..., column : column + 1], -1)[chosen].all()
    assert bool(trajectory.behaviour_log_prob.isfinite().all())


WAYS = [
    *((way, place) for way in ("sync", "async") for place in PLACES),
    *((f"SyncVectorEnv {mode.name}", place) for mode in AutoresetMode for place in PLACES),
    ("AsyncVectorEnv NEXT_STEP", "info"),
    ("AsyncVectorEnv SAME_STEP", "method"),
    *((f"custom {mode.name}", "info") for mode in AutoresetMode),
]


@pytest.mark.parametrize(("way", "place"), WAYS)
def test_masks_reach_the_policy_and_are_obeyed(way: str, place: str) -> None:
    world = environments(way, place)
    rest = "clock" if place == "observation" else OBSERVATION
    assert isinstance(world.observation_space, Composite)
    assert dict(world.observation_space.entries)[ACTION_MASK] == ActionMask((3,))
    assert {name for name, _ in world.observation_space.entries} == {ACTION_MASK, rest}
    collector = EnvironmentCollector(world, steps=40, seed=0)
    obeyed(collector.collect(policy(world), 0), VALID)
    obeyed(collector.collect(RandomPolicy(world.action_space, masked=True), 1), VALID, 4)
    collector.close()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("way", ["sync", "async", "SyncVectorEnv NEXT_STEP", "SyncVectorEnv SAME_STEP"])
def test_masks_of_several_choices(way: str, place: str) -> None:
    world = environments(way, place, several=True)
    collector = EnvironmentCollector(world, steps=40, seed=0)
    obeyed(collector.collect(policy(world), 0), SEVERAL)
    obeyed(collector.collect(RandomPolicy(world.action_space, masked=True), 1), SEVERAL, (1, 0))
    collector.close()


@pytest.mark.parametrize("way", ["sync", "SyncVectorEnv NEXT_STEP", "SyncVectorEnv SAME_STEP", "custom SAME_STEP"])
def test_whole_episodes_and_evaluation_obey_masks(way: str) -> None:
    world = environments(way, "info")
    collector = EnvironmentCollector(world, episodes=6, seed=0)
    trajectory = collector.collect(policy(world), 0)
    assert trajectory.mask.all()
    assert trajectory.shape == (6, LENGTH)
    obeyed(trajectory, VALID)
    result = evaluate_policy(policy(world), world, episodes=4, seed=0)
    assert result.returns.tolist() == [5.0] * 4
    collector.close()


def test_padding_has_no_mask_and_breaks_nothing() -> None:
    """A policy evaluated on whole padded rows has finite log-probs and gradients everywhere."""
    world = make_environments(lambda: Masked("info", truncating=True), config(count=1, time_limit=3))
    ours = policy(world)
    trajectory = EnvironmentCollector(world, episodes=2, seed=0).collect(ours, 0)
    observation: Any = {name: torch.cat([e, torch.zeros_like(e)], 1) for name, e in trajectory.observation.items()}  # pyright: ignore[reportAttributeAccessIssue]
    padded = replace(
        trajectory,
        observation=observation,
        action=torch.cat([trajectory.action, torch.zeros_like(trajectory.action)], 1),
    )
    evaluation = ours.evaluate(padded)
    (evaluation.log_prob + evaluation.entropy)[:, :3].sum().backward()
    assert evaluation.log_prob.isfinite().all()
    assert all(bool(p.grad.isfinite().all()) for p in ours.parameters() if p.grad is not None)


def test_final_observations_carry_their_masks() -> None:
    world = make_environments(lambda: Masked("info", truncating=True), config(count=2))
    trajectory = EnvironmentCollector(world, steps=7, seed=0).collect(policy(world), 0)
    final: Any = trajectory.final_observation
    assert counts(final).tolist() == [5, 2, 5, 2]
    assert np.array_equal(final[ACTION_MASK].numpy(), VALID[counts(final)].astype(bool))
    same = make_environments(
        SyncVectorEnv([lambda: Masked("info", truncating=True)] * 2, autoreset_mode="SameStep"), config()
    )
    other = EnvironmentCollector(same, steps=7, seed=0).collect(policy(same), 0)
    assert torch.equal(other.final_observation[ACTION_MASK], final[ACTION_MASK])  # pyright: ignore[reportArgumentType, reportCallIssue]


@pytest.mark.parametrize("way", ["sync", "async", "custom DISABLED", "custom SAME_STEP"])
def test_snapshots_hold_masks(way: str) -> None:
    first, second = environments(way, "info"), environments(way, "info")
    ours = policy(first)
    observation = first.reset([1, 2, 3])
    for _ in range(4):
        observation = first.step(ours.sampler().to_environment(ours.sampler().mode(observation))).observation
    tree, action = first.snapshot(), ours.sampler().to_environment(ours.sampler().mode(observation))
    second.reset([7, 8, 9])
    restored: Any = second.restore(tree)
    assert np.array_equal(restored[ACTION_MASK], VALID[[4, 4, 4]].astype(bool))
    for _ in range(3):
        ours_step, theirs = first.step(action), second.step(action)
        left, right = dict(ours_step.observation), dict(theirs.observation)  # pyright: ignore[reportArgumentType, reportCallIssue]
        assert all(np.array_equal(left[name], right[name]) for name in left)
        action = ours.sampler().to_environment(ours.sampler().mode(left))
    first.close()
    second.close()


WRONG = {
    "nothing is valid": (
        np.zeros(3, np.int8),
        r"after 2 steps of the episode, info\['action_mask'\]: no action is val",
    ),
    "absent": ("absent", r"after 2 steps of the episode, info\['action_mask'\]: there is no mask of valid actions"),
    "shape": (np.ones(4, bool), r"one entry for each of 3 choices, shape \(3,\), got shape \(4,\)"),
    "numbers": (np.array([0, 2, 1]), "must hold bool, or whole numbers 0 and 1"),
    "real numbers": (np.array([0.0, 1.0, 1.0]), "must hold bool, or whole numbers 0 and 1"),
    "words": (["a", "b", "c"], "must hold bool, or whole numbers 0 and 1"),
}


@pytest.mark.parametrize(("case", "way"), [*((case, "sync") for case in WRONG), ("absent", "async")])
def test_a_wrong_mask_is_told_with_environment_and_step(case: str, way: str) -> None:
    broken, words = WRONG[case]
    world = make_environments(partial(Masked, "info", broken=broken), config(count=2, vectorization=way))
    collector = EnvironmentCollector(world, steps=10, seed=0)
    with pytest.raises(EnvironmentFailureError, match=words) as caught:
        collector.collect(RandomPolicy(world.action_space, masked=True), 0)
    assert caught.match("environment [01] ")
    collector.close()


def test_a_vector_environment_is_told_which_of_it_is_wrong() -> None:
    world = make_environments(MaskedVector(3, AutoresetMode.NEXT_STEP, broken=1), config())
    collector = EnvironmentCollector(world, steps=10, seed=0)
    with pytest.raises(EnvironmentFailureError, match=r"environment 1 of .*, step 3: observation, info\['action_mask'"):
        collector.collect(RandomPolicy(world.action_space, masked=True), 0)


@pytest.mark.parametrize(
    ("make", "settings", "words"),
    [
        (lambda: gymnasium.make("Pendulum-v1"), config("info"), "masks .* are for Discrete and MultiDiscrete actions"),
        (Masked, config("method"), r"has no method action_masks\(\) to ask for masks"),
        (Masked, config("observation"), "the mask should be the entry 'legal' of the observation"),
        (
            partial(Masked, "method"),
            config("method", action_mask_name="valid_action_mask"),
            r"no method valid_action_mask\(\)",
        ),
    ],
    ids=["continuous", "no method", "no entry", "another method"],
)
def test_a_place_without_masks_is_told(make: Callable[[], Any], settings: EnvironmentConfig, words: str) -> None:
    with pytest.raises((UnsupportedSpaceError, ActionMaskError), match=words):
        make_environments(make, settings)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("place", PLACES)
def test_an_environment_without_masks_is_not_to_blame(place: str, vectorization: str) -> None:
    with pytest.raises(Exception, match=r'environment\.action_mask="none" for an environment without masks') as caught:
        make_environments("CartPole-v1", config(place, count=2, vectorization=vectorization)).reset([0, 1])
    assert isinstance(caught.value, UnsupportedSpaceError | ActionMaskError | EnvironmentFailureError)
    assert "The fault is in the environment" not in str(caught.value)


def test_an_entry_of_that_name_is_not_overwritten() -> None:
    space = gymnasium.spaces.Dict({"action_mask": gymnasium.spaces.Discrete(2)})

    def make() -> Any:
        world = Masked("info")
        world.observation_space = space
        return world

    with pytest.raises(UnsupportedSpaceError, match="has an entry 'action_mask' already"):
        make_environments(make, config())


def check(place: str, **settings: Any) -> Report:
    name = "legal" if place == "observation" else None
    from upslope.collect.masks import MaskedEnvironment

    return check_environment(lambda: MaskedEnvironment(Masked(place, **settings), place, name), steps=200)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("place", PLACES)
def test_check_env_walks_by_the_mask(place: str) -> None:
    report = check(place)
    assert report.ok, str(report)
    assert "masks of valid actions: " in str(report)


def test_check_env_tells_what_is_wrong_with_masks_and_that_there_are_some() -> None:
    assert "no action is valid" in str(check("info", broken=np.zeros(3, np.int8)))
    assert not check("info", broken="absent").ok
    unused = check_environment("Taxi-v4", steps=20)
    assert unused.ok
    assert "set environment.action_mask to info" in str(unused)
    used = check_environment(EnvironmentConfig(id="Taxi-v4", action_mask="info"), steps=20)
    assert used.ok
    assert "masks of valid actions: " in str(used)
