"""All rows and their probabilities: episodes, fragments, limits, random rewards, selections."""

import math

import pytest
import torch

from upslope.estimators import discount_weight
from upslope.exact import (
    PROBLEMS,
    Rows,
    TabularPolicy,
    enumerate_episodes,
    enumerate_fragments,
    problem,
    solve,
    state_time_occupancy,
)

FINITE = ("bandit", "six-state", "noisy-rewards")


def returns(rows: Rows, gamma: float) -> torch.Tensor:
    weight = discount_weight(rows.trajectory.time, gamma, dtype=torch.float64)
    return (rows.trajectory.reward * weight * rows.trajectory.mask).sum(-1)


def total(rows: Rows) -> float:
    return float(rows.behaviour_probability.sum())


@pytest.mark.parametrize("name", FINITE)
def test_episodes_have_probability_one_and_the_exact_return(name: str) -> None:
    named = problem(name)
    policy = named.policy(0)
    rows = enumerate_episodes(named.mdp, policy)
    trajectory, gain = rows.trajectory, returns(rows, named.mdp.gamma)
    assert total(rows) == pytest.approx(1.0, abs=1e-13)
    expected = float(solve(named.mdp, policy).objective.detach())
    assert float(rows.behaviour_probability @ gain) == pytest.approx(expected, abs=1e-12)
    assert trajectory.terminated.sum() == len(rows)
    assert len(trajectory.final_index) == 0


@pytest.mark.parametrize("start", [0, 1, 2])
def test_returns_from_a_chosen_start_are_the_values(start: int) -> None:
    named = problem("six-state")
    policy = named.policy(1)
    rows = enumerate_episodes(named.mdp, policy, start=start)
    expected = float(solve(named.mdp, policy).value[start].detach())
    assert float(rows.behaviour_probability @ returns(rows, named.mdp.gamma)) == pytest.approx(expected, abs=1e-12)


def test_every_episode_of_the_bandit() -> None:
    rows = enumerate_episodes(problem("bandit").mdp, TabularPolicy(2, 4))
    found = sorted(
        (int(action), float(reward), float(p))
        for action, reward, p in zip(
            rows.trajectory.action[:, 0], rows.trajectory.reward[:, 0], rows.behaviour_probability, strict=True
        )
    )
    means, spread = (1.0, 0.2, -0.5, 0.6), (1.0, 0.3, 2.0, 0.0)
    wanted = [(a, m + side * d, 0.125) for a, (m, d) in enumerate(zip(means, spread, strict=True)) for side in (-1, 1)]
    assert [row[0] for row in found] == [row[0] for row in sorted(wanted)]
    assert [x for row in found for x in row] == pytest.approx([x for row in sorted(wanted) for x in row])


def test_a_limit_truncates_and_keeps_what_followed() -> None:
    named = problem("loops")
    rows = enumerate_episodes(named.mdp, named.policy(0), limit=3)
    trajectory = rows.trajectory
    assert total(rows) == pytest.approx(1.0, abs=1e-13)
    assert trajectory.shape[1] == 3
    assert not (trajectory.terminated & trajectory.truncated).any()
    ended = (trajectory.terminated | trajectory.truncated) & trajectory.mask
    assert ended.sum(-1).tolist() == [1] * len(rows)
    row, step = trajectory.final_index // 3, trajectory.final_index % 3
    assert trajectory.truncated[row, step].all()
    assert int(trajectory.truncated.sum()) == len(row)
    assert (step == 2).all()
    assert not named.mdp.terminal[trajectory.final_observation].any()
    state, action = rows.state[row, step], trajectory.action[row, step]
    assert (named.mdp.transition[state, action, trajectory.final_observation] > 0).all()


def test_consecutive_states_of_a_row_follow_each_other() -> None:
    named = problem("six-state")
    rows = enumerate_episodes(named.mdp, named.policy(0))
    trajectory = rows.trajectory
    inside = trajectory.mask[:, 1:]
    likely = named.mdp.transition[rows.state[:, :-1], trajectory.action[:, :-1], rows.state[:, 1:]]
    assert (likely[inside] > 0).all()
    assert (trajectory.time == torch.arange(trajectory.shape[1]))[trajectory.mask].all()
    assert trajectory.mask.sum(-1).tolist() == rows.length.tolist()
    luck = named.mdp.start[rows.state[:, 0]]
    for row in range(len(rows)):
        steps = int(rows.length[row])
        states = [*rows.state[row, :steps].tolist(), 6]
        for step in range(steps):
            luck[row] *= named.mdp.transition[states[step], trajectory.action[row, step], states[step + 1]]
    torch.testing.assert_close(rows.luck, luck, rtol=1e-12, atol=0)


def test_probabilities_of_another_policy_and_its_gradient() -> None:
    named = problem("six-state")
    rows = enumerate_episodes(named.mdp, named.policy(0))
    other = named.policy(1)
    probability = rows.probability(other.log_prob(rows.trajectory.observation, rows.trajectory.action))
    assert float(probability.sum().detach()) == pytest.approx(1.0, abs=1e-13)
    (slope,) = torch.autograd.grad(probability.sum(), [other.theta])
    assert slope.abs().max() < 1e-14


