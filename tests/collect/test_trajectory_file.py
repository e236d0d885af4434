"""What is recorded is read again as it was, and nothing else is read."""

import json
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from gymnasium import spaces
from small_worlds import Walk

from upslope.collect import SyncEnvironments
from upslope.collect.actions import RandomPolicy
from upslope.collect.recorded import record_episodes
from upslope.collect.trajectory_file import Recording, read_recording, write_recording
from upslope.errors import UsageError
from upslope.spaces import ACTION_MASK, OBSERVATION, ActionMask, Box, Composite

WORLDS = {
    "vector": (spaces.Box(-np.inf, np.inf, (3,), np.float64), spaces.Discrete(3)),
    "named": (
        spaces.Dict({"z": spaces.Box(-np.inf, np.inf, (3,), np.float64), "a": spaces.Box(-9, 9, (2, 2), np.float32)}),
        spaces.Box(-1, 1, (2,), np.float32),
    ),
    "choices": (spaces.Box(-np.inf, np.inf, (3,), np.float64), spaces.MultiDiscrete([2, 3])),
}


class Named(Walk):
    """The walk with what is seen under two names."""

    def reset(self, *, seed=None, options=None):
        return self._named(super().reset(seed=seed)[0]), {}

    def step(self, action):
        observation, *rest = super().step(action)
        return self._named(observation), *rest

    def _named(self, position):
        named = isinstance(self.observation_space, spaces.Dict)
        return {"z": position, "a": np.zeros((2, 2), np.float32) + position[0]} if named else position


def recorded(kind: str = "vector") -> Recording:
    environments = SyncEnvironments([lambda: Named(*WORLDS[kind])] * 2)
    policy = RandomPolicy(environments.action_space)
    return record_episodes(policy, environments, episodes=5, seed=1, about={"environment": "a walk"})


def same(one: object, other: object) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
    return one == other


