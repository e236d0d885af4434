"""Whole layers as single autograd nodes with closed-form backward passes, for the CPU.

On small networks the time goes into dispatching many tiny operations, not into arithmetic. Each function here has a
`plain` twin in ordinary torch operations: it defines the meaning, runs on other devices and dtypes, and is what the
closed forms fall back to when a backward pass must itself be differentiated (`create_graph=True`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

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


def fusable(*tensors: Tensor) -> bool:
    """Whether the closed forms apply: float32 or float64 on the CPU, all of one dtype."""
    dtype = tensors[0].dtype
    return dtype in (torch.float32, torch.float64) and all(t.device.type == "cpu" and t.dtype == dtype for t in tensors)


class _Loan:
    """Who holds a lent array: NumPy keeps this alive as long as any view or tensor of the memory, and it gives back."""

    __slots__ = ("__array_struct__", "_memory", "_shelf")

    def __init__(self, memory: np.ndarray, shelf: list[np.ndarray]) -> None:
        self._memory, self._shelf = memory, shelf
        self.__array_struct__: Any = memory.__array_struct__

    def __del__(self) -> None:
        self._shelf.append(self._memory)


class _Arrays(threading.local):
    """Memory for large intermediate arrays, used again once nobody holds it any longer.

    The C library gives large freed blocks back to the operating system, and getting them again costs more than the
    arithmetic done in them. What lies on a shelf is free; what is lent lies on none.
    """

    SMALLEST, LARGEST, KEPT = 1 << 14, 1 << 23, 1 << 28

    def __init__(self) -> None:
        self._shelves: dict[tuple[int, int, np.dtype[Any]], list[np.ndarray]] = {}
        self._bytes = 0

    def empty(self, rows: int, columns: int, dtype: np.dtype[Any]) -> np.ndarray:
        """An uninitialised array of a size between the smallest and the largest."""
        shelf = self._shelves.setdefault((rows, columns, dtype), [])
        if shelf:
            memory = shelf.pop()
        else:
            memory = np.empty((rows, columns), dtype=dtype)
            if self._bytes + memory.nbytes > self.KEPT:
                # Loans come back to shelves that nobody looks at any more, and are freed with them.
                self._shelves.clear()
                self._bytes = 0
                return memory
            self._bytes += memory.nbytes
        return np.asarray(cast("Any", _Loan(memory, shelf)))


_ARRAYS = _Arrays()


def _empty(rows: int, columns: int, dtype: np.dtype[Any]) -> np.ndarray:
    """An uninitialised array, lent if it is large."""
    if _Arrays.SMALLEST <= rows * columns <= _Arrays.LARGEST:
        return _ARRAYS.empty(rows, columns, dtype)
    return np.empty((rows, columns), dtype=dtype)


class RowGradients(threading.local):
    """While recording, every perceptron's backward pass says what each of its rows brings to the gradient.

    Of a weight [O, F] the row m brings the outer product of two vectors, of a bias or a constant output [O] one vector.

    Attributes:
        of: by `data_ptr()` of the tensor, [M, O] and [M, F], or [M, O] and None; no row of a tensor that was used more
            than once; None while nothing is recorded.
    """

    of: dict[int, tuple[np.ndarray, np.ndarray | None]] | None = None

    @contextmanager
    def recording(self) -> Iterator[dict[int, tuple[np.ndarray, np.ndarray | None]]]:
        """Record the backward passes of this thread in what is given."""
        self.of = {}
        try:
            yield self.of
        finally:
            self.of = None

    def add(self, tensor: np.ndarray, gradient: np.ndarray, features: np.ndarray | None) -> None:
        """What the rows of one perceptron bring to one tensor."""
        if self.of is not None:
            place = tensor.__array_interface__["data"][0]
            # Of a perceptron that a row goes through several times no single pass has the whole.
            self.of[place] = (gradient[:0], None) if place in self.of else (gradient.copy(), features)


ROW_GRADIENTS = RowGradients()
"""Of the backward passes in this module."""


# --- multilayer perceptrons ------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """What a multilayer perceptron is, besides its tensors.

    Attributes:
        activation: between the layers.
        torso: whether the last layer, too, is followed by an activation.
        tensors: how many it has: weight, bias, weight, bias ..., and where `constant`, a vector [C].
        constant: whether that vector is appended to every row of the result: outputs that do not depend on the input.
    """

    activation: str
    torso: bool
    tensors: int
    constant: bool

    def split(self, tensors: Sequence[Any]) -> tuple[Sequence[Any], Any]:
        """Weights and biases; the constant outputs or None."""
        return (tensors[:-1], tensors[-1]) if self.constant else (tensors, None)


def plain_mlp(features: Tensor, layout: Layout, tensors: Sequence[Tensor]) -> Tensor:
    """`features` [M, F] through the affine layers and activations of one perceptron, [M, outputs]."""
    layers, constant = layout.split(tensors)
    hidden = features
    for position in range(0, len(layers), 2):
        hidden = torch.addmm(layers[position + 1], hidden, layers[position].t())
        if layout.torso or position + 2 < len(layers):
            hidden = ACTIVATIONS[layout.activation](hidden)
    return hidden if constant is None else torch.cat([hidden, constant.expand(len(hidden), -1)], dim=-1)


def plain_mlps(features: Tensor, layouts: Sequence[Layout], *tensors: Tensor) -> tuple[Tensor, ...]:
    """`plain_mlp` for several perceptrons on the same features."""
    outputs: list[Tensor] = []
    start = 0
    for layout in layouts:
        outputs.append(plain_mlp(features, layout, tensors[start : start + layout.tensors]))
        start += layout.tensors
    return tuple(outputs)


def mlps(features: Tensor, layouts: Sequence[Layout], *tensors: Tensor) -> tuple[Tensor, ...]:
    """`plain_mlps`, as one node where the closed form applies."""
    if fusable(features, tensors[0]) and all(layout.activation in FUSED_ACTIVATIONS for layout in layouts):
        if not torch.is_grad_enabled():
            return _mlps_forward(features.numpy(), layouts, [tensor.numpy() for tensor in tensors])[0]
        return _MLPs.apply(features, layouts, *tensors)  # pyright: ignore[reportReturnType]
    return plain_mlps(features, layouts, *tensors)


def _mlps_forward(
    features: np.ndarray, layouts: Sequence[Layout], arrays: Sequence[np.ndarray]
) -> tuple[tuple[Tensor, ...], list[list[np.ndarray]]]:
    """The outputs, and what came out of each activation of each perceptron."""
    outputs: list[Tensor] = []
    activations: list[list[np.ndarray]] = []
    start = 0
    for layout in layouts:
        output, hidden = _mlp_forward(features, layout, arrays[start : start + layout.tensors])
        outputs.append(torch.from_numpy(output))
        activations.append(hidden)
        start += layout.tensors
    return tuple(outputs), activations


class _MLPs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, layouts: Sequence[Layout], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.arrays = [tensor.numpy() for tensor in tensors]
        outputs, ctx.activations = _mlps_forward(features.numpy(), layouts, ctx.arrays)
        ctx.layouts = layouts
        ctx.save_for_backward(features, *tensors)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        inputs, needed = ctx.saved_tensors, ctx.needs_input_grad
        if torch.is_grad_enabled():
            wanted = [i for i, need in enumerate((needed[0], *needed[2:])) if need]
            outputs = plain_mlps(inputs[0], ctx.layouts, *inputs[1:])
            found = torch.autograd.grad(outputs, [inputs[i] for i in wanted], gradients, create_graph=True)
            results: list[Tensor | None] = [None] * len(inputs)
            for i, gradient in zip(wanted, found, strict=True):
                results[i] = gradient
            return results[0], None, *results[1:]
        # The arrays are where the tensors are, and reading what was saved refuses tensors that changed since then.
        source, arrays = inputs[0].detach().numpy(), ctx.arrays
        through: Tensor | None = None
        found, start = list[Tensor](), 0
        for layout, gradient, hidden in zip(ctx.layouts, gradients, ctx.activations, strict=True):
            tensors = arrays[start : start + layout.tensors]
            below = _mlp_backward(gradient.numpy(), source, layout, tensors, hidden, found, needed[0])
            if below is not None:
                through = below if through is None else through + below
            start += layout.tensors
        return through, None, *found


def _mlp_forward(
    features: np.ndarray, layout: Layout, tensors: Sequence[np.ndarray]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The output, and what came out of each activation."""
    layers, constant = layout.split(tensors)
    hidden: list[np.ndarray] = []
    output, last = features, len(layers) - 2
    for position in range(0, len(layers), 2):
        weight = layers[position]
        output = np.dot(output, weight.T, out=_empty(len(output), len(weight), output.dtype))
        output += layers[position + 1]
        if layout.torso or position < last:
            activate(layout.activation, output)
            hidden.append(output)
    return (output if constant is None else append_constant(output, constant)), hidden


