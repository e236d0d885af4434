"""Values, visits and objectives against numbers worked out by hand, and the identities between them."""

import math
from dataclasses import replace

import pytest
import torch

from upslope.exact import (
    PROBLEMS,
    FiniteMDP,
    TabularPolicy,
    observed_value,
    policy_gradient,
    problem,
    solve,
    state_time_occupancy,
)

EPISODIC = [name for name in PROBLEMS if problem(name).mdp.kind == "episodic"]


def close(actual: torch.Tensor, expected: object, tolerance: float = 1e-12) -> None:
    wanted = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.detach(), wanted.detach(), rtol=tolerance, atol=tolerance)


def greedy(actions: list[int], of: int) -> TabularPolicy:
    """All the probability on one action per state."""
    chosen = torch.nn.functional.one_hot(torch.tensor(actions), of)
    return TabularPolicy(len(actions), of, torch.where(chosen == 1, 0.0, -torch.inf).to(torch.float64))


def test_two_states_by_hand() -> None:
    solution = solve(problem("two-state").mdp, TabularPolicy(3, 2))
    second = (0.5 + 0.225 * 0.75) / (1 - 0.45 * 0.225)
    first = 0.75 + 0.45 * second
    close(solution.value, [first, second, 0.0])
    close(solution.action_value, [[1 + 0.9 * second, 0.5], [-1.0, 2 + 0.45 * first], [0.0, 0.0]])
    close(solution.visits, [1 / (1 - 0.45 * 0.225), 0.45 / (1 - 0.45 * 0.225), 0.0])
    close(solution.undiscounted_visits, [8 / 7, 4 / 7, 0.0])
    close(solution.on_policy, [2 / 3, 1 / 3, 0.0])
    close(solution.mean_length, 12 / 7)
    close(solution.objective, first)
    assert solution.average_reward is None


@pytest.mark.parametrize("name", EPISODIC)
def test_the_objective_is_the_rewards_of_the_visits(name: str) -> None:
    named = problem(name)
    solution = solve(named.mdp, named.policy(3))
    reward = (named.mdp.transition * named.mdp.reward).sum(-1)
    close(solution.objective, solution.visits @ (solution.policy * reward).sum(-1), 1e-9)
    close(solution.value, (solution.policy * solution.action_value).sum(-1), 1e-9)
    close((solution.policy * solution.advantage).sum(-1), torch.zeros(named.mdp.states), 1e-9)


@pytest.mark.parametrize("name", ["two-state", "six-state", "loops", "random-walk-5", "short-corridor"])
def test_visits_are_summed_occupancies(name: str) -> None:
    named = problem(name)
    policy = named.policy(1)
    occupancy, solution = state_time_occupancy(named.mdp, policy), solve(named.mdp, policy)
    close(occupancy.sum(0), solution.undiscounted_visits, 1e-9)
    close(named.mdp.gamma ** torch.arange(len(occupancy), dtype=torch.float64) @ occupancy, solution.visits, 1e-9)


@pytest.mark.parametrize("name", ["random-walk-5", "short-corridor", "bandit", "cliff-walking"])
def test_the_constant_of_proportionality_is_the_mean_length(name: str) -> None:
    named = problem(name)
    policy = named.policy(2)
    solution = solve(named.mdp, policy)
    shared = (solution.on_policy.detach()[:, None] * solution.policy * solution.action_value.detach()).sum()
    (slope,) = torch.autograd.grad(shared, [policy.theta], retain_graph=True)
    scaled = solution.mean_length.detach() * slope.flatten()
    close(policy_gradient(named.mdp, policy, parameters=[policy.theta]), scaled, 1e-10)
    assert float(solution.mean_length.detach()) > 0.99


@pytest.mark.parametrize("name", ["ring", "two-state-continuing", "access-control"])
def test_differential_values_satisfy_their_equations(name: str) -> None:
    named = problem(name)
    solution = solve(named.mdp, named.policy(0))
    assert solution.average_reward is not None
    move = torch.einsum("sa,sax->sx", solution.policy, named.mdp.transition)
    reward = (solution.policy * (named.mdp.transition * named.mdp.reward).sum(-1)).sum(-1)
    close(solution.on_policy @ move, solution.on_policy)
    close(solution.on_policy.sum(), 1.0)
    close(solution.average_reward, solution.on_policy @ reward)
    close(solution.objective, solution.average_reward)
    close(solution.value, reward - solution.average_reward + move @ solution.value)
    close(solution.on_policy @ solution.value, 0.0)
    close((solution.policy * solution.action_value).sum(-1), solution.value)
    assert math.isinf(float(solution.mean_length))