@pytest.mark.parametrize("kind", list(WORLDS))
@pytest.mark.parametrize("full", [False, True])
def test_every_field_comes_back(kind, full, tmp_path):
    recording = recorded(kind)
    trajectory = recording.trajectory
    if full:
        log_prob = trajectory.behaviour_log_prob
        trajectory = replace(
            trajectory,
            group=torch.arange(5) // 2,
            memory={"h": torch.rand(5, 4), "c": torch.rand(5, 2, 2)},
            reference_log_prob=log_prob - 1.0,
            proximal_log_prob=log_prob + 1.0,
            behaviour_log_prob=torch.full_like(log_prob, torch.nan),
            policy_version=12,
        )
        recording = replace(recording, trajectory=trajectory)
    write_recording(recording, tmp_path / "walk.safetensors")
    found = read_recording(tmp_path / "walk.safetensors")
    for entry in fields(trajectory):
        assert same(getattr(found.trajectory, entry.name), getattr(trajectory, entry.name)), entry.name
    if isinstance(trajectory.observation, dict):
        assert list(found.trajectory.observation) == list(trajectory.observation)
    assert (found.observation_space, found.action_space) == (recording.observation_space, recording.action_space)
    assert found.about == {"environment": "a walk"}
    assert [path.name for path in tmp_path.iterdir()] == ["walk.safetensors"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "walk.safetensors"
    write_recording(recorded(), path)
    return path.read_bytes()


def refusal(raw: bytes, path: Path) -> str:
    path.write_bytes(raw)
    with pytest.raises(UsageError) as error:
        read_recording(path)
    assert str(path) in str(error.value)
    return str(error.value)


def test_any_changed_byte_is_noticed(whole, tmp_path):
    path, generator = tmp_path / "walk.safetensors", np.random.default_rng(0)
    header = int.from_bytes(whole[:8], "little")
    places = [0, 7, *generator.integers(8, 8 + header, 20), *generator.integers(8 + header, len(whole), 20)]
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        pure = 8 <= place < whole.index(b'"upslope"')
        with suppress(UsageError) if pure else pytest.raises(UsageError):
            read_recording(path)


@pytest.mark.parametrize("length", [0, 5, 8, 200, -1])
def test_a_file_cut_short_is_refused(length, whole, tmp_path):
    assert "damaged" in refusal(whole[:length], tmp_path / "walk.safetensors")


def test_other_files_are_refused(whole, tmp_path):
    path = tmp_path / "x.safetensors"
    assert "damaged" in refusal(b"PK\x03\x04 not at all", path)
    assert "no safetensors file that upslope wrote" in refusal(safetensors.torch.save({"a": torch.zeros(1)}), path)
    other = safetensors.torch.save({"a": torch.zeros(1)}, metadata={"upslope": json.dumps({"format": "cake"})})
    assert "unknown settings" in refusal(other, path)
    later = whole.replace(rb"\"version\": 1", rb"\"version\": 2")
    assert later != whole
    assert "of version 2" in refusal(later, path)
    with pytest.raises(UsageError, match="upslope record"):
        read_recording(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reward": torch.zeros(5)}, "reward must have the shape"),
        ({"mask": torch.zeros(5, 2, dtype=torch.bool)}, "mask must be bool"),
        ({"time": torch.zeros(5, 4)}, "time must be int64"),
        ({"action": torch.full((5, 4), 3)}, "whole numbers from 0 to below 3"),
        ({"action": torch.zeros(5, 4, 2, dtype=torch.long)}, "action must have the shape"),
        ({"observation": torch.zeros(5, 4, 2)}, "observation must have the shape"),
        ({"final_index": torch.tensor([3, 1])}, "must rise"),
        ({"group": torch.zeros(4, dtype=torch.long)}, "group must be int64"),
    ],
    ids=["reward", "mask", "time", "choice", "action", "observation", "ends", "group"],
)
def test_fields_that_are_none_of_a_trajectory_are_refused(changes, words, tmp_path):
    recording = recorded()
    steps = {
        "observation": torch.zeros(5, 4, 3),
        "action": torch.zeros(5, 4, dtype=torch.long),
        "reward": torch.zeros(5, 4),
        "terminated": torch.zeros(5, 4, dtype=torch.bool),
        "truncated": torch.zeros(5, 4, dtype=torch.bool),
        "mask": torch.ones(5, 4, dtype=torch.bool),
        "behaviour_log_prob": torch.zeros(5, 4),
        "time": torch.zeros(5, 4, dtype=torch.long),
        "final_index": torch.tensor([1, 3]),
        "final_observation": torch.zeros(2, 3),
    }
    trajectory = replace(recording.trajectory, **{**steps, **changes})
    write_recording(replace(recording, trajectory=trajectory), tmp_path / "walk.safetensors")
    with pytest.raises(UsageError, match=words):
        read_recording(tmp_path / "walk.safetensors")
    write_recording(replace(recording, trajectory=replace(recording.trajectory, **steps)), tmp_path / "ok.safetensors")
    read_recording(tmp_path / "ok.safetensors")


def test_masks_of_actions_that_are_no_bits_are_refused(tmp_path):
    recording = recorded()
    mask = torch.ones(*recording.trajectory.shape, 3, dtype=torch.uint8)
    trajectory = recording.trajectory
    trajectory = replace(
        trajectory,
        observation={OBSERVATION: trajectory.observation, ACTION_MASK: mask},
        final_observation={
            OBSERVATION: trajectory.final_observation,
            ACTION_MASK: mask.flatten(0, 1)[trajectory.final_index],
        },
    )
    seen = Composite(((OBSERVATION, Box((3,), -1.0, 1.0)), (ACTION_MASK, ActionMask((3,)))))
    write_recording(replace(recording, trajectory=trajectory, observation_space=seen), tmp_path / "walk.safetensors")
    with pytest.raises(UsageError, match="action_mask must be bool"):
        read_recording(tmp_path / "walk.safetensors")
