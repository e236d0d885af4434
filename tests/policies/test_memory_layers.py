"""Recurrent layers against their plain twins, rows against their segments, and what each kind of memory is."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from upslope.policies.fused_recurrent import gru, lstm, plain_gru, plain_lstm
from upslope.policies.memory_transformer import TransformerCore
from upslope.policies.packing import Packing
from upslope.policies.recurrent import Core, RecurrentCore

COUNTS = (4, 3, 3, 1)
KINDS = ("gru", "lstm", "transformer")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def core(kind: str, *, layers: int = 2, context: int = 3) -> Core:
    generator = torch.Generator().manual_seed(0)
    if kind == "transformer":
        return TransformerCore(3, 8, layers, context, 2, gain=math.sqrt(2.0), generator=generator).double()
    return RecurrentCore(kind, 3, 5, layers, orthogonal=True, generator=generator).double()


def layer(kind: str) -> tuple[tuple[Tensor, ...], object, object]:
    """Differentiable inputs, and the fused layer and its twin as functions of them."""
    size, start, cell = 3, normal(4, 3, seed=1), normal(4, 3, seed=2)
    if kind == "gru":
        inputs = (normal(11, 3 * size), normal(size, 3 * size, seed=3), normal(size, seed=4))
        return (
            inputs,
            lambda p, w, b: gru(p, start, w, b, COUNTS),
            lambda p, w, b: plain_gru(p, start, w, b, COUNTS),
        )
    inputs = (normal(11, 4 * size), normal(size, 4 * size, seed=3))
    return (
        inputs,
        lambda p, w: lstm(p, start, cell, w, COUNTS)[0],
        lambda p, w: plain_lstm(p, start, cell, w, COUNTS)[0],
    )


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_a_fused_layer_is_its_plain_twin(kind: str) -> None:
    inputs, fused, plain = layer(kind)
    torch.testing.assert_close(fused(*inputs), plain(*inputs), rtol=0, atol=1e-14)  # type: ignore[operator]
    leaves = tuple(tensor.requires_grad_() for tensor in inputs)
    assert torch.autograd.gradcheck(fused, leaves)
    assert torch.autograd.gradgradcheck(fused, leaves)


def test_the_cells_are_the_twins_too() -> None:
    projected, start, cell, weight = normal(11, 12), normal(4, 3, seed=1), normal(4, 3, seed=2), normal(3, 12, seed=3)
    torch.testing.assert_close(
        lstm(projected, start, cell, weight, COUNTS)[1], plain_lstm(projected, start, cell, weight, COUNTS)[1]
    )


def test_a_layer_is_what_pytorch_calls_by_its_name() -> None:
    """Gates in another order, and PyTorch's second bias."""
    steps, size = normal(2, 5, 3), 4
    packing = Packing.of(torch.ones(2, 5, dtype=torch.bool), None)
    for kind, order in (("gru", (0, 1, 2)), ("lstm", (0, 1, 3, 2))):
        ours = RecurrentCore(kind, 3, size, 1, orthogonal=False, generator=torch.Generator().manual_seed(0)).double()
        theirs = {"gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[kind](3, size, batch_first=True, dtype=torch.float64)

        def reordered(tensor: Tensor, order: tuple[int, ...] = order, size: int = size) -> Tensor:
            return torch.cat([tensor.split(size, -1)[gate] for gate in order], -1)

        with torch.no_grad():
            theirs.weight_ih_l0.copy_(reordered(ours.input_weights[0]).t())
            theirs.weight_hh_l0.copy_(reordered(ours.hidden_weights[0]).t())
            theirs.bias_ih_l0.copy_(reordered(ours.input_biases[0]))
            theirs.bias_hh_l0.zero_()
            if ours.hidden_biases is not None:
                theirs.bias_hh_l0[2 * size :].copy_(ours.hidden_biases[0])
        expected = theirs(steps)[0]
        torch.testing.assert_close(packing.put(ours.replay(packing.take_tensor(steps), packing, None)[0]), expected)


def test_segments_by_hand() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]], dtype=torch.bool)
    time = torch.tensor([[5, 6, 0, 1], [0, 0, 0, 1]])
    packing = Packing.of(mask, time)
    assert packing.counts == (4, 3)
    assert packing.place.tolist() == [0, 2, 6, 4, 1, 3, 7]
    assert packing.row.tolist() == [0, 0, 1, 1]
    assert packing.fresh.tolist() == [False, True, True, True]
    assert packing.steps_at(torch.tensor([7, 4])).tolist() == [6, 3]
    with pytest.raises(ValueError, match="nothing was chosen at \\[5\\]"):
        packing.steps_at(torch.tensor([5]))
    memory = torch.arange(1.0, 3.0).unsqueeze(-1)
    assert packing.start(memory, (1,), memory).flatten().tolist() == [1.0, 0.0, 0.0, 0.0]


