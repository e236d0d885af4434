"""Log-probability and entropy of a distribution as one autograd node with a closed-form backward pass, for the CPU.

As in `upslope.policies.fused`, `plain_*` are the twins in ordinary torch operations: they define the meaning, and are
what a closed form falls back to when a backward pass must itself be differentiated.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upslope.policies.fused import fusable

IMPOSSIBLE = -1e3
"""A log-probability below which a probability is exactly 0 in float32 and float64 alike."""


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
        chosen = action.numpy() * len(logits)
        chosen += np.arange(len(logits))
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
