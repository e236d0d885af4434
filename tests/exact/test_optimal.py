"""Policy iteration, value iteration and gradient ascent agree with each other and with the optima that are known."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from upslope.exact import (
    PROBLEMS,
    FiniteMDP,
    LinearPolicy,
    TabularPolicy,
    best_policy,
    deterministic,
    enumerate_episodes,
    expected_return,
    gradient_ascent,
    policy_iteration,
    problem,
    solve,
    value_iteration,
)

SEEN = [name for name in PROBLEMS if name not in ("short-corridor", "cliff-walking")]


def objective(mdp: FiniteMDP, actions: Tensor) -> float:
    """J of a deterministic policy; NaN where it has none."""
    policy = TabularPolicy(mdp.states, mdp.actions, deterministic(mdp, actions).log())
    return float(solve(replace(mdp, observation=torch.arange(mdp.states)), policy).objective.detach())


@pytest.mark.parametrize("name", list(PROBLEMS))
def test_policy_iteration_rises_and_value_iteration_ends_at_the_same(name: str) -> None:
    mdp = problem(name).mdp
    found = policy_iteration(mdp)
    reached = [iteration.objective for iteration in found.iterations]
    assert all(after >= before - 1e-12 for before, after in itertools.pairwise(reached))
    assert [iteration.changed == 0 for iteration in found.iterations] == [False] * (len(reached) - 1) + [True]
    swept = value_iteration(mdp)
    assert swept.objective == pytest.approx(found.best.objective, abs=1e-9)
    if mdp.kind == "episodic":
        assert torch.allclose(swept.values[-1], found.best.value, atol=1e-9)
    else:
        difference = found.best.value - found.best.value[0]
        assert torch.allclose(swept.values[-1], difference, atol=1e-9)


@pytest.mark.parametrize("name", ["two-state", "six-state", "loops", "noisy-rewards"])
def test_no_deterministic_policy_is_better(name: str) -> None:
    mdp = problem(name).mdp
    best = policy_iteration(mdp).best
    going = (~mdp.terminal).nonzero().squeeze(-1)
    every: list[float] = []
    for choice in itertools.product(range(mdp.actions), repeat=len(going)):
        every.append(
            objective(mdp, torch.zeros(mdp.states, dtype=torch.long).index_copy(0, going, torch.tensor(choice)))
        )
    assert best.objective == pytest.approx(max(every), abs=1e-12)


def test_the_optima_that_are_known() -> None:
    best = {name: policy_iteration(problem(name).mdp).best.objective for name in PROBLEMS}
    assert best["cliff-walking"] == problem("cliff-walking").published["return of the best path"] == -13.0
    assert best["baird"] == problem("baird").published["value of every state"] == 0.0
    assert best["bandit"] == max(problem("bandit").published.values())
    assert best["two-state-continuing"] == 1.0
    assert best["random-walk-5"] == best["random-walk-19"] == 1.0
    # stay, then back or out as it falls: v1 = 2 + 0.45 v0, v0 = 1 + 0.9 v1
    assert best["two-state"] == pytest.approx((1 + 0.9 * 2) / (1 - 0.9 * 0.45), abs=1e-12)
    assert best["short-corridor"] == -3.0, "who sees the state takes three steps"


def test_the_best_policy_where_states_look_alike_is_the_books() -> None:
    named = problem("short-corridor")
    found = best_policy(named.mdp, named.policy, restarts=3)
    assert float(found.best.objective[-1]) == pytest.approx(named.published["value of the best policy"], abs=1e-9)
    assert float(found.best.policy[-1, 0, 1]) == pytest.approx(2.0 - math.sqrt(2.0), abs=1e-6)
    assert all(ascent.converged for ascent in found.ascents)


@pytest.mark.parametrize("direction", ["plain", "natural"])
@pytest.mark.parametrize("name", SEEN)
def test_exact_ascent_of_a_table_comes_to_the_optimum(name: str, direction: str) -> None:
    named = problem(name)
    begin = named.policy(0)
    before = begin.preferences().detach().clone()
    ascent = gradient_ascent(named.mdp, begin, direction=direction)  # type: ignore[arg-type]
    assert torch.equal(begin.preferences(), before), "the policy given stays as it is"
    assert bool((ascent.objective[1:] > ascent.objective[:-1]).all())
    assert float(ascent.objective[-1]) == pytest.approx(policy_iteration(named.mdp).best.objective, abs=1e-7)
    assert float(ascent.objective[0]) == pytest.approx(float(solve(named.mdp, begin).objective.detach()), abs=1e-12)
    assert len(ascent.policy) == len(ascent.objective) == len(ascent.slope) == len(ascent.step_size) + 1


def test_a_step_without_line_search_is_the_gradient_times_its_size() -> None:
    """The bandit: J = sum_a pi(a) q(a), dJ/dtheta(a) = pi(a) (q(a) - J)."""
    named = problem("bandit")
    begin = named.policy(0)
    pi, q = begin.preferences()[0].softmax(-1).detach(), torch.tensor([1.0, 0.2, -0.5, 0.6], dtype=torch.float64)
    ascent = gradient_ascent(named.mdp, begin, iterations=1, step_size=0.3, line_search=False)
    moved = ascent.final.preferences()[0].detach() - begin.preferences()[0].detach()
    assert torch.allclose(moved, 0.3 * pi * (q - pi @ q), atol=1e-12)


def test_a_step_that_leads_nowhere_says_so() -> None:
    named = problem("short-corridor")
    with pytest.raises(ValueError, match="take a smaller one, or a line search"):
        gradient_ascent(named.mdp, named.policy(0), line_search=False, step_size=1.0)
    with pytest.raises(ValueError, match="step_size above 0"):
        gradient_ascent(named.mdp, named.policy(0), step_size=0.0)


def test_a_loop_that_pays_is_refused_and_one_that_costs_nothing_is_not_walked() -> None:
    moves = [[[1, 0, 0], [0, 1, 0]], [[0, 1, 0], [0, 0, 1]], [[0, 0, 0], [0, 0, 0]]]
    pays = FiniteMDP.from_tables(moves, [[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]], terminal=[2])
    with pytest.raises(ValueError, match="no upper bound"):
        policy_iteration(pays)
    free = FiniteMDP.from_tables(moves, [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]], terminal=[2])
    assert policy_iteration(free).best.actions.tolist() == [1, 1, 0]


def test_policies_that_fall_apart_are_no_obstacle_to_the_average_reward() -> None:
    """Staying everywhere has as many closed classes as states."""
    stay_or_go = [[[1.0 if x == (s + a) % 3 else 0.0 for x in range(3)] for a in range(2)] for s in range(3)]
    mdp = FiniteMDP.from_tables(stay_or_go, [[0.1, -1.0], [0.2, -1.0], [0.5, -1.0]], kind="continuing")
    found = policy_iteration(mdp)
    assert found.iterations[0].objective == pytest.approx(0.1)
    assert found.best.objective == pytest.approx(0.5, abs=1e-12)
    assert found.best.actions.tolist() == [1, 1, 0]


def test_the_return_that_an_evaluation_measures() -> None:
    named = problem("six-state")
    policy = named.policy(0)
    rows = enumerate_episodes(named.mdp, policy)
    log_prob = policy.log_prob(rows.trajectory.observation, rows.trajectory.action)
    probability = rows.probability(log_prob).detach()
    table = solve(named.mdp, policy).policy.detach()
    total = rows.trajectory.reward.masked_fill(~rows.trajectory.mask, 0.0)
    for limit in (1, 3, 10):
        wanted = float(probability @ total[:, :limit].sum(-1))
        assert expected_return(named.mdp, table, limit=limit) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("start", [torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0, 2, 0]), torch.tensor([0])])
def test_a_start_that_is_none_is_refused(start: Tensor) -> None:
    with pytest.raises(ValueError, match="an action from 0 to 1 for each of the 3 states"):
        policy_iteration(problem("two-state").mdp, start=start)


def test_any_first_policy_leads_to_the_same_optimum() -> None:
    named = problem("six-state")
    for seed in range(5):
        start = torch.randint(2, (7,), generator=torch.Generator().manual_seed(seed))
        found = policy_iteration(named.mdp, start=start)
        assert found.best.objective == pytest.approx(policy_iteration(named.mdp).best.objective, abs=1e-12)


def test_features_that_tie_states_together_leave_a_better_table_to_the_one_who_sees() -> None:
    named = problem("short-corridor")
    policy = named.policy(0)
    assert isinstance(policy, LinearPolicy)
    found = best_policy(named.mdp, named.policy, restarts=1).best
    assert float(found.objective[-1]) < policy_iteration(named.mdp).best.objective
