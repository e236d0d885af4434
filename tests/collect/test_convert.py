import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from small_worlds import Spoken

from upslope.collect import (
    EnvironmentCollector,
    GymnasiumVector,
    SyncEnvironments,
    UnsupportedSpaceError,
    convert_action_space,
)
from upslope.collect.actions import RandomPolicy, random_action
from upslope.collect.convert import ObservationLayout
from upslope.policies import ActorCritic, ActorCriticConfig
from upslope.spaces import Box, Composite, Discrete, MultiBinary, MultiDiscrete


def _converted(space):
    return ObservationLayout(space).space


def test_each_observation_space_in_our_words():
    box = spaces.Box(np.array([-1.0, -np.inf]), np.array([1.0, 2.0]), dtype=np.float64)
    assert _converted(box) == Box((2,), (-1.0, -np.inf), (1.0, 2.0), "float32")
    image = spaces.Box(0, 255, (8, 6, 3), np.uint8)
    assert _converted(image) == Box((8, 6, 3), 0.0, 255.0, "uint8")
    assert _converted(spaces.Discrete(3, start=-1)) == Discrete(3, -1)
    assert _converted(spaces.MultiDiscrete([2, 5], start=[1, 0])) == MultiDiscrete((2, 5), (1, 0))
    assert _converted(spaces.MultiBinary([2, 3])) == MultiBinary(6)


def test_nested_spaces_are_flattened_to_paths():
    inner = spaces.Tuple((spaces.Discrete(2), spaces.MultiBinary(3)))
    nested = spaces.Dict({"a": inner, "b": spaces.Dict({"c": spaces.Box(0, 1, (2,))})})
    expected = (("a/0", Discrete(2)), ("a/1", MultiBinary(3)), ("b/c", Box((2,), 0.0, 1.0)))
    assert _converted(nested) == Composite(expected)


@pytest.mark.parametrize(
    ("space", "word"),
    [
        (spaces.Text(5), "TransformObservation"),
        (spaces.Sequence(spaces.Discrete(2)), "Sequence"),
        (spaces.Graph(spaces.Box(0, 1, (2,)), None), "Graph"),
        (spaces.Dict({"good": spaces.Discrete(2), "bad": spaces.Text(5)}), "'bad'"),
        (spaces.Dict({}), "no entries"),
        (spaces.Dict({"a/b": spaces.Discrete(2), "a": spaces.Dict({"b": spaces.Discrete(2)})}), "Rename"),
        (spaces.OneOf([spaces.Discrete(2), spaces.Discrete(3)]), "OneOf"),
    ],
)
def test_observations_without_array_form_are_refused_with_the_remedy(space, word):
    with pytest.raises(UnsupportedSpaceError, match=word):
        _converted(space)


@pytest.mark.parametrize(
    ("space", "word"),
    [
        (spaces.Dict({"a": spaces.Discrete(2)}), "TransformAction"),
        (spaces.Tuple([spaces.Discrete(2)]), "MultiDiscrete"),
        (spaces.Box(0, 3, (2,), np.int64), "MultiDiscrete"),
        (spaces.MultiBinary([2, 2]), "one dimension"),
        (spaces.MultiDiscrete([[2, 2]]), "one dimension"),
        (spaces.Text(4), "TransformAction"),
    ],
)
def test_actions_no_policy_can_take_are_refused_with_the_remedy(space, word):
    with pytest.raises(UnsupportedSpaceError, match=word):
        convert_action_space(space)


OBSERVATIONS = [
    spaces.Box(-1, 1, (3,), np.float64),
    spaces.Box(-1, 1, (), np.float32),
    spaces.Box(0, 255, (4, 5, 3), np.uint8),
    spaces.Box(-5, 5, (2,), np.int32),
    spaces.Discrete(4, start=2),
    spaces.MultiDiscrete([3, 4], start=[-1, 5]),
    spaces.MultiDiscrete([[3, 4], [2, 2]]),
    spaces.MultiBinary(4),
    spaces.MultiBinary([2, 2]),
    spaces.Tuple((spaces.Discrete(3, start=1), spaces.Box(0, 1, (2,)))),
    spaces.Dict({"x": spaces.Dict({"y": spaces.MultiBinary(2)}), "z": spaces.Discrete(2)}),
]


def _flatten(observation, space):
    """What one observation must become, written down without the code under test."""
    match space:
        case spaces.Dict():
            parts = {name: _flatten(observation[name], child) for name, child in space.spaces.items()}
        case spaces.Tuple():
            parts = {str(k): _flatten(observation[k], child) for k, child in enumerate(space.spaces)}
        case spaces.Discrete():
            return {"": np.int64(observation - space.start)}
        case spaces.MultiDiscrete():
            return {"": (observation - space.start).ravel()}
        case spaces.MultiBinary():
            return {"": observation.ravel()}
        case _:
            return {"": observation.astype(np.float32) if observation.dtype.kind == "f" else observation}
    return {f"{a}/{b}" if b else a: value for a, entries in parts.items() for b, value in entries.items()}


