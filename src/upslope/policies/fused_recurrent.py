"""Recurrent layers over packed segments, each as a single autograd node with a closed-form backward pass.

What a layer adds to a step from its input was computed for all steps at once (`projected`); only the product with the
state before is left to the loop, forwards and backwards, and the gradient of its weights is one product again. As in
`upslope.policies.fused`, `plain_*` are the twins in ordinary torch operations: they define the meaning and are what a
backward pass falls back to that must itself be differentiated.

The gated recurrent unit, with gates r, z and candidate n (Cho et al. 2014, in the form that PyTorch and cuDNN use):

    r = sigmoid(p_r + h U_r)    z = sigmoid(p_z + h U_z)    n = tanh(p_n + r * (h U_n + b))    h' = (1 - z) n + z h

The long short-term memory, with gates i, f, o and candidate g (Hochreiter & Schmidhuber 1997; Gers et al. 2000):

    i, f, o = sigmoid(p + h U)    g = tanh(p_g + h U_g)    c' = f c + i g    h' = o tanh(c')
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upslope.policies.fused import fusable


def plain_gru(projected: Tensor, start: Tensor, weight: Tensor, bias: Tensor, counts: Sequence[int]) -> Tensor:
    """States [M, H] after each packed step.

    Args:
        projected: [M, 3H] what the inputs add: reset gate, update gate, candidate.
        start: [S, H] the state before each segment's first step.
        weight: [H, 3H] U.
        bias: [H] b, within the candidate's reset gate.
        counts: how many segments have an n-th step, falling.
    """
    size, hidden, found, position = start.shape[1], start, list[Tensor](), 0
    for count in counts:
        step, hidden = projected[position : position + count], hidden[:count]
        reset, update, candidate = (hidden @ weight).split(size, dim=-1)
        reset = torch.sigmoid(step[:, :size] + reset)
        update = torch.sigmoid(step[:, size : 2 * size] + update)
        candidate = torch.tanh(step[:, 2 * size :] + reset * (candidate + bias))
        hidden = candidate + update * (hidden - candidate)
        found.append(hidden)
        position += count
    return torch.cat(found) if found else projected.new_zeros(0, size)


def plain_lstm(
    projected: Tensor, start: Tensor, cell: Tensor, weight: Tensor, counts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """States and cells, both [M, H], after each packed step; the cells without gradient.

    Args:
        projected: [M, 4H] what the inputs add: input, forget and output gates, candidate.
        start, cell: [S, H] state and cell before each segment's first step.
        weight: [H, 4H] U.
        counts: how many segments have an n-th step, falling.
    """
    size, hidden, position = start.shape[1], start, 0
    states, cells = list[Tensor](), list[Tensor]()
    for count in counts:
        total = projected[position : position + count] + hidden[:count] @ weight
        enter, keep, show = torch.sigmoid(total[:, : 3 * size]).split(size, dim=-1)
        cell = keep * cell[:count] + enter * torch.tanh(total[:, 3 * size :])
        hidden = show * torch.tanh(cell)
        states.append(hidden)
        cells.append(cell.detach())
        position += count
    if not states:
        return projected.new_zeros(0, size), projected.new_zeros(0, size)
    return torch.cat(states), torch.cat(cells)


def gru(projected: Tensor, start: Tensor, weight: Tensor, bias: Tensor, counts: Sequence[int]) -> Tensor:
    """`plain_gru`, as one node where the closed form applies; no gradient goes into `start`."""
    if fusable(projected, start, weight):
        return _GRU.apply(projected, start, weight, bias, tuple(counts))  # pyright: ignore[reportReturnType]
    return plain_gru(projected, start, weight, bias, counts)


def lstm(
    projected: Tensor, start: Tensor, cell: Tensor, weight: Tensor, counts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """`plain_lstm`, as one node where the closed form applies; no gradient goes into `start` and `cell`."""
    if fusable(projected, start, weight):
        return _LSTM.apply(projected, start, cell, weight, tuple(counts))  # pyright: ignore[reportReturnType]
    return plain_lstm(projected, start, cell, weight, counts)


def _spans(counts: Sequence[int]) -> list[tuple[int, int]]:
    """Where each packed step's entries begin and end."""
    ends = list(accumulate(counts))
    return [(end - count, end) for count, end in zip(counts, ends, strict=True)]


