"""Reading prompts and drawing on, token by token, with keys and values kept: the forward pass of generation.

All sequences share one clock. A sequence that begins at time b has its position p at time b + p, so that a step writes
the keys and values of every sequence into the same column of the cache, whatever their lengths, and the columns before
a sequence's beginning are hidden from it. Columns before the earliest beginning are not read at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, final

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from upslope.policies.language.prepared import PreparedLayer, PreparedModel

_WORTH_SPLITTING = 16
"""From so many sequences on, the two halves of the slots are attended to from their own earliest beginning."""


@final
class Prompts:
    """Prompts of one length that have been read.

    Attributes:
        length: n, in tokens.
        memory: [layers, 2, P, key_value_heads, n, S] keys and values.
        logits: [P, V] of the token that follows each.
    """

    def __init__(self, memory: Tensor, logits: Tensor) -> None:
        self.memory = memory
        self.logits = logits
        self.length = memory.shape[4]


@final
class Cache:
    """Keys and values of the sequences in every slot, by the common clock.

    Args:
        model: whose they are.
        slots: how many sequences.
        clock: the time of the first step: the longest prompt's length.
        capacity: times for which there is room at first.

    Attributes:
        clock: the time that the next step writes to.
        first: the earliest beginning.
        begin: [live] the beginnings of the sequences in use.
        masked: whether beginnings differ.
        ranges: rows of `keys` and `values` (from, to) and the earliest beginning among them.
        keys, values: one [live * key_value_heads, capacity, S] per layer.
    """

    def __init__(self, model: PreparedModel, slots: int, clock: int, capacity: int) -> None:
        self._model = model
        self._device = model.embedding.device
        self.slots = slots
        self.clock = clock
        self.longest_prompt = clock
        self.beginning = [clock] * slots
        self.first = clock
        self.masked = False
        self._allocate(capacity)

    @property
    def capacity(self) -> int:
        """Times for which there is room."""
        return self.memory.shape[4]

    def admit(self, prompts: Prompts, index: Sequence[int], slots: Sequence[int]) -> None:
        """Put prompts into slots, so that each ends at the clock.

        Args:
            prompts: that have been read.
            index: which of them, for every slot.
            slots: the slots.
        """
        begin = self.clock - prompts.length
        first, end = slots[0], slots[-1] + 1
        if list(slots) == list(range(first, end)):
            chosen = prompts.memory.index_select(2, torch.tensor(index, device=self._device))
            self.memory[:, :, first:end, :, begin : self.clock] = chosen
        else:
            for slot, place in zip(slots, index, strict=True):
                self.memory[:, :, slot, :, begin : self.clock] = prompts.memory[:, :, place]
        for slot in slots:
            self.beginning[slot] = begin

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Put the sequences of some slots into others."""
        for source, target in zip(sources, targets, strict=True):
            begin = self.beginning[source]
            used = self.memory[..., begin : self.clock, :]
            used[:, :, target] = used[:, :, source]
            self.beginning[target] = begin

    def arranged(self, live: int, vacant: Sequence[int] = ()) -> None:
        """The first `live` slots are computed from now on, as `admit` and `move` left them.

        Args:
            live: how many.
            vacant: those among them that hold nothing; what is computed for them means nothing.
        """
        latest = max(self.beginning[slot] for slot in range(live) if slot not in vacant)
        for slot in vacant:
            self.beginning[slot] = latest
        beginnings = self.beginning[:live]
        self.first = min(beginnings)
        self.masked = max(beginnings) > self.first
        self.begin = torch.tensor(beginnings, device=self._device)
        self._look(live)

    def make_room(self) -> None:
        """See that the clock's column is there: drop what nobody reads, and grow."""
        if self.clock < self.capacity:
            return
        drop = max(0, min(self.first, self.clock - self.longest_prompt))
        old, width = self.memory, self.clock - drop
        self.clock -= drop
        self.first -= drop
        self.beginning = [begin - drop for begin in self.beginning]
        self.begin = self.begin - drop
        self._allocate(max(2 * width, 64))
        self.memory[..., :width, :] = old[..., drop : drop + width, :]
        self._look(len(self.begin))

    def attend(self, number: int, query: Tensor, window: int | None) -> Tensor:
        """What a layer's queries [live, H, S] at the clock become, [live, H*S].

        Args:
            number: of the layer.
            query: scaled and turned; the keys and values of the clock are in their place already.
            window: how many times are seen, the clock's included, or None.
        """
        after, rows = self.clock + 1, len(query)
        query = query.reshape(len(self.keys[number]), -1, query.shape[-1])
        mixed: list[Tensor] = []
        for low, high, first in self.ranges:
            start = first if window is None else max(first, after - window)
            keys, values = (part[number][low:high, start:after] for part in (self.keys, self.values))
            bias = self._bias[low:high, :, start:after] if self.masked else None
            mixed.append(_attend(query[low:high], keys, values, bias))
        return (mixed[0] if len(mixed) == 1 else torch.cat(mixed)).view(rows, -1)

    def _allocate(self, capacity: int) -> None:
        model = self._model
        shape = (len(model.layers), 2, self.slots, model.key_value_heads, capacity, model.head_size)
        self.memory = torch.zeros(shape, dtype=model.compute, device=self._device)

    def _look(self, live: int) -> None:
        heads, half = self._model.key_value_heads, live // 2
        self.ranges = [(0, live * heads, self.first)]
        if self.masked and live >= _WORTH_SPLITTING:
            parts = ((0, half), (half, live))
            self.ranges = [(low * heads, high * heads, min(self.beginning[low:high])) for low, high in parts]
        self.keys, self.values = (list(half[:, :live].flatten(1, 2)) for half in self.memory.unbind(1))
        if self.masked:
            self._mask()

    def _mask(self) -> None:
        hidden = torch.arange(self.capacity, device=self._device) < self.begin.unsqueeze(1)
        bias = torch.zeros(hidden.shape, dtype=self._model.compute, device=self._device)
        bias = bias.masked_fill_(hidden, -torch.inf).repeat_interleave(self._model.key_value_heads, dim=0)
        self._bias = bias.unsqueeze(1)


