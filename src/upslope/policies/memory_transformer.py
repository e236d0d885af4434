"""Memory that looks back: a causal transformer over the last steps of the episode.

Layer by layer, with x the step's features and the keys and values of the last `context` steps of the same episode:

    x = x + W_o [ sum_j softmax_j( q . k_j / sqrt(d) + b_{t - j} ) v_j ]_heads        q, k, v = W_qkv norm(x)
    x = x + W_2 relu(W_1 norm(x))

b is learned for each head and distance t - j = 0 .. context, beginning as a slope (Press et al. 2022): how long ago a
step was is known, how late in the episode it is is not. The memory is every layer's keys and values, so that acting
costs one step, and a row is replayed with the keys and values it began with in front of its own.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast, final

import numpy as np
import torch
from torch import Tensor, nn

from upslope.policies.networks import linear
from upslope.policies.packing import Packing
from upslope.policies.recurrent import Core, LeanCore, Memory, MemoryArrays

_EPSILON = 1e-5
_HIDDEN = 2
"""Units of a layer's perceptron per feature."""


@final
class TransformerCore(Core):
    """Attention to the last `context` steps of the episode, besides the present one, in each layer.

    Args:
        inputs: how many features come in.
        size: features of each layer.
        layers: how many.
        context: how many earlier steps a layer sees.
        heads: of the attention; they share `size`.
        gain: of orthogonal weights, or None for PyTorch's defaults.
        generator: of the initial weights; None leaves them on the meta device, for saved tensors to be put in.
    """

    def __init__(
        self,
        inputs: int,
        size: int,
        layers: int,
        context: int,
        heads: int,
        *,
        gain: float | None,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self.features, self.context, self.heads = size, context, heads
        self.shapes = {"keys": (layers, context, size), "values": (layers, context, size), "length": (1,)}
        self.enter = linear(inputs, size, gain, generator)
        self.blocks = nn.ModuleList(_Block(size, context, heads, gain, generator) for _ in range(layers))
        self.norm = _Norm(size, generator)

    def _blocks(self) -> list[_Block]:
        return cast("list[_Block]", list(self.blocks))

    def replay(self, features: Tensor, packing: Packing, memory: Memory | None) -> tuple[Tensor, Memory]:
        """Go through all rows as they were lived; see `Core`."""
        starts = {
            name: packing.start(None if memory is None else memory[name], shape, features)
            for name, shape in self.shapes.items()
        }
        length = starts["length"][:, 0]
        grid = _Grid.of(packing, length, self.context)
        x = self.enter(features)
        keys, values = list[Tensor](), list[Tensor]()
        for layer, block in enumerate(self._blocks()):
            seen = starts["keys"][:, layer], starts["values"][:, layer]
            x, key, value = block(x, grid, seen)
            keys.append(key.detach())
            values.append(value.detach())
        trace = {"keys": torch.stack(keys, 1), "values": torch.stack(values, 1), "length": length}
        return self.norm(x), trace

    def after(self, trace: Memory, packing: Packing, steps: Tensor) -> Memory:
        """The last `context` keys and values [K, layers, context, size] up to packed steps [K], and how many count."""
        segment, within = packing.segment[steps], packing.within[steps]
        window = within.unsqueeze(-1) + 1 + torch.arange(self.context, device=within.device)
        found = {
            name: trace[name].transpose(1, 2)[segment.unsqueeze(-1), window].transpose(1, 2)
            for name in ("keys", "values")
        }
        length = trace["length"][segment] + within + 1
        return {**found, "length": length.clamp(max=self.context).unsqueeze(-1)}

    def lean(self) -> LeanCore:
        """The twin for rollouts."""
        return _LeanTransformer(self)


class _Grid(NamedTuple):
    """Segments side by side, padded to the longest: L steps each.

    Attributes:
        place: [M] where each packed step stands, `segment * L + within`.
        segments, longest: S and L.
        distance: [L, context + L] how many steps before a step each key is, within 0 .. context.
        seen: [S, 1, L, context + L] whether a step attends to that key.
    """

    place: Tensor
    segments: int
    longest: int
    distance: Tensor
    seen: Tensor

    @classmethod
    def of(cls, packing: Packing, length: Tensor, context: int) -> _Grid:
        """For packed segments that begin with `length` [S] keys each, the last of the `context` before them."""
        segments, longest = len(packing.row), len(packing.counts)
        step = torch.arange(longest, device=length.device).unsqueeze(-1)
        key = torch.arange(context + longest, device=length.device)
        distance = step + context - key
        near = (distance >= 0) & (distance <= context)
        held = key >= context - length.unsqueeze(-1)
        return cls(
            place=packing.segment * longest + packing.within,
            segments=segments,
            longest=longest,
            distance=distance.clamp(0, context),
            seen=(near & held.unsqueeze(1)).unsqueeze(1),
        )

    def spread(self, steps: Tensor) -> Tensor:
        """[M, D] -> [S, L, D]."""
        empty = steps.new_zeros(self.segments * self.longest, steps.shape[1])
        return empty.index_copy(0, self.place, steps).view(self.segments, self.longest, steps.shape[1])


class _Block(nn.Module):
    """One layer: attention, then a perceptron."""

    def __init__(
        self, size: int, context: int, heads: int, gain: float | None, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = _Norm(size, generator), _Norm(size, generator)
        self.ask = linear(size, 3 * size, None if gain is None else 1.0, generator)
        self.answer = linear(size, size, None if gain is None else 1.0, generator)
        self.widen = linear(size, _HIDDEN * size, gain, generator)
        self.narrow = linear(_HIDDEN * size, size, None if gain is None else 1.0, generator)
        if generator is None:
            self.bias = nn.Parameter(torch.empty(heads, context + 1, device="meta"))
        else:
            slope = 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)
            self.bias = nn.Parameter(-slope.unsqueeze(-1) * torch.arange(context + 1))

    def forward(self, x: Tensor, grid: _Grid, seen: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Features [M, D] after the layer, and all keys and values, each [S, context + L, D]."""
        size = x.shape[-1]
        query, key, value = (grid.spread(part) for part in self.ask(self.first(x)).split(size, -1))
        key, value = torch.cat([seen[0], key], 1), torch.cat([seen[1], value], 1)
        scores = self._by_head(query) @ self._by_head(key).transpose(-1, -2) / math.sqrt(size // self.heads)
        scores = (scores + self.bias[:, grid.distance]).masked_fill(~grid.seen, -torch.inf)
        attended = (scores.softmax(-1) @ self._by_head(value)).transpose(1, 2).reshape(-1, size)
        x = x + self.answer(attended.index_select(0, grid.place))
        return x + self.narrow(torch.relu(self.widen(self.second(x)))), key, value

    def _by_head(self, x: Tensor) -> Tensor:
        """[S, T, D] -> [S, heads, T, D / heads]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class _Norm(nn.Module):
    """x / standard deviation around the mean, times a scale, plus a shift, over the features."""

    def __init__(self, size: int, generator: torch.Generator | None) -> None:
        super().__init__()
        device = "meta" if generator is None else "cpu"
        self.scale, self.shift = (
            nn.Parameter(torch.ones(size, device=device)),
            nn.Parameter(torch.zeros(size, device=device)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[M, D] -> [M, D]."""
        return nn.functional.layer_norm(x, x.shape[-1:], self.scale, self.shift, _EPSILON)


class _LeanTransformer(LeanCore):
    """One step of each environment: its query against the keys it remembers and its own."""

    def __init__(self, core: TransformerCore) -> None:
        self._enter, self._norm = _affine(core.enter), _LeanNorm(core.norm)
        self._blocks = [_LeanBlock(block) for block in core._blocks()]  # pyright: ignore[reportPrivateUsage]
        self._context = core.context

    def step(self, features: np.ndarray, memory: MemoryArrays) -> np.ndarray:
        """[N, inputs] -> [N, size]; keys and values [N, layers, context, size] move up by one in place."""
        x = features @ self._enter[0] + self._enter[1]
        unseen = np.arange(self._context + 1) < self._context - memory["length"]
        for layer, block in enumerate(self._blocks):
            x = block(x, memory["keys"][:, layer], memory["values"][:, layer], unseen)
        np.minimum(memory["length"] + 1.0, self._context, out=memory["length"])
        return self._norm(x)


class _LeanBlock:
    def __init__(self, block: _Block) -> None:
        self._first, self._second = _LeanNorm(block.first), _LeanNorm(block.second)
        self._layers = [_affine(layer) for layer in (block.ask, block.answer, block.widen, block.narrow)]
        self._bias, self._heads = block.bias.detach().cpu().numpy(), block.heads

    def __call__(self, x: np.ndarray, keys: np.ndarray, values: np.ndarray, unseen: np.ndarray) -> np.ndarray:
        """[N, D] -> [N, D]; keys and values [N, context, D] take in the present step's, in place."""
        ask, answer, widen, narrow = self._layers
        count, size = x.shape
        heads = (count, -1, self._heads, size // self._heads)
        query, key, value = np.split(self._first(x) @ ask[0] + ask[1], 3, axis=1)
        all_keys = np.concatenate([keys, key[:, None]], axis=1)
        all_values = np.concatenate([values, value[:, None]], axis=1)
        scores = np.einsum("nhd,njhd->nhj", query.reshape(heads)[:, 0], all_keys.reshape(heads))
        scores *= 1.0 / math.sqrt(size // self._heads)
        scores += self._bias[:, ::-1]
        scores[np.broadcast_to(unseen[:, None], scores.shape)] = -np.inf
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        attended = np.einsum("nhj,njhd->nhd", scores, all_values.reshape(heads)).reshape(count, size)
        keys[...], values[...] = all_keys[:, 1:], all_values[:, 1:]
        x = x + (attended @ answer[0] + answer[1])
        hidden = np.maximum(self._second(x) @ widen[0] + widen[1], 0.0)
        return x + (hidden @ narrow[0] + narrow[1])


class _LeanNorm:
    def __init__(self, norm: _Norm) -> None:
        self._scale, self._shift = norm.scale.detach().cpu().numpy(), norm.shift.detach().cpu().numpy()

    def __call__(self, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = np.mean(centred * centred, axis=-1, keepdims=True)
        return centred / np.sqrt(variance + _EPSILON) * self._scale + self._shift


def _affine(layer: nn.Linear) -> tuple[np.ndarray, np.ndarray]:
    return layer.weight.detach().cpu().numpy().T, layer.bias.detach().cpu().numpy()