def _mlp_backward(
    gradient: np.ndarray,
    features: np.ndarray,
    layout: Layout,
    tensors: Sequence[np.ndarray],
    hidden: list[np.ndarray],
    found: list[Tensor],
    through: bool,
) -> Tensor | None:
    """Append the gradients of the tensors to `found`; return that of the features if it is wanted (`through`)."""
    layers, constant = layout.split(tensors)
    # Sums over rows are products with ones: several times faster than a reduction.
    ones = np.ones(len(features), dtype=features.dtype)
    backwards: list[np.ndarray] = []
    recording = ROW_GRADIENTS.of is not None
    if constant is not None:
        width = gradient.shape[1] - len(constant)
        backwards.append(np.dot(ones, gradient[:, width:]))
        ROW_GRADIENTS.add(constant, gradient[:, width:], None)
        gradient = gradient[:, :width]
    for layer in range(len(layers) // 2 - 1, -1, -1):
        if layer < len(hidden):
            gradient = _through_activation(layout.activation, gradient, hidden[layer])
        below = hidden[layer - 1] if layer else features
        backwards.append(np.dot(ones, gradient))
        backwards.append(np.dot(gradient.T, below))
        if recording:
            ROW_GRADIENTS.add(layers[2 * layer + 1], gradient, None)
            ROW_GRADIENTS.add(layers[2 * layer], gradient, below)
        if layer or through:
            weight = layers[2 * layer]
            out = _empty(len(gradient), weight.shape[1], weight.dtype)
            gradient = np.dot(gradient, weight, out=out)
    found.extend(map(torch.from_numpy, reversed(backwards)))
    return torch.from_numpy(gradient) if through else None


def activate(activation: str, array: np.ndarray) -> None:
    """Apply an activation in place."""
    if activation == "tanh":
        np.tanh(array, out=array)
    elif activation == "relu":
        np.maximum(array, 0.0, out=array)
    else:
        array[...] = ACTIVATIONS[activation](torch.from_numpy(array)).numpy()


def append_constant(output: np.ndarray, constant: np.ndarray) -> np.ndarray:
    """[M, O] and [C] -> [M, O + C]."""
    count, width = output.shape
    result = np.empty((count, width + len(constant)), dtype=output.dtype)
    result[:, :width] = output
    result[:, width:] = constant
    return result


def _through_activation(activation: str, gradient: np.ndarray, output: np.ndarray) -> np.ndarray:
    if activation == "relu":
        return gradient * (output > 0.0)
    slope = np.multiply(output, output, out=_empty(len(output), output.shape[1], output.dtype))
    np.subtract(1.0, slope, out=slope)
    slope *= gradient
    return slope
