import re

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from small_worlds import Faulty, Remembering, Walk

from upslope.collect import EnvironmentFailureError, Tick, TickVector, UnknownEnvironmentError, check_environment


def _problems(source):
    report = check_environment(source, steps=300)
    assert not report.ok
    assert "not ready to train in" in str(report)
    return " ".join(finding.text for finding in report.findings if finding.level == "problem")


class Bent(gymnasium.Env):
    """One thing wrong with it."""

    def __init__(self, fault):
        self.fault = fault
        self.observation_space = spaces.Text(3) if fault == "space" else spaces.Box(-1, 1, (2,))
        self.action_space = spaces.Discrete(2)
        self.count = 0
        self.seen = np.zeros(2, np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seen = np.zeros(2, np.float32)
        return self.seen if self.fault == "reset" else (self.seen, {})

    def step(self, action):
        self.count += 1
        observation = self.seen.copy()
        if self.fault == "dtype":
            observation = observation.astype(np.float64)
        if self.fault == "range":
            observation += 3
        if self.fault == "random":
            observation = np.random.default_rng().uniform(-1, 1, 2).astype(np.float32)
        if self.fault == "memory":
            observation += self.count / 1e4
        reward = "much" if self.fault == "reward" else 1.0
        terminated = 1 if self.fault == "flag" else bool(self.count % 10 == 0)
        if self.fault == "raise":
            raise KeyError("x")
        if self.fault == "four":
            return observation, reward, terminated, {}
        return observation, reward, terminated, False, {}


@pytest.mark.parametrize("source", ["CartPole-v1", Walk, Remembering, Tick, lambda: Tick(named=True, terminating=True)])
def test_good_environments_pass(source):
    report = check_environment(source, steps=300)
    assert report.ok, str(report)
    assert "no problem found" in str(report)
    assert "the Tick suite" in str(report)


def test_snapshots_are_reported_as_they_are():
    assert "snapshots hold" in str(check_environment(Remembering, steps=100))
    assert "made anew at checkpoints" in str(check_environment(Walk, steps=100))


@pytest.mark.parametrize(
    ("fault", "word"),
    [
        ("space", "Text"),
        ("reset", "reset() must return"),
        ("dtype", "float64"),
        ("range", "not in observation_space"),
        ("random", "self.np_random"),
        ("reward", "one finite number"),
        ("flag", "terminated must be True or False"),
        ("four", "step() must return"),
    ],
)
def test_what_is_wrong_is_named(fault, word):
    assert word in _problems(lambda: Bent(fault))


def test_infinite_rewards_are_found():
    assert "step 7: the reward must be one finite number" in _problems(lambda: Faulty("reward"))


def test_an_environment_that_raises_is_shown():
    with pytest.raises(EnvironmentFailureError, match=r"step 1 with the action . raised KeyError"):
        check_environment(lambda: Bent("raise"))


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_vector_environments_are_checked_too(mode):
    report = check_environment(TickVector(3, mode), steps=60)
    assert report.ok
    assert mode.name in str(report)


def test_a_vector_environment_that_lies_is_found():
    vector = TickVector(3, AutoresetMode.NEXT_STEP)
    vector.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
    assert "final_obs" in _problems(vector)


def test_an_environment_without_ends_is_noted():
    assert "set a time limit" in str(check_environment(lambda: Faulty("nothing"), steps=50))


class Claims(TickVector):
    """A vector Tick that does one thing and declares another."""

    def __init__(self, num_envs=3, does=AutoresetMode.SAME_STEP, declares=AutoresetMode.NEXT_STEP, fault=""):
        super().__init__(num_envs, does)
        self.metadata = {"autoreset_mode": declares}
        self.fault = fault

    def reset(self, *, seed=None, options=None):
        if options is not None and self.fault == "all":
            return super().reset(seed=seed)
        if options is not None and self.fault == "none":
            count = self._count.copy()
            _, info = super().reset(options=options)
            self._count = np.where(count == 5, 0, count)
            return (count / 5).astype(np.float32)[:, None], info
        return super().reset(seed=seed, options=options)

    def step(self, actions):
        observation, reward, terminated, truncated, info = super().step(actions)
        if self.fault == "final" and info:
            info = {"final_obs": observation}
        if self.fault == "unrewarded":
            reward = np.zeros(self.num_envs)
        if self.fault == "flags":
            truncated = truncated.astype(np.int64)
        if self.fault == "paid":
            reward = np.ones(self.num_envs)
        return observation, reward, terminated, truncated, info


SAME, NEXT, DISABLED = AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED


@pytest.mark.parametrize(
    ("does", "declares", "fault", "word"),
    [
        (SAME, NEXT, "", "resets in the same step though it declares NEXT_STEP"),
        (SAME, NEXT, "unrewarded", "should begin an episode"),
        (NEXT, NEXT, "paid", "should only reset: reward 0"),
        (SAME, SAME, "final", "final_obs.* is always the first observation of the next episode"),
        (SAME, SAME, "flags", "truncated must be 3 booleans"),
        (DISABLED, DISABLED, "none", "should begin an episode"),
    ],
)
def test_modes_that_are_declared_and_not_kept_are_found(does, declares, fault, word):
    assert re.search(word, _problems(Claims(3, does, declares, fault)))


class Unrewarded(Walk):
    """Random starts, five steps and no reward: only that its actions matter tells when it resets."""

    def reset(self, *, seed=None, options=None):
        self.left = 5
        return super().reset(seed=seed)

    def step(self, action):
        self.left -= 1
        observation, *_, info = super().step(action)
        return observation, 0.0, self.left == 0, False, info


def test_a_reset_in_the_same_step_is_found_by_the_action_that_is_not_ignored():
    vector = SyncVectorEnv([Unrewarded] * 3, autoreset_mode=SAME)
    vector.metadata = {"autoreset_mode": NEXT}
    assert "the action of the step after an end changes what follows" in _problems(vector)


class Staggered(SyncVectorEnv):
    """Cannot reset some of its environments alone."""

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)


