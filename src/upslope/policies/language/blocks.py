"""The parts of a block between attentions as single autograd nodes with closed-form backward passes, for the CPU.

On a CPU most of what a small model costs beside its matrix products is moving activations through memory. Here rows
are taken in pieces that stay in a core's cache, and nothing is kept that is cheap to compute again. What the numbers
mean is written in plain operations in `Architecture.attention_inputs` and `Architecture.finish`; those also run
wherever the closed forms do not apply, and when a backward pass must itself be differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from upslope.policies.language.parts import ACTIVATIONS, ActivationName, Layer, Linear, Norm

PIECE = 2**19
"""Numbers of the widest activation that are worked on at a time (2 MiB in float32)."""
FEWEST = 1024
"""Rows of a piece, at least: each piece reads and writes the weights' gradients once."""

_aten = torch.ops.aten
_activation_backward: dict[ActivationName, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": lambda gradient, x: _aten.silu_backward(gradient, x),
    "gelu": lambda gradient, x: _aten.gelu_backward(gradient, x),
    "gelu_tanh": lambda gradient, x: _aten.gelu_backward(gradient, x, approximate="tanh"),
    "relu": lambda gradient, x: _aten.threshold_backward(gradient, x, 0),
}


def direct(x: Tensor) -> bool:
    """Whether the closed forms apply to such activations: on the CPU, in the parameters' own precision."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")


def can_project(layer: Layer) -> bool:
    """Whether `project` covers what comes before this layer's attention."""
    return layer.query_norm is None and not any(linear.low_rank for linear in layer.query_key_value)


def can_finish(layer: Layer) -> bool:
    """Whether `finish` covers what comes after this layer's attention."""
    linears = (layer.out, layer.up, layer.down, *(() if layer.gate is None else (layer.gate,)))
    plain = layer.post_attention_norm is None and layer.post_feed_forward_norm is None
    return plain and not any(linear.low_rank for linear in linears)


@dataclass(frozen=True, kw_only=True, slots=True)
class _NormKind:
    """What a norm is beside its parameters."""

    rms: bool
    epsilon: float
    offset: float

    @classmethod
    def of(cls, norm: Norm) -> _NormKind:
        return cls(rms=norm.kind == "rms", epsilon=norm.epsilon, offset=norm.offset)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.rms:
            return _aten.native_layer_norm(x, weight.shape, weight, bias, self.epsilon)[0]
        return (x * self._inverse(x)).mul_(weight + self.offset if self.offset else weight)

    def backward(
        self,
        gradient: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        to_weight: Tensor,
        to_bias: Tensor | None,
    ) -> Tensor:
        """Gradient of x; adds those of weight and bias to the given ones. Overwrites `gradient`."""
        if not self.rms:
            shape = weight.shape
            _, mean, inverse = _aten.native_layer_norm(x, shape, weight, bias, self.epsilon)
            to_x, more_weight, more_bias = _aten.native_layer_norm_backward(
                gradient, x, shape, mean, inverse, weight, bias, [True, True, bias is not None]
            )
            to_weight += more_weight
            if to_bias is not None:
                to_bias += more_bias
            return to_x
        inverse = self._inverse(x)
        scaled = x * inverse
        to_weight += (gradient * scaled).sum(0)
        gradient.mul_(weight + self.offset if self.offset else weight)
        along = (gradient * scaled).mean(-1, keepdim=True)
        return gradient.addcmul_(scaled, along, value=-1.0).mul_(inverse)

    def _inverse(self, x: Tensor) -> Tensor:
        """1 / sqrt(mean(x^2) + epsilon), [n, 1]."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return norm.square_().div_(x.shape[-1]).add_(self.epsilon).rsqrt_()


def _size(widest: int) -> int:
    """Rows of a piece."""
    return max(FEWEST, PIECE // widest)


def _pieces(rows: int, widest: int) -> Iterator[slice]:
    size = _size(widest)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """W x + b for rows x [n, inputs] and W [outputs, inputs]."""
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


class _Sum:
    """Gradients of a linear map's weight and bias, summed over pieces."""

    def __init__(self, weight: Tensor | None, bias: Tensor | None, wanted: tuple[bool, bool]) -> None:
        self.weight = torch.zeros(weight.shape, dtype=weight.dtype) if weight is not None and wanted[0] else None
        self.bias = torch.zeros_like(bias) if bias is not None and wanted[1] else None

    def add(self, gradient: Tensor, x: Tensor) -> None:
        """From one piece's gradient of outputs [n, outputs] and its inputs [n, inputs]."""
        if self.weight is not None:
            self.weight.addmm_(gradient.t(), x)
        if self.bias is not None:
            self.bias += gradient.sum(0)


