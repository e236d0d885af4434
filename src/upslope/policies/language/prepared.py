"""A language model's weights, copied once per version into the form that generates fastest.

Queries, keys and values are one matrix product; matrices are stored [inputs, outputs]; the gain of a norm is multiplied
into the matrix behind it; LoRA adapters are merged; and the pairs (i, i + S/2) that rotary embeddings turn stand side
by side as (2i, 2i + 1), in queries and keys alike, which leaves their products as they are and makes a turn one complex
product. What is computed differs from the model's own forward pass by rounding only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from upslope.policies.language.architecture import Architecture
from upslope.policies.language.parts import ACTIVATIONS, Layer, Linear, Norm, Rotary


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """x M + b.

    Attributes:
        matrix: M, [inputs, outputs].
        bias: b, [outputs] or None.
    """

    matrix: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """[N, inputs] -> [N, outputs]."""
        return torch.mm(x, self.matrix) if self.bias is None else torch.addmm(self.bias, x, self.matrix)

    def add_to(self, stream: Tensor, x: Tensor) -> None:
        """stream += x M + b, in place."""
        if stream.dtype != x.dtype:
            stream += self(x)
            return
        stream.addmm_(x, self.matrix)
        if self.bias is not None:
            stream += self.bias


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaling:
    """A norm, its gain and bias given explicitly or left to the matrix behind it.

    The root mean square is a Euclidean norm: x / sqrt(mean(x^2) + epsilon) = sqrt(D) x / hypot(|x|, sqrt(D epsilon)).

    Attributes:
        root: sqrt(D epsilon) as a tensor of no dimensions, or None for layer normalisation.
        width: D.
        epsilon: as in `Norm`.
        gain: what multiplies the result, sqrt(D) included for root mean squares; None if the matrix behind does.
        bias: what is added, or None.
        result: the type of number the result has.
    """

    root: Tensor | None
    width: int
    epsilon: float
    gain: Tensor | None
    bias: Tensor | None
    result: torch.dtype

    def __call__(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        if self.root is None:
            return layer_norm(x, (self.width,), self.gain, self.bias, self.epsilon).to(self.result)
        y = x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self.root)
        if self.gain is not None:
            y *= self.gain
        return y.to(self.result)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedLayer:
    """One block; the parts are those of `parts.Layer`.

    Attributes:
        query_key_value: all three in a row; queries come out scaled for their products with keys.
        rotary: which of the model's rotary embeddings, or None.
    """

    attention_norm: Scaling
    query_key_value: Product
    query_norm: Scaling | None
    key_norm: Scaling | None
    rotary: int | None
    window: int | None
    out: Product
    post_attention_norm: Scaling | None
    feed_forward_norm: Scaling
    gate: Product | None
    up: Product
    down: Product
    activation: Callable[[Tensor], Tensor]
    post_feed_forward_norm: Scaling | None

    def finish(self, stream: Tensor, mixed: Tensor) -> None:
        """The rest of the block after attention's heads [N, H*S], added to the stream [N, D] in place."""
        if self.post_attention_norm is None:
            self.out.add_to(stream, mixed)
        else:
            stream += self.post_attention_norm(self.out(mixed).to(stream.dtype))
        x = self.feed_forward_norm(stream)
        inner = self.activation(self.up(x)) if self.gate is None else self.activation(self.gate(x)).mul_(self.up(x))
        if self.post_feed_forward_norm is None:
            self.down.add_to(stream, inner)
        else:
            stream += self.post_feed_forward_norm(self.down(inner).to(stream.dtype))


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedModel:
    """All of a model as of one version of its weights.

    Attributes:
        embedding: [V, D], scaled.
        position: [P, D] learned positions, or None.
        layers: the blocks.
        norm: after the last block.
        head: to the logits.
        rotary: the different rotary embeddings of the layers.
        heads, key_value_heads, head_size, context, logit_softcap: as in `Architecture`.
        wide: type of number of the residual stream and the logits.
        compute: of matrix products and of the cache.
    """

    embedding: Tensor
    position: Tensor | None
    layers: tuple[PreparedLayer, ...]
    norm: Scaling
    head: Product
    rotary: tuple[Rotary, ...]
    heads: int
    key_value_heads: int
    head_size: int
    context: int
    logit_softcap: float | None
    wide: torch.dtype
    compute: torch.dtype

    def embed(self, token: Tensor, position: Tensor) -> Tensor:
        """The stream before the first block, [N, D], of tokens [N] at positions [N]."""
        stream = self.embedding.index_select(0, token)
        if self.position is not None:
            stream += self.position.index_select(0, position)
        return stream

    def logits(self, stream: Tensor) -> Tensor:
        """[N, V] of the stream [N, D] after the last block."""
        logits = self.head(self.norm(stream)).to(self.wide)
        if self.logit_softcap is not None:
            logits = torch.tanh(logits / self.logit_softcap) * self.logit_softcap
        return logits


@torch.inference_mode()
def prepare(architecture: Architecture, compute: torch.dtype) -> PreparedModel:
    """Copy the weights as they stand now.

    Args:
        architecture: of the model.
        compute: type of number of matrix products and the cache: the weights' own, or bfloat16.
    """
    wide = architecture.token_embedding.dtype
    rotaries: list[Rotary] = []
    layers = tuple(
        _layer(architecture, layer, _number(layer.rotary, rotaries), compute) for layer in architecture.layers
    )
    norm, head = _normed(architecture.norm, _products((architecture.head,)), compute)
    position = architecture.position_embedding
    return PreparedModel(
        embedding=architecture.token_embedding * architecture.embedding_scale,
        position=None if position is None else position.clone(),
        layers=layers,
        norm=norm,
        head=head,
        rotary=tuple(rotaries),
        heads=architecture.heads,
        key_value_heads=architecture.key_value_heads,
        head_size=architecture.head_size,
        context=architecture.context,
        logit_softcap=architecture.logit_softcap,
        wide=wide,
        compute=compute,
    )


