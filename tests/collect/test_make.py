import time

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from small_worlds import Walk

from upslope.collect import (
    EnvironmentConfig,
    Tick,
    TickVector,
    UnknownEnvironmentError,
    UnsupportedAutoresetError,
    environment_factory,
    make_environments,
    resolve_environments,
)
from upslope.collect.make import has_native
from upslope.streams import Purpose


class Slow(Walk):
    """Takes three milliseconds a step."""

    def step(self, action):
        time.sleep(0.003)
        return super().step(action)


def test_slow_environments_go_to_worker_processes(monkeypatch):
    monkeypatch.setattr("upslope.collect.make.available_cores", lambda: 4)
    resolution = resolve_environments(Slow, EnvironmentConfig(count=4, resume="rebuild"))
    assert resolution.config.vectorization == "async"
    assert "4 processes" in resolution.notes[0]
    monkeypatch.setattr("upslope.collect.make.available_cores", lambda: 1)
    assert resolve_environments(Slow, EnvironmentConfig(count=4)).config.vectorization == "sync"


@pytest.mark.parametrize(("count", "choice"), [(1, "sync"), (128, "native")])
def test_an_environments_own_vectorisation_is_taken_where_it_is_faster(count, choice, monkeypatch):
    monkeypatch.setattr("upslope.collect.make.available_cores", lambda: 1)
    config = resolve_environments("CartPole-v1", EnvironmentConfig(count=count)).config
    assert config.vectorization == choice
    assert config.resume == "snapshot"
    environments = make_environments(config)
    assert environments.vectorization == choice
    assert environments.reset(range(count)).shape == (count, 4)


@pytest.mark.parametrize("cores", [1, 8])
@pytest.mark.parametrize("seconds", [1e-7, 1.0])
@pytest.mark.parametrize(("count", "native"), [(15, False), (16, True)])
def test_random_streams_are_never_chosen_by_the_clock(count, native, seconds, cores, monkeypatch):
    """sync and async agree to the last bit, native has other random numbers: how fast the machine is must not tell."""
    monkeypatch.setattr("upslope.collect.make.available_cores", lambda: cores)
    monkeypatch.setattr("upslope.collect.make._seconds_per_step", lambda environments, seed: seconds)
    config = resolve_environments("CartPole-v1", EnvironmentConfig(count=count, resume="rebuild")).config
    assert (config.vectorization == "native") is native


def test_what_is_settled_stays_settled():
    config = EnvironmentConfig(id="Pendulum-v1", vectorization="sync", resume="rebuild")
    assert resolve_environments(config).config == config


def test_every_source_is_taken():
    assert make_environments("Pendulum-v1").action_space.shape == (1,)
    assert make_environments(EnvironmentConfig(id="Acrobot-v1", count=2)).num_envs == 2
    assert make_environments(Walk, EnvironmentConfig(count=3)).num_envs == 3
    assert make_environments(Walk()).num_envs == 1
    vector = make_environments(TickVector(5, AutoresetMode.DISABLED), EnvironmentConfig(count=2))
    assert (vector.num_envs, vector.vectorization, vector.resume) == (5, "vector", "rebuild")


def test_an_instance_is_reset_but_not_closed_when_rebuilt():
    closed = []

    class Closing(Walk):
        def close(self):
            closed.append(1)

    environments = make_environments(Closing())
    first = environments.rebuild([3]).copy()
    assert np.array_equal(environments.rebuild([3]), first)
    assert closed == []


def test_an_environment_that_says_it_is_empty_is_taken_all_the_same():
    class Empty(Walk):
        def __len__(self):
            return 0

    environment = Empty()
    assert make_environments(environment).action_space.n == 3


def test_one_instance_cannot_be_several():
    with pytest.raises(ValueError, match="pass a function that makes one"):
        make_environments(Walk(), EnvironmentConfig(count=2))


def test_arguments_and_time_limits_reach_the_environment():
    config = EnvironmentConfig(id="FrozenLake-v1", kwargs={"is_slippery": False}, time_limit=7)
    environment = environment_factory(config)()
    assert environment.spec is not None
    assert environment.spec.max_episode_steps == 7
    assert environment.spec.kwargs["is_slippery"] is False
    environments = make_environments(Walk, EnvironmentConfig(time_limit=1, vectorization="sync"))
    environments.reset([0])
    assert environments.step(np.zeros(1, dtype=np.int64)).truncated.tolist() == [True]


