import dataclasses

import pytest
import torch

from upslope.trajectory import Trajectory


def trajectory() -> Trajectory:
    """Two rows of four: the first is truncated after t=1 and goes on at the end, the second terminates at t=2."""
    terminated = torch.tensor([[False, False, False, False], [False, False, True, False]])
    truncated = torch.tensor([[False, True, False, False], [False, False, False, False]])
    zeros = torch.zeros(2, 4)
    return Trajectory(
        observation=torch.zeros(2, 4, 1),
        action=torch.zeros(2, 4, dtype=torch.int64),
        reward=zeros,
        terminated=terminated,
        truncated=truncated,
        mask=torch.ones(2, 4, dtype=torch.bool),
        behaviour_log_prob=zeros,
        time=torch.zeros(2, 4, dtype=torch.int64),
        final_observation=torch.zeros(3, 1),
        final_index=torch.tensor([1, 3, 7]),
    )


def test_cut_holds_at_ends_of_episodes_and_of_rows():
    expected = [[False, True, False, True], [False, False, True, True]]
    assert trajectory().cut.tolist() == expected


def test_discount_is_zero_only_where_the_step_terminated():
    expected = torch.tensor([[0.9, 0.9, 0.9, 0.9], [0.9, 0.9, 0.0, 0.9]])
    assert torch.equal(trajectory().discount(0.9), expected)


def test_next_value_is_that_of_the_state_that_really_followed():
    value = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    final_value = torch.tensor([10.0, 20.0, 30.0])
    expected = torch.tensor([[2.0, 10.0, 4.0, 20.0], [6.0, 7.0, 0.0, 30.0]])
    assert torch.equal(trajectory().next_value(value, final_value), expected)


def test_reading_a_trajectory_changes_nothing_in_it():
    sealed = trajectory()
    sealed.cut.fill_(True)
    assert not sealed.terminated[0].any()
    assert sealed.truncated.sum() == 1


def test_a_trajectory_is_sealed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        trajectory().reward = torch.ones(2, 4)
