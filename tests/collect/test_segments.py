"""Pairs of segments stand the right way round, whoever prefers them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_rows import recorded

from upslope.collect.actions import RandomPolicy
from upslope.collect.given_data import RecordedConfig, SegmentPairsConfig
from upslope.collect.recorded import RecordedCollector
from upslope.collect.rows import Piece
from upslope.collect.segments import (
    SegmentPair,
    SegmentPairCollector,
    draw_segment_pairs,
    read_preferences,
    write_preferences,
)
from upslope.collect.trajectory_file import Recording
from upslope.errors import UsageError
from upslope.spaces import Box, Discrete
from upslope.trajectory import Trajectory


class Untouched:
    """Environments of the recorded spaces."""

    observation_space, action_space, num_envs, resume = Box((), -1e9, 1e9), Discrete(9), 1, "snapshot"

    def close(self):
        pass


def recording(trajectory: Trajectory) -> Recording:
    return Recording(
        trajectory=trajectory, observation_space=Untouched.observation_space, action_space=Untouched.action_space
    )


POLICY = RandomPolicy(Discrete(9))


def pairs_of(trajectory: Trajectory, pairs: list[SegmentPair], *, per_update: int = 2, seed: int = 1):
    config = SegmentPairsConfig(pairs=per_update)
    return SegmentPairCollector(recording(trajectory), pairs, Untouched(), config, seed=seed)


def pair(better: int, worse: int, start: int = 0, stop: int = 2) -> SegmentPair:
    pieces = [Piece(row=row, start=start, stop=stop) for row in (better, worse)]
    return SegmentPair(chosen=pieces[0], rejected=pieces[1])


def test_a_batch_of_pairs_written_out():
    whole = recorded([3, 5, 4])
    trajectory = pairs_of(whole, [pair(2, 0), pair(1, 2, 1, 4)]).take([1, 0])
    assert trajectory.observation.tolist() == [[101, 102, 103], [201, 202, 203], [200, 201, 0], [0, 1, 0]]
    assert trajectory.reward.tolist() == [[0, 0, 1], [0, 0, -1], [0, 1, 0], [0, -1, 0]]
    assert trajectory.mask.sum(-1).tolist() == [3, 3, 2, 2]
    assert trajectory.time.tolist() == [[1, 2, 3], [1, 2, 3], [0, 1, 0], [0, 1, 0]]
    assert trajectory.group is not None
    assert trajectory.group.tolist() == [0, 0, 1, 1]
    assert trajectory.behaviour_log_prob[trajectory.mask].isnan().all()
    assert (trajectory.behaviour_log_prob[~trajectory.mask] == 0).all()
    assert trajectory.memory is None


@pytest.mark.parametrize("by", ["segment", "to_go"])
def test_the_higher_return_is_preferred(by):
    whole = recorded([9, 8, 8, 7])
    generator = torch.Generator().manual_seed(0)
    whole = replace(whole, reward=torch.randn(4, 9, generator=generator).masked_fill(~whole.mask, 0.0))
    pairs = draw_segment_pairs(whole, drawn=200, length=3, by=by, seed=0)
    assert len(pairs) == 200
    for one in pairs:
        assert one.chosen.start == one.rejected.start
        ends = [piece.stop if by == "segment" else None for piece in (one.chosen, one.rejected)]
        better, worse = (
            float(whole.reward[piece.row, piece.start : end].sum())
            for piece, end in zip((one.chosen, one.rejected), ends, strict=True)
        )
        assert better > worse
    assert {piece.start for one in pairs for piece in (one.chosen,)} == set(range(6))
    assert pairs == draw_segment_pairs(whole, drawn=200, length=3, by=by, seed=0)
    assert pairs != draw_segment_pairs(whole, drawn=200, length=3, by=by, seed=1)


def test_where_nothing_tells_segments_apart_it_is_said():
    with pytest.raises(UsageError, match=r"only 0 differ in return.*'to_go'"):
        draw_segment_pairs(recorded([9, 8]), drawn=2, length=3, by="segment", seed=0)
    with pytest.raises(UsageError, match="1 of 2 recorded episodes have the 9 steps"):
        draw_segment_pairs(recorded([9, 8]), drawn=2, length=9, by="to_go", seed=0)
    assert len(draw_segment_pairs(recorded([9, 8]), drawn=2, length=3, by="to_go", seed=0)) == 2


def line(first: tuple[int, int, int], second: tuple[int, int, int], label: object = "first", **more: object) -> str:
    keys = ("row", "start", "stop")
    named = {"first": dict(zip(keys, first, strict=True)), "second": dict(zip(keys, second, strict=True))}
    return json.dumps({**named, "label": label, **more})


def read(path: Path, *lines: str) -> list[SegmentPair]:
    path.write_text("\n".join(lines) + "\n")
    return read_preferences(path, recorded([3, 5, 4]))


def test_stated_preferences_are_read_the_right_way_round(tmp_path):
    path = tmp_path / "labels.jsonl"
    first, second = read(path, line((0, 0, 2), (2, 1, 3)), "", line((0, 0, 2), (1, 1, 3), "second"))
    assert first == SegmentPair(chosen=Piece(row=0, start=0, stop=2), rejected=Piece(row=2, start=1, stop=3))
    assert second == SegmentPair(chosen=Piece(row=1, start=1, stop=3), rejected=Piece(row=0, start=0, stop=2))
    write_preferences([first, second], path)
    assert read_preferences(path, recorded([3, 5, 4])) == [first, second]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (line((0, 0, 2), (1, 0, 2), "both"), 'label must be "first" or "second"'),
        (line((0, 0, 2), (1, 0, 2), 1), "label must be str"),
        (line((0, 0, 2), (1, 0, 2), why="nicer"), "unknown settings"),
        (line((0, 0, 2), (1, 0, 3)), "of one length"),
        (line((0, 0, 2), (0, 0, 2)), "preferred to itself"),
        (line((0, 0, 4), (1, 0, 4)), "within the 3 steps of row 0"),
        (line((3, 0, 2), (1, 0, 2)), "one of the 3 recorded rows"),
        ("[1, 2]", "expected"),
        ("{", "line 1"),
    ],
    ids=["unknown", "number", "more", "lengths", "itself", "beyond", "row", "list", "broken"],
)
def test_lines_that_are_no_preference_are_named(text, words, tmp_path):
    with pytest.raises(UsageError, match=words) as error:
        read(tmp_path / "labels.jsonl", text)
    assert "line 1" in str(error.value)
    with pytest.raises(UsageError, match="states no preference"):
        read(tmp_path / "labels.jsonl", "")


def test_every_pair_comes_once_an_epoch_and_going_on_is_exact():
    whole, pairs = recorded([6, 6, 6]), [pair(0, 1, start, start + 2) for start in range(4)] + [pair(2, 1)]
    straight, stopped = pairs_of(whole, pairs), pairs_of(whole, pairs)
    seen = [straight.collect(POLICY, update) for update in range(5)]
    starts = [(int(t.observation[row, 0])) for t in seen for row in range(0, 4, 2)]
    assert sorted(starts[:5]) == sorted(starts[5:]) == [0, 1, 2, 3, 200]
    assert starts[:5] != starts[5:]
    assert [t.policy_version for t in seen] == list(range(5))
    assert straight.steps_taken == 8
    stopped.collect(POLICY, 0)
    tree = stopped.snapshot()
    again = pairs_of(whole, pairs)
    again.restore(tree)
    rebuilt = pairs_of(whole, pairs)
    rebuilt.rebuild(1)
    for other in (again, rebuilt):
        assert torch.equal(other.collect(POLICY, 1).observation, seen[1].observation)
    with pytest.raises(UsageError, match="not those the run was begun with"):
        pairs_of(whole, [*pairs[1:], pairs[0]]).restore(tree)


def test_demonstrations_come_in_rows_of_at_most_a_length():
    config = RecordedConfig(file=Path("x"), rows=4, length=2)
    rows = RecordedCollector(recording(recorded([5, 2])), Untouched(), config, seed=1)
    trajectory = rows.collect(POLICY, 3)
    steps = [row[mask].tolist() for row, mask in zip(trajectory.observation, trajectory.mask, strict=True)]
    assert sorted(steps) == [[0, 1], [2, 3], [4], [100, 101]]
    assert trajectory.behaviour_log_prob[trajectory.mask].isnan().all()
    assert trajectory.memory is None
    assert trajectory.policy_version == 3
    assert rows.steps_taken == 7
    other = RecordedCollector(recording(recorded([5, 2])), Untouched(), config, seed=1)
    other.restore(rows.snapshot())
    assert torch.equal(other.collect(POLICY, 4).observation, rows.collect(POLICY, 4).observation)


def test_recordings_of_another_world_are_refused():
    other = replace(recording(recorded([5, 2])), action_space=Discrete(4))
    with pytest.raises(UsageError, match=r"x is of actions in Discrete\(n=4"):
        RecordedCollector(other, Untouched(), RecordedConfig(file=Path("x")), seed=1)
    wider = replace(recording(recorded([5, 2])), observation_space=Box((), -1.0, 1.0))
    RecordedCollector(wider, Untouched(), RecordedConfig(file=Path("x")), seed=1)
