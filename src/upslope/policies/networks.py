"""Networks: from an observation to features, and from features to parameters of a distribution or a value."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn

from upslope.policies.fused import Layout, activate, append_constant, mlps
from upslope.spaces import ActionMask, Box, Composite, Discrete, Leaf, MultiDiscrete, Space, without_mask
from upslope.trajectory import ObservationArrays

ActivationName: TypeAlias = Literal["tanh", "relu", "gelu", "silu", "elu"]
EncoderName: TypeAlias = Literal["auto", "mlp", "nature_cnn", "small_cnn"]
ImageLayout: TypeAlias = Literal["auto", "height_width_channel", "channel_height_width"]


# --- initialisation --------------------------------------------------------------------------------------------------


def linear(inputs: int, outputs: int, gain: float | None, generator: torch.Generator | None) -> nn.Linear:
    """An affine layer: orthogonal weights with this gain and zero biases, or PyTorch's own defaults if gain is None.

    Without a generator it stays on the meta device, shapes without memory or values, for saved tensors to be put in.
    """
    layer = nn.Linear(inputs, outputs, device="meta")
    _initialise(layer, gain, generator)
    return layer


def convolution(
    channels: int, filters: int, kernel: int, stride: int, gain: float | None, generator: torch.Generator | None
) -> nn.Conv2d:
    """A convolution without padding, initialised like `linear`."""
    layer = nn.Conv2d(channels, filters, kernel, stride=stride, device="meta")
    _initialise(layer, gain, generator)
    return layer


def _initialise(layer: nn.Module, gain: float | None, generator: torch.Generator | None) -> None:
    if generator is None:
        return
    layer.to_empty(device="cpu")
    weight, bias = cast("Tensor", layer.weight), cast("Tensor", layer.bias)
    with torch.no_grad():
        if gain is not None:
            nn.init.orthogonal_(weight, gain, generator=generator)
            bias.zero_()
            return
        bound = 1.0 / math.sqrt(weight[0].numel())
        weight.uniform_(-bound, bound, generator=generator)
        bias.uniform_(-bound, bound, generator=generator)


# --- multilayer perceptron -------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """Affine layers with activations between them; one autograd node on the CPU.

    Args:
        inputs: number of features.
        hidden: sizes of the hidden layers.
        outputs: number of outputs; None makes the last hidden layer the output (a torso).
        activation: between the layers.
        gain: of the hidden layers' orthogonal weights; None for PyTorch's default initialisation.
        output_gain: of the output layer.
        output_bias: [outputs + constant] initial value of the outputs, 0 where None.
        constant: how many further outputs do not depend on the input at all: they are one learned vector.
        generator: of the initial weights; the global generator is never touched. None leaves the network on the meta
            device, without memory or values, for saved tensors to be put in.
    """

    def __init__(
        self,
        inputs: int,
        hidden: tuple[int, ...],
        outputs: int | None,
        *,
        activation: ActivationName = "tanh",
        gain: float | None = math.sqrt(2.0),
        output_gain: float | None = 1.0,
        output_bias: tuple[float, ...] | None = None,
        constant: int = 0,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self.activation, self.torso = activation, outputs is None
        sizes = [inputs, *hidden]
        layers = [linear(a, b, gain, generator) for a, b in pairwise(sizes)]
        if outputs is not None:
            layers.append(linear(sizes[-1], outputs, output_gain, generator))
        self.layers = nn.ModuleList(layers)
        self.affine = tuple(layers)
        self.features = sizes[-1] if outputs is None else outputs + constant
        device = "meta" if generator is None else "cpu"
        self.constant = nn.Parameter(torch.zeros(constant, device=device)) if constant else None
        if output_bias is not None and outputs is not None and generator is not None:
            with torch.no_grad():
                layers[-1].bias.add_(torch.tensor(output_bias[:outputs]))
                if self.constant is not None:
                    self.constant.add_(torch.tensor(output_bias[outputs:]))

        self.layout = Layout(activation, self.torso, 2 * len(layers) + bool(constant), bool(constant))

    def tensors(self) -> list[Tensor]:
        """Weight, bias, weight, bias ... and the constant outputs, if any: the order of `Layout`."""
        found: list[Tensor] = []
        for layer in self.affine:
            # Attributes of a module are looked up by Python code, slower than a small network's arithmetic.
            held = cast("dict[str, Tensor]", layer._parameters)  # pyright: ignore[reportPrivateUsage]
            found += (held["weight"], held["bias"])
        if self.constant is not None:
            found.append(self.constant)
        return found

    def forward(self, features: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs + constant]."""
        flat = features if features.ndim == 2 else features.reshape(-1, features.shape[-1])
        (output,) = mlps(flat, (self.layout,), *self.tensors())
        return output if features.ndim == 2 else output.view(*features.shape[:-1], -1)


