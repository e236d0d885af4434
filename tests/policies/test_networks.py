"""Networks: the closed forms against plain torch, encoders against their NumPy twins, initial weights."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from upslope.policies import MLP, ImageEncoder, VectorEncoder
from upslope.policies.fused import _Arrays, mlps, plain_mlps
from upslope.policies.networks import (
    NATURE_CNN,
    ActivationName,
    CompositeEncoder,
    LeanMLP,
    build_encoder,
    encode_arrays,
    forward_pair,
    is_vector_only,
)
from upslope.spaces import Box, Composite, Discrete, MultiBinary, MultiDiscrete


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(*, hidden: tuple[int, ...] = (6, 5), outputs: int | None = 3, activation: ActivationName = "tanh", constant=0):
    network = MLP(4, hidden, outputs, activation=activation, constant=constant, generator=seeded())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=seeded(7))
    return network


SHAPES = [
    {},
    {"activation": "relu"},
    {"constant": 2},
    {"hidden": ()},
    {"hidden": (), "constant": 1},
    {"outputs": None},
    {"outputs": None, "activation": "relu", "hidden": (7,)},
]


@pytest.mark.parametrize("shape", SHAPES)
def test_closed_form_equals_plain_torch(shape: dict) -> None:
    first, second = make(**shape), make()
    features = torch.randn(9, 4, generator=seeded(1), requires_grad=True)
    inputs = [features, *first.tensors(), *second.tensors()]
    weights = [torch.randn(9, first.features, generator=seeded(2)), torch.randn(9, 3, generator=seeded(3))]
    results: list[list[Tensor]] = []
    for function in (mlps, plain_mlps):
        outputs = function(features, (first.layout, second.layout), *inputs[1:])
        total = torch.stack([(w * o).sum() for w, o in zip(weights, outputs, strict=True)]).sum()
        results.append([*outputs, *torch.autograd.grad(total, inputs)])
    for closed, plain in zip(*results, strict=True):
        torch.testing.assert_close(closed, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_and_second_gradients(shape: dict) -> None:
    first, second = make(**shape).double(), make(hidden=(3,)).double()
    features = torch.randn(3, 4, generator=seeded(1), dtype=torch.float64, requires_grad=True)
    inputs = [features, *first.tensors(), *second.tensors()]

    def function(features: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return mlps(features, (first.layout, second.layout), *tensors)

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


def test_a_node_can_be_walked_back_twice_and_two_at_a_time() -> None:
    network = make(hidden=(300, 300))
    small, large = (torch.randn(rows, 4, generator=seeded(rows)) for rows in (80, 81))
    first = network(small)
    again = network(small * 2.0)
    other = network(large)
    weight = network.layers[0].weight
    grads = [torch.autograd.grad(first.sum(), weight, retain_graph=True)[0].clone() for _ in range(2)]
    (of_again,), (of_other,) = torch.autograd.grad(again.sum(), weight), torch.autograd.grad(other.sum(), weight)
    torch.testing.assert_close(grads[0], grads[1], rtol=0.0, atol=0.0)
    for features, gradient in ((small, grads[0]), (small * 2.0, of_again), (large, of_other)):
        (plain,) = plain_mlps(features, (network.layout,), *network.tensors())
        (expected,) = torch.autograd.grad(plain.sum(), weight)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("uncounted", [0, 1])
@pytest.mark.parametrize(
    "hold",
    [
        lambda array: array,
        lambda array: array[5:].T,
        lambda array: torch.from_numpy(array),
        lambda array: torch.from_numpy(array)[3:, :2],
        lambda array: memoryview(array),
    ],
)
def test_memory_is_lent_to_one_holder_at_a_time_and_used_again(
    hold: Callable[[np.ndarray], object], uncounted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the interpreter counts references: from Python 3.14 on, borrowed ones are left out."""
    counted = sys.getrefcount
    monkeypatch.setattr(sys, "getrefcount", lambda value: counted(value) - 1 - uncounted)
    arrays, dtype = _Arrays(), np.dtype(np.float32)
    first = arrays.empty(200, 100, dtype)
    place = first.__array_interface__["data"]
    assert first.shape == (200, 100)
    assert first.dtype == dtype
    assert first.flags.writeable
    held = hold(first)
    del first
    others = [arrays.empty(200, 100, dtype) for _ in range(3)]
    assert len({place, *(other.__array_interface__["data"] for other in others)}) == 4
    del held
    assert arrays.empty(200, 100, dtype).__array_interface__["data"] == place


