"""What the blocks of language models are made of, as typed parts that hold a model's own parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, relu, silu

ActivationName: TypeAlias = Literal["silu", "gelu", "gelu_tanh", "relu"]


def gelu_tanh(x: Tensor) -> Tensor:
    """The Gaussian error linear unit by its tanh approximation (`gelu_new`, `gelu_pytorch_tanh`)."""
    return gelu(x, approximate="tanh")


ACTIVATIONS: dict[ActivationName, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": relu,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRank:
    """A LoRA adapter: adds `scale * outer @ inner @ x`.

    Attributes:
        inner: [rank, inputs].
        outer: [outputs, rank].
        scale: alpha / rank.
    """

    inner: Tensor
    outer: Tensor
    scale: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """y = W x + b, plus adapters.

    Attributes:
        stored: the model's own weight: [outputs, inputs], or [inputs, outputs] where `transposed` (GPT-2).
        bias: [outputs] or None.
        transposed: how the weight is stored.
        low_rank: active adapters.
    """

    stored: Tensor
    bias: Tensor | None = None
    transposed: bool = False
    low_rank: tuple[LowRank, ...] = ()

    @property
    def weight(self) -> Tensor:
        """W, [outputs, inputs], without adapters; a view, differentiable."""
        return self.stored.t() if self.transposed else self.stored

    def __call__(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        y = linear(x, self.weight, self.bias)
        for adapter in self.low_rank:
            y = y + linear(linear(x, adapter.inner), adapter.outer) * adapter.scale
        return y


@dataclass(frozen=True, kw_only=True, slots=True)
class Norm:
    """Root mean square or layer normalisation over the last dimension.

    RMS: x / sqrt(mean(x^2) + epsilon) * (offset + weight), computed in float32 at least;
    layer: (x - mean) / sqrt(variance + epsilon) * weight + bias.

    Attributes:
        kind: which.
        weight: [D].
        bias: [D] or None.
        epsilon: added to the mean square or the variance.
        offset: added to the weight: 1 in Gemma, else 0.
    """

    kind: Literal["rms", "layer"]
    weight: Tensor
    bias: Tensor | None = None
    epsilon: float
    offset: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        if self.kind == "layer":
            return layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)
        wide = x if x.dtype == torch.float64 else x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        weight = self.weight + self.offset if self.offset else self.weight
        return (scaled * weight).to(x.dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rotary:
    """Rotary position embedding: pairs (i, i + S/2) of a head turn by position * frequency_i.

    Attributes:
        frequency: [S/2] float32, radians per position.
        scale: multiplies cosine and sine (1 but for YaRN).
    """

    frequency: Tensor
    scale: float

    def cosine_sine(self, position: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """For positions [...], cosines and sines [..., S/2]; angles in float32 as transformers has them."""
        angle = position.unsqueeze(-1).float() * self.frequency.to(position.device)
        return (angle.cos() * self.scale).to(dtype), (angle.sin() * self.scale).to(dtype)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn heads [..., S] by cosines and sines [..., S/2] that broadcast against them."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One block.

    Attributes:
        attention_norm: before attention.
        query_key_value: three projections, or one (GPT-2) whose outputs are queries, keys and values in a row.
        query_norm, key_norm: over each head before rotation, or None.
        rotary: of queries and keys, or None where positions are learned.
        attention_scale: multiplies query-key products.
        window: a position sees itself and at most `window - 1` before it; None for all before it.
        out: from the heads' outputs back to the stream.
        post_attention_norm: of attention's output, or None.
        feed_forward_norm: before the feed-forward part.
        gate: or None.
        up, down: the feed-forward part.
        activation: its name in `ACTIVATIONS`.
        post_feed_forward_norm: of the feed-forward output, or None.
    """

    attention_norm: Norm
    query_key_value: tuple[Linear, ...]
    query_norm: Norm | None
    key_norm: Norm | None
    rotary: Rotary | None
    attention_scale: float
    window: int | None
    out: Linear
    post_attention_norm: Norm | None
    feed_forward_norm: Norm
    gate: Linear | None
    up: Linear
    down: Linear
    activation: ActivationName
    post_feed_forward_norm: Norm | None