def forward_pair(first: MLP, second: MLP, features: Tensor) -> tuple[Tensor, Tensor]:
    """Two perceptrons on the same features [M, F], as one autograd node on the CPU."""
    outputs = mlps(features, (first.layout, second.layout), *first.tensors(), *second.tensors())
    return outputs[0], outputs[1]


class LeanMLP:
    """An `MLP` for rollouts: NumPy only, on views of the parameters where they lie.

    The views follow in-place changes of the parameters; a policy whose parameters were moved (or lie on an
    accelerator, of which this takes a copy) needs a new one.
    """

    def __init__(self, network: MLP) -> None:
        tensors = network.tensors()
        self.device = tensors[0].device
        tensors, self._constant = network.layout.split([tensor.numpy(force=True) for tensor in tensors])
        arrays = [(weight.T, bias) for weight, bias in zip(tensors[::2], tensors[1::2], strict=True)]
        self._hidden, self._last = (arrays, None) if network.torso else (arrays[:-1], arrays[-1])
        self._activation = network.activation
        self.dtype = arrays[0][0].dtype

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """[N, inputs] -> [N, outputs + constant], a new array."""
        for weight, bias in self._hidden:
            features = np.dot(features, weight)
            features += bias
            activate(self._activation, features)
        if self._last is not None:
            features = np.dot(features, self._last[0])
            features += self._last[1]
        return features if self._constant is None else append_constant(features, self._constant)


# --- encoders --------------------------------------------------------------------------------------------------------