def test_the_average_reward_of_two_states_by_hand() -> None:
    policy = TabularPolicy(2, 2, torch.tensor([[0.7, 0.3], [0.9, 0.1]]).log())
    solution = solve(problem("two-state-continuing").mdp, policy)
    close(solution.objective, 0.75, 1e-7)
    close(solution.on_policy, [0.25, 0.75], 1e-7)
    assert torch.isinf(solution.undiscounted_visits).all()


def test_a_policy_that_splits_a_continuing_problem_is_refused() -> None:
    mdp = FiniteMDP.from_tables([[[1, 0], [0, 1]], [[0, 1], [1, 0]]], [[0, 0], [1, 1]], kind="continuing")
    with pytest.raises(ValueError, match=r"stays for good in one of the classes \[\[0\], \[1\]\]"):
        solve(mdp, greedy([0, 0], 2))


def test_states_a_policy_passes_once_have_no_share_in_a_continuing_problem() -> None:
    mdp = FiniteMDP.from_tables([[[1, 0], [0, 1]], [[0, 1], [1, 0]]], [[0, 0], [1, 1]], kind="continuing")
    solution = solve(mdp, greedy([1, 0], 2))
    close(solution.on_policy, [0.0, 1.0])
    close(solution.value, [-1.0, 0.0])


def endless_beside_an_end(gamma: float) -> tuple[FiniteMDP, TabularPolicy]:
    """From 0 to the end, to 1 for ever, or to the circle 2, 3: with probability 0.5, 0.2 and 0.3."""
    mdp = FiniteMDP.from_tables(
        [
            [[0, 0, 0, 0, 1], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0]],
            [[0, 1, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 1]],
            [[0, 0, 0, 1, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]],
            [[0, 0, 1, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 1]],
            [[0, 0, 0, 0, 1]] * 3,
        ],
        [[1.0, 2.0, 3.0]] * 5,
        terminal=[4],
        gamma=gamma,
    )
    never = -torch.inf
    rows = [[math.log(0.5), math.log(0.2), math.log(0.3)]] + [[0.0, 0.0, never]] * 3 + [[0.0, 0.0, 0.0]]
    return mdp, TabularPolicy(5, 3, torch.tensor(rows, dtype=torch.float64))


def test_endless_discounted_episodes_have_values_and_infinite_visits() -> None:
    solution = solve(*endless_beside_an_end(0.5))
    close(solution.value, [0.5 * 1 + 0.2 * (2 + 1.5) + 0.3 * (3 + 1.5), 3.0, 3.0, 3.0, 0.0])
    close(solution.visits, [1.0, 0.2, 0.15 / 0.75, 0.075 / 0.75, 0.0])
    assert solution.undiscounted_visits.tolist() == [1.0, math.inf, math.inf, math.inf, 0.0]
    close(solution.on_policy, [0.0, 0.4, 0.3, 0.3, 0.0])


def test_without_discount_what_need_not_end_has_no_value() -> None:
    mdp, policy = endless_beside_an_end(1.0)
    solution = solve(mdp, policy)
    assert torch.isnan(solution.value).tolist() == [True, True, True, True, False]
    assert torch.isnan(solution.action_value[0]).tolist() == [False, True, True]
    assert torch.isnan(solution.objective)
    with pytest.raises(ValueError, match="episodes of this policy need not end"):
        policy_gradient(mdp, policy)


def test_states_that_are_not_visited_do_not_spoil_the_rest() -> None:
    mdp, _ = endless_beside_an_end(1.0)
    solution = solve(mdp, greedy([0, 0, 0, 0, 0], 3))
    assert solution.objective == 1.0
    assert solution.mean_length == 1.0
    assert torch.isnan(solution.value).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("name", ["six-state", "ring", "time-limit"])
def test_the_value_of_what_is_seen_is_the_value_where_states_look_different(name: str) -> None:
    named = problem(name)
    solution = solve(named.mdp, named.policy(0))
    close(observed_value(named.mdp, solution), solution.value)


def test_the_value_of_states_that_look_alike_is_the_mean_over_steps() -> None:
    """The corridor under the even policy: visits 6, 4 and 2 with values -12, -10 and -6, and the end apart."""
    named = problem("short-corridor")
    policy = named.policy(0)
    policy.theta.data.zero_()
    solution = solve(named.mdp, policy)
    close(solution.undiscounted_visits, [6.0, 4.0, 2.0, 0.0])
    close(solution.value, [-12.0, -10.0, -6.0, 0.0])
    close(observed_value(named.mdp, solution), [-(72.0 + 40.0 + 12.0) / 12.0])


def test_observations_without_a_number_have_no_table() -> None:
    named = problem("six-state")
    mdp = replace(named.mdp, observation=torch.zeros(7, 2))
    with pytest.raises(ValueError, match="observations must be whole numbers"):
        observed_value(mdp, solve(named.mdp, named.policy(0)))