def lived(kind: str, mask: np.ndarray, begins: np.ndarray, features: np.ndarray, layers: int) -> np.ndarray:
    """Step by step, in one row after the other, as acting does it."""
    module = core(kind, layers=layers)
    lean = module.lean()
    memory = {name: np.zeros((len(mask), *shape)) for name, shape in module.shapes.items()}
    for array in memory.values():
        array += 0.3
    if kind == "transformer":
        memory["length"][:] = 2.0
    result = np.zeros((*mask.shape, module.features))
    for row in range(len(mask)):
        for t in np.flatnonzero(mask[row]):
            own = {name: array[row : row + 1] for name, array in memory.items()}
            if begins[row, t]:
                for array in own.values():
                    array[:] = 0.0
            result[row, t] = lean.step(features[row, t : t + 1], own)[0]
    return result


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(KINDS), st.integers(1, 2), st.integers(0, 10_000))
def test_acting_is_replaying(kind: str, layers: int, seed: int) -> None:
    """Whatever positions are no decisions, and wherever episodes begin."""
    chance = np.random.default_rng(seed)
    shape = (int(chance.integers(1, 4)), int(chance.integers(1, 9)))
    mask, begins = chance.random(shape) < 0.8, chance.random(shape) < 0.3
    mask[0, 0] = True
    features = chance.standard_normal((*shape, 3))
    module = core(kind, layers=layers)
    memory = {name: torch.full((shape[0], *s), 0.3, dtype=torch.float64) for name, s in module.shapes.items()}
    if kind == "transformer":
        memory["length"] = torch.full((shape[0], 1), 2.0, dtype=torch.float64)
    packing = Packing.of(torch.from_numpy(mask), torch.from_numpy(np.where(begins, 0, 7)))
    with torch.no_grad():
        seen, _ = module.replay(packing.take_tensor(torch.from_numpy(features)), packing, memory)
    expected = lived(kind, mask, begins, features, layers)
    np.testing.assert_allclose(packing.put(seen).numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_after_a_step_is_where_its_row_goes_on(kind: str) -> None:
    module, features = core(kind), normal(2, 9, 3)
    whole = Packing.of(torch.ones(2, 9, dtype=torch.bool), None)
    with torch.no_grad():
        seen, trace = module.replay(whole.take_tensor(features), whole, None)
        memory = module.after(trace, whole, whole.steps_at(torch.tensor([4, 9 + 4])))
        rest = Packing.of(torch.ones(2, 4, dtype=torch.bool), None)
        later, _ = module.replay(rest.take_tensor(features[:, 5:]), rest, memory)
    torch.testing.assert_close(rest.put(later), whole.put(seen)[:, 5:], rtol=0, atol=1e-12)


def test_a_transformer_sees_so_many_steps_and_no_clock() -> None:
    module, features = core("transformer", layers=1, context=3), normal(1, 9, 3)
    packing = Packing.of(torch.ones(1, 9, dtype=torch.bool), None)
    changed = features.clone()
    changed[:, 2] += 1.0
    with torch.no_grad():
        before = module.replay(features[0], packing, None)[0]
        after = module.replay(changed[0], packing, None)[0]
        shifted = module.replay(torch.cat([features[0, 4:], features[0, :4]]), packing, None)[0]
    moved = (before - after).abs().sum(-1) > 1e-9
    assert moved.tolist() == [False, False, True, True, True, True, False, False, False]
    torch.testing.assert_close(shifted[3:5], before[7:9])


@pytest.mark.parametrize("kind", KINDS)
def test_all_parameters_get_a_gradient(kind: str) -> None:
    module = core(kind)
    packing = Packing.of(torch.ones(2, 6, dtype=torch.bool), None)
    seen, _ = module.replay(normal(12, 3), packing, None)
    (seen * normal(*seen.shape, seed=9)).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().sum()) > 0.0, name
