"""Answers printed in the literature."""

import math

import pytest
import torch

from upslope.exact import (
    PROBLEMS,
    LinearPolicy,
    TabularPolicy,
    enumerate_episodes,
    objective_gradient,
    policy_gradient,
    problem,
    solve,
)

BEST = 2.0 - math.sqrt(2.0)


def corridor(right: float) -> LinearPolicy:
    """Right with this probability, everywhere."""
    policy = problem("short-corridor").policy(0)
    assert isinstance(policy, LinearPolicy)
    theta = torch.tensor([math.log(right / (1.0 - right)), 0.0], dtype=torch.float64)
    return LinearPolicy(policy.features, theta)


def corridor_value(right: float) -> float:
    return float(solve(problem("short-corridor").mdp, corridor(right)).objective.detach())


def test_the_best_policy_of_the_short_corridor() -> None:
    published = problem("short-corridor").published
    assert published["best probability of right"] == pytest.approx(BEST, abs=1e-15)
    assert corridor_value(BEST) == pytest.approx(-(6.0 + 4.0 * math.sqrt(2.0)), abs=1e-12)
    assert published["value of the best policy"] == pytest.approx(corridor_value(BEST), abs=1e-12)
    assert all(corridor_value(right) < corridor_value(BEST) for right in (0.01, 0.3, BEST - 0.01, BEST + 0.01, 0.9))


def test_the_gradient_of_the_short_corridor_vanishes_at_the_best_policy_and_points_there() -> None:
    mdp = problem("short-corridor").mdp
    at_best = corridor(BEST)
    for slope in (policy_gradient(mdp, at_best), objective_gradient(mdp, at_best)):
        assert slope.abs().max() < 1e-12
    toward = [policy_gradient(mdp, p, parameters=[p.theta])[0] for p in (corridor(0.4), corridor(0.7))]
    assert toward[0] > 0.1
    assert toward[1] < -0.1


@pytest.mark.parametrize("right", [0.2, 0.5, 0.8])
def test_the_short_corridor_by_its_closed_form(right: float) -> None:
    assert corridor_value(right) == pytest.approx(-(4 - 2 * right) / (right * (1 - right)), rel=1e-12)


def test_the_epsilon_greedy_policies_of_the_short_corridor() -> None:
    """As printed, to whole numbers."""
    published = problem("short-corridor").published
    assert round(corridor_value(0.95)) == published["value of right with probability 0.95"] == -44
    assert round(corridor_value(0.05)) == published["value of right with probability 0.05"] == -82


def test_the_features_of_the_short_corridor_are_the_books() -> None:
    assert corridor(0.5).features.tolist() == [[[0.0, 1.0], [1.0, 0.0]]]


@pytest.mark.parametrize(("name", "states"), [("random-walk-5", 5), ("random-walk-19", 19)])
def test_values_of_the_random_walks(name: str, states: int) -> None:
    named = problem(name)
    value = solve(named.mdp, TabularPolicy(states + 2, 2)).value.detach()
    wanted = [named.published[f"value of state {state} of the even walk"] for state in range(1, states + 1)]
    assert value[1:-1].tolist() == pytest.approx(wanted, abs=1e-12)
    assert value[[0, -1]].tolist() == [0.0, 0.0]
    assert wanted[0] == {5: 1 / 6, 19: -0.9}[states]
    assert wanted[-1] == {5: 5 / 6, 19: 0.9}[states]


def path(moves: dict[int, int]) -> TabularPolicy:
    """One action per state; up where nothing is said."""
    preferences = torch.full((48, 4), -torch.inf, dtype=torch.float64)
    for state in range(48):
        preferences[state, moves.get(state, 0)] = 0.0
    return TabularPolicy(48, 4, preferences)


def test_paths_along_the_cliff() -> None:
    up, right, down = 0, 1, 2
    named = problem("cliff-walking")
    best = path({36: up, **{24 + c: right for c in range(11)}, 35: down})
    safest = path({36: up, 24: up, 12: up, **dict.fromkeys(range(11), right), 11: down, 23: down, 35: down})
    assert solve(named.mdp, best).objective == named.published["return of the best path"] == -13.0
    assert solve(named.mdp, safest).objective == named.published["return of the safest path"] == -17.0


def test_no_path_along_the_cliff_is_better() -> None:
    mdp = problem("cliff-walking").mdp
    expected, going = (mdp.transition * mdp.reward).sum(-1), (~mdp.terminal).unsqueeze(-1)
    value = torch.zeros(48, dtype=torch.float64)
    for _ in range(60):
        value = ((expected + mdp.transition @ value) * going).max(-1).values
    assert value[36] == -13.0


def test_a_step_off_the_cliff_costs_a_hundred_and_leads_back() -> None:
    mdp = problem("cliff-walking").mdp
    assert mdp.transition[36, 1, 36] == 1.0
    assert mdp.reward[36, 1, 36] == -100.0
    assert mdp.transition[25, 2, 36] == 1.0
    assert mdp.transition[35, 2, 47] == 1.0
    assert mdp.reward[35, 2, 47] == -1.0


def test_answers_worked_out_by_hand() -> None:
    two, bandit, continuing = problem("two-state"), problem("bandit"), problem("two-state-continuing")
    value = solve(two.mdp, TabularPolicy(3, 2)).objective.detach()
    assert float(value) == pytest.approx(two.published["value of the start under the even policy"], abs=1e-12)
    arms = solve(bandit.mdp, TabularPolicy(2, 4)).action_value[0].detach().tolist()
    assert arms == pytest.approx([bandit.published[f"value of action {a}"] for a in range(4)])
    average = solve(continuing.mdp, TabularPolicy(2, 2)).objective.detach()
    assert float(average) == pytest.approx(continuing.published["average reward of the even policy"], abs=1e-12)


def test_six_states_have_few_trajectories_of_several_lengths() -> None:
    named = problem("six-state")
    rows = enumerate_episodes(named.mdp, named.policy(0))
    assert len(rows) <= 300
    assert set(rows.length.tolist()) == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("name", list(PROBLEMS))
def test_named_problems_are_complete_and_reproducible(name: str) -> None:
    named = problem(name)
    assert named.name == name
    assert named.summary
    policy, again, other = named.policy(0), named.policy(0), named.policy(1)
    assert torch.equal(policy.preferences(), again.preferences())
    assert not torch.equal(policy.preferences(), other.preferences())
    assert (solve(named.mdp, policy).policy[~named.mdp.terminal] > 0.005).all()
    assert bool(named.source) == bool(named.published)


def test_an_unknown_problem_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match=r"there is no problem 'six_state'; there are: bandit, two-state, .*ring"):
        problem("six_state")