def _joined(linears: tuple[Linear, ...]) -> tuple[Tensor, Tensor | None]:
    """Several maps of one input as one; their weights stay separate parameters."""
    if len(linears) == 1:
        return linears[0].weight, linears[0].bias
    weight = torch.cat([linear.weight for linear in linears])
    biases = [linear.bias for linear in linears]
    present = [bias for bias in biases if bias is not None]
    if not present:
        return weight, None
    whole = [
        linear.stored.new_zeros(linear.weight.shape[0]) if bias is None else bias
        for linear, bias in zip(linears, biases, strict=True)
    ]
    return weight, torch.cat(whole)


def project(layer: Layer, stream: Tensor, turned: int, angles: tuple[Tensor, Tensor] | None) -> Tensor:
    """Queries, keys and values of packed tokens in a row, queries and keys rotated: [N, (H + 2K) S].

    Args:
        layer: for which `can_project`.
        stream: [N, D].
        turned: H + K, heads that rotate.
        angles: cosines and sines [N, S/2], or None.
    """
    weight, bias = _joined(layer.query_key_value)
    norm = layer.attention_norm
    cosine, sine = angles if angles is not None else (None, None)
    kind = _NormKind.of(norm)
    return cast(Tensor, _Project.apply(stream, norm.weight, norm.bias, weight, bias, cosine, sine, kind, turned))


def _turn(rows: Tensor, turned: int, cosine: Tensor, sine: Tensor, sign: float) -> None:
    """Rotate the first heads of rows [n, heads * S] in place; a sign of -1 turns back."""
    half = cosine.shape[-1]
    heads = rows[:, : turned * 2 * half].view(len(rows), turned, 2, half)
    first, second = heads[:, :, 0], heads[:, :, 1]
    cosine, sine = cosine.unsqueeze(1), sine.unsqueeze(1)
    moved = first * cosine
    moved.addcmul_(second, sine, value=-sign)
    second.mul_(cosine).addcmul_(first, sine, value=sign)
    first.copy_(moved)


class _Project(Function):
    @staticmethod
    def forward(
        ctx: Any,
        stream: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        cosine: Tensor | None,
        sine: Tensor | None,
        kind: _NormKind,
        turned: int,
    ) -> Tensor:
        out = stream.new_empty(len(stream), len(weight))
        for piece in _pieces(len(stream), len(weight)):
            x = kind.forward(stream[piece], norm_weight, norm_bias)
            projected = _product(x, weight, bias, out[piece])
            if cosine is not None and sine is not None:
                _turn(projected, turned, cosine[piece], sine[piece], 1.0)
        ctx.save_for_backward(stream, norm_weight, norm_bias, weight, bias, cosine, sine)
        ctx.kind, ctx.turned = kind, turned
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        stream, norm_weight, norm_bias, weight, bias, cosine, sine = ctx.saved_tensors
        kind: _NormKind = ctx.kind
        if torch.is_grad_enabled():
            return _differentiable(_plain_project, ctx, gradients[0], 7)
        to_stream = torch.empty_like(stream)
        to_norm, to_norm_bias = torch.zeros_like(norm_weight), _zeros(norm_bias)
        linear = _Sum(weight, bias, ctx.needs_input_grad[3:5])
        for piece in _pieces(len(stream), len(weight)):
            gradient = gradients[0][piece]
            if cosine is not None:
                gradient = gradient.clone(memory_format=torch.contiguous_format)
                _turn(gradient, ctx.turned, cosine[piece], sine[piece], -1.0)
            linear.add(gradient, kind.forward(stream[piece], norm_weight, norm_bias))
            to_x = gradient @ weight
            to_stream[piece] = kind.backward(to_x, stream[piece], norm_weight, norm_bias, to_norm, to_norm_bias)
        return to_stream, to_norm, to_norm_bias, linear.weight, linear.bias, None, None, None, None