@pytest.mark.parametrize("space", OBSERVATIONS, ids=str)
def test_every_observation_arrives_as_the_environment_gave_it(space):
    environments = [Spoken(space), Spoken(space)]
    collector = EnvironmentCollector(
        SyncEnvironments([lambda: environments[0], lambda: environments[1]]), steps=6, seed=3
    )
    trajectory = collector.collect(RandomPolicy(collector.action_space), 0)
    for row, environment in enumerate(environments):
        for step, shown in enumerate(environment.shown[:6]):
            for name, expected in _flatten(shown, space).items():
                tensor = trajectory.observation[name] if name else trajectory.observation
                assert tensor[row, step].numpy().dtype == expected.dtype
                np.testing.assert_array_equal(tensor[row, step].numpy(), expected)
        for name, expected in _flatten(environment.shown[6], space).items():
            tensor = trajectory.final_observation[name] if name else trajectory.final_observation
            np.testing.assert_array_equal(tensor[row].numpy(), expected)
    assert trajectory.final_index.tolist() == [5, 11]


@pytest.mark.parametrize("space", OBSERVATIONS, ids=str)
def test_batched_observations_of_vector_environments_are_converted_alike(space):
    from gymnasium.vector import AutoresetMode, SyncVectorEnv

    from upslope.collect import GymnasiumVector

    def rollout(environments):
        collector = EnvironmentCollector(environments, steps=4, seed=1)
        return collector.collect(RandomPolicy(collector.action_space), 0).observation

    ours = rollout(SyncEnvironments([lambda: Spoken(space)] * 2))
    vector = SyncVectorEnv([lambda: Spoken(space)] * 2, autoreset_mode=AutoresetMode.SAME_STEP)
    theirs = rollout(GymnasiumVector(vector))
    for name in ours if isinstance(ours, dict) else [None]:
        left, right = (ours, theirs) if name is None else (ours[name], theirs[name])
        assert left.dtype == right.dtype
        assert torch.equal(left, right)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(3, start=5),
        spaces.MultiDiscrete([2, 3], start=[4, -1]),
        spaces.MultiBinary(3),
        spaces.Box(-2, 2, (2,), np.float64),
        spaces.Box(-np.inf, np.inf, (2, 2), np.float32),
        spaces.Box(np.array([-1, 0], np.float32), np.array([1, np.inf], np.float32)),
    ],
    ids=str,
)
def test_actions_reach_the_environment_in_its_own_type(space):
    environment = Spoken(spaces.Discrete(2), space)
    environments = SyncEnvironments([lambda: environment])
    environments.reset([1])
    sent = random_action(environments.action_space, np.random.default_rng(0), 5)
    for action in sent:
        environments.step(action[None])
    for action, taken in zip(sent, environment.taken, strict=True):
        np.testing.assert_array_equal(taken, action)
        assert np.asarray(taken).dtype == space.dtype


def test_a_wrong_shape_is_refused_at_reset():
    class Liar(gymnasium.Env):
        observation_space = spaces.Box(-1, 1, (4,))
        action_space = spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            return np.zeros(1, np.float32), {}

    with pytest.raises(RuntimeError, match=r"shape \(1,\), but its space says \(4,\)"):
        SyncEnvironments([Liar]).reset([0])


def test_environments_of_different_spaces_do_not_go_together():
    with pytest.raises(ValueError, match="environment 1 has the spaces"):
        SyncEnvironments([lambda: Spoken(spaces.Discrete(2)), lambda: Spoken(spaces.Discrete(3))])


BOUNDED = [
    spaces.Box(-0.1, 0.1, (2,), np.float64),
    spaces.Box(-1.0, 1.0, (1, 2), np.float64),
    spaces.Box(-0.1, 0.1, (2,), np.float16),
]
HALF_OPEN = spaces.Box(np.array([0.1, -np.inf]), np.array([0.7, 1e-9]), dtype=np.float64)


@pytest.mark.parametrize(
    ("action_space", "head"),
    [(box, head) for box in BOUNDED for head in ("gaussian", "squashed_gaussian", "beta")] + [(HALF_OPEN, "gaussian")],
)
def test_float32_policies_never_leave_a_box_of_another_width(action_space, head):
    source = Spoken(spaces.Box(-1, 1, (3,)), action_space)
    for environments in (
        SyncEnvironments([lambda: source] * 2),
        GymnasiumVector(SyncVectorEnv([lambda: source] * 2, autoreset_mode=AutoresetMode.SAME_STEP)),
    ):
        policy = ActorCritic(
            environments.observation_space,
            environments.action_space,
            ActorCriticConfig(distribution=head, log_std_init=3.0),
            generator=torch.Generator().manual_seed(0),
        )
        EnvironmentCollector(environments, steps=50, seed=0).collect(policy, 0)
    assert len(source.taken) == 200
    if head == "gaussian":
        highest = np.array(source.taken).reshape(200, -1)[:, 0].max()
        assert highest == pytest.approx(action_space.high.reshape(-1)[0])
    assert all(action_space.contains(action) for action in source.taken)