def _before(start: np.ndarray, after: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """[M, H] what stood before each step: the start, or what stood after the step before."""
    result, last = np.empty_like(after), start
    for begin, end in spans:
        result[begin:end] = last[: end - begin]
        last = after[begin:end]
    return result


def _sigmoid(array: np.ndarray) -> None:
    """In place: sigmoid(x) = (tanh(x / 2) + 1) / 2."""
    array *= 0.5
    np.tanh(array, out=array)
    array += 1.0
    array *= 0.5


class _GRU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor, start: Tensor, weight: Tensor, bias: Tensor, counts: Any) -> Tensor:
        steps, size = len(projected), start.shape[1]
        states, offset = torch.empty_like(projected[:, :size]), bias.numpy()
        gates, inner = projected.numpy().copy(), np.empty((steps, size), dtype=offset.dtype)
        product = projected.new_empty(len(start), 3 * size)
        last, after = start, states.numpy()
        for begin, end in _spans(counts):
            count = end - begin
            torch.mm(last[:count], weight, out=product[:count])
            added, gate = product.numpy()[:count], gates[begin:end]
            gate[:, : 2 * size] += added[:, : 2 * size]
            _sigmoid(gate[:, : 2 * size])
            np.add(added[:, 2 * size :], offset, out=inner[begin:end])
            candidate = gate[:, 2 * size :]
            candidate += gate[:, :size] * inner[begin:end]
            np.tanh(candidate, out=candidate)
            state = after[begin:end]
            np.subtract(last.numpy()[:count], candidate, out=state)
            state *= gate[:, size : 2 * size]
            state += candidate
            last = states[begin:end]
        ctx.save_for_backward(projected, start, weight, bias)
        ctx.counts, ctx.gates, ctx.inner, ctx.states = counts, gates, inner, after
        return states

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        projected, start, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            output = plain_gru(projected, start.detach(), weight, bias, ctx.counts)
            return _again(output, gradients[0], (projected, None, weight, bias), ctx.needs_input_grad)
        size, spans = start.shape[1], _spans(ctx.counts)
        reset, update, candidate = (ctx.gates[:, k * size : (k + 1) * size] for k in range(3))
        before = _before(start.detach().numpy(), ctx.states, spans)
        # What a state's gradient becomes on its way into: product r, product z, product n; and the candidate itself.
        slope = np.empty((len(before), 3, size), dtype=before.dtype)
        into_candidate = (1.0 - update) * (1.0 - candidate * candidate)
        slope[:, 2] = into_candidate * reset
        slope[:, 0] = slope[:, 2] * ctx.inner * (1.0 - reset)
        slope[:, 1] = (before - candidate) * update * (1.0 - update)
        through = torch.empty(len(before), 3 * size, dtype=weight.dtype)
        upper = gradients[0].numpy().copy()
        back, transposed = torch.zeros(start.shape, dtype=weight.dtype), weight.detach().t().contiguous()
        behind, shaped = back.numpy(), through.numpy().reshape(slope.shape)
        for begin, end in reversed(spans):
            count, here = end - begin, upper[begin:end]
            here += behind[:count]
            np.multiply(here[:, None], slope[begin:end], out=shaped[begin:end])
            torch.mm(through[begin:end], transposed, out=back[:count])
            behind[:count] += here * update[begin:end]
        weight_gradient = torch.mm(torch.from_numpy(before).t(), through)
        bias_gradient = through[:, 2 * size :].sum(0)
        entering = through.clone()
        np.multiply(upper, into_candidate, out=entering.numpy()[:, 2 * size :])
        return entering, None, weight_gradient, bias_gradient, None