@pytest.mark.parametrize("name", [*FINITE, "two-state", "time-limit", "ring"])
def test_fragments_have_probability_one_and_the_shares_of_states(name: str) -> None:
    named = problem(name)
    policy = named.policy(0)
    rows = enumerate_fragments(named.mdp, policy, steps=3, limit=named.limit)
    assert total(rows) == pytest.approx(1.0, abs=1e-10)
    assert rows.trajectory.mask.all()
    if named.limit is None:
        share = solve(named.mdp, policy).on_policy.detach()
    else:
        visits = state_time_occupancy(named.mdp, policy, limit=named.limit).sum(0)
        share = visits / visits.sum()
    for step in range(3):
        met = torch.zeros(named.mdp.states, dtype=torch.float64)
        met.index_add_(0, rows.state[:, step], rows.behaviour_probability)
        torch.testing.assert_close(met, share, rtol=0, atol=1e-10)


def test_fragments_go_through_ends_into_new_episodes() -> None:
    named = problem("time-limit")
    rows = enumerate_fragments(named.mdp, named.policy(0), steps=4, limit=4)
    trajectory = rows.trajectory
    ended = (trajectory.terminated | trajectory.truncated)[:, :-1]
    assert (trajectory.time[:, 1:][ended] == 0).all()
    assert (named.mdp.start[rows.state[:, 1:][ended]] > 0).all()
    assert (trajectory.time[:, 1:] == trajectory.time[:, :-1] + 1)[~ended].all()
    assert (trajectory.truncated == ((trajectory.time == 3) & ~trajectory.terminated)).all()
    last = torch.zeros_like(trajectory.mask)
    last[:, -1] = True
    open_end = ~trajectory.terminated & (trajectory.truncated | last)
    assert trajectory.final_index.tolist() == open_end.flatten().nonzero().squeeze(-1).tolist()


def test_a_continuing_problem_has_fragments_only() -> None:
    named = problem("ring")
    policy = named.policy(0)
    rows = enumerate_fragments(named.mdp, policy, steps=2)
    assert not (rows.trajectory.terminated | rows.trajectory.truncated).any()
    gain = float(rows.behaviour_probability @ rows.trajectory.reward.mean(-1))
    assert gain == pytest.approx(float(solve(named.mdp, policy).objective.detach()), abs=1e-12)
    with pytest.raises(ValueError, match="a continuing problem has no episodes: give a limit"):
        enumerate_episodes(named.mdp, policy)
    with pytest.raises(ValueError, match="a continuing problem has no time limit"):
        enumerate_fragments(named.mdp, policy, steps=2, limit=4)


@pytest.mark.parametrize("chosen", [[0], [5], [3, 3], [7, 0, 2, 7], list(range(40))])
def test_selected_rows_are_the_rows(chosen: list[int]) -> None:
    named = problem("time-limit")
    rows = enumerate_fragments(named.mdp, named.policy(0), steps=3, limit=2)
    picked, whole = rows.select(chosen), rows.trajectory
    for name in ("observation", "action", "reward", "terminated", "truncated", "mask", "behaviour_log_prob", "time"):
        assert torch.equal(getattr(picked, name), getattr(whole, name)[chosen]), name
    value = torch.arange(4, dtype=torch.float64) + 1
    following = whole.next_value(value[whole.observation], value[whole.final_observation])
    again = picked.next_value(value[picked.observation], value[picked.final_observation])
    assert torch.equal(again, following[chosen])


def test_selected_rows_are_no_longer_than_the_longest() -> None:
    named = problem("six-state")
    rows = enumerate_episodes(named.mdp, named.policy(0))
    shortest = int(rows.length.argmin())
    picked = rows.select([shortest])
    assert picked.shape == (1, int(rows.length[shortest]))
    assert picked.mask.all()
    longest = int(rows.length.argmax())
    assert rows.select([shortest, longest]).shape == (2, int(rows.length[longest]))


def test_too_many_rows_are_refused_with_the_way_on() -> None:
    named = problem("loops")
    with pytest.raises(ValueError, match="more than 500 rows: take a smaller problem, a time limit"):
        enumerate_episodes(named.mdp, named.policy(0), most=500)
    with pytest.raises(ValueError, match="more than 100 rows"):
        enumerate_fragments(named.mdp, named.policy(0), steps=4, most=100)


def test_arguments_out_of_range_are_refused() -> None:
    named = problem("six-state")
    policy = named.policy(0)
    with pytest.raises(ValueError, match="limit must be at least 1"):
        enumerate_episodes(named.mdp, policy, limit=0)
    with pytest.raises(ValueError, match="limit must be at least 1"):
        state_time_occupancy(named.mdp, policy, limit=0)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        enumerate_fragments(named.mdp, policy, steps=0)
    with pytest.raises(ValueError, match="start must be a state that is not terminal"):
        enumerate_episodes(named.mdp, policy, start=6)


def test_episodes_without_end_are_refused_with_the_way_on() -> None:
    named = problem("baird")
    with pytest.raises(ValueError, match="give a time limit"):
        state_time_occupancy(named.mdp, named.policy(0), longest=50)
    assert state_time_occupancy(named.mdp, named.policy(0), limit=7).shape == (7, 7)


def test_impossible_actions_are_not_followed() -> None:
    preferences = torch.zeros(7, 2, dtype=torch.float64)
    preferences[:, 1] = -math.inf
    rows = enumerate_episodes(problem("six-state").mdp, TabularPolicy(7, 2, preferences))
    assert not rows.trajectory.action[rows.trajectory.mask].any()
    assert total(rows) == pytest.approx(1.0, abs=1e-13)


@pytest.mark.parametrize("name", list(PROBLEMS))
def test_every_problem_can_be_cut_into_rows(name: str) -> None:
    named = problem(name)
    rows = enumerate_episodes(named.mdp, named.policy(0), limit=2)
    assert total(rows) == pytest.approx(1.0, abs=1e-12)