class VectorEncoder(nn.Module):
    """A leaf as one flat vector: numbers as they are (bytes of images divided by 255), choices as one-hot vectors.

    It has no parameters, so that one pass serves actor and critic, and a NumPy twin for rollouts.
    """

    def __init__(self, leaf: Leaf) -> None:
        super().__init__()
        self.leaf = leaf
        self.divide = isinstance(leaf, Box) and leaf.is_image
        if isinstance(leaf, Box):
            self.features = math.prod(leaf.shape)
        elif isinstance(leaf, MultiDiscrete):
            self.features = sum(leaf.choices)
        else:
            self.features = leaf.n
        choices = leaf.choices if isinstance(leaf, MultiDiscrete) else ()
        self.offsets = tuple(int(offset) for offset in np.cumsum((0, *choices))[:-1])
        self.unit: Tensor
        # On the CPU whatever the default device is: loading builds policies on the meta device, and this is not saved.
        self.register_buffer("unit", torch.ones((), device="cpu"), persistent=False)

    def forward(self, observation: Tensor) -> Tensor:
        """[M, ...] -> [M, features], in the number type the module was moved to."""
        dtype = self.unit.dtype
        if isinstance(self.leaf, Discrete | MultiDiscrete):
            index = observation.long().reshape(len(observation), -1)
            if self.offsets:
                index = index + torch.tensor(self.offsets, device=index.device)
            return torch.zeros(len(index), self.features, dtype=dtype, device=index.device).scatter_(1, index, 1.0)
        flat = observation.reshape(len(observation), self.features).to(dtype)
        return flat / 255.0 if self.divide else flat

    def encode(self, observation: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """The same in NumPy."""
        if isinstance(self.leaf, Discrete | MultiDiscrete):
            index = observation.reshape(len(observation), -1)
            if self.offsets:
                index = index + np.array(self.offsets)
            hot = np.zeros((len(index), self.features), dtype=dtype)
            np.put_along_axis(hot, index, 1.0, axis=1)
            return hot
        flat = observation if observation.ndim == 2 else observation.reshape(len(observation), self.features)
        flat = np.ascontiguousarray(flat, dtype=dtype)
        return flat / np.asarray(255.0, dtype=dtype) if self.divide else flat


class ImageEncoder(nn.Module):
    """Convolutions, one affine layer, ReLU after each. Bytes are divided by 255 here and nowhere else.

    Args:
        leaf: an image space, height and width and channels in either order.
        layout: which; "auto" takes the smaller of the outer dimensions for the channels.
        layers: (filters, kernel, stride) of each convolution.
        features: size of the result.
        gain: of the orthogonal weights, or None for PyTorch's default initialisation.
        generator: of the initial weights, or None: see `MLP`.

    Raises:
        ValueError: if the space is no image or the image is too small for the convolutions.
    """

    def __init__(
        self,
        leaf: Leaf,
        *,
        layout: ImageLayout,
        layers: tuple[tuple[int, int, int], ...],
        features: int,
        gain: float | None,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        if not isinstance(leaf, Box) or len(leaf.shape) != 3:
            raise ValueError(f'a convolutional encoder needs a Box of three dimensions, got {leaf}: use encoder="mlp"')
        self.channels_last = channels_last(leaf.shape, layout)
        height, width, channels = leaf.shape if self.channels_last else (*leaf.shape[1:], leaf.shape[0])
        self.divide, self.features = leaf.dtype == "uint8", features
        smallest = _smallest_image(layers)
        if min(height, width) < smallest:
            raise ValueError(
                f"an image of {height} x {width} (shape {leaf.shape}) is too small for these convolutions, which need "
                f'at least {smallest} x {smallest}: use encoder="small_cnn" or "mlp", or set image_layout if the '
                "channels were taken for a side"
            )
        convolutions: list[nn.Module] = []
        for filters, kernel, stride in layers:
            convolutions += (convolution(channels, filters, kernel, stride, gain, generator), nn.ReLU())
            height, width, channels = (height - kernel) // stride + 1, (width - kernel) // stride + 1, filters
        self.convolutions = nn.Sequential(*convolutions, nn.Flatten())
        self.output = linear(height * width * channels, features, gain, generator)

    def forward(self, observation: Tensor) -> Tensor:
        """[M, H, W, C] or [M, C, H, W] -> [M, features]."""
        image = observation.permute(0, 3, 1, 2) if self.channels_last else observation
        image = image.to(self.output.weight.dtype)
        if self.divide:
            image = image / 255.0
        return torch.relu(self.output(self.convolutions(image)))


NATURE_CNN = ((32, 8, 4), (64, 4, 2), (64, 3, 1))
"""Filters, kernel and stride of Mnih et al. 2015; with 512 features. Needs 36 x 36 pixels."""
SMALL_CNN = ((32, 3, 1), (64, 3, 1))
"""For tiny images, 10 x 10 for example; with 128 features. Needs 5 x 5."""


def channels_last(shape: tuple[int, ...], layout: ImageLayout) -> bool:
    """Whether the last of three dimensions holds the channels."""
    return shape[-1] <= shape[0] if layout == "auto" else layout == "height_width_channel"


def _smallest_image(layers: tuple[tuple[int, int, int], ...]) -> int:
    size = 1
    for _, kernel, stride in reversed(layers):
        size = (size - 1) * stride + kernel
    return size


class CompositeEncoder(nn.Module):
    """One encoder per named leaf; features concatenated in the space's order."""

    def __init__(self, encoders: dict[str, nn.Module]) -> None:
        super().__init__()
        self.names = tuple(encoders)
        self.encoders = nn.ModuleList(encoders.values())
        self.features = sum(cast("int", encoder.features) for encoder in encoders.values())

    def forward(self, observation: dict[str, Tensor]) -> Tensor:
        """Named tensors [M, ...] -> [M, features]."""
        parts = [encoder(observation[name]) for name, encoder in zip(self.names, self.encoders, strict=True)]
        return torch.cat(parts, dim=-1)

    def encode(self, observation: dict[str, np.ndarray], dtype: np.dtype) -> np.ndarray:
        """The same in NumPy, for vectors only."""
        encoders = zip(self.names, cast("list[VectorEncoder]", self.encoders), strict=True)
        return np.concatenate([encoder.encode(observation[name], dtype) for name, encoder in encoders], axis=1)


def build_encoder(
    space: Space, kind: EncoderName, layout: ImageLayout, gain: float | None, generator: torch.Generator | None
) -> VectorEncoder | ImageEncoder | CompositeEncoder:
    """The encoder of a space: convolutions for images where `kind` says so (see `ActorCriticConfig`), vectors else.

    It takes what is left of an observation without the mask of valid actions, if there is one.

    Raises:
        ValueError: if a convolutional encoder is asked for and no leaf is an image, or an image is too small.
    """
    space = without_mask(space)
    if isinstance(space, Composite):
        entries = [(name, leaf) for name, leaf in space.entries if not isinstance(leaf, ActionMask)]
        kinds: dict[str, EncoderName] = {name: _leaf_kind(leaf, kind, layout) for name, leaf in entries}
        if kind in ("nature_cnn", "small_cnn") and set(kinds.values()) == {"mlp"}:
            raise ValueError(f'encoder="{kind}" needs an image among the observations, got {space}: use encoder="mlp"')
        leaves = {name: _build_leaf(leaf, kinds[name], layout, gain, generator) for name, leaf in entries}
        return CompositeEncoder(dict(leaves))
    chosen: EncoderName = _leaf_kind(space, kind, layout) if kind == "auto" else kind
    return _build_leaf(space, chosen, layout, gain, generator)


def _leaf_kind(leaf: Leaf, kind: EncoderName, layout: ImageLayout) -> EncoderName:
    if not isinstance(leaf, Box) or len(leaf.shape) != 3:
        return "mlp"
    if kind != "auto":
        return kind
    if not leaf.is_image:
        return "mlp"
    sides = leaf.shape[:2] if channels_last(leaf.shape, layout) else leaf.shape[1:]
    if min(sides) >= _smallest_image(NATURE_CNN):
        return "nature_cnn"
    return "small_cnn" if min(sides) >= _smallest_image(SMALL_CNN) else "mlp"


def _build_leaf(
    leaf: Leaf, kind: EncoderName, layout: ImageLayout, gain: float | None, generator: torch.Generator | None
) -> VectorEncoder | ImageEncoder:
    if kind == "nature_cnn":
        return ImageEncoder(leaf, layout=layout, layers=NATURE_CNN, features=512, gain=gain, generator=generator)
    if kind == "small_cnn":
        return ImageEncoder(leaf, layout=layout, layers=SMALL_CNN, features=128, gain=gain, generator=generator)
    return VectorEncoder(leaf)


def is_vector_only(encoder: nn.Module) -> bool:
    """Whether an encoder has a NumPy twin (`encode`) and no parameters."""
    if isinstance(encoder, CompositeEncoder):
        return all(isinstance(part, VectorEncoder) for part in encoder.encoders)
    return isinstance(encoder, VectorEncoder)


def encode_arrays(encoder: nn.Module, observation: ObservationArrays, dtype: np.dtype) -> np.ndarray:
    """Features [N, F] of an encoder that `is_vector_only`, in NumPy."""
    if isinstance(observation, dict):
        return cast("CompositeEncoder", encoder).encode(observation, dtype)
    return cast("VectorEncoder", encoder).encode(observation, dtype)


def feature_count(encoder: nn.Module) -> int:
    """How many features an encoder says it puts out.

    Raises:
        ValueError: if it does not say.
    """
    features = getattr(encoder, "features", None)
    if not isinstance(features, int) or features < 1:
        raise ValueError(
            f"the encoder {type(encoder).__name__} must have an attribute `features`: the number of features it puts "
            f"out per observation, a positive integer; got {features!r}"
        )
    return features
