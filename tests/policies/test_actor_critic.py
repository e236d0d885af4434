"""The policy as algorithms, collectors and users meet it."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
import pytest
import torch
import torch.distributions as twins
from torch import Tensor, nn

from upslope import PPO, EnvironmentConfig, EvaluationConfig, RolloutConfig, Run, train
from upslope.policies import ActorCritic, ActorCriticConfig, build_head
from upslope.spaces import Box, Composite, Discrete, MultiBinary, MultiDiscrete, Space
from upslope.trajectory import Batch, Observation, Trajectory, map_observation

VECTOR, IMAGE = Box((4,), -math.inf, math.inf), Box((12, 12, 2), 0, 255, "uint8")
CHOICES = Discrete(3)
NESTED = Composite((("a/x", VECTOR), ("a/y", Discrete(3, start=2)), ("b/0", MultiBinary(2)), ("b/1", IMAGE)))
OBSERVATIONS: dict[str, Space] = {
    "box": VECTOR,
    "shaped box": Box((2, 3), -1.0, 1.0, "float64"),
    "image": IMAGE,
    "discrete": Discrete(5, start=-2),
    "multidiscrete": MultiDiscrete((2, 3), (1, -1)),
    "multibinary": MultiBinary(3),
    "composite": NESTED,
    "composite of vectors": Composite((("x", VECTOR), ("y", MultiDiscrete((2, 3), (0, 0))))),
}
ACTIONS: dict[str, tuple[Space, str]] = {
    "discrete": (Discrete(3, start=1), "auto"),
    "multidiscrete": (MultiDiscrete((2, 4), (0, -1)), "auto"),
    "multibinary": (MultiBinary(3), "auto"),
    "box": (Box((2,), -1.0, (2.0, 0.5)), "auto"),
    "unbounded box": (Box((2, 2), -math.inf, math.inf), "gaussian"),
    "squashed": (Box((2,), -1.0, 2.0), "squashed_gaussian"),
    "beta": (Box((), -1.0, 2.0, "float64"), "beta"),
}


def make(
    observation: Space = VECTOR, action: Space = CHOICES, *, seed: int = 0, encoder=None, **settings
) -> ActorCritic:
    generator = torch.Generator().manual_seed(seed)
    config = ActorCriticConfig(**{"hidden": (16, 8), "policy_gain": 1.0, **settings})
    return ActorCritic(observation, action, config, generator=generator, encoder=encoder)


def random_leaf(space: Space, generator: np.random.Generator, *lead: int) -> np.ndarray:
    """As trajectories hold it: no offsets."""
    if isinstance(space, Box):
        if space.dtype == "uint8":
            return generator.integers(256, size=(*lead, *space.shape), dtype=np.uint8)
        return generator.normal(size=(*lead, *space.shape)).astype(space.dtype)
    if isinstance(space, Discrete):
        return generator.integers(space.n, size=lead)
    if isinstance(space, MultiDiscrete):
        return generator.integers(space.choices, size=(*lead, len(space.choices)))
    assert isinstance(space, MultiBinary)
    return generator.integers(2, size=(*lead, space.n), dtype=np.int8)


def random_observation(space: Space, *lead: int, seed: int = 0) -> np.ndarray | dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    if isinstance(space, Composite):
        return {name: random_leaf(leaf, generator, *lead) for name, leaf in space.entries}
    return random_leaf(space, generator, *lead)


def tensors(arrays: np.ndarray | dict[str, np.ndarray]) -> Observation:
    return map_observation(torch.from_numpy, arrays)


def batch(observation: Observation, action: Tensor) -> Batch:
    none = torch.zeros(0)
    return Batch(
        observation=observation,
        action=action,
        mask=none.bool(),
        behaviour_log_prob=none,
        advantage=none,
        value_target=None,
        behaviour_value=None,
        behaviour_distribution=None,
        weight=none,
    )


@pytest.mark.parametrize("observation", OBSERVATIONS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_the_sampler_and_evaluate_agree_on_every_observation(observation: str, shared: bool, normalize: bool) -> None:
    space = OBSERVATIONS[observation]
    policy = make(space, shared=shared, normalize_observation=normalize)
    if policy.observation_normalizer is not None:
        policy.observation_normalizer.update(tensors(random_observation(space, 20, seed=9)), torch.ones(20).bool())
    arrays = random_observation(space, 6)
    sampler = policy.sampler()
    noise = sampler.noise(np.random.default_rng(1), 4, 6)
    action = sampler.sample(arrays, noise[3])
    parameters = sampler.parameters(arrays)
    evaluation = policy.evaluate(batch(tensors(arrays), torch.from_numpy(action)))
    np.testing.assert_allclose(parameters, evaluation.distribution.parameters.detach().numpy(), atol=1e-6)
    np.testing.assert_array_equal(action, (parameters + noise[3]).argmax(-1))
    assert evaluation.value is not None
    for tensor in (evaluation.log_prob, evaluation.entropy, evaluation.value):
        assert tensor.shape == (6,)
        assert tensor.dtype == torch.float32
    torch.testing.assert_close(policy.log_prob(tensors(arrays), torch.from_numpy(action)), evaluation.log_prob)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize(
    "spread", [{}, {"state_dependent_std": True, "log_std_bounds": (-2.0, 1.0), "log_std_init": -1.0}]
)
def test_every_action_space_samples_evaluates_and_learns(action: str, spread: dict) -> None:
    space, distribution = ACTIONS[action]
    policy = make(action=space, distribution=distribution, **spread)
    sampler, arrays = policy.sampler(), random_observation(VECTOR, 5)
    chosen = sampler.sample(arrays, sampler.noise(np.random.default_rng(0), 1, 5)[0])
    evaluation = policy.evaluate(batch(tensors(arrays), torch.from_numpy(chosen)))
    assert evaluation.value is not None
    (evaluation.log_prob + evaluation.entropy + evaluation.value).sum().backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name
    assert sampler.to_environment(chosen).shape[0] == 5
    assert sampler.to_environment(sampler.mode(arrays)).shape == sampler.to_environment(chosen).shape


def test_log_std_starts_where_the_configuration_says() -> None:
    for settings in ({}, {"state_dependent_std": True}, {"log_std_bounds": (-3.0, 1.0)}):
        policy = make(action=Box((2,), -1.0, 1.0), log_std_init=-0.7, policy_gain=1e-6, **settings)
        evaluation = policy.evaluate(batch(torch.randn(3, 4), torch.zeros(3, 2)))
        expected = 2 * (-0.7 + 0.5 * math.log(2 * math.pi * math.e))
        torch.testing.assert_close(evaluation.entropy.detach(), torch.full((3,), expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("space", [VECTOR, NESTED])
@pytest.mark.parametrize("action", ["discrete", "multidiscrete", "box"])
def test_rows_of_time_are_the_flat_steps_in_order(space: Space, action: str) -> None:
    policy = make(space, ACTIONS[action][0])
    arrays = random_observation(space, 6)
    sampler = policy.sampler()
    chosen = torch.from_numpy(sampler.sample(arrays, sampler.noise(np.random.default_rng(0), 1, 6)[0]))
    flat, in_rows = tensors(arrays), map_observation(lambda t: t.reshape(2, 3, *t.shape[1:]), tensors(arrays))
    one = policy.evaluate(batch(flat, chosen))
    other = policy.evaluate(batch(in_rows, chosen.reshape(2, 3, *chosen.shape[1:])))
    assert one.value is not None
    assert other.value is not None
    for a, b in ((one.log_prob, other.log_prob), (one.entropy, other.entropy), (one.value, other.value)):
        torch.testing.assert_close(b, a.view(2, 3))
    torch.testing.assert_close(policy.log_prob(in_rows, chosen.reshape(2, 3, *chosen.shape[1:])), other.log_prob)
    torch.testing.assert_close(other.distribution.kl(other.distribution.detach()), torch.zeros(2, 3), atol=1e-6, rtol=0)
    assert other.distribution.select(slice(0, 1)).parameters.shape[:2] == (1, 3)


def test_evaluate_is_what_its_networks_and_a_twin_say() -> None:
    policy = make(hidden=(8,), activation="relu")
    observation, action = torch.randn(7, 4), torch.randint(3, (7,))
    first, last = policy.actor.layers
    hidden = torch.relu(observation @ first.weight.T + first.bias)
    twin = twins.Categorical(logits=hidden @ last.weight.T + last.bias)
    evaluation = policy.evaluate(batch(observation, action))
    torch.testing.assert_close(evaluation.log_prob, twin.log_prob(action))
    torch.testing.assert_close(evaluation.entropy, twin.entropy())
    assert policy.critic is not None
    first, last = policy.critic.layers
    value = torch.relu(observation @ first.weight.T + first.bias) @ last.weight.T + last.bias
    torch.testing.assert_close(evaluation.value, value.squeeze(-1))


def test_fisher_vector_products_pass_through_the_fused_nodes() -> None:
    policy = make(action=Box((2,), -1.0, 1.0), critic=False).double()
    observation, action = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    parameters = list(policy.parameters())
    distribution = policy.evaluate(batch(observation, action)).distribution
    kl = distribution.detach().kl(distribution).sum()
    gradients = torch.autograd.grad(kl, parameters, create_graph=True)
    vector = [torch.randn(p.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) for p in parameters]
    product = sum((g * v).sum() for g, v in zip(gradients, vector, strict=True))
    curvature = torch.autograd.grad(product, parameters)

    def kl_after(step: float) -> float:
        with torch.no_grad():
            for p, v in zip(parameters, vector, strict=True):
                p += step * v
            moved = policy.evaluate(batch(observation, action)).distribution
            result = float(distribution.detach().kl(moved).sum())
            for p, v in zip(parameters, vector, strict=True):
                p -= step * v
        return result

    quadratic = float(sum((c * v).sum() for c, v in zip(curvature, vector, strict=True)))
    step = 1e-4
    assert (kl_after(step) + kl_after(-step)) / step**2 == pytest.approx(quadratic, rel=1e-4)


def trajectory(space: Space, rows: int, positions: int, ends: int) -> Trajectory:
    none = torch.zeros(rows, positions, dtype=torch.bool)
    truncated = none.clone()
    truncated[0, 1] = True
    return Trajectory(
        observation=tensors(random_observation(space, rows, positions)),
        action=torch.zeros(rows, positions, dtype=torch.int64),
        reward=torch.zeros(rows, positions),
        terminated=none,
        truncated=truncated,
        mask=~none,
        behaviour_log_prob=torch.zeros(rows, positions),
        time=torch.zeros(rows, positions, dtype=torch.int64),
        final_observation=tensors(random_observation(space, ends, seed=1)),
        final_index=torch.tensor([1, positions - 1, 2 * positions - 1][:ends]),
    )


@pytest.mark.parametrize("space", [VECTOR, NESTED])
@pytest.mark.parametrize("shared", [False, True])
def test_values_bootstrap_from_the_final_observations_in_one_critic_call(space: Space, shared: bool) -> None:
    policy = make(space, shared=shared, normalize_observation=True)
    data = trajectory(space, 2, 4, 3)
    policy.observe(data)
    calls: list[int] = []
    assert policy.critic is not None
    policy.critic.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    value, next_value = policy.values(data)
    assert calls == [2 * 4 + 3]
    assert not value.requires_grad
    expected = policy.evaluate(data).value
    final = policy.evaluate(batch(data.final_observation, torch.zeros(3, dtype=torch.int64))).value
    assert expected is not None
    assert final is not None
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(next_value[0, [1, 3]], final[:2].detach())
    torch.testing.assert_close(next_value[1, 3], final[2].detach())
    torch.testing.assert_close(next_value[1, :3], value[1, 1:])


@pytest.mark.parametrize("space", [VECTOR, NESTED])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_one_look_at_a_trajectory_says_what_two_would(space: Space, shared: bool, normalize: bool) -> None:
    """Log-probs, entropies and values row after row, and the gradient: final observations bring nothing to it."""
    policy = make(space, shared=shared, normalize_observation=normalize).double()
    data = trajectory(space, 2, 5, 3)
    if normalize:
        policy.observe(data)
    weight = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    gradients: list[list[Tensor]] = []
    (_, next_value), separate = policy.values(data), policy.evaluate(data)
    together, following = policy.evaluate_with_next_value(data)
    assert not following.requires_grad
    torch.testing.assert_close(following, next_value)
    for found in (separate, together):
        assert found.value is not None
        parts = torch.stack([found.log_prob, found.entropy, found.value]).view(3, 2, 5)
        policy.zero_grad()
        (weight * parts).sum().backward()
        gradients.append([parameter.grad for parameter in policy.parameters() if parameter.grad is not None])
    for field in ("log_prob", "entropy", "value"):
        torch.testing.assert_close(getattr(together, field), getattr(separate, field).flatten())
    torch.testing.assert_close(together.distribution.parameters, separate.distribution.parameters.flatten(0, 1))
    torch.testing.assert_close(gradients[1], gradients[0])


def test_a_policy_without_critic_says_so() -> None:
    policy = make(critic=False)
    assert policy.evaluate(batch(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64))).value is None
    with pytest.raises(ValueError, match="critic=True"):
        policy.values(trajectory(VECTOR, 2, 4, 3))


def test_ratio_is_one_before_the_first_step_after_statistics_have_moved() -> None:
    policy = make(action=Box((2,), -1.0, 1.0), normalize_observation=True)
    data = trajectory(VECTOR, 2, 4, 3)
    policy.observe(data)
    sampler = policy.sampler()
    policy.observe(data)
    arrays = data.observation.numpy().reshape(8, 4)
    action = sampler.sample(arrays, sampler.noise(np.random.default_rng(0), 1, 8)[0])
    behaviour = policy.log_prob(data.observation, torch.from_numpy(action).view(2, 4, 2))
    now = policy.evaluate(batch(data.observation.view(8, 4), torch.from_numpy(action))).log_prob
    assert torch.equal(behaviour.view(8), now)


def test_a_sampler_sees_parameters_that_change_in_place() -> None:
    policy, observation = make(), random_observation(VECTOR, 3)
    flat = torch.cat([p.detach().reshape(-1) for p in policy.parameters()])
    start = 0
    for parameter in policy.parameters():
        parameter.data = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    sampler = policy.sampler()
    flat.mul_(1.7)
    with torch.no_grad():
        expected = policy.action_parameters(tensors(observation))
    np.testing.assert_allclose(sampler.parameters(observation), expected.numpy(), rtol=1e-5, atol=1e-6)


def test_initialisation_is_a_function_of_its_generator_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = make(NESTED), make(NESTED), make(NESTED, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in one.named_parameters():
        assert torch.equal(tensor, same.get_parameter(name))
    assert not torch.equal(one.actor.layers[0].weight, other.actor.layers[0].weight)


# --- acting ----------------------------------------------------------------------------------------------------------


def as_the_environment_gives_it(name: str, arrays: Any) -> object:
    if name == "composite":
        return {"b": (arrays["b/0"], arrays["b/1"]), "a": {"y": arrays["a/y"] + 2, "x": arrays["a/x"]}}
    if name == "discrete":
        return arrays - 2
    return arrays + np.array([1, -1]) if name == "multidiscrete" else arrays


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_act_reads_single_observations_and_batches(name: str) -> None:
    space = OBSERVATIONS[name]
    policy = make(space)
    arrays = random_observation(space, 4)
    theirs = as_the_environment_gives_it(name, arrays)
    expected = policy.sampler().mode(arrays)
    np.testing.assert_array_equal(policy.act(theirs), expected)
    for row in range(4):
        single = map_observation(lambda array, row=row: array[row], arrays)
        action = policy.act(as_the_environment_gives_it(name, single))
        assert action == expected[row]
        assert np.ndim(action) == 0


@pytest.mark.parametrize("name", ACTIONS)
@pytest.mark.parametrize("deterministic", [True, False])
def test_act_speaks_the_environments_language(name: str, deterministic: bool) -> None:
    space, distribution = ACTIONS[name]
    policy = make(action=space, distribution=distribution)
    observation = np.array([1.0, -2.0, 0.5, 3.0], dtype=np.float32)

    def act(of: np.ndarray) -> np.ndarray:
        return np.asarray(policy.act(of, deterministic=deterministic, generator=np.random.default_rng(0)))

    single, both = act(observation), act(np.stack([observation, -observation]))
    assert both.shape == (2, *single.shape)
    np.testing.assert_allclose(both[0], single, rtol=1e-5, atol=1e-6)
    if isinstance(space, Discrete):
        assert single in (1, 2, 3)
    elif isinstance(space, MultiDiscrete):
        assert single[0] in (0, 1)
        assert single[1] in (-1, 0, 1, 2)
    elif isinstance(space, MultiBinary):
        assert set(single) <= {0, 1}
    elif isinstance(space, Box):
        assert single.shape == space.shape
        assert single.dtype == space.dtype
        assert (single >= np.reshape(space.low, -1)[0]).all()
        assert (single <= np.reshape(np.array(space.high), -1)).all()


def test_act_is_deterministic_unless_told_otherwise() -> None:
    policy = make(policy_gain=0.01)
    observation = np.zeros(4, dtype=np.float32)
    assert len({int(policy.act(observation)) for _ in range(20)}) == 1
    assert len({int(policy.act(observation, deterministic=False)) for _ in range(60)}) == 3


@pytest.mark.parametrize(
    ("space", "observation", "message"),
    [
        (VECTOR, np.zeros(5), r"must have shape \(4,\), or \(N, 4\) for a batch, got \(5,\)"),
        (VECTOR, np.array([0.0, np.nan, 0.0, 0.0]), "not finite: nan"),
        (VECTOR, np.array(["a", "b", "c", "d"]), "must hold numbers"),
        (Discrete(3, start=1), 0, "outside its space"),
        (NESTED, {"a": {"x": np.zeros(4)}}, r"must have the entries \['a/x', 'a/y', 'b/0', 'b/1'\]"),
        (
            Composite((("x", VECTOR), ("y", Discrete(2)))),
            {"x": np.zeros((3, 4)), "y": np.array([0, 1])},
            "batches of one size",
        ),
    ],
)
def test_act_names_what_is_wrong_with_an_observation(space: Space, observation: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(space).act(observation)


# --- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["box", "composite", "discrete"])
@pytest.mark.parametrize("action", ["box", "multidiscrete", "beta"])
def test_a_policy_survives_saving_to_the_bit(space: str, action: str) -> None:
    actions, distribution = ACTIONS[action]
    policy = make(
        OBSERVATIONS[space], actions, distribution=distribution, normalize_observation=True, normalize_reward=True
    )
    data = trajectory(OBSERVATIONS[space], 2, 4, 3)
    policy.observe(data)
    assert policy.reward_normalizer is not None
    policy.reward_normalizer.scale(replace(data, reward=torch.randn(2, 4)), 0.99)
    tree = json.loads(json.dumps(policy.config_tree()))
    saved = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    again = ActorCritic.from_tree(tree, saved)
    assert again.config == policy.config
    assert again.config_tree() == policy.config_tree()
    assert list(again.state_dict()) == list(policy.state_dict())
    for name, tensor in policy.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    arrays = random_observation(OBSERVATIONS[space], 5)
    np.testing.assert_array_equal(again.sampler().parameters(arrays), policy.sampler().parameters(arrays))


def test_trees_that_describe_no_policy_are_refused() -> None:
    policy = make()
    tree, state = policy.config_tree(), policy.state_dict()
    with pytest.raises(ValueError, match="a policy is described by"):
        ActorCritic.from_tree({"config": {}}, state)
    with pytest.raises(ValueError, match="a policy is described by"):
        ActorCritic.from_tree(cast("Any", [1]), state)
    config = {**tree["config"], "extra": 1}
    del config["critic"]
    with pytest.raises(ValueError, match=r"config: unknown settings \['extra'\], missing settings \['critic'\]"):
        ActorCritic.from_tree({**tree, "config": config}, state)
    with pytest.raises(ValueError, match="tensors do not fit"):
        ActorCritic.from_tree(tree, {name: tensor for name, tensor in state.items() if "bias" not in name})
    with pytest.raises(ValueError, match="leave `encoder` out"):
        ActorCritic.from_tree(tree, state, encoder=nn.Identity())


HUGE = 10**7


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("config", 5, "config must be a mapping, got 5"),
        ("config.hidden", "abc", "config.hidden must be a list, got 'abc'"),
        ("config.hidden", 5, "config.hidden must be a list, got 5"),
        ("config.hidden", [16, True], r"config.hidden\[1\] must be int"),
        ("config.hidden", [16, -8], "at least one unit each"),
        ("config.hidden", [1e7, 1e7], r"config.hidden\[0\] must be int, got 10000000.0"),
        ("config.hidden", [HUGE, HUGE], "config.hidden is .* but the saved tensors hold"),
        ("config.hidden", [10**30], "config.hidden is .* but the saved tensors hold"),
        ("config.hidden", [16, 4], "tensors do not fit"),
        ("config.activation", "nope", "config.activation must be one of 'tanh', 'relu', 'gelu', 'silu', 'elu'"),
        ("config.activation", ["tanh"], "config.activation must be one of"),
        ("config.encoder", "nope", "config.encoder must be one of"),
        ("config.distribution", None, "config.distribution must be one of"),
        ("config.log_std_bounds", [1], "config.log_std_bounds must have 2 entries, got 1"),
        ("config.log_std_bounds", [-math.inf, math.inf], "log_std_bounds must be finite"),
        ("config.log_std_init", math.nan, "log_std_init must be a finite number"),
        ("config.observation_clip", math.nan, "observation_clip and reward_clip must be positive"),
        ("config.critic", 1, "config.critic must be bool, got 1"),
        ("config.shared", True, "tensors do not fit"),
        ("own_encoder", 3, "own_encoder must be str, got 3"),
        ("observation_space", [], "observation_space must be a mapping"),
        ("observation_space.kind", ["Box"], "observation_space: "),
        ("observation_space.kind", "Sphere", "observation_space: unknown kind of space 'Sphere'"),
        ("observation_space.shape", "abcd", "observation_space.shape must be a list, got 'abcd'"),
        ("observation_space.shape", [-4], "observation_space is no space"),
        ("observation_space.shape", [10**20, 10**20], "observation_space is no space"),
        ("observation_space.shape", [HUGE], "tensors do not fit"),
        ("observation_space.low", [0.0], "observation_space.low must be one number or 4, got 1"),
        ("observation_space.dtype", "object", "observation_space.dtype must be one of bool, float16"),
        ("action_space", {"kind": "Discrete", "n": HUGE, "start": 0}, "action_space is no space"),
        ("action_space", {"kind": "Discrete", "n": 2, "start": 10**30}, "action_space is no space"),
        ("action_space", {"kind": "MultiDiscrete", "choices": [2, 2], "start": [0]}, "one start per choice"),
        ("action_space", {"kind": "MultiBinary", "n": "3"}, "action_space.n must be int, got '3'"),
        ("action_space", {"kind": "Composite", "entries": {"a": 1}}, "action_space: a space is described by a mapping"),
    ],
)
@pytest.mark.parametrize("text", [False, True])
def test_what_an_edited_policy_file_says_is_read_or_named(place: str, value: object, said: str, text: bool) -> None:
    policy = make(action=Box((2,), -1.0, 1.0))
    tree: Any = copy.deepcopy(policy.config_tree())
    *path, last = place.split(".")
    inner = tree
    for name in path:
        inner = inner[name]
    inner[last] = value
    with pytest.raises(ValueError, match=said):
        ActorCritic.from_tree(json.loads(json.dumps(tree)) if text else tree, policy.state_dict())


def test_loading_initialises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is there a weight of the wrong size in memory before it is found to be wrong."""
    policy = make(NESTED, Box((2,), -1.0, 1.0), hidden=(64, 64))

    def refused(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a weight was made")

    monkeypatch.setattr(nn.init, "orthogonal_", refused)
    monkeypatch.setattr(nn.Module, "to_empty", refused)
    tree = policy.config_tree()
    again = ActorCritic.from_tree(tree, policy.state_dict())
    assert {tensor.device.type for tensor in (*again.parameters(), *again.buffers())} == {"cpu"}
    with pytest.raises(ValueError, match=r"size mismatch for actor.layers.0.weight.*6000"):
        ActorCritic.from_tree({**tree, "config": {**tree["config"], "hidden": [6000, 6000]}}, policy.state_dict())


def test_a_loaded_policy_has_tensors_of_its_own_and_learns() -> None:
    policy = make(normalize_observation=True)
    tensors_of_double = {name: tensor.double() for name, tensor in policy.state_dict().items()}
    for state in (policy.state_dict(), tensors_of_double):
        again = ActorCritic.from_tree(policy.config_tree(), state)
        assert [p.dtype for p in again.parameters()] == [p.dtype for p in policy.parameters()]
        assert all(parameter.requires_grad for parameter in again.parameters())
        before = [tensor.clone() for tensor in state.values()]
        again.observe(trajectory(VECTOR, 2, 4, 3))
        with torch.no_grad():
            for parameter in again.parameters():
                parameter += 1.0
        assert all(torch.equal(a, b) for a, b in zip(before, state.values(), strict=True))
        evaluation = again.evaluate(batch(torch.zeros(2, 4), torch.tensor([0, 1])))
        evaluation.log_prob.sum().backward()


def test_what_is_frozen_in_an_encoder_of_ones_own_stays_frozen() -> None:
    policy, encoder = make(encoder=Sines()), Sines()
    encoder.frequency.requires_grad_(False)
    again = ActorCritic.from_tree(policy.config_tree(), policy.state_dict(), encoder=encoder)
    assert again.encoder is encoder
    assert not encoder.frequency.requires_grad


# --- an encoder of one's own -----------------------------------------------------------------------------------------


class Sines(nn.Module):
    features = 8

    def __init__(self) -> None:
        super().__init__()
        self.frequency = nn.Parameter(torch.ones(4))

    def forward(self, observation: Tensor) -> Tensor:
        angle = observation.float() * self.frequency
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


@pytest.mark.parametrize("shared", [False, True])
def test_an_encoder_of_ones_own(shared: bool) -> None:
    policy = make(encoder=Sines(), shared=shared, normalize_observation=True)
    arrays = random_observation(VECTOR, 5)
    action = torch.from_numpy(policy.sampler().mode(arrays))
    evaluation = policy.evaluate(batch(tensors(arrays), action))
    np.testing.assert_allclose(
        policy.sampler().parameters(arrays), evaluation.distribution.parameters.detach().numpy(), atol=1e-6
    )
    assert evaluation.value is not None
    (evaluation.log_prob + evaluation.value).sum().backward()
    frequencies = [p for name, p in policy.named_parameters() if name.endswith("frequency")]
    assert len(frequencies) == (1 if shared else 2)
    assert all(p.grad is not None and bool((p.grad != 0.0).any()) for p in frequencies)
    tree = policy.config_tree()
    with pytest.raises(ValueError, match="Sines: pass a new one"):
        ActorCritic.from_tree(tree, policy.state_dict())
    again = ActorCritic.from_tree(tree, policy.state_dict(), encoder=Sines())
    np.testing.assert_array_equal(again.sampler().parameters(arrays), policy.sampler().parameters(arrays))


class Moody(nn.Module):
    """Another function in training mode than in evaluation mode, and no function of its inputs alone."""

    features = 6

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
        with torch.no_grad():
            self.layers[0].weight.copy_(torch.linspace(-1.0, 1.0, 24).view(6, 4))
            self.layers[0].bias.zero_()

    def forward(self, observation: Tensor) -> Tensor:
        return self.layers(observation.float())


@pytest.mark.parametrize("shared", [False, True])
def test_acting_and_learning_are_the_same_function_whatever_the_encoder(shared: bool) -> None:
    policy = make(encoder=Moody(), shared=shared)
    before = {name: tensor.clone() for name, tensor in policy.named_buffers()}
    assert not any(module.training for module in policy.modules())
    assert policy.train() is policy
    assert not any(module.training for module in policy.modules())
    arrays = random_observation(VECTOR, 5)
    sampler = policy.sampler()
    action = torch.from_numpy(sampler.sample(arrays, sampler.noise(np.random.default_rng(0), 1, 5)[0]))
    behaviour = policy.log_prob(tensors(arrays), action)
    evaluation = policy.evaluate(batch(tensors(arrays), action))
    assert torch.equal(torch.exp(evaluation.log_prob - behaviour), torch.ones(5))
    np.testing.assert_allclose(
        sampler.parameters(arrays), evaluation.distribution.parameters.detach().numpy(), atol=1e-6
    )
    for name, buffer in policy.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_the_same_seed_gives_the_same_weights_whatever_the_encoder(tmp_path: Path) -> None:
    """PyTorch's global generator, from which Dropout draws, has no say in it."""
    weights: list[Tensor] = []
    for place in ("one", "other"):
        run = Run(
            environment=EnvironmentConfig(id="CartPole-v1", count=2),
            rollout=RolloutConfig(steps=16),
            policy=ActorCriticConfig(hidden=(8,)),
            algorithm=PPO(epochs=2),
            evaluation=EvaluationConfig(episodes=1),
            steps=64,
            seed=3,
            directory=tmp_path / place,
        )
        policy = train(run, encoder=Moody()).policy
        weights.append(torch.cat([parameter.detach().reshape(-1) for parameter in policy.parameters()]))
        torch.rand(7)
    assert torch.equal(*weights)


def test_an_encoder_must_say_how_many_features_it_has() -> None:
    with pytest.raises(ValueError, match="Identity must have an attribute `features`"):
        make(encoder=nn.Identity())


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "settings", "message"),
    [
        (Composite((("a", Discrete(2)),)), {}, "wrap the environment"),
        (Box((2,), 0, 255, "uint8"), {}, "MultiDiscrete"),
        (Discrete(2), {"distribution": "gaussian"}, "use one of auto, categorical"),
        (Box((2,), -1.0, 1.0), {"distribution": "categorical"}, "gaussian, squashed_gaussian, beta"),
        (Box((2,), -math.inf, 1.0), {"distribution": "beta"}, "finite action bounds"),
    ],
)
def test_action_spaces_without_a_distribution_are_refused_with_a_remedy(
    space: Space, settings: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_head(space, ActorCriticConfig(**settings))


def test_settings_without_meaning_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one unit"):
        ActorCriticConfig(hidden=(64, 0))
    with pytest.raises(ValueError, match="must be positive"):
        ActorCriticConfig(observation_clip=0.0)


def test_default_weights_without_orthogonal_initialisation() -> None:
    policy = make(orthogonal=False)
    weight = policy.actor.layers[0].weight
    assert float(weight.detach().abs().max()) <= 0.5
    assert float(policy.actor.layers[0].bias.detach().abs().max()) > 0.0


def test_no_hidden_layers_put_the_outputs_on_the_encoder() -> None:
    for shared in (False, True):
        policy = make(IMAGE, hidden=(), shared=shared)
        assert policy.actor.layers[0].weight.shape == (3, 128)
        evaluation = policy.evaluate(batch(tensors(random_observation(IMAGE, 2)), torch.tensor([0, 1])))
        assert evaluation.log_prob.shape == (2,)