def test_a_reset_mask_that_is_ignored_is_found():
    assert "changed environments where the mask is False" in _problems(Staggered([Walk] * 3, autoreset_mode=DISABLED))


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("world", [Walk, Unrewarded, lambda: Tick(named=True, terminating=True)])
def test_vector_environments_that_keep_their_word_pass(world, mode):
    report = check_environment(lambda: SyncVectorEnv([world] * 3, autoreset_mode=mode), steps=300)
    assert report.ok, str(report)
    assert f"{mode.name} is kept" in str(report)


def test_an_ids_own_vectorisation_is_checked_too():
    good = str(check_environment("CartPole-v1", steps=300))
    assert "its own vectorisation: autoreset mode NEXT_STEP is kept" in good
    gymnasium.register(id="Claims-v0", entry_point=Tick, vector_entry_point=Claims)
    try:
        assert "its own vectorisation: step 6, after an end" in _problems("Claims-v0")
    finally:
        gymnasium.registry.pop("Claims-v0")


class Sharing(Walk):
    """Keeps its position in its class."""

    where = np.zeros(3)

    def reset(self, *, seed=None, options=None):
        Sharing.where, _ = super().reset(seed=seed)
        return Sharing.where, {}

    def step(self, action):
        self.position = Sharing.where
        Sharing.where, *rest = super().step(action)
        return Sharing.where, *rest


def test_every_way_to_step_is_compared_with_a_plain_loop():
    text = str(check_environment(Walk, steps=100))
    for way in ("1 x sync", "2 x sync", "2 x async"):
        assert f"{way}: the collector and a plain loop agree" in text
    assert "2 x sync: the collector and a plain loop over the same seed and actions disagree" in _problems(Sharing)


def test_an_environment_in_a_file_is_checked(tmp_path):
    file = tmp_path / "world.py"
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom upslope.collect import Tick\n"
        "@dataclass\nclass Size:\n    width: int = 1\nclass MyTick(Tick):\n    size = Size()\n"
    )
    report = check_environment(f"{file}:MyTick", steps=50)
    assert report.ok
    assert report.name == f"{file}:MyTick"
    with pytest.raises(UnknownEnvironmentError, match=r"no class or function 'Other'; its classes are .*MyTick"):
        check_environment(f"{file}:Other")
    with pytest.raises(UnknownEnvironmentError, match="there is no Python file"):
        check_environment(f"{tmp_path}/nowhere.py:MyTick")
