"""Tables that describe no problem are refused, with what to do; lists and arrays become tensors."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from upslope.exact import FiniteMDP

DOUBLE = torch.float64


def chain() -> FiniteMDP:
    """0 -> 1 or 2 -> end."""
    return FiniteMDP.from_tables(
        [
            [[0.0, 0.5, 0.5, 0.0], [0.0, 1.0, 0.0, 0.0]],
            [[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]],
            [[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]],
            [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]],
        ],
        [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [0.0, 0.0]],
        terminal=[3],
    )


def changed(table: torch.Tensor, where: tuple[int, ...], value: float) -> torch.Tensor:
    table = table.clone()
    table[where] = value
    return table


def test_lists_become_tables_and_a_state_sees_its_number() -> None:
    mdp = chain()
    assert (mdp.states, mdp.actions, mdp.gamma, mdp.kind) == (4, 2, 1.0, "episodic")
    assert mdp.reward.shape == (4, 2, 4)
    assert mdp.reward[0, 1].tolist() == [2.0] * 4
    assert mdp.start.tolist() == [1.0, 0.0, 0.0, 0.0]
    assert mdp.terminal.tolist() == [False, False, False, True]
    assert mdp.observation.tolist() == [0, 1, 2, 3]


def test_arrays_of_any_float_type_become_float64() -> None:
    mdp = FiniteMDP.from_tables(
        np.array([[[0, 1]], [[0, 0]]], dtype=np.float32),
        np.ones((2, 1, 2), dtype=np.float32),
        start=np.array([1, 0], dtype=np.float32),
        terminal=[1],
        observation=np.array([[0.5], [1.5]]),
    )
    assert {mdp.transition.dtype, mdp.reward.dtype, mdp.start.dtype} == {DOUBLE}
    assert mdp.observation.tolist() == [[0.5], [1.5]]


@pytest.mark.parametrize(
    ("field", "where", "value", "message"),
    [
        ("transition", (0, 0, 1), 0.4, r"state 0 with action 0 must sum to 1; they sum to 0\.9"),
        ("transition", (1, 1, 0), 0.5, r"state 1 with action 1 must sum to 1; they sum to 1\.5"),
        ("transition", (0, 0, 1), -0.5, r"transition\[0, 0, 1\] is -0\.5: a probability cannot be negative"),
        ("transition", (2, 0, 3), torch.nan, r"transition\[2, 0, 3\] is nan"),
        ("reward", (1, 0, 2), torch.inf, r"reward\[1, 0, 2\] is inf"),
        ("start", (1,), 0.25, r"start distribution must sum to 1; it sums to 1\.25"),
        ("start", (1,), -0.25, r"start\[1\] is -0\.25"),
    ],
)
def test_a_wrong_number_is_named(field: str, where: tuple[int, ...], value: float, message: str) -> None:
    mdp = chain()
    table = {"transition": mdp.transition, "reward": mdp.reward, "start": mdp.start}[field]
    with pytest.raises(ValueError, match=message):
        replace(mdp, **{field: changed(table, where, value)})


def test_a_start_in_a_terminal_state_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot start in a terminal state, but start gives state 3"):
        replace(chain(), start=torch.tensor([0.5, 0.0, 0.0, 0.5], dtype=DOUBLE))


@pytest.mark.parametrize(
    ("field", "table", "message"),
    [
        ("transition", torch.zeros(4, 4, dtype=DOUBLE), r"transition must have shape \[S, A, S\]"),
        ("reward", torch.zeros(4, 2, dtype=DOUBLE), r"reward must have shape \(4, 2, 4\)"),
        ("start", torch.ones(3, dtype=DOUBLE), r"start must have shape \(4,\)"),
        ("terminal", torch.zeros(4, dtype=DOUBLE), "terminal must be boolean"),
        ("observation", torch.arange(3), "observation must have one entry for each of the 4 states"),
        ("start", torch.tensor([1.0, 0.0, 0.0, 0.0]), r"start must be float64; got torch\.float32"),
    ],
)
def test_a_wrong_shape_or_type_is_named(field: str, table: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(chain(), **{field: table})


@pytest.mark.parametrize("gamma", [-0.1, 1.1, float("nan")])
def test_gamma_is_a_discount(gamma: float) -> None:
    with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\]"):
        replace(chain(), gamma=gamma)


def test_rows_of_terminal_states_are_not_read() -> None:
    mdp = chain()
    assert replace(mdp, transition=changed(mdp.transition, (3, 0, 0), 7.0)).states == 4


def trap(*, start: int, gamma: float) -> FiniteMDP:
    """State 0 ends or leads into 1; from 1 there is no way out."""
    return FiniteMDP.from_tables(
        [[[0, 0, 1], [0, 1, 0]], [[0, 1, 0], [0, 1, 0]], [[0, 0, 1], [0, 0, 1]]],
        [[0, 0], [1, 1], [0, 0]],
        start=start,
        terminal=[2],
        gamma=gamma,
    )


def test_without_discount_states_from_which_nothing_ends_are_named() -> None:
    with pytest.raises(ValueError, match="at gamma = 1 every episode must be able to end, but from state 1 no"):
        trap(start=0, gamma=1.0)
    assert trap(start=0, gamma=0.9).states == 3


def test_a_trap_nobody_can_reach_does_no_harm() -> None:
    mdp = FiniteMDP.from_tables([[[0, 0, 1]], [[0, 1, 0]], [[0, 0, 1]]], [[1], [1], [0]], terminal=[2])
    assert mdp.states == 3


def test_a_continuing_problem_has_no_end() -> None:
    with pytest.raises(ValueError, match="a continuing problem has no terminal states, but state 3 is"):
        replace(chain(), kind="continuing")


def test_a_reducible_chain_is_refused_with_its_classes() -> None:
    move = [[[0, 1, 0, 0, 0]], [[0, 0, 0.5, 0.5, 0]], [[0, 0, 1, 0, 0]], [[0, 0, 0, 0, 1]], [[0, 0, 0, 1, 0]]]
    with pytest.raises(ValueError, match="for good in: state 2; states 3, 4; never to come back to: states 0, 1"):
        FiniteMDP.from_tables(move, [[0]] * 5, kind="continuing")
    inside = FiniteMDP.from_tables(move, [[0]] * 5, kind="continuing", start=3)
    assert inside.kind == "continuing"


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind must be 'episodic' or 'continuing'; got 'endless'"):
        replace(chain(), kind="endless")


def test_reward_distributions_have_the_expected_reward_as_their_mean() -> None:
    mdp = chain()
    value = torch.stack([mdp.reward - 1.0, mdp.reward + 1.0], -1)
    even = torch.full_like(value, 0.5)
    assert replace(mdp, reward_value=value, reward_probability=even).reward_value is value
    with pytest.raises(ValueError, match=r"reward\[0, 0, 1\] is 1\.0, and the mean of its distribution is 2\.0"):
        replace(mdp, reward_value=value + 1.0, reward_probability=even)
    with pytest.raises(ValueError, match="from state 0 with action 0 to state 1 must be probabilities that sum to 1"):
        replace(mdp, reward_value=value, reward_probability=even * 0.9)
    with pytest.raises(ValueError, match="needs both reward_value and reward_probability"):
        replace(mdp, reward_value=value)
    with pytest.raises(ValueError, match=r"must have shape \[S, A, S, K\]"):
        replace(mdp, reward_value=value[0], reward_probability=even[0])


def test_states_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match=r"terminal must name states from 0 to 1; got \[2\]"):
        FiniteMDP.from_tables([[[0, 1]], [[0, 1]]], [[1], [0]], terminal=[2])
    with pytest.raises(ValueError, match="start must be a state from 0 to 1"):
        FiniteMDP.from_tables([[[0, 1]], [[0, 1]]], [[1], [0]], terminal=[1], start=2)


WAY, GAIN = [[[0, 0.5, 0.5]], [[0, 0, 1]], [[0, 0, 0]]], [[1], [1], [0]]


@pytest.mark.parametrize(
    "terminal", [[2], (2,), np.array([2]), [False, False, True], np.array([False, False, True]), [np.int64(2)]]
)
def test_terminal_states_by_number_or_one_boolean_each(terminal: list[int]) -> None:
    assert FiniteMDP.from_tables(WAY, GAIN, terminal=terminal).terminal.tolist() == [False, False, True]


def test_two_booleans_are_no_numbers_and_a_mask_may_name_the_first_state() -> None:
    mdp = FiniteMDP.from_tables([[[0, 0]], [[1, 0]]], [[0], [1]], start=1, terminal=[True, False])
    assert mdp.terminal.tolist() == [True, False]


@pytest.mark.parametrize("terminal", [[2.0], [False, True], [0, True], 2, [[2]], ["2"], [0.0, 0.0, 1.0]])
def test_what_names_no_terminal_states_is_refused(terminal: list[int]) -> None:
    with pytest.raises(ValueError, match="numbers of the terminal states, or one boolean for each of the 3 states"):
        FiniteMDP.from_tables(WAY, GAIN, terminal=terminal)


@pytest.mark.parametrize("start", [0, np.int64(0), np.uint8(0), np.array(0), [1.0, 0.0, 0.0]])
def test_a_start_by_any_whole_number(start: int) -> None:
    assert FiniteMDP.from_tables(WAY, GAIN, terminal=[2], start=start).start.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("start", [True, 0.0, 3, -1, np.bool_(True)])
def test_a_start_that_is_no_state_is_refused(start: int) -> None:
    with pytest.raises(ValueError, match=r"start must be a state from 0 to 2 or a distribution \[S\]"):
        FiniteMDP.from_tables(WAY, GAIN, terminal=[2], start=start)


def test_observations_must_be_there_and_finite() -> None:
    with pytest.raises(ValueError, match="observation is empty"):
        FiniteMDP.from_tables(WAY, GAIN, terminal=[2], observation=[])
    with pytest.raises(ValueError, match="observation must have one entry for each of the 3 states"):
        replace(FiniteMDP.from_tables(WAY, GAIN, terminal=[2]), observation=torch.zeros(3, 0))
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match="the observation of state 1 is not finite"):
            FiniteMDP.from_tables(WAY, GAIN, terminal=[2], observation=[[0.0, 1.0], [0.0, value], [1.0, 1.0]])


def test_sums_within_the_tolerance_are_made_exact() -> None:
    """Over 10,000 steps a row that sums to 1 + 9e-10 would make the probability of being somewhere 1 + 9e-6."""
    off = 9e-10
    mdp = FiniteMDP.from_tables(
        [[[0.25, 0.75 + off]], [[0.5 - off, 0.5]]], [[1], [0]], start=[0.5 + off, 0.5], gamma=0.9
    )
    somewhere = mdp.start @ torch.linalg.matrix_power(mdp.transition[:, 0], 10_000)
    assert abs(float(somewhere.sum()) - 1.0) < 1e-11
    assert float(mdp.transition[0, 0, 1]) / 3.0 == pytest.approx(float(mdp.transition[0, 0, 0]), rel=2e-9)
    again = replace(mdp, gamma=0.5)
    assert torch.equal(again.transition, mdp.transition)
    assert torch.equal(again.start, mdp.start)


def test_sums_that_are_right_to_rounding_are_left_alone() -> None:
    tenths = [0.1] * 10
    mdp = FiniteMDP.from_tables([[tenths]] * 10, [[1.0]] * 10, gamma=0.9)
    assert mdp.transition.flatten().tolist() == tenths * 10
