"""Whole layers as single autograd nodes with closed-form backward passes, for the CPU.

On small networks the time goes into dispatching many tiny operations, not into arithmetic. Each function here has a
`plain` twin in ordinary torch operations: it defines the meaning, runs on other devices and dtypes, and is what the
closed forms fall back to when a backward pass must itself be differentiated (`create_graph=True`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
    "elu": torch.nn.functional.elu,
}
FUSED_ACTIVATIONS = frozenset({"tanh", "relu"})

IMPOSSIBLE = -1e3
"""A log-probability below which a probability is exactly 0 in float32 and float64 alike."""


def fusable(*tensors: Tensor) -> bool:
    """Whether the closed forms apply: float32 or float64 on the CPU, all of one dtype."""
    dtype = tensors[0].dtype
    return dtype in (torch.float32, torch.float64) and all(t.device.type == "cpu" and t.dtype == dtype for t in tensors)


# --- multilayer perceptron -------------------------------------------------------------------------------------------


def plain_mlp(
    features: Tensor, activation: str, activate_output: bool, constant: Tensor | None, *layers: Tensor
) -> Tensor:
    """`features` [M, F] through affine layers (weight, bias, weight, bias ...) with activations between them.

    `constant` [C] is appended to every row of the result: outputs that do not depend on the input.
    """
    hidden = features
    for position in range(0, len(layers), 2):
        hidden = torch.addmm(layers[position + 1], hidden, layers[position].t())
        if activate_output or position + 2 < len(layers):
            hidden = ACTIVATIONS[activation](hidden)
    if constant is not None:
        hidden = torch.cat([hidden, constant.expand(len(hidden), -1)], dim=-1)
    return hidden


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, activation: str, activate_output: bool, constant: Tensor | None, *layers: Tensor
    ) -> Tensor:
        function = np.tanh if activation == "tanh" else _rectify
        hidden = features
        activations: list[Tensor] = []
        for position in range(0, len(layers), 2):
            hidden = torch.addmm(layers[position + 1], hidden, layers[position].t())
            if activate_output or position + 2 < len(layers):
                array = hidden.numpy()
                function(array, out=array)
                activations.append(hidden)
        if constant is not None:
            hidden = torch.cat([hidden, constant.expand(len(hidden), -1)], dim=-1)
        ctx.activation, ctx.activate_output, ctx.layers = activation, activate_output, len(layers)
        ctx.save_for_backward(features, constant, *layers, *activations)
        return hidden

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        features, constant, *rest = ctx.saved_tensors
        layers, activations = rest[: ctx.layers], [activation.detach() for activation in rest[ctx.layers :]]
        arguments = (ctx.activation, ctx.activate_output)
        if torch.is_grad_enabled():
            inputs = (features, constant, *layers)
            wanted = _wanted(ctx, inputs)
            output = plain_mlp(features, *arguments, constant, *layers)
            found = torch.autograd.grad(
                output, [inputs[i] for i in wanted], gradients[0], create_graph=True, allow_unused=True
            )
            results: list[Tensor | None] = [None] * len(inputs)
            for i, gradient in zip(wanted, found, strict=True):
                results[i] = gradient
            return results[0], None, None, *results[1:]
        return _mlp_backward(ctx, gradients[0], features, constant, layers, activations)


def _wanted(ctx: Any, inputs: tuple[Tensor | None, ...]) -> list[int]:
    needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:])
    return [i for i, tensor in enumerate(inputs) if tensor is not None and needs[i]]


def _rectify(array: np.ndarray, out: np.ndarray) -> None:
    np.maximum(array, 0.0, out=out)


def _mlp_backward(
    ctx: Any, gradient: Tensor, features: Tensor, constant: Tensor | None, layers: list[Tensor], hidden: list[Tensor]
) -> Any:
    results: list[Tensor | None] = [None] * (4 + len(layers))
    ones = np.ones(len(features), dtype=features.numpy().dtype)
    if constant is not None:
        results[3] = torch.from_numpy(ones @ gradient[:, -len(constant) :].numpy())
        gradient = gradient[:, : -len(constant)]
    for position in range(len(layers) - 2, -1, -2):
        layer = position // 2
        if ctx.activate_output or position + 2 < len(layers):
            gradient = _through_activation(ctx.activation, gradient, hidden[layer])
        below = hidden[layer - 1] if layer else features
        if ctx.needs_input_grad[4 + position]:
            results[4 + position] = torch.mm(gradient.t(), below)
        if ctx.needs_input_grad[5 + position]:
            results[5 + position] = torch.from_numpy(ones @ gradient.numpy())
        if layer or ctx.needs_input_grad[0]:
            gradient = torch.mm(gradient, layers[position])
    if ctx.needs_input_grad[0]:
        results[0] = gradient
    return tuple(results)


def _through_activation(activation: str, gradient: Tensor, output: Tensor) -> Tensor:
    value = output.numpy()
    if activation == "relu":
        return torch.from_numpy(gradient.numpy() * (value > 0.0))
    slope = value * value
    np.subtract(1.0, slope, out=slope)
    np.multiply(slope, gradient.numpy(), out=slope)
    return torch.from_numpy(slope)


def mlp(features: Tensor, activation: str, activate_output: bool, constant: Tensor | None, *layers: Tensor) -> Tensor:
    """`plain_mlp`, as one node where the closed form applies."""
    if activation in FUSED_ACTIVATIONS and fusable(features, *layers):
        return _MLP.apply(features, activation, activate_output, constant, *layers)  # pyright: ignore[reportReturnType]
    return plain_mlp(features, activation, activate_output, constant, *layers)


# --- categorical -----------------------------------------------------------------------------------------------------


def plain_categorical(logits: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """log pi(a) = logit_a - logsumexp(logits) and H = -sum_a pi(a) log pi(a), both [M], for `logits` [M, n].

    A logit of -inf is an action of probability 0: it contributes nothing to the entropy.
    """
    log_prob = torch.log_softmax(logits, dim=-1)
    entropy = -(log_prob.exp() * log_prob.clamp(min=IMPOSSIBLE)).sum(-1)
    return log_prob.gather(-1, action.unsqueeze(-1)).squeeze(-1), entropy


class _Categorical(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        # Actions first: reductions over few actions are then additions of long rows.
        rows = np.array(logits.numpy().T, order="C")
        with np.errstate(over="ignore", invalid="ignore"):
            rows -= np.maximum.reduce(rows, axis=0)
            probability = np.exp(rows)
            total = np.add.reduce(probability, axis=0)
            probability /= total
            rows -= np.log(total)
        chosen = np.arange(len(logits)) + action.numpy() * len(logits)
        log_prob = rows.ravel()[chosen]
        np.maximum(rows, IMPOSSIBLE, out=rows)
        entropy = -np.add.reduce(probability * rows, axis=0)
        rows += entropy
        ctx.save_for_backward(logits, action)
        ctx.probability, ctx.surprise, ctx.chosen = probability, rows, chosen
        return torch.from_numpy(log_prob), torch.from_numpy(entropy)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        logits, action = ctx.saved_tensors
        if torch.is_grad_enabled():
            outputs = plain_categorical(logits, action)
            (result,) = torch.autograd.grad(outputs, logits, gradients, create_graph=True)
            return result, None
        log_prob_gradient, entropy_gradient = gradients[0].numpy(), gradients[1].numpy()
        result = ctx.surprise * entropy_gradient
        result += log_prob_gradient
        result *= ctx.probability
        np.negative(result, out=result)
        result.ravel()[ctx.chosen] += log_prob_gradient
        return torch.from_numpy(result.T), None


def categorical(logits: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """`plain_categorical`, as one node where the closed form applies."""
    if fusable(logits) and logits.ndim == 2:
        return _Categorical.apply(logits, action)  # pyright: ignore[reportReturnType]
    return plain_categorical(logits, action)


# --- Gaussian --------------------------------------------------------------------------------------------------------

_HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)


def plain_gaussian(parameters: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """Log-density and entropy, both [M], of a diagonal Gaussian with `parameters` [M, 2A]: mean, then log_std.

    log pi(a) = -sum_i [ (a_i - mean_i)^2 / (2 std_i^2) + log std_i + log(2 pi)/2 ];
    H = sum_i [ log std_i + (1 + log(2 pi))/2 ].
    """
    mean, log_std = parameters.chunk(2, dim=-1)
    deviation = (action - mean) * torch.exp(-log_std)
    log_prob = -(0.5 * deviation * deviation + log_std + _HALF_LOG_TWO_PI).sum(-1)
    return log_prob, (log_std + (0.5 + _HALF_LOG_TWO_PI)).sum(-1)


class _Gaussian(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameters: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        array = parameters.numpy()
        size = array.shape[-1] // 2
        log_std = array[:, size:]
        with np.errstate(over="ignore", invalid="ignore"):
            inverse_std = np.exp(-log_std)
            deviation = (action.numpy() - array[:, :size]) * inverse_std
            square = deviation * deviation
        ones = np.ones(size, dtype=array.dtype)
        log_scale = log_std @ ones
        log_prob = square @ ones
        log_prob *= -0.5
        log_prob -= log_scale
        log_prob -= size * _HALF_LOG_TWO_PI
        entropy = log_scale + size * (0.5 + _HALF_LOG_TWO_PI)
        ctx.save_for_backward(parameters, action)
        ctx.inverse_std, ctx.deviation, ctx.square = inverse_std, deviation, square
        return torch.from_numpy(log_prob), torch.from_numpy(entropy)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        parameters, action = ctx.saved_tensors
        if torch.is_grad_enabled():
            outputs = plain_gaussian(parameters, action)
            (result,) = torch.autograd.grad(outputs, parameters, gradients, create_graph=True)
            return result, None
        size = ctx.deviation.shape[-1]
        log_prob_gradient, entropy_gradient = gradients[0].numpy()[:, None], gradients[1].numpy()[:, None]
        result = np.empty((len(ctx.deviation), 2 * size), dtype=ctx.deviation.dtype)
        mean, log_std = result[:, :size], result[:, size:]
        np.multiply(ctx.deviation, ctx.inverse_std, out=mean)
        mean *= log_prob_gradient
        np.subtract(ctx.square, 1.0, out=log_std)
        log_std *= log_prob_gradient
        log_std += entropy_gradient
        return torch.from_numpy(result), None


def gaussian(parameters: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """`plain_gaussian`, as one node where the closed form applies."""
    if fusable(parameters, action) and parameters.ndim == 2 and not action.requires_grad:
        return _Gaussian.apply(parameters, action)  # pyright: ignore[reportReturnType]
    return plain_gaussian(parameters, action)
