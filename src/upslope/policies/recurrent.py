"""Memory that runs along an episode: gated recurrent units and long short-term memory, in layers.

A core maps what the encoder makes of an observation, and what it remembers, to features for actor and critic. It has
two faces: the module, which goes through whole rows when learning, and a lean twin, which takes one step of all
environments in a rollout. Memories are named tensors [B, layers, size]; zeros are the empty memory.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import cast, final

import numpy as np
import torch
from torch import Tensor, nn

from upslope.policies.fused_recurrent import gru, lstm
from upslope.policies.packing import Packing

Memory = dict[str, Tensor]
"""Named tensors [B, ...]."""

MemoryArrays = dict[str, np.ndarray]
"""The same in a rollout: [N, ...]."""


class Core(nn.Module, ABC):
    """A memory between encoder and heads.

    Attributes:
        features: how many it puts out.
        shapes: what it remembers: names, and their shapes for one environment. Zeros are the empty memory.
    """

    features: int
    shapes: dict[str, tuple[int, ...]]

    @abstractmethod
    def replay(self, features: Tensor, packing: Packing, memory: Memory | None) -> tuple[Tensor, Memory]:
        """Go through all rows as they were lived.

        Args:
            features: [M, inputs] of the chosen steps, packed.
            packing: of the rows.
            memory: [B, ...] at each row's start; None for the empty one.

        Returns:
            Features [M, features], differentiable, and what `after` needs to look memories up, without gradient.
        """

    @abstractmethod
    def after(self, trace: Memory, packing: Packing, steps: Tensor) -> Memory:
        """The memory [K, ...] that stood after packed steps [K]."""

    @abstractmethod
    def lean(self) -> LeanCore:
        """The twin for rollouts, on views of the parameters."""


class LeanCore(ABC):
    """A core in a rollout: one step of all environments at a time, in NumPy and without gradient."""

    @abstractmethod
    def step(self, features: np.ndarray, memory: MemoryArrays) -> np.ndarray:
        """[N, inputs] -> [N, features]; the memory [N, ...] moves on in place."""


@final
class RecurrentCore(Core):
    """Layers of gated recurrent units or long short-term memory.

    Args:
        kind: "gru" or "lstm".
        inputs: how many features come in.
        size: units of each layer.
        layers: how many.
        orthogonal: orthogonal weights and zero biases (1 for the forget gate, so that a new memory keeps what it has);
            otherwise all uniform in +-1/sqrt(size).
        generator: of the initial weights; None leaves them on the meta device, for saved tensors to be put in.
    """

    def __init__(
        self, kind: str, inputs: int, size: int, layers: int, *, orthogonal: bool, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.kind, self.features, self.layers = kind, size, layers
        self.names = ("hidden",) if kind == "gru" else ("hidden", "cell")
        self.shapes = dict.fromkeys(self.names, (layers, size))
        gates = 3 if kind == "gru" else 4
        device = "meta" if generator is None else "cpu"

        def parameters(*shape: int) -> nn.ParameterList:
            return nn.ParameterList(torch.zeros(shape, device=device) for _ in range(layers))

        self.input_weights = nn.ParameterList(
            torch.zeros(inputs if layer == 0 else size, gates * size, device=device) for layer in range(layers)
        )
        self.input_biases = parameters(gates * size)
        self.hidden_weights = parameters(size, gates * size)
        self.hidden_biases = parameters(size) if kind == "gru" else None
        if generator is not None:
            self._initialise(orthogonal, generator)

    @torch.no_grad()
    def _initialise(self, orthogonal: bool, generator: torch.Generator) -> None:
        size = self.features
        if not orthogonal:
            bound = 1.0 / math.sqrt(size)
            for parameter in self.parameters():
                parameter.uniform_(-bound, bound, generator=generator)
            return
        for weight in (*self.input_weights, *self.hidden_weights):
            for gate in weight.split(size, dim=1):
                nn.init.orthogonal_(gate, generator=generator)
        if self.kind == "lstm":
            for bias in self.input_biases:
                bias[size : 2 * size] = 1.0

    def _layer(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        offset = None if self.hidden_biases is None else self.hidden_biases[layer]
        return self.input_weights[layer], self.input_biases[layer], self.hidden_weights[layer], offset

    def replay(self, features: Tensor, packing: Packing, memory: Memory | None) -> tuple[Tensor, Memory]:
        """Go through all rows as they were lived; see `Core`."""
        shape = (self.layers, self.features)
        starts = [packing.start(None if memory is None else memory[name], shape, features) for name in self.names]
        trace: dict[str, list[Tensor]] = {name: [] for name in self.names}
        for layer in range(self.layers):
            enter, bias, weight, offset = self._layer(layer)
            projected = torch.addmm(bias, features, enter)
            start = [each[:, layer].contiguous() for each in starts]
            if offset is not None:
                features = gru(projected, start[0], weight, offset, packing.counts)
            else:
                features, cells = lstm(projected, start[0], start[1], weight, packing.counts)
                trace["cell"].append(cells)
            trace["hidden"].append(features.detach())
        return features, {name: torch.stack(parts, dim=1) for name, parts in trace.items()}

    def after(self, trace: Memory, packing: Packing, steps: Tensor) -> Memory:
        """The memory [K, layers, size] that stood after packed steps [K]."""
        return {name: part[steps] for name, part in trace.items()}

    def lean(self) -> LeanCore:
        """The twin for rollouts."""
        return _LeanRecurrent(self)


class _LeanRecurrent(LeanCore):
    """Products by torch, which is the faster for few rows of large layers; the rest in NumPy."""

    def __init__(self, core: RecurrentCore) -> None:
        layers = [core._layer(layer) for layer in range(core.layers)]  # pyright: ignore[reportPrivateUsage]
        self._layers = [tuple(None if part is None else part.detach().cpu() for part in parts) for parts in layers]
        self._size, self._kind = core.features, core.kind

    def step(self, features: np.ndarray, memory: MemoryArrays) -> np.ndarray:
        """[N, inputs] -> [N, size]; the memory [N, layers, size] moves on in place."""
        for layer, (enter, bias, weight, offset) in enumerate(self._layers):
            hidden = np.ascontiguousarray(memory["hidden"][:, layer])
            before = torch.from_numpy(hidden)
            entering = torch.addmm(cast("Tensor", bias), torch.from_numpy(features), cast("Tensor", enter))
            if offset is None:
                cell = memory["cell"][:, layer]
                features = self._lstm(entering, before, cast("Tensor", weight), cell)
            else:
                product = torch.mm(before, cast("Tensor", weight)).numpy()
                features = self._gru(entering.numpy(), product, offset.numpy(), hidden)
            memory["hidden"][:, layer] = features
        return features

    def _gru(self, entering: np.ndarray, product: np.ndarray, offset: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        size = self._size
        gates = _sigmoid(entering[:, : 2 * size] + product[:, : 2 * size])
        product[:, 2 * size :] += offset
        candidate = np.tanh(entering[:, 2 * size :] + gates[:, :size] * product[:, 2 * size :])
        return candidate + gates[:, size:] * (hidden - candidate)

    def _lstm(self, entering: Tensor, before: Tensor, weight: Tensor, cell: np.ndarray) -> np.ndarray:
        size = self._size
        total = entering.addmm_(before, weight).numpy()
        gates = _sigmoid(total[:, : 3 * size])
        new = gates[:, size : 2 * size] * cell
        new += gates[:, :size] * np.tanh(total[:, 3 * size :])
        cell[...] = new
        return gates[:, 2 * size :] * np.tanh(new)


def _sigmoid(array: np.ndarray) -> np.ndarray:
    result = np.tanh(0.5 * array)
    result += 1.0
    result *= 0.5
    return result