def test_native_environments_take_arguments_and_time_limits_too():
    config = EnvironmentConfig(
        id="CartPole-v1", count=2, vectorization="native", kwargs={"sutton_barto_reward": True}, time_limit=3
    )
    environments = make_environments(config)
    environments.reset([0, 0])
    steps = [environments.step(np.zeros(2, dtype=np.int64)) for _ in range(4)]
    assert [step.truncated.tolist() for step in steps] == [[False] * 2, [False] * 2, [True] * 2, [False] * 2]
    assert steps[0].reward.tolist() == [0.0, 0.0]
    assert steps[3].live is not None
    assert not steps[3].live.any()


def test_no_native_vectorisation_is_said_so():
    with pytest.raises(ValueError, match=r"Pendulum-v1 has no vectorisation of its own.*'sync' or 'async'"):
        make_environments(EnvironmentConfig(id="Pendulum-v1", vectorization="native"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("CartPol-v1", ["no environment 'CartPol-v1'", "CartPole-v1"]),
        ("CartPole-v9", ["no environment 'CartPole-v9'", "CartPole-v1"]),
        ("Nowhere/Thing-v0", ["Namespace Nowhere not found"]),
        ("no_such_package:Thing-v0", ["needs a package", "no_such_package"]),
    ],
)
def test_unknown_environments_are_named_with_close_matches(name, words):
    with pytest.raises(UnknownEnvironmentError) as caught:
        make_environments(name)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("entry_point", "extra"),
    [
        ("gymnasium.envs.box2d.lunar_lander:LunarLander", "upslope[box2d]"),
        ("gymnasium.envs.mujoco.hopper_v5:HopperEnv", "upslope[mujoco]"),
    ],
)
def test_a_missing_package_names_the_extra_to_install(entry_point, extra, monkeypatch):
    def missing(*arguments, **settings):
        raise gymnasium.error.DependencyNotInstalled("not here")

    gymnasium.register(id="Missing-v0", entry_point=entry_point)
    monkeypatch.setattr(gymnasium, "make", missing)
    try:
        with pytest.raises(UnknownEnvironmentError, match="pip install") as caught:
            make_environments("Missing-v0")
    finally:
        gymnasium.registry.pop("Missing-v0")
    assert extra in str(caught.value)


def test_a_vector_environment_that_hides_its_mode_is_refused():
    vector = SyncVectorEnv([Tick])
    vector.metadata = {}
    with pytest.raises(UnsupportedAutoresetError):
        make_environments(vector)


@pytest.mark.parametrize("count", [0, -3])
def test_the_count_is_positive(count):
    with pytest.raises(ValueError, match="count"):
        make_environments(EnvironmentConfig(count=count))


def test_evaluation_environments_are_not_tried_for_snapshots():
    environments = make_environments("Pendulum-v1", seed=3, purpose=Purpose.EVALUATION_ENVIRONMENT)
    assert environments.resume == "rebuild"


def test_atari_frames_are_grey_small_and_stacked():
    pytest.importorskip("ale_py")
    config = EnvironmentConfig(id="ALE/Breakout-v5", preprocessing="atari", vectorization="sync")
    environments = make_environments(config)
    assert not has_native(config)
    observation = environments.reset([0])
    assert (observation.shape, observation.dtype) == ((1, 4, 84, 84), np.uint8)
    assert environments.observation_space.is_image
    environments.step(np.zeros(1, dtype=np.int64))
    environments.close()


def _breakout(**settings):
    pytest.importorskip("ale_py")
    return environment_factory(EnvironmentConfig(id="ALE/Breakout-v5", preprocessing="atari", **settings))()


def test_a_policy_that_only_waits_is_served_every_ball():
    """Untrained greedy policies do nothing: without FIRE Breakout would stand still for 27,000 steps."""
    game = _breakout(kwargs={"repeat_action_probability": 0.0})
    game.reset(seed=0)
    ended, steps, lives = False, 0, set()
    while not ended and steps < 1000:
        _, _, terminated, truncated, info = game.step(0)
        ended, steps = terminated or truncated, steps + 1
        lives.add(info["lives"])
    assert ended
    assert lives == {5, 4, 3, 2, 1, 0}


def test_time_limits_of_games_count_decisions_not_frames():
    game = _breakout(time_limit=20)
    game.reset(seed=0)
    assert [game.step(0)[3] for _ in range(20)] == [False] * 19 + [True]


def test_games_without_fire_are_left_alone():
    pytest.importorskip("ale_py")
    game = environment_factory(EnvironmentConfig(id="ALE/Freeway-v5", preprocessing="atari"))()
    frames, _ = game.reset(seed=0)
    assert "FIRE" not in game.unwrapped.get_action_meanings()
    assert (frames == frames[0]).all()
