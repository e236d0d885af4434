"""Rows cut where memory begins anew, and their pieces laid side by side.

A recurrence is sequential within an episode only: the episodes of a row, and the rows, are independent of one another.
So the chosen steps of all rows are cut into segments (one episode's part of one row), and the n-th steps of all
segments are computed together. Nothing is left to reset or to hide while the memory runs: resets are where segments
begin, and positions that are no decisions are in none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from upslope.trajectory import Observation, map_observation


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """The `M` chosen steps of rows [B, T] in the order they are computed: all first steps of segments, all second ...

    Segments are ordered by length, the longest first, so that those still going on are always the first of them.

    Attributes:
        shape: (B, T).
        counts: how many segments have an n-th step, one number per n.
        place: [M] where in the rows each step is, `b * T + t`.
        segment: [M] the segment of each step.
        within: [M] its number in the segment.
        row: [S] the row of each segment.
        fresh: [S] bool, whether the segment begins with an empty memory instead of the row's.
    """

    shape: tuple[int, int]
    counts: tuple[int, ...]
    place: Tensor
    segment: Tensor
    within: Tensor
    row: Tensor
    fresh: Tensor

    @classmethod
    def of(cls, mask: Tensor, time: Tensor | None) -> Packing:
        """Cut rows into segments.

        Args:
            mask: [B, T] bool, where a decision was taken.
            time: [B, T] decisions since the episode's start: a segment begins wherever it is 0. None where rows hold
                one episode each, whose first step of the row finds the row's memory.
        """
        rows, positions = mask.shape
        place = np.flatnonzero(mask.cpu().numpy())
        row = place // positions
        begins = np.zeros(len(place), dtype=bool) if time is None else time.cpu().numpy().reshape(-1)[place] == 0
        first = begins.copy()
        first[:1] = True
        first[1:] |= row[1:] != row[:-1]
        starts = np.flatnonzero(first)
        lengths = np.diff(starts, append=len(place))
        order = np.argsort(-lengths, kind="stable")
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        segment = rank[np.cumsum(first) - 1]
        within = np.arange(len(place)) - np.repeat(starts, lengths)
        longest = int(lengths.max(initial=0))
        counts = len(lengths) - np.searchsorted(np.sort(lengths), np.arange(longest), side="right")
        packed = np.empty_like(place)
        packed[(np.cumsum(counts) - counts)[within] + segment] = np.arange(len(place))

        def tensor(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(mask.device)

        return cls(
            shape=(rows, positions),
            counts=tuple(counts.tolist()),
            place=tensor(place[packed]),
            segment=tensor(segment[packed]),
            within=tensor(within[packed]),
            row=tensor(row[starts][order]),
            fresh=tensor(begins[starts][order]),
        )

    def take(self, observation: Observation) -> Observation:
        """The chosen steps [M, ...] of rows [B, T, ...]."""
        return map_observation(self.take_tensor, observation)

    def take_tensor(self, rows: Tensor) -> Tensor:
        """The chosen steps [M, ...] of one tensor [B, T, ...]."""
        return rows.reshape(-1, *rows.shape[2:]).index_select(0, self.place)

    def put(self, steps: Tensor) -> Tensor:
        """Steps [M, ...] where they belong in rows [B, T, ...]; 0 where nothing was chosen."""
        rows, positions = self.shape
        empty = steps.new_zeros(rows * positions, *steps.shape[1:])
        return empty.index_copy(0, self.place, steps).view(rows, positions, *steps.shape[1:])

    def steps_at(self, index: Tensor) -> Tensor:
        """[K] the packed number of the chosen steps at `index` [K], `b * T + t`.

        Raises:
            ValueError: if nothing was chosen there.
        """
        number = torch.full((self.shape[0] * self.shape[1],), -1, device=self.place.device)
        number[self.place] = torch.arange(len(self.place), device=self.place.device)
        found = number[index]
        if bool((found < 0).any()):
            raise ValueError(f"nothing was chosen at {index[found < 0].tolist()}, so that no memory stands there")
        return found

    def start(self, memory: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """[S, *shape] what each segment begins with: zeros, or its row's memory [B, *shape] where that goes on."""
        if memory is None:
            return like.new_zeros(len(self.row), *shape)
        going_on = memory.index_select(0, self.row).to(like)
        return going_on.masked_fill(self.fresh.view(-1, *(1 for _ in shape)), 0.0)


def join_observations(first: Observation, second: Observation) -> Observation:
    """Observations [M, ...] and [K, ...] as [M + K, ...]."""
    if isinstance(first, dict):
        other = cast("dict[str, Tensor]", second)
        return {name: torch.cat([entry, other[name]]) for name, entry in first.items()}
    return torch.cat([first, cast("Tensor", second)])