class _Attention(Protocol):
    """What a block's queries, keys and values become; the only part in which prompts and steps differ."""

    def __call__(self, number: int, layer: PreparedLayer, query_key_value: Tensor) -> Tensor: ...


@final
class Decoder:
    """The cached forward pass.

    Args:
        model: weights as of some version.
        positions: the longest sequence that will be read.
    """

    def __init__(self, model: PreparedModel, positions: int) -> None:
        self.model = model
        self._last = positions - 1
        place = torch.arange(positions, device=model.embedding.device)
        self._turns = [torch.complex(*rotary.cosine_sine(place, model.wide)) for rotary in model.rotary]
        self._queries = model.heads * model.head_size
        self._keys = self._queries + model.key_value_heads * model.head_size

    @torch.inference_mode()
    def read(self, prompts: Sequence[Sequence[int]]) -> list[Prompts]:
        """Read prompts, each once; those of one length come back together, in the order given.

        Args:
            prompts: token ids, sorted by length.
        """
        model = self.model
        lengths = [len(prompt) for prompt in prompts]
        parts = [(length, lengths.count(length)) for length in dict.fromkeys(lengths)]
        device = model.embedding.device
        token = torch.tensor([token for prompt in prompts for token in prompt], device=device)
        position = torch.cat([torch.arange(length, device=device).repeat(count) for length, count in parts])
        memory: list[list[Tensor]] = [[] for _ in parts]
        turns = self._turns_at(position)

        def attend(number: int, layer: PreparedLayer, query_key_value: Tensor) -> Tensor:
            query, key, value = self._heads(layer, query_key_value, turns)
            mixed, begin = torch.empty_like(query), 0
            for (length, count), kept in zip(parts, memory, strict=True):
                rows = slice(begin, begin + length * count)
                begin += length * count
                q, k, v = (part[rows].unflatten(0, (count, length)).transpose(1, 2) for part in (query, key, value))
                kept.append(torch.stack((k, v)))
                mixed[rows] = _causal(q, k, v, layer.window).transpose(1, 2).flatten(0, 1)
            return mixed.flatten(1)

        stream = self._blocks(model.embed(token, position), attend)
        last = torch.tensor(lengths, device=device).cumsum(0) - 1
        logits = model.logits(stream.index_select(0, last)).split([count for _, count in parts])
        return [Prompts(torch.stack(kept), part) for kept, part in zip(memory, logits, strict=True)]

    @torch.inference_mode()
    def step(self, token: Tensor, cache: Cache) -> Tensor:
        """Read one more token of every sequence in use; the clock moves on.

        Args:
            token: [live] the tokens drawn last, of the first slots.
            cache: of their sequences.

        Returns:
            [live, V] logits of the token that follows each.
        """
        model = self.model
        cache.make_room()
        position = (cache.clock - cache.begin).clamp_(max=self._last)
        turns = self._turns_at(position)
        clock = cache.clock

        def attend(number: int, layer: PreparedLayer, query_key_value: Tensor) -> Tensor:
            query, key, value = self._heads(layer, query_key_value, turns)
            keys, values = cache.keys[number], cache.values[number]
            keys.select(1, clock).view(key.shape).copy_(key)
            values.select(1, clock).view(value.shape).copy_(value)
            return cache.attend(number, query, layer.window)

        logits = model.logits(self._blocks(model.embed(token, position), attend))
        cache.clock += 1
        return logits

    def _blocks(self, stream: Tensor, attend: _Attention) -> Tensor:
        for number, layer in enumerate(self.model.layers):
            layer.finish(stream, attend(number, layer, layer.query_key_value(layer.attention_norm(stream))))
        return stream

    def _turns_at(self, position: Tensor) -> list[Tensor]:
        return [turns.index_select(0, position).unsqueeze(1) for turns in self._turns]

    def _heads(
        self, layer: PreparedLayer, query_key_value: Tensor, turns: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [N, H, S], keys and values [N, key_value_heads, S], turned."""
        size = self.model.head_size
        count = len(query_key_value)
        query = query_key_value[:, : self._queries].view(count, -1, size)
        key = query_key_value[:, self._queries : self._keys].view(count, -1, size)
        value = query_key_value[:, self._keys :].view(count, -1, size)
        if layer.query_norm is not None:
            query = layer.query_norm(query.to(self.model.wide))
        if layer.key_norm is not None:
            key = layer.key_norm(key.to(self.model.wide))
        if layer.rotary is not None:
            query, key = (_turn(part.to(self.model.wide), turns[layer.rotary]) for part in (query, key))
        return query.to(self.model.compute), key.to(self.model.compute), value


def _turn(heads: Tensor, turn: Tensor) -> Tensor:
    """Neighbours (2i, 2i + 1) of heads [N, h, S] as complex numbers, times [N, 1, S/2]."""
    count, number, size = heads.shape
    pairs = torch.view_as_complex(heads.view(count, number, size // 2, 2))
    return torch.view_as_real(pairs * turn).view(count, number, size)


def _attend(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """One query per head: [N, G, S] over [N, L, S] to [N, G, S]; bias [N, 1, L]."""
    if query.dtype == torch.bfloat16:
        whole = (part.unsqueeze(0) for part in (query, keys, values))
        return scaled_dot_product_attention(*whole, attn_mask=bias, scale=1.0).squeeze(0)
    scores = torch.bmm(query, keys.mT) if bias is None else torch.baddbmm(bias, query, keys.mT)
    return torch.bmm(scores.softmax(-1), values)


def _causal(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """Whole prompts of one length: [P, H, n, S] over [P, h, n, S] to [P, H, n, S]."""
    length = query.shape[2]
    grouped = query.shape[1] != key.shape[1]
    if window is None or window >= length:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0, enable_gqa=grouped)
    place = torch.arange(length, device=query.device)
    distance = place.unsqueeze(1) - place
    seen = (distance >= 0) & (distance < window)
    return scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=1.0, enable_gqa=grouped)
