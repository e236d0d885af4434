"""Pieces of rows keep every step, and what really followed the last one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from upslope.collect.rows import Piece, join_rows, row_lengths, take_pieces
from upslope.trajectory import Trajectory


def recorded(lengths: list[int], *, named: bool = False, terminated: bool = True, offset: float = 0.0) -> Trajectory:
    """Whole episodes that count: observation 100 row + t, action t, reward 1 per step."""
    rows, longest = len(lengths), max(lengths)
    step = torch.arange(longest).expand(rows, longest)
    mask = step < torch.tensor(lengths).unsqueeze(-1)
    last = step == (torch.tensor(lengths) - 1).unsqueeze(-1)
    seen = (100.0 * torch.arange(rows).unsqueeze(-1) + step + offset).masked_fill(~mask, 0.0)
    ends = torch.zeros(0, dtype=torch.long) if terminated else last.flatten().nonzero().squeeze(-1)
    final = torch.zeros(0) if terminated else 100.0 * torch.arange(rows) + torch.tensor(lengths) + offset
    return Trajectory(
        observation={"a": seen, "b": seen.unsqueeze(-1).repeat(1, 1, 2)} if named else seen,
        final_observation={"a": final, "b": final.unsqueeze(-1).repeat(1, 2)} if named else final,
        final_index=ends,
        action=step.masked_fill(~mask, 0),
        reward=mask.float(),
        terminated=last if terminated else torch.zeros_like(last),
        truncated=torch.zeros_like(last) if terminated else last,
        mask=mask,
        behaviour_log_prob=-seen,
        time=step.masked_fill(~mask, 0),
        memory=torch.arange(rows).float(),
    )


def what_follows(trajectory: Trajectory) -> list[tuple[int, float]]:
    observation = trajectory.final_observation
    assert isinstance(observation, torch.Tensor)
    return list(zip(trajectory.final_index.tolist(), observation.tolist(), strict=True))


def test_a_piece_that_ends_before_its_row_is_followed_by_the_row_itself():
    taken = take_pieces(recorded([5, 3]), [Piece(row=1, start=0, stop=2), Piece(row=0, start=1, stop=4)])
    assert taken.observation.tolist() == [[100.0, 101.0, 0.0], [1.0, 2.0, 3.0]]
    assert taken.mask.tolist() == [[True, True, False], [True, True, True]]
    assert taken.time.tolist() == [[0, 1, 0], [1, 2, 3]]
    assert what_follows(taken) == [(1, 102.0), (5, 4.0)]
    assert taken.memory is None


def test_what_a_policy_carried_is_kept_where_all_pieces_begin_with_their_row():
    taken = take_pieces(recorded([5, 3]), [Piece(row=1, start=0, stop=2), Piece(row=0, start=0, stop=4)])
    assert isinstance(taken.memory, torch.Tensor)
    assert taken.memory.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("terminated", [True, False])
def test_the_end_of_an_episode_stays_what_it_was(terminated):
    taken = take_pieces(recorded([5, 3], terminated=terminated), [Piece(row=1, start=1, stop=3)])
    assert taken.terminated.tolist() == [[False, terminated]]
    assert taken.truncated.tolist() == [[False, not terminated]]
    assert what_follows(taken) == ([] if terminated else [(1, 103.0)])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.booleans(), st.booleans(), st.integers(1, 3))
def test_rows_taken_apart_and_joined_again_are_the_same(lengths, named, terminated, parts):
    whole = recorded(lengths, named=named, terminated=terminated)
    pieces = [Piece(row=row, start=0, stop=length) for row, length in enumerate(lengths)]
    split = [take_pieces(whole, pieces[at : at + parts]) for at in range(0, len(pieces), parts)]
    joined = join_rows(split)
    for name in Trajectory.__dataclass_fields__:
        before, after = getattr(whole, name), getattr(joined, name)
        if isinstance(before, dict):
            assert all(torch.equal(before[key], after[key]) for key in before), name
        else:
            assert torch.equal(before, after) if isinstance(before, torch.Tensor) else before == after, name
    assert row_lengths(joined).tolist() == lengths


def test_pieces_outside_and_parts_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="outside of 2 rows of 5 positions"):
        take_pieces(recorded([5, 3]), [Piece(row=0, start=3, stop=6)])
    with pytest.raises(ValueError, match="nothing to take"):
        take_pieces(recorded([5]), [])
    with pytest.raises(ValueError, match="memory is there in some"):
        join_rows([recorded([2]), take_pieces(recorded([3]), [Piece(row=0, start=1, stop=2)])])