def _number(rotary: Rotary | None, known: list[Rotary]) -> int | None:
    if rotary is None:
        return None
    for number, other in enumerate(known):
        if other.scale == rotary.scale and torch.equal(other.frequency, rotary.frequency):
            return number
    known.append(rotary)
    return len(known) - 1


_Parts = tuple[Tensor, Tensor | None]
"""A weight [outputs, inputs] and a bias [outputs]."""


def _layer(architecture: Architecture, layer: Layer, rotary: int | None, compute: torch.dtype) -> PreparedLayer:
    size = architecture.head_size
    weight, bias = _products(layer.query_key_value)
    queries, keys = architecture.heads * size, architecture.key_value_heads * size
    order = torch.arange(weight.shape[0], device=weight.device)
    pairs = torch.arange(size, device=weight.device)
    if rotary is not None:
        pairs = pairs.view(2, size // 2).t().reshape(-1)
        order[: queries + keys] = order[: queries + keys].view(-1, size)[:, pairs].reshape(-1)
    weight, bias = weight[order], None if bias is None else bias[order]
    query_norm = _head_norm(layer.query_norm, pairs, layer.attention_scale)
    if layer.query_norm is None:
        weight[:queries] *= layer.attention_scale
        if bias is not None:
            bias[:queries] *= layer.attention_scale
    attention_norm, query_key_value = _normed(layer.attention_norm, (weight, bias), compute)
    feed_forward_norm, up = _normed(layer.feed_forward_norm, _products((layer.up,)), compute)
    gate = None if layer.gate is None else _normed(layer.feed_forward_norm, _products((layer.gate,)), compute)[1]
    return PreparedLayer(
        attention_norm=attention_norm,
        query_key_value=query_key_value,
        query_norm=query_norm,
        key_norm=_head_norm(layer.key_norm, pairs, 1.0),
        rotary=rotary,
        window=layer.window,
        out=_stored(_products((layer.out,)), compute),
        post_attention_norm=_scaling(layer.post_attention_norm, layer.attention_norm.weight.dtype),
        feed_forward_norm=feed_forward_norm,
        gate=gate,
        up=up,
        down=_stored(_products((layer.down,)), compute),
        activation=_activation(layer),
        post_feed_forward_norm=_scaling(layer.post_feed_forward_norm, layer.attention_norm.weight.dtype),
    )


def _activation(layer: Layer) -> Callable[[Tensor], Tensor]:
    return ACTIVATIONS[layer.activation]


def _products(linears: tuple[Linear, ...]) -> _Parts:
    """Several projections of one input as one, adapters merged; copies."""
    weights: list[Tensor] = []
    for linear in linears:
        weight = linear.weight
        for adapter in linear.low_rank:
            weight = weight + adapter.outer @ adapter.inner * adapter.scale
        weights.append(weight)
    bias = None
    if any(linear.bias is not None for linear in linears):
        given = [
            weight.new_zeros(len(weight)) if linear.bias is None else linear.bias
            for linear, weight in zip(linears, weights, strict=True)
        ]
        bias = torch.cat(given)
    return torch.cat(weights), bias


def _stored(parts: _Parts, compute: torch.dtype) -> Product:
    weight, bias = parts
    return Product(matrix=weight.t().to(compute).contiguous(), bias=None if bias is None else bias.to(compute))


def _normed(norm: Norm, parts: _Parts, compute: torch.dtype) -> tuple[Scaling, Product]:
    """A norm and the matrix behind it. At reduced precision the gain stays where the model has it: rounding the
    matrix must give the same numbers as in the learner."""
    weight, bias = parts
    if compute != norm.weight.dtype:
        full = _scaling(norm, compute)
        assert full is not None
        return full, _stored(parts, compute)
    gain = _gain(norm)
    if norm.bias is not None:
        moved = weight @ norm.bias
        bias = moved if bias is None else bias + moved
    return _bare(norm), _stored((weight * gain, bias), compute)


def _gain(norm: Norm) -> Tensor:
    return (norm.weight + norm.offset) * (math.sqrt(len(norm.weight)) if norm.kind == "rms" else 1.0)


def _bare(norm: Norm) -> Scaling:
    width = len(norm.weight)
    root = norm.weight.new_tensor(math.sqrt(width * norm.epsilon)) if norm.kind == "rms" else None
    return Scaling(root=root, width=width, epsilon=norm.epsilon, gain=None, bias=None, result=norm.weight.dtype)


def _scaling(norm: Norm | None, result: torch.dtype) -> Scaling | None:
    if norm is None:
        return None
    bare = _bare(norm)
    bias = None if norm.bias is None else norm.bias.clone()
    return Scaling(root=bare.root, width=bare.width, epsilon=bare.epsilon, gain=_gain(norm), bias=bias, result=result)


def _head_norm(norm: Norm | None, pairs: Tensor, scale: float) -> Scaling | None:
    """A norm over heads whose dimensions stand in another order."""
    plain = None if norm is None else _scaling(norm, norm.weight.dtype)
    if plain is None or plain.gain is None:
        return None
    bias = None if plain.bias is None else plain.bias[pairs] * scale
    return Scaling(
        root=plain.root,
        width=plain.width,
        epsilon=plain.epsilon,
        gain=plain.gain[pairs] * scale,
        bias=bias,
        result=plain.result,
    )
