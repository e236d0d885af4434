"""Pairs of trajectory segments, one preferred to the other -> trajectories that DPO and its kin learn from.

Preferences come from return, or were stated in a file. Rows stand in adjacent pairs, the preferred segment first:
rewards +1 and -1 at a row's last step, `group` the number of the pair within the batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upslope.collect.example_order import ExampleOrder
from upslope.collect.given_data import SegmentPairsConfig, SegmentReturn
from upslope.collect.recorded import check_recorded_spaces, unsampled
from upslope.collect.rows import Piece, row_lengths, take_pieces
from upslope.collect.trajectory_file import Recording
from upslope.collect.vector import VectorEnvironment
from upslope.errors import UsageError
from upslope.estimators import reward_to_go
from upslope.streams import Purpose, stream
from upslope.trajectory import Policy, Trajectory, Tree
from upslope.typed_tree import TreeError, read_fields

MOST_TRIES_PER_PAIR = 50
"""Drawing pairs gives up once this many per wanted pair were tried: their returns hardly tell segments apart."""

_LABELS = {"first": False, "second": True}
"""What a stated preference may be, and whether the two change places."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentPair:
    """Two segments of equal length.

    Attributes:
        chosen: the preferred one.
        rejected: the other one.
    """

    chosen: Piece
    rejected: Piece

    def __post_init__(self) -> None:
        """Refuse what is no pair."""
        if self.chosen.length != self.rejected.length:
            raise ValueError(
                f"the segments of a pair are of one length, got {self.chosen.length} and {self.rejected.length} steps"
            )
        if self.chosen == self.rejected:
            raise ValueError("a segment cannot be preferred to itself: leave the pair out")


class SegmentPairCollector:
    """Brings pairs of segments, the preferred one's row first; a `upslope.trajectory.Collector`.

    Whoever learns from pairs keeps two rows together (`Passes.together = 2`). Nobody sampled them here:
    `behaviour_log_prob` is NaN where the mask is True.

    Args:
        recording: that the segments lie in.
        pairs: all of them, at least one.
        environments: that the policy is made for; stepped by nobody.
        config: how many per update.
        seed: of the run.

    Attributes:
        environments: as given; closed with the collector.
        steps_taken: chosen steps of the last update's segments.

    Raises:
        UsageError: if the spaces differ, or there is no pair.
    """

    def __init__(
        self,
        recording: Recording,
        pairs: Sequence[SegmentPair],
        environments: VectorEnvironment,
        config: SegmentPairsConfig,
        *,
        seed: int,
    ) -> None:
        own = (environments.observation_space, environments.action_space)
        check_recorded_spaces((recording.observation_space, recording.action_space), own, str(config.file))
        if not pairs:
            raise UsageError("there is no pair of segments to learn from")
        self.environments = environments
        self._trajectory = unsampled(recording.trajectory)
        self._pairs = list(pairs)
        self._per_update = config.pairs
        self._order = ExampleOrder(len(self._pairs), seed=seed)
        self._content = _content(self._trajectory, self._pairs)
        self.steps_taken = 0

    def collect(self, policy: Policy, update: int) -> Trajectory:
        """The next pairs."""
        trajectory = self.take(self._order.take(self._per_update))
        self.steps_taken = int(trajectory.mask.sum())
        return replace(trajectory, policy_version=update)

    def take(self, indices: Sequence[int]) -> Trajectory:
        """These pairs in this order, whatever comes next in training."""
        pairs = [self._pairs[index] for index in indices]
        trajectory = take_pieces(self._trajectory, [piece for pair in pairs for piece in (pair.chosen, pair.rejected)])
        last = (trajectory.mask * torch.arange(trajectory.shape[1])).amax(-1, keepdim=True)
        label = torch.tensor([1.0, -1.0]).repeat(len(pairs)).unsqueeze(-1)
        return replace(
            trajectory,
            reward=torch.zeros_like(trajectory.reward).scatter(1, last, label.to(trajectory.reward.dtype)),
            group=torch.arange(len(pairs)).repeat_interleave(2),
        )

    def finished(self) -> list[tuple[float, int]]:
        """No episode is played."""
        return []

    def rebuild(self, update: int) -> None:
        """Begin `update`: the pairs before it are known from their number."""
        self._order.cursor = update * self._per_update

    def snapshot(self) -> Tree:
        """Which pairs come next, and of which."""
        return {"pairs": self._order.snapshot(), "content": self._content}

    def restore(self, tree: Tree) -> None:
        """Go on exactly there.

        Raises:
            UsageError: if the pairs are others.
        """
        if tree["content"] != self._content:
            raise UsageError(
                "the segments or their preferences are not those the run was begun with: bring the files back, or, "
                "where episodes were played anew and came out otherwise, record them (`upslope record`) and begin a "
                "new run with rollout.file"
            )
        self._order.restore(tree["pairs"])

    def close(self) -> None:
        """Close the environments."""
        self.environments.close()


def _content(trajectory: Trajectory, pairs: Sequence[SegmentPair]) -> str:
    """A hash of what is learnt from."""
    digest = hashlib.sha256()
    observation = trajectory.observation
    for tensor in (*(observation.values() if isinstance(observation, dict) else [observation]), trajectory.action):
        digest.update(tensor.contiguous().numpy().tobytes())
    for pair in pairs:
        digest.update(repr((pair.chosen, pair.rejected)).encode())
    return digest.hexdigest()


