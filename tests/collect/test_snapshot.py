import re

import numpy as np
import pytest
import torch
from small_worlds import Forgetful, Remembering, Walk

from upslope.collect import EnvironmentCollector, EnvironmentConfig, make_environments, resolve_environments
from upslope.collect.actions import RandomPolicy, random_action
from upslope.collect.resume import freeze
from upslope.train.typed_json import encode_tree

EXACT = [
    ("CartPole-v1", "sync"),
    ("CartPole-v1", "native"),
    ("Pendulum-v1", "sync"),
    ("Acrobot-v1", "sync"),
    ("MountainCar-v0", "sync"),
    ("MountainCarContinuous-v0", "sync"),
    ("FrozenLake-v1", "sync"),
    ("Taxi-v4", "sync"),
    ("Blackjack-v1", "sync"),
    ("CliffWalking-v1", "sync"),
    ("Hopper-v5", "sync"),
    ("Humanoid-v5", "sync"),
    ("Hopper-v5", "async"),
]


def _environments(name, vectorization, resume="snapshot"):
    return make_environments(EnvironmentConfig(id=name, count=3, vectorization=vectorization, resume=resume))


def _plain(tree):
    """What a checkpoint may hold."""
    match tree:
        case dict():
            assert all(isinstance(key, str) for key in tree)
            return {key: _plain(value) for key, value in tree.items()}
        case list() | tuple():
            return [_plain(value) for value in tree]
        case np.ndarray():
            return tree.copy()
        case _:
            assert tree is None or type(tree) in (bool, int, float, str), type(tree)
            assert not isinstance(tree, int) or abs(tree) < 2**53
            return tree


def _walk(environments, actions):
    trace = []
    for action in actions:
        step = environments.step(action)
        trace.append(freeze([step.observation, step.reward, step.terminated, step.truncated, step.final]))
    return trace


@pytest.mark.parametrize(("name", "vectorization"), EXACT)
def test_a_restored_environment_goes_on_the_same_to_the_last_bit(name, vectorization):
    first, second = _environments(name, vectorization), _environments(name, vectorization)
    generator = np.random.default_rng(1)
    actions = [random_action(first.action_space, generator, 3) for _ in range(250)]
    first.reset([1, 2, 3])
    _walk(first, actions[:37])
    tree = _plain(first.snapshot())
    expected = _walk(first, actions[37:])
    second.reset([4, 5, 6])
    _walk(second, actions[:11])
    second.restore(tree)
    assert _walk(second, actions[37:]) == expected
    assert len({str(entry) for entry in expected}) > 5
    first.close()
    second.close()


def test_time_limits_are_part_of_the_snapshot():
    config = EnvironmentConfig(id="Pendulum-v1", vectorization="sync", resume="snapshot", time_limit=10)
    first, second = make_environments(config), make_environments(config)
    first.reset([0])
    action = np.zeros((1, 1), np.float32)
    for _ in range(6):
        first.step(action)
    second.reset([1])
    second.restore(first.snapshot())
    assert [bool(second.step(action).truncated[0]) for _ in range(4)] == [False, False, False, True]


@pytest.mark.parametrize(
    ("source", "expected", "why"),
    [
        (Remembering, "snapshot", None),
        (Forgetful, "rebuild", "went on differently"),
        (Walk, "rebuild", "small_worlds:Walk cannot be taken"),
    ],
)
def test_users_environments_are_tried_before_they_are_trusted(source, expected, why):
    resolution = resolve_environments(source, EnvironmentConfig(vectorization="sync"))
    assert resolution.config.resume == expected
    assert why is None or any(why in note for note in resolution.notes)


