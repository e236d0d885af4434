import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from small_worlds import Walk

from upslope.collect import GymnasiumVector, SyncEnvironments, TickVector, UnsupportedAutoresetError
from upslope.collect.actions import random_action


def test_an_unknown_or_missing_autoreset_mode_is_refused():
    vector = TickVector(2, AutoresetMode.SAME_STEP)
    vector.metadata = {}
    with pytest.raises(UnsupportedAutoresetError, match=r"does not say how it resets.*SAME_STEP"):
        GymnasiumVector(vector)
    vector.metadata = {"autoreset_mode": "sometimes"}
    with pytest.raises(UnsupportedAutoresetError, match="unknown autoreset mode 'sometimes'"):
        GymnasiumVector(vector)


@pytest.mark.parametrize("declared", ["SAME_STEP", "SameStep", AutoresetMode.SAME_STEP])
def test_the_mode_may_be_declared_by_name(declared):
    vector = TickVector(2, AutoresetMode.SAME_STEP)
    vector.metadata = {"autoreset_mode": declared}
    assert GymnasiumVector(vector).mode is AutoresetMode.SAME_STEP


def test_same_step_without_the_final_observation_is_refused_when_an_episode_ends():
    vector = TickVector(2, AutoresetMode.NEXT_STEP)
    vector.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
    environments = GymnasiumVector(vector)
    environments.reset([0, 0])
    for _ in range(4):
        environments.step(np.zeros(2, dtype=np.int64))
    with pytest.raises(UnsupportedAutoresetError, match=r"gave no info\['final_obs'\]"):
        environments.step(np.zeros(2, dtype=np.int64))


def test_our_loop_and_gymnasium_agree_to_the_last_bit():
    ours = SyncEnvironments([Walk] * 3)
    theirs = GymnasiumVector(SyncVectorEnv([Walk] * 3, autoreset_mode=AutoresetMode.SAME_STEP))
    generator = np.random.default_rng(0)
    assert np.array_equal(ours.reset([4, 5, 6]), theirs.reset([4, 5, 6]))
    ends = 0
    for _ in range(200):
        action = random_action(ours.action_space, generator, 3)
        left, right = ours.step(action), theirs.step(action)
        for name in ("observation", "reward", "terminated", "truncated"):
            assert np.array_equal(getattr(left, name), getattr(right, name)), name
        assert (left.finished is None) == (right.finished is None)
        if left.finished is not None:
            ends += len(left.finished)
            assert np.array_equal(left.finished, right.finished)
            assert np.array_equal(left.final, right.final)
    assert ends > 30


def test_an_environment_that_raises_is_named():
    class Late(Walk):
        def step(self, action):
            raise ZeroDivisionError("no way")

    environments = SyncEnvironments([Walk, Late])
    environments.reset([7, 8])
    with pytest.raises(RuntimeError, match=r"environment 1 raised.*seeded with 8.*ZeroDivisionError: no way") as caught:
        environments.step(np.zeros(2, dtype=np.int64))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
