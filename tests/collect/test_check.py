import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from small_worlds import Faulty, Remembering, Walk

from upslope.collect import EnvironmentFailureError, Tick, TickVector, check_environment


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