def test_no_more_memory_is_kept_than_agreed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Arrays, "KEPT", 3 * 4 * 200 * 100)
    arrays, dtype = _Arrays(), np.dtype(np.float32)
    kept = [arrays.empty(200 + i, 100, dtype) for i in range(4)]
    del kept
    assert sum(memory.nbytes for shelf in arrays._shelves.values() for memory in shelf) <= _Arrays.KEPT


def test_changing_a_weight_between_forward_and_backward_is_an_error() -> None:
    network = make()
    output = network(torch.zeros(2, 4)).sum()
    with torch.no_grad():
        network.layers[1].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


def test_only_what_is_trained_gets_a_gradient() -> None:
    network = make(constant=2)
    network.layers[0].weight.requires_grad_(False)
    network(torch.ones(2, 4)).sum().backward()
    assert network.layers[0].weight.grad is None
    assert network.layers[0].bias.grad is not None
    assert network.constant is not None
    torch.testing.assert_close(network.constant.grad, torch.full((2,), 2.0))


@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu", "silu", "elu"])
def test_the_numpy_forward_is_the_same_and_follows_the_parameters(activation: ActivationName) -> None:
    network = make(activation=activation, constant=1)
    lean, features = LeanMLP(network), torch.randn(5, 4, generator=seeded(4))
    for _ in range(2):
        np.testing.assert_allclose(lean(features.numpy()), network(features).detach().numpy(), atol=1e-6)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.1


def test_any_leading_shape() -> None:
    network, features = make(constant=1), torch.randn(2, 3, 4, generator=seeded(5))
    torch.testing.assert_close(network(features).view(6, 4), network(features.view(6, 4)))
    pair = forward_pair(network, make(), features.view(6, 4))
    torch.testing.assert_close(pair[0], network(features.view(6, 4)), rtol=0.0, atol=0.0)