class _LSTM(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, start: Tensor, cell: Tensor, weight: Tensor, counts: Any
    ) -> tuple[Tensor, Tensor]:
        size = start.shape[1]
        states, cells = torch.empty_like(projected[:, :size]), torch.empty_like(projected[:, :size])
        gates = torch.empty_like(projected)
        squashed = np.empty_like(states.numpy())
        array, after, inside = gates.numpy(), states.numpy(), cells.numpy()
        last, remembered = start, cell.numpy()
        for begin, end in _spans(counts):
            count, gate = end - begin, array[begin:end]
            torch.addmm(projected[begin:end], last[:count], weight, out=gates[begin:end])
            _sigmoid(gate[:, : 3 * size])
            candidate = gate[:, 3 * size :]
            np.tanh(candidate, out=candidate)
            new = inside[begin:end]
            np.multiply(gate[:, size : 2 * size], remembered[:count], out=new)
            new += gate[:, :size] * candidate
            np.tanh(new, out=squashed[begin:end])
            np.multiply(gate[:, 2 * size : 3 * size], squashed[begin:end], out=after[begin:end])
            last, remembered = states[begin:end], new
        ctx.save_for_backward(projected, start, cell, weight)
        ctx.counts, ctx.gates, ctx.squashed, ctx.states, ctx.cells = counts, array, squashed, after, inside
        ctx.mark_non_differentiable(cells)
        return states, cells

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        projected, start, cell, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            output = plain_lstm(projected, start.detach(), cell.detach(), weight, ctx.counts)[0]
            return _again(output, gradients[0], (projected, None, None, weight), ctx.needs_input_grad)
        size, spans, gates, squashed = start.shape[1], _spans(ctx.counts), ctx.gates, ctx.squashed
        enter, keep, show, candidate = (gates[:, k * size : (k + 1) * size] for k in range(4))
        before = _before(start.detach().numpy(), ctx.states, spans)
        # What the gradient of a cell becomes on its way into i, f and g, of a state into o and into the cell.
        slope = np.empty((len(before), 3, size), dtype=before.dtype)
        slope[:, 0] = candidate * enter * (1.0 - enter)
        slope[:, 1] = _before(cell.detach().numpy(), ctx.cells, spans) * keep * (1.0 - keep)
        slope[:, 2] = enter * (1.0 - candidate * candidate)
        into_show = squashed * show * (1.0 - show)
        into_cell = show * (1.0 - squashed * squashed)
        through = torch.empty(len(before), 4 * size, dtype=weight.dtype)
        upper, shaped = gradients[0].numpy(), through.numpy().reshape(len(before), 4, size)
        back, transposed = torch.zeros(start.shape, dtype=weight.dtype), weight.detach().t().contiguous()
        behind, of_cell = back.numpy(), np.zeros(start.shape, dtype=before.dtype)
        for begin, end in reversed(spans):
            count, here = end - begin, shaped[begin:end]
            of_state = upper[begin:end] + behind[:count]
            inner = of_cell[:count]
            inner += of_state * into_cell[begin:end]
            np.multiply(inner[:, None], slope[begin:end, :2], out=here[:, :2])
            np.multiply(of_state, into_show[begin:end], out=here[:, 2])
            np.multiply(inner, slope[begin:end, 2], out=here[:, 3])
            inner *= keep[begin:end]
            torch.mm(through[begin:end], transposed, out=back[:count])
        weight_gradient = torch.mm(torch.from_numpy(before).t(), through)
        return through, None, None, weight_gradient, None


def _again(output: Tensor, gradient: Tensor, inputs: Sequence[Tensor | None], needed: Sequence[bool]) -> Any:
    """The gradients of the plain twin, which can be differentiated once more; None for what is held fixed."""
    wanted = [k for k, tensor in enumerate(inputs) if tensor is not None and needed[k]]
    tensors = [tensor for k, tensor in enumerate(inputs) if tensor is not None and k in wanted]
    results: list[Tensor | None] = [None] * (len(inputs) + 1)
    for k, found in zip(wanted, torch.autograd.grad(output, tensors, gradient, create_graph=True), strict=True):
        results[k] = found
    return tuple(results)