def draw_segment_pairs(
    trajectory: Trajectory, *, drawn: int, length: int, by: SegmentReturn, seed: int
) -> list[SegmentPair]:
    """Pairs of segments of two rows, the one with the higher undiscounted return preferred.

    Both begin at the same time of their rows, so that a time limit cuts off what follows equally. Pairs with equal
    returns, which prefer nothing, are drawn again.

    Args:
        trajectory: whole episodes, one row each.
        drawn: pairs wanted.
        length: steps of a segment.
        by: the rewards that count: of the segment, or from its first step to the end of its row.
        seed: of the run.

    Raises:
        UsageError: if fewer than two rows are long enough, or returns hardly tell segments apart.
    """
    lengths = row_lengths(trajectory)
    enough = (lengths >= length).nonzero().squeeze(-1).tolist()
    if len(enough) < 2:
        raise UsageError(
            f"{len(enough)} of {len(lengths)} recorded episodes have the {length} steps of a segment, and a pair is of "
            "two: set rollout.length to less, or record more episodes"
        )
    returns, generator = _returns(trajectory, length, by), stream(seed, Purpose.SEGMENTS)
    pairs: list[SegmentPair] = []
    for _ in range(MOST_TRIES_PER_PAIR * drawn):
        if len(pairs) == drawn:
            return pairs
        first, second = (enough[index] for index in generator.choice(len(enough), size=2, replace=False))
        most = int(min(lengths[first], lengths[second])) - length
        start = int(generator.integers(most + 1))
        if returns[first, start] == returns[second, start]:
            continue
        better, worse = (first, second) if returns[first, start] > returns[second, start] else (second, first)
        pieces = [Piece(row=row, start=start, stop=start + length) for row in (better, worse)]
        pairs.append(SegmentPair(chosen=pieces[0], rejected=pieces[1]))
    if len(pairs) == drawn:
        return pairs
    raise UsageError(
        f"of {MOST_TRIES_PER_PAIR * drawn} pairs of segments only {len(pairs)} differ in return, and {drawn} are "
        "wanted: set rollout.by to 'to_go' where every step is rewarded alike, or to other lengths, or record episodes "
        "of a policy that is sometimes better"
    )


def _returns(trajectory: Trajectory, length: int, by: SegmentReturn) -> Tensor:
    """[B, T] of the segment that begins at each position, or of all that follows there."""
    reward = torch.where(trajectory.mask, trajectory.reward, 0.0).to(torch.float64)
    if by == "to_go":
        return reward_to_go(reward, torch.ones_like(reward), trajectory.cut)
    padded = torch.nn.functional.pad(reward, (0, length - 1))
    return padded.unfold(-1, length, 1).sum(-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stated:
    first: dict[str, int]
    second: dict[str, int]
    label: str


def read_preferences(path: Path, trajectory: Trajectory) -> list[SegmentPair]:
    """Stated preferences, one per line of JSON, between segments of recorded episodes.

    A line is `{"first": {"row": 0, "start": 10, "stop": 42}, "second": {...}, "label": "first"}`; the label is "first"
    or "second", whichever is preferred.

    Args:
        path: of the file.
        trajectory: the recorded rows that the lines speak of.

    Raises:
        UsageError: if there is no such file, or naming the line that is no such preference.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the preferences {path} cannot be read: {error}") from error
    lengths = row_lengths(trajectory).tolist()
    pairs: list[SegmentPair] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            pairs.append(_stated(line, lengths))
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}, line {number}: {error}") from error
    if not pairs:
        raise UsageError(f"{path} states no preference: it has no line")
    return pairs


def _stated(line: str, lengths: Sequence[int]) -> SegmentPair:
    tree = json.loads(line)
    if not isinstance(tree, Mapping):
        raise TreeError('expected {"first": ..., "second": ..., "label": ...}')
    stated: _Stated = read_fields(_Stated, tree, "the preference")
    if stated.label not in _LABELS:
        raise TreeError(
            f'label must be "first" or "second", whichever is preferred, got {stated.label!r}; leave out pairs of '
            "which neither is"
        )
    pieces = [_piece(stated.first, "first", lengths), _piece(stated.second, "second", lengths)]
    chosen, rejected = reversed(pieces) if _LABELS[stated.label] else pieces
    return SegmentPair(chosen=chosen, rejected=rejected)


def _piece(tree: Mapping[str, Any], name: str, lengths: Sequence[int]) -> Piece:
    piece: Piece = read_fields(Piece, tree, name)
    if not 0 <= piece.row < len(lengths):
        raise TreeError(f"{name}.row must be one of the {len(lengths)} recorded rows, got {piece.row}")
    if not 0 <= piece.start < piece.stop <= lengths[piece.row]:
        raise TreeError(
            f"{name} must begin before it stops, within the {lengths[piece.row]} steps of row {piece.row}; got "
            f"{piece.start} to {piece.stop}"
        )
    return piece


def write_preferences(pairs: Sequence[SegmentPair], path: Path) -> None:
    """A file that `read_preferences` reads, the preferred segment first."""
    keys = ("row", "start", "stop")
    lines = [
        json.dumps(
            {
                "first": {key: getattr(pair.chosen, key) for key in keys},
                "second": {key: getattr(pair.rejected, key) for key in keys},
                "label": "first",
            }
        )
        for pair in pairs
    ]
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