def test_initial_weights() -> None:
    before = torch.get_rng_state()
    network = MLP(
        8, (64, 32), 4, output_gain=0.01, output_bias=(0.0, 0.0, 0.0, 0.5, -1.0), constant=1, generator=seeded()
    )
    torch.testing.assert_close(torch.get_rng_state(), before, rtol=0, atol=0)
    first, second, last = (layer.weight.detach() for layer in network.layers)
    torch.testing.assert_close(first.T @ first, 2.0 * torch.eye(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(second @ second.T, 2.0 * torch.eye(32), atol=1e-5, rtol=0)
    torch.testing.assert_close(last @ last.T, 1e-4 * torch.eye(4), atol=1e-8, rtol=0)
    torch.testing.assert_close(network.layers[2].bias.detach(), torch.tensor([0.0, 0.0, 0.0, 0.5]))
    torch.testing.assert_close(network.constant.detach(), torch.tensor([-1.0]))
    same = MLP(8, (64, 32), 4, output_gain=0.01, generator=seeded())
    assert torch.equal(same.layers[0].weight, network.layers[0].weight)
    default = MLP(8, (64,), 4, gain=None, output_gain=None, generator=seeded())
    assert float(default.layers[0].weight.detach().abs().max()) <= 1.0 / math.sqrt(8.0)


# --- encoders --------------------------------------------------------------------------------------------------------

LEAVES = [
    (Box((2, 3), -1.0, 1.0), np.arange(12, dtype=np.float32).reshape(2, 2, 3), np.arange(12.0).reshape(2, 6)),
    (Discrete(3, start=5), np.array([2, 0]), [[0, 0, 1], [1, 0, 0]]),
    (MultiDiscrete((2, 3), (0, 0)), np.array([[1, 0], [0, 2]]), [[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]]),
    (MultiBinary(3), np.array([[1, 0, 1], [0, 0, 1]], dtype=np.int8), [[1, 0, 1], [0, 0, 1]]),
    (Box((1, 1, 2), 0, 255, "uint8"), np.array([[[[0, 255]]], [[[51, 102]]]], dtype=np.uint8), [[0, 1], [0.2, 0.4]]),
]


@pytest.mark.parametrize(("leaf", "observation", "expected"), LEAVES)
def test_vectors_of_leaves(leaf, observation: np.ndarray, expected: object) -> None:
    encoder = VectorEncoder(leaf)
    features = encoder(torch.from_numpy(observation))
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, torch.tensor(np.array(expected, dtype=np.float32)))
    np.testing.assert_array_equal(encoder.encode(observation, np.dtype(np.float32)), features.numpy())
    assert encoder.double()(torch.from_numpy(observation)).dtype == torch.float64


def test_composites_concatenate_their_leaves_in_order() -> None:
    space = Composite((("b", Discrete(2)), ("a/x.y", Box((2,), -1.0, 1.0))))
    encoder = build_encoder(space, "auto", "auto", None, seeded())
    observation = {"a/x.y": np.array([[0.5, 0.25]], dtype=np.float32), "b": np.array([1])}
    expected = [[0.0, 1.0, 0.5, 0.25]]
    assert is_vector_only(encoder)
    np.testing.assert_array_equal(encode_arrays(encoder, observation, np.dtype(np.float32)), expected)
    tensors = {name: torch.from_numpy(array) for name, array in observation.items()}
    np.testing.assert_array_equal(encoder(tensors).numpy(), expected)


def test_image_encoders_read_both_layouts_and_scale_bytes_once() -> None:
    last, first = Box((40, 44, 3), 0, 255, "uint8"), Box((3, 40, 44), 0, 255, "uint8")
    one = build_encoder(last, "auto", "auto", math.sqrt(2.0), seeded())
    other = build_encoder(first, "auto", "auto", math.sqrt(2.0), seeded())
    assert isinstance(one, ImageEncoder)
    assert one.features == 512
    image = torch.randint(256, (2, 40, 44, 3), generator=seeded(1), dtype=torch.uint8)
    torch.testing.assert_close(one(image), other(image.permute(0, 3, 1, 2)), atol=1e-5, rtol=1e-4)
    real = ImageEncoder(
        Box((40, 44, 3), 0.0, 1.0),
        layout="auto",
        layers=NATURE_CNN,
        features=512,
        gain=math.sqrt(2.0),
        generator=seeded(),
    )
    torch.testing.assert_close(real(image / 255.0), one(image))


def test_the_encoder_fits_the_image() -> None:
    def built(shape: tuple[int, ...], kind="auto") -> object:
        return build_encoder(Box(shape, 0, 255, "uint8"), kind, "auto", None, seeded())

    assert built((36, 36, 1)).convolutions[0].kernel_size == (8, 8)
    assert built((35, 36, 1)).convolutions[0].kernel_size == (3, 3)
    assert built((10, 10, 4)).features == 128
    assert isinstance(built((4, 10, 4)), VectorEncoder)
    assert isinstance(built((84, 84, 4), "mlp"), VectorEncoder)
    assert built((10, 10, 4))(torch.zeros(2, 10, 10, 4, dtype=torch.uint8)).shape == (2, 128)
    with pytest.raises(ValueError, match=r"at least 36 x 36: use encoder=\"small_cnn\""):
        built((35, 36, 1), "nature_cnn")
    with pytest.raises(ValueError, match='use encoder="mlp"'):
        build_encoder(Box((4,), -1.0, 1.0), "nature_cnn", "auto", None, seeded())
    with pytest.raises(ValueError, match="needs an image among the observations"):
        build_encoder(Composite((("a", Discrete(2)),)), "small_cnn", "auto", None, seeded())
    mixed = Composite((("a", Discrete(2)), ("b", Box((10, 10, 4), 0, 255, "uint8"))))
    encoder = build_encoder(mixed, "small_cnn", "auto", None, seeded())
    assert isinstance(encoder, CompositeEncoder)
    assert encoder.features == 130
    assert not is_vector_only(encoder)
