"""Rows of tokens without their padding, each beginning that several rows share held once.

What stands at a position of a causal model depends on the tokens up to it and on nothing else. So two rows with the
same first k tokens have the same k hidden states, whoever chose those tokens: they are computed once, and their
gradient is the sum over the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

Numbers: TypeAlias = np.ndarray

WORTHWHILE = 0.12
"""The part of all tokens that sharing must save before rows are gathered instead of being views."""
PAIRS_PER_RUN = 8000
"""Pairs of positions that attention computes in the time one more call of it takes (measured: 128 wide, one core)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Rows that lie one behind another, equally long, each with equally many tokens of its own.

    Attributes:
        start: the packed number of the first row's first own token.
        rows: how many rows.
        own: tokens of its own in each row, its last ones.
        length: tokens of each row, those included that it shares with an earlier one.
        index: [rows, length] packed numbers of all tokens of each row; None where every token is its own.
    """

    start: int
    rows: int
    own: int
    length: int
    index: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """Whole rows of similar length, padded to the longest of them, where that is cheaper than runs.

    Attributes:
        index: [rows, length] packed numbers; 0 behind a row's end, which no position of the row sees.
        place: [n] where packed tokens that no earlier row holds stand in a flat [rows * length] table.
        number: [n] their packed numbers. Over all buckets every packed token occurs once.
    """

    index: Tensor
    place: Tensor
    number: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where the tokens of `R` rows lie among `N` packed ones.

    Attributes:
        token: [N] ids.
        position: [N] of each within its row.
        runs: all packed tokens, in order.
        buckets: the same rows otherwise; empty where runs are the cheaper way.
        index: [R, L] packed number of each token of each row; 0 behind a row's end.
        length: [R].
        back: [N] where each packed token stands in a flat [R, L] table: r * L + position.
    """

    token: Tensor
    position: Tensor
    runs: tuple[Run, ...]
    buckets: tuple[Bucket, ...]
    index: Tensor
    length: Tensor
    back: Tensor

    @property
    def plain(self) -> bool:
        """Whether the packed tokens are the rows themselves, [R, L] flattened."""
        first = self.runs[0]
        return len(self.runs) == 1 and first.index is None


def pack(tokens: Tensor, length: Tensor, *, share: bool = True) -> Layout:
    """Pack the first `length[r]` tokens of each row.

    Args:
        tokens: [R, T] ids.
        length: [R] of each row; 0 for one that is left out.
        share: whether beginnings that rows have in common are held once. It is done only where that saves enough.

    Raises:
        ValueError: if all rows are empty.
    """
    device = tokens.device
    longest = int(length.max())
    if longest == 0:
        raise ValueError("there is no token to read: every row is empty")
    lengths = length.cpu().numpy()
    table = tokens[:, :longest].cpu().numpy()
    shared, owner = _shared(table, lengths) if share else (np.zeros_like(lengths), None)
    if shared.sum() < WORTHWHILE * lengths.sum():
        shared, owner = np.zeros_like(lengths), None
    own = lengths - shared
    order = np.lexsort((own, lengths))
    order = order[own[order] > 0]
    start = np.zeros_like(lengths)
    start[order] = np.cumsum(own[order]) - own[order]
    column = np.arange(longest)
    inside = column < lengths[:, None]
    index = (start - shared)[:, None] + column
    if owner is not None:
        index = np.take_along_axis(index, owner, axis=0)
    index = np.where(inside, index, 0)
    mine = inside & (column >= shared[:, None])
    count = int(own.sum())
    back = np.empty(count, dtype=np.int64)
    back[index[mine]] = np.flatnonzero(mine)

    def tensor(array: Numbers) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    runs = tuple(_runs(order, own, lengths, start, index, device))
    buckets = list(_buckets(order, lengths)) if len(runs) > 1 else []
    more = sum(len(rows) * int(lengths[rows].max()) ** 2 for rows in buckets)
    more -= int((own * (2 * lengths - own)).sum())
    if more > 2 * PAIRS_PER_RUN * (len(runs) - len(buckets)):
        buckets = []
    return Layout(
        token=tensor(table.reshape(-1)[back]),
        position=tensor(back % longest),
        runs=runs,
        buckets=tuple(_bucket(rows, lengths, index, mine, tensor) for rows in buckets),
        index=tensor(index),
        length=length,
        back=tensor(back),
    )


def _shared(table: Numbers, lengths: Numbers) -> tuple[Numbers, Numbers]:
    """For each row how many first tokens an earlier row has too, and for each position the row that holds it.

    In lexicographic order a row shares most with the row before it. Whoever holds a position is the last row up to
    this one, in that order, that does not share it.
    """
    rows, longest = table.shape
    column = np.arange(longest)
    marked = np.where(column < lengths[:, None], table + 1, 0)
    keys = np.ascontiguousarray(marked.astype(">i8")).view(np.dtype((np.void, 8 * longest))).reshape(rows)
    order = np.argsort(keys, kind="stable")
    ordered = marked[order]
    same = (ordered[1:] == ordered[:-1]) & (ordered[1:] > 0)
    common = np.zeros(rows, dtype=lengths.dtype)
    common[1:] = np.logical_and.accumulate(same, axis=1).sum(axis=1)
    holds = np.where(column >= common[:, None], np.arange(rows)[:, None], 0)
    holder = np.maximum.accumulate(holds, axis=0)
    shared, owner = np.empty_like(common), np.empty_like(holder)
    shared[order] = common
    owner[order] = order[holder]
    return shared, owner


def _buckets(order: Numbers, lengths: Numbers) -> Iterator[Numbers]:
    """Rows from the longest on, cut where a row is an eighth (and 8 tokens) shorter than the longest of its bucket."""
    rows = order[::-1]
    while len(rows):
        longest = int(lengths[rows[0]])
        within = int((lengths[rows] >= longest - max(8, longest // 8)).sum())
        yield rows[:within]
        rows = rows[within:]


def _bucket(
    rows: Numbers, lengths: Numbers, index: Numbers, mine: Numbers, tensor: Callable[[Numbers], Tensor]
) -> Bucket:
    longest = int(lengths[rows].max())
    table, held = index[rows, :longest], mine[rows, :longest]
    return Bucket(index=tensor(table), place=tensor(np.flatnonzero(held)), number=tensor(table[held]))


def _runs(
    order: Numbers, own: Numbers, lengths: Numbers, start: Numbers, index: Numbers, device: torch.device
) -> list[Run]:
    """Neighbours in `order` with the same lengths, together."""
    changes = np.flatnonzero((np.diff(own[order]) != 0) | (np.diff(lengths[order]) != 0)) + 1
    runs: list[Run] = []
    for rows in np.split(order, changes):
        first, length = int(rows[0]), int(lengths[rows[0]])
        whole = int(own[first]) == length
        numbers = None if whole else torch.from_numpy(np.ascontiguousarray(index[rows, :length])).to(device)
        runs.append(Run(start=int(start[first]), rows=len(rows), own=int(own[first]), length=length, index=numbers))
    return runs
