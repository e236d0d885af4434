"""Rows of trajectories taken apart and put together: every piece keeps what really followed its last step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from upslope.trajectory import Observation, Trajectory, map_observation


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Positions `start` to `stop` (exclusive) of one row."""

    row: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        """How many."""
        return self.stop - self.start


def row_lengths(trajectory: Trajectory) -> Tensor:
    """[B] positions of each row up to its last chosen one."""
    positions = torch.arange(1, trajectory.shape[1] + 1)
    return (trajectory.mask * positions).amax(-1)


def take_pieces(trajectory: Trajectory, pieces: Sequence[Piece]) -> Trajectory:
    """Pieces of rows as rows of their own, padded at the end to the longest.

    Where a piece ends and its row goes on, the next observation of the row is what followed. What a recurrent policy
    carried is known at the start of a row alone: it is kept where all pieces begin there, and else left out.

    Args:
        trajectory: [B, T].
        pieces: each within its row, and at least one position long.

    Raises:
        ValueError: if there are no pieces, or one lies outside.
    """
    rows, positions = trajectory.shape
    if not pieces:
        raise ValueError("there is nothing to take: name one piece at least")
    for piece in pieces:
        if not (0 <= piece.row < rows and 0 <= piece.start < piece.stop <= positions):
            raise ValueError(f"{piece} lies outside of {rows} rows of {positions} positions")
    row = torch.tensor([piece.row for piece in pieces])
    start = torch.tensor([piece.start for piece in pieces])
    length = torch.tensor([piece.length for piece in pieces])
    steps = torch.arange(int(length.max()))
    inside = steps < length.unsqueeze(-1)
    source = (row * positions + start).unsqueeze(-1) + steps.where(inside, 0)

    def gather(tensor: Tensor) -> Tensor:
        found = tensor.reshape(rows * positions, *tensor.shape[2:])[source]
        return found.masked_fill(~inside.view(*inside.shape, *[1] * (found.dim() - 2)), 0)

    final_index, final = _ends(trajectory, source, inside, length)
    return Trajectory(
        observation=map_observation(gather, trajectory.observation),
        final_observation=final,
        final_index=final_index,
        group=None if trajectory.group is None else trajectory.group[row],
        policy_version=trajectory.policy_version,
        memory=_at_rows(trajectory.memory, row) if not start.any() else None,
        **_each(gather, trajectory),
    )


_STEPWISE = ("action", "reward", "terminated", "truncated", "mask", "behaviour_log_prob", "time")
_OPTIONAL = ("reference_log_prob", "proximal_log_prob")


def _each(function: Callable[[Tensor], Tensor], trajectory: Trajectory) -> dict[str, Any]:
    """The fields that have one entry per position."""
    fields = {name: function(getattr(trajectory, name)) for name in _STEPWISE}
    optional = {name: getattr(trajectory, name) for name in _OPTIONAL}
    return fields | {name: None if entry is None else function(entry) for name, entry in optional.items()}


def _at_rows(memory: Observation | None, row: Tensor) -> Observation | None:
    return None if memory is None else map_observation(lambda tensor: tensor[row], memory)


def _ends(trajectory: Trajectory, source: Tensor, inside: Tensor, length: Tensor) -> tuple[Tensor, Observation]:
    """Where [K] pieces are cut without termination, and what followed there [K, ...]."""
    count = trajectory.reward.numel()
    entry = torch.full((count,), -1).index_copy(0, trajectory.final_index, torch.arange(len(trajectory.final_index)))
    known = torch.where(inside, entry[source], -1)
    last = torch.arange(source.shape[1]) == (length - 1).unsqueeze(-1)
    ended = (trajectory.terminated | trajectory.truncated).reshape(-1)[source]
    going_on = last & (known < 0) & ~ended
    index = ((known >= 0) | going_on).flatten().nonzero().squeeze(-1)
    known, following = known.flatten()[index], source.flatten()[index] + 1
    recorded = known >= 0

    def pick(final: Tensor, observation: Tensor) -> Tensor:
        found = final.new_zeros(len(index), *final.shape[1:])
        found[recorded] = final[known[recorded]]
        found[~recorded] = observation.reshape(count, *observation.shape[2:])[following[~recorded]]
        return found

    final, observation = trajectory.final_observation, trajectory.observation
    if isinstance(final, dict):
        seen = cast("dict[str, Tensor]", observation)
        return index, {name: pick(tensor, seen[name]) for name, tensor in final.items()}
    return index, pick(final, cast("Tensor", observation))


def join_rows(parts: Sequence[Trajectory]) -> Trajectory:
    """The rows of several trajectories one after the other, padded at the end to the longest.

    Args:
        parts: of the same spaces; the version is the first one's. Groups keep their numbers.

    Raises:
        ValueError: if there are none, or an optional field is there in some and not in others.
    """
    if not parts:
        raise ValueError("there is nothing to join: give one trajectory at least")
    if len(parts) == 1:
        return parts[0]
    for name in ("group", "memory", *_OPTIONAL):
        if len({getattr(part, name) is None for part in parts}) > 1:
            raise ValueError(f"{name} is there in some trajectories and not in others: they cannot be joined")
    longest = max(part.shape[1] for part in parts)
    padded = [_padded(part, longest) for part in parts]
    offset, index = 0, list[Tensor]()
    for part in padded:
        index.append(part.final_index + offset)
        offset += part.reward.numel()
    first = padded[0]
    fields: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in padded]) for name in _STEPWISE}
    for name in ("group", *_OPTIONAL):
        if getattr(first, name) is not None:
            fields[name] = torch.cat([getattr(part, name) for part in padded])
    if first.memory is not None:
        fields["memory"] = _together([cast("Observation", part.memory) for part in padded])
    return replace(
        first,
        observation=_together([part.observation for part in padded]),
        final_observation=_together([part.final_observation for part in padded]),
        final_index=torch.cat(index),
        **fields,
    )


def _padded(part: Trajectory, longest: int) -> Trajectory:
    rows, positions = part.shape

    def pad(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor.new_zeros(rows, longest - positions, *tensor.shape[2:])], dim=1)

    return replace(
        part,
        observation=map_observation(pad, part.observation),
        final_index=part.final_index // positions * longest + part.final_index % positions,
        **_each(pad, part),
    )


def _together(parts: Sequence[Observation]) -> Observation:
    first = parts[0]
    if isinstance(first, dict):
        return {name: torch.cat([cast("dict[str, Tensor]", part)[name] for part in parts]) for name in first}
    return torch.cat([cast("Tensor", part) for part in parts])