class Peculiar(Remembering):
    """Remembers everything, but says so in some way of its own."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.kept = np.float64(0.25)

    def reset(self, *, seed=None, options=None):
        self.kept = np.float64(0.25)
        return super().reset(seed=seed)

    def step(self, action):
        assert type(self.kept) is np.float64
        self.kept += self.position[0]
        observation, reward, *rest = super().step(action)
        return observation, reward + float(self.kept), *rest

    def get_state(self):
        said = {
            "scalar": self.kept,
            "tensor": torch.tensor(float(self.kept), dtype=torch.float64),
            "tuple": (1, self.kept),
            "object": object(),
            "set": {1},
            "key": {3: 1},
            "array": np.array([None]),
            "loop": [],
        }
        said["loop"].append(said["loop"])
        if self.way == "missing":
            raise KeyError("kept")
        return {**super().get_state(), "said": said.get(self.way, self.kept)}

    def set_state(self, state):
        super().set_state(state)
        if self.way == "setting":
            raise TypeError("no, thanks")
        said = state["said"]
        match self.way:
            case "tensor":
                assert isinstance(said, torch.Tensor)
                self.kept = np.float64(said.item())
            case "tuple":
                self.kept = said[1]
            case _:
                self.kept = said


@pytest.mark.parametrize("way", ["scalar", "tensor", "tuple"])
def test_states_of_users_environments_come_back_as_they_were_given(way):
    resolution = resolve_environments(lambda: Peculiar(way), EnvironmentConfig(vectorization="sync"))
    assert resolution.config.resume == "snapshot", resolution.notes
    environments = make_environments(lambda: Peculiar(way), resolution.config)
    environments.reset([1])
    assert encode_tree(environments.snapshot())


@pytest.mark.parametrize(
    ("way", "problem"),
    [
        ("object", r"get_state\(\) returns\['said'\] is of the type object, which a checkpoint cannot hold"),
        ("set", r"returns\['said'\] is of the type set"),
        ("key", r"returns\['said'\] has the key 3; keys must be str"),
        ("array", r"returns\['said'\] is of the type array of object"),
        ("loop", r"contains itself"),
        ("missing", r"Peculiar.get_state\(\) raised KeyError: 'kept'"),
        ("setting", r"Peculiar.set_state\(state\) raised TypeError: no, thanks"),
    ],
)
def test_states_that_a_checkpoint_cannot_hold_are_found_before_the_run(way, problem):
    resolution = resolve_environments(lambda: Peculiar(way), EnvironmentConfig(vectorization="sync"))
    assert resolution.config.resume == "rebuild"
    assert re.search(problem, resolution.notes[-1])


def test_snapshots_that_do_not_hold_are_refused_where_they_are_asked_for():
    with pytest.raises(ValueError, match="Use resume='rebuild'"):
        resolve_environments(Forgetful, EnvironmentConfig(vectorization="sync", resume="snapshot"))


def test_a_snapshot_of_something_else_is_refused():
    cartpole, pendulum = _environments("CartPole-v1", "sync"), _environments("Pendulum-v1", "sync")
    cartpole.reset([0, 1, 2])
    pendulum.reset([0, 1, 2])
    with pytest.raises(ValueError, match="resume with the environment the run was started with"):
        pendulum.restore(cartpole.snapshot())
    tree = cartpole.snapshot()
    tree["environments"].pop()
    with pytest.raises(ValueError, match="count=2"):
        cartpole.restore(tree)


def _collected(collector, updates):
    policy = RandomPolicy(collector.action_space)
    result = []
    for update in updates:
        trajectory = collector.collect(policy, update)
        fields = (trajectory.observation, trajectory.action, trajectory.reward, trajectory.time, trajectory.mask)
        result.append(freeze([*fields, trajectory.final_observation, trajectory.final_index, collector.finished()]))
    return result


@pytest.mark.parametrize(
    ("name", "vectorization", "resume", "length"),
    [
        ("CartPole-v1", "sync", "snapshot", {"steps": 40}),
        ("CartPole-v1", "native", "snapshot", {"steps": 40}),
        ("CartPole-v1", "async", "snapshot", {"steps": 40}),
        ("CartPole-v1", "sync", "rebuild", {"steps": 40}),
        ("CartPole-v1", "async", "rebuild", {"steps": 40}),
        ("CartPole-v1", "sync", "snapshot", {"episodes": 4}),
        ("LunarLander-v3", "sync", "rebuild", {"steps": 40}),
        ("BipedalWalker-v3", "sync", "rebuild", {"steps": 40}),
        ("LunarLander-v3", "sync", "rebuild", {"episodes": 3}),
        ("Hopper-v5", "sync", "snapshot", {"steps": 40}),
    ],
)
def test_a_resumed_collector_and_one_that_went_on_bring_the_same(name, vectorization, resume, length):
    straight = EnvironmentCollector(_environments(name, vectorization, resume), seed=5, **length)
    _collected(straight, range(3))
    tree = _plain(straight.snapshot())
    expected = _collected(straight, range(3, 6))
    resumed = EnvironmentCollector(_environments(name, vectorization, resume), seed=5, **length)
    resumed.restore(tree)
    assert _collected(resumed, range(3, 6)) == expected
    straight.close()
    resumed.close()


def test_rebuilding_cuts_open_episodes_and_forgets_their_returns():
    collector = EnvironmentCollector(_environments("Pendulum-v1", "sync", "rebuild"), steps=150, seed=0)
    collector.collect(RandomPolicy(collector.action_space), 0)
    collector.snapshot()
    trajectory = collector.collect(RandomPolicy(collector.action_space), 1)
    assert trajectory.time[:, 0].tolist() == [0, 0, 0]
    assert collector.finished() == []
