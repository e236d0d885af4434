"""A memory replayed is the memory that acted; it begins anew where episodes do, and nowhere else."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from upslope import ActorCritic, ActorCriticConfig, EnvironmentConfig, MemoryConfig
from upslope.collect import EnvironmentCollector, make_environments
from upslope.policies.fused_recurrent import gru, lstm, plain_gru, plain_lstm
from upslope.policies.memory_transformer import TransformerCore
from upslope.policies.packing import Packing
from upslope.policies.recurrent import Core, RecurrentCore

KINDS = ("gru", "lstm", "transformer")
COUNTS = (4, 3, 3, 1)


def core(kind: str) -> Core:
    generator = torch.Generator().manual_seed(0)
    if kind == "transformer":
        return TransformerCore(3, 8, 2, 3, 2, gain=math.sqrt(2.0), generator=generator).double()
    return RecurrentCore(kind, 3, 5, 2, orthogonal=True, generator=generator).double()


def lived(module: Core, mask: np.ndarray, begins: np.ndarray, features: np.ndarray) -> np.ndarray:
    """One row after the other, step by step, as acting does it; from a memory that is not empty."""
    lean, result = module.lean(), np.zeros((*mask.shape, module.features))
    for row in range(len(mask)):
        memory = {name: np.full((1, *shape), 0.3) for name, shape in module.shapes.items()}
        if "length" in memory:
            memory["length"][:] = 2.0
        for t in np.flatnonzero(mask[row]):
            if begins[row, t]:
                for array in memory.values():
                    array[:] = 0.0
            result[row, t] = lean.step(features[row, t : t + 1], memory)[0]
    return result


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 10_000))
def test_replaying_a_memory_is_acting_with_it(kind: str, seed: int) -> None:
    chance = np.random.default_rng(seed)
    shape = (int(chance.integers(1, 4)), int(chance.integers(1, 9)))
    mask, begins = chance.random(shape) < 0.8, chance.random(shape) < 0.3
    mask[0, 0] = True
    features, module = chance.standard_normal((*shape, 3)), core(kind)
    memory = {name: torch.full((shape[0], *s), 0.3, dtype=torch.float64) for name, s in module.shapes.items()}
    if "length" in memory:
        memory["length"][:] = 2.0
    packing = Packing.of(torch.from_numpy(mask), torch.from_numpy(np.where(begins, 0, 7)))
    with torch.no_grad():
        seen, _ = module.replay(packing.take_tensor(torch.from_numpy(features)), packing, memory)
    np.testing.assert_allclose(packing.put(seen).numpy(), lived(module, mask, begins, features), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_after_a_step_is_where_its_row_goes_on(kind: str) -> None:
    module = core(kind)
    features = torch.randn(2, 9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = Packing.of(torch.ones(2, 9, dtype=torch.bool), None)
    with torch.no_grad():
        seen, trace = module.replay(whole.take_tensor(features), whole, None)
        memory = module.after(trace, whole, whole.steps_at(torch.tensor([4, 9 + 4])))
        rest = Packing.of(torch.ones(2, 4, dtype=torch.bool), None)
        later, _ = module.replay(rest.take_tensor(features[:, 5:]), rest, memory)
    torch.testing.assert_close(rest.put(later), whole.put(seen)[:, 5:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_a_fused_layer_has_the_gradient_of_its_twin(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    start, cell, gates = normal(4, 3), normal(4, 3), 3 if kind == "gru" else 4
    inputs = [normal(11, 3 * gates).requires_grad_(), normal(3, 3 * gates).requires_grad_()]
    if kind == "gru":
        inputs.append(normal(3).requires_grad_())
        fused = gru(inputs[0], start, inputs[1], inputs[2], COUNTS)
        plain = plain_gru(inputs[0], start, inputs[1], inputs[2], COUNTS)
    else:
        fused = lstm(inputs[0], start, cell, inputs[1], COUNTS)[0]
        plain = plain_lstm(inputs[0], start, cell, inputs[1], COUNTS)[0]
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-9)
    weight = normal(*fused.shape)
    ours, theirs = (torch.autograd.grad((output * weight).sum(), inputs) for output in (fused, plain))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_rollout_carries_on_is_what_its_rows_end_with(kind: str) -> None:
    """In rows of 10 steps: each begins with the memory that the one before ended with; the first with none."""
    environments = make_environments(EnvironmentConfig(count=3, vectorization="sync", resume="rebuild"))
    memory = MemoryConfig(kind=kind, size=4, heads=2, context=5)  # type: ignore[arg-type]
    config = ActorCriticConfig(hidden=(), memory=memory, policy_gain=1.0)
    spaces = (environments.observation_space, environments.action_space)
    policy = ActorCritic(*spaces, config, generator=torch.Generator().manual_seed(0)).double()
    collector = EnvironmentCollector(environments, steps=40, seed=1, row_steps=10)
    trajectory = collector.collect(policy, 0)
    assert policy.memory is not None
    assert isinstance(trajectory.observation, torch.Tensor)
    packing = Packing.of(trajectory.mask, trajectory.time)
    with torch.no_grad():
        for name, part in policy.memory.named_cores():
            carried = {k.removeprefix(f"{name}/"): v for k, v in trajectory.memory.items() if k.startswith(name)}  # type: ignore[union-attr]
            features = packing.take_tensor(trajectory.observation).double()
            _, trace = part.replay(features, packing, carried)
            ends = part.after(trace, packing, packing.steps_at(torch.arange(12) * 10 + 9))
            ended = (trajectory.terminated | trajectory.truncated)[:, -1]
            for key, end in ends.items():
                end[ended] = 0.0
                begun = carried[key].view(3, 4, *end.shape[1:])
                assert not begun[:, 0].any()
                expected = end.view(begun.shape)[:, :3]
                torch.testing.assert_close(begun[:, 1:], expected, rtol=0, atol=1e-6)
    assert (trajectory.time[:, 1:] == 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_final_observation_is_valued_with_the_memory_of_its_episode(kind: str) -> None:
    """Rows cut in the middle: V' of a row's last step is V of the next row's first."""
    environments = make_environments(EnvironmentConfig(count=2, vectorization="sync", resume="rebuild"))
    memory = MemoryConfig(kind=kind, size=4, heads=2, context=5, shared=True)  # type: ignore[arg-type]
    spaces = (environments.observation_space, environments.action_space)
    config = ActorCriticConfig(hidden=(), memory=memory)
    policy = ActorCritic(*spaces, config, generator=torch.Generator().manual_seed(0)).double()
    trajectory = EnvironmentCollector(environments, steps=40, seed=1, row_steps=5).collect(policy, 0)
    value, following = policy.values(trajectory)
    value, following = value.view(2, 40), following.view(2, 40)
    going_on = trajectory.time.view(2, 40)[:, 1:] > 0
    torch.testing.assert_close(following[:, :-1][going_on], value[:, 1:][going_on], rtol=0, atol=1e-6)