def _zeros(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else torch.zeros_like(tensor)


def _plain_project(ctx: Any, inputs: tuple[Tensor | None, ...]) -> Tensor:
    stream, norm_weight, norm_bias, weight, bias, cosine, sine = inputs
    x = _plain_norm(ctx.kind, stream, norm_weight, norm_bias)
    out = torch.nn.functional.linear(x, cast(Tensor, weight), bias)
    if cosine is None or sine is None:
        return out
    half = cosine.shape[-1]
    heads = out.view(len(out), -1, 2, half)
    first, second = heads[:, : ctx.turned, 0], heads[:, : ctx.turned, 1]
    cosine, sine = cosine.unsqueeze(1), sine.unsqueeze(1)
    turned = torch.stack((first * cosine - second * sine, second * cosine + first * sine), dim=2)
    return torch.cat((turned, heads[:, ctx.turned :]), dim=1).reshape(out.shape)


def _plain_norm(kind: _NormKind, x: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    name = "rms" if kind.rms else "layer"
    norm = Norm(kind=name, weight=cast(Tensor, weight), bias=bias, epsilon=kind.epsilon, offset=kind.offset)
    return norm(cast(Tensor, x))


def _differentiable(
    plain: Callable[[Any, tuple[Tensor | None, ...]], Tensor], ctx: Any, gradient: Tensor, inputs: int
) -> tuple[Tensor | None, ...]:
    """A backward pass by plain operations, itself differentiable."""
    saved: tuple[Tensor | None, ...] = ctx.saved_tensors[:inputs]
    wanted = [bool(needed) and x is not None for needed, x in zip(ctx.needs_input_grad, saved, strict=False)]
    leaves = [x for x, needed in zip(saved, wanted, strict=True) if needed]
    output = plain(ctx, saved)
    found = iter(torch.autograd.grad(output, cast("list[Tensor]", leaves), gradient, create_graph=True))
    given = [next(found) if needed else None for needed in wanted]
    return (*given, *([None] * (len(ctx.needs_input_grad) - len(given))))


def finish(layer: Layer, stream: Tensor, mixed: Tensor) -> Tensor:
    """The stream [N, D] after the block, from the one before it and attention's output [N, H*S].

    Args:
        layer: for which `can_finish`.
        stream: [N, D].
        mixed: [N, H * S].
    """
    norm, gate = layer.feed_forward_norm, layer.gate
    parameters = (
        *(layer.out.weight, layer.out.bias, norm.weight, norm.bias),
        *((None, None) if gate is None else (gate.weight, gate.bias)),
        *(layer.up.weight, layer.up.bias, layer.down.weight, layer.down.bias),
    )
    settings = _NormKind.of(norm), layer.activation, torch.is_grad_enabled()
    return cast(Tensor, _Finish.apply(stream, mixed, *parameters, settings))


class _Finish(Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        (
            stream,
            mixed,
            out,
            out_bias,
            norm_weight,
            norm_bias,
            gate,
            gate_bias,
            up,
            up_bias,
            down,
            down_bias,
            settings,
        ) = arguments
        kind, activation, keep = settings
        rows, inner = len(stream), len(up)
        result, middle = torch.empty_like(stream), torch.empty_like(stream)
        room = rows if keep else min(rows, _size(inner))
        raised = stream.new_empty(room, inner)
        gated = None if gate is None else stream.new_empty(room, inner)
        for piece in _pieces(rows, inner):
            between = _product(mixed[piece], out, out_bias, middle[piece]).add_(stream[piece])
            x = kind.forward(between, norm_weight, norm_bias)
            place = piece if keep else slice(0, len(x))
            hidden = _product(x, up, up_bias, raised[place])
            if gate is None or gated is None:
                hidden = ACTIVATIONS[activation](hidden)
            else:
                hidden = ACTIVATIONS[activation](_product(x, gate, gate_bias, gated[place])).mul_(hidden)
            _product(hidden, down, down_bias, result[piece]).add_(between)
        if keep:
            ctx.save_for_backward(*arguments[:12], middle, raised, gated)
            ctx.settings, ctx.kind = settings, kind
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return _differentiable(_plain_finish, ctx, gradients[0], 12)
        saved = ctx.saved_tensors
        _, mixed, out, out_bias, norm_weight, norm_bias, gate, gate_bias, up, up_bias, down, down_bias = saved[:12]
        middle, raised, gated = saved[12:]
        kind, activation, _ = ctx.settings
        wanted = ctx.needs_input_grad
        to_stream, to_mixed = torch.empty_like(middle), torch.empty_like(mixed)
        to_norm, to_norm_bias = torch.zeros_like(norm_weight), _zeros(norm_bias)
        outs, gates = _Sum(out, out_bias, wanted[2:4]), _Sum(gate, gate_bias, wanted[6:8])
        ups, downs = _Sum(up, up_bias, wanted[8:10]), _Sum(down, down_bias, wanted[10:12])
        for piece in _pieces(len(middle), len(up)):
            gradient, between = gradients[0][piece], middle[piece]
            part = None if gated is None else gated[piece]
            hidden, to_up, to_gate = _activated_backward(raised[piece], part, gradient @ down, activation)
            downs.add(gradient, hidden)
            x = kind.forward(between, norm_weight, norm_bias)
            ups.add(to_up, x)
            to_x = to_up @ up
            if to_gate is not None:
                gates.add(to_gate, x)
                to_x.addmm_(to_gate, gate)
            through = kind.backward(to_x, between, norm_weight, norm_bias, to_norm, to_norm_bias)
            whole = torch.add(gradient, through, out=to_stream[piece])
            outs.add(whole, mixed[piece])
            torch.mm(whole, out, out=to_mixed[piece])
        sums = (each for linear in (gates, ups, downs) for each in (linear.weight, linear.bias))
        return to_stream, to_mixed, outs.weight, outs.bias, to_norm, to_norm_bias, *sums, None


def _activated_backward(
    raised: Tensor, gated: Tensor | None, gradient: Tensor, activation: ActivationName
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The activated numbers again, and the gradients of `raised` and `gated`; overwrites that of the first."""
    function, backward = ACTIVATIONS[activation], _activation_backward[activation]
    if gated is None:
        return function(raised), backward(gradient, raised), None
    active = function(gated)
    to_up = gradient * active
    return active.mul_(raised), to_up, backward(gradient.mul_(raised), gated)


def _plain_finish(ctx: Any, inputs: tuple[Tensor | None, ...]) -> Tensor:
    stream, mixed, out, out_bias, norm_weight, norm_bias, gate, gate_bias, up, up_bias, down, down_bias = cast(
        "tuple[Tensor, ...]", inputs
    )
    linear = torch.nn.functional.linear
    kind, activation, _ = ctx.settings
    between = stream + linear(mixed, out, out_bias)
    x = _plain_norm(kind, between, norm_weight, norm_bias)
    raised, function = linear(x, up, up_bias), ACTIVATIONS[activation]
    hidden = function(raised) if gate is None else function(linear(x, gate, gate_bias)) * raised  # pyright: ignore[reportUnnecessaryComparison]
    return between + linear(hidden, down, down_bias)
