"""The theorem against autograd through the solve and against enumeration; what dropping gamma^t does."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from upslope.estimators import discount_weight
from upslope.exact import (
    PROBLEMS,
    FiniteMDP,
    Rows,
    StatePolicy,
    TabularPolicy,
    enumerate_episodes,
    enumerated_gradient,
    objective_gradient,
    policy_gradient,
    problem,
    solve,
    state_weights,
    time_limited,
)
from upslope.exact.gradient import Gradient

AVERAGE = ("ring", "two-state-continuing", "access-control")
DISCOUNTED = ("two-state", "six-state", "loops", "time-limit", "noisy-rewards")


def the_gradient(name: str) -> Gradient:
    return "average_reward" if name in AVERAGE else "discounted"


def discounts(rows: Rows, gamma: float) -> Tensor:
    """gamma^t of the steps there are, [R, T]."""
    return discount_weight(rows.trajectory.time, gamma, dtype=torch.float64) * rows.trajectory.mask


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", list(PROBLEMS))
def test_the_theorem_is_the_gradient_of_the_objective(name: str, seed: int) -> None:
    named = problem(name)
    policy = named.policy(seed)
    theorem = policy_gradient(named.mdp, policy, gradient=the_gradient(name))
    close(theorem, objective_gradient(named.mdp, policy))
    assert theorem.dtype == torch.float64
    assert (theorem.norm() > 1e-3) == (name != "baird")


@pytest.mark.parametrize("name", ["bandit", "six-state", "noisy-rewards"])
def test_the_theorem_is_the_gradient_of_the_enumerated_returns(name: str) -> None:
    named = problem(name)
    policy = named.policy(0)
    rows = enumerate_episodes(named.mdp, policy)
    close(enumerated_gradient(rows, policy, named.mdp.gamma), policy_gradient(named.mdp, policy), 1e-12)


@pytest.mark.parametrize("name", DISCOUNTED)
def test_without_the_discount_of_states_it_is_another_vector(name: str) -> None:
    named = problem(name)
    policy = named.policy(0)
    right = policy_gradient(named.mdp, policy)
    dropped = policy_gradient(named.mdp, policy, gradient="undiscounted_states")
    assert float((right - dropped).norm() / right.norm()) > 0.05


@pytest.mark.parametrize("name", ["short-corridor", "random-walk-5", "bandit", "cliff-walking"])
def test_without_discount_both_are_the_same(name: str) -> None:
    named = problem(name)
    policy = named.policy(0)
    close(policy_gradient(named.mdp, policy, gradient="undiscounted_states"), policy_gradient(named.mdp, policy), 1e-14)


def jacobian(mdp: FiniteMDP, policy: TabularPolicy, gradient: Gradient, step: float = 1e-5) -> Tensor:
    """By central differences, [P, P]."""
    flat = policy.theta.data.view(-1)
    columns: list[Tensor] = []
    for entry in range(len(flat)):
        before = float(flat[entry])
        sides: list[Tensor] = []
        for moved in (before + step, before - step):
            flat[entry] = moved
            sides.append(policy_gradient(mdp, policy, gradient=gradient, parameters=[policy.theta]))
        flat[entry] = before
        columns.append((sides[0] - sides[1]) / (2 * step))
    return torch.stack(columns, -1)


@pytest.mark.parametrize("name", ["two-state", "six-state"])
def test_the_direction_without_gamma_to_the_t_is_the_gradient_of_no_function(name: str) -> None:
    """A gradient has a symmetric Jacobian (Nota & Thomas 2020)."""
    named = problem(name)
    policy = named.policy(0)
    assert isinstance(policy, TabularPolicy)
    true, dropped = (jacobian(named.mdp, policy, kind) for kind in ("discounted", "undiscounted_states"))
    assert float((true - true.mT).abs().max()) < 1e-8
    assert float((dropped - dropped.mT).abs().max()) > 1e-3


def test_by_hand_on_a_bandit() -> None:
    named = problem("bandit")
    policy = TabularPolicy(2, 4)
    mean = torch.tensor([1.0, 0.2, -0.5, 0.6], dtype=torch.float64)
    expected = torch.cat([(mean - mean.mean()) / 4, torch.zeros(4)])
    close(policy_gradient(named.mdp, policy, parameters=[policy.theta]), expected, 1e-14)


@pytest.mark.parametrize("gradient", ["discounted", "undiscounted_states"])
@pytest.mark.parametrize("name", ["time-limit", "loops", "six-state"])
def test_a_limit_counts_the_steps_before_it_with_unlimited_action_values(name: str, gradient: Gradient) -> None:
    """E[sum over the steps before the limit of (gamma^t) grad log pi q], row by row."""
    named = problem(name)
    policy = named.policy(0)
    rows = enumerate_episodes(named.mdp, policy, limit=3)
    trajectory = rows.trajectory
    action_value = solve(named.mdp, policy).action_value.detach()[rows.state, trajectory.action]
    discount = named.mdp.gamma if gradient == "discounted" else 1.0
    weight = rows.behaviour_probability.unsqueeze(-1) * discounts(rows, discount)
    surrogate = (weight * policy.log_prob(trajectory.observation, trajectory.action) * action_value).sum()
    (expected,) = torch.autograd.grad(surrogate, [policy.theta])
    actual = policy_gradient(named.mdp, policy, gradient=gradient, limit=3, parameters=[policy.theta])
    close(actual, expected.flatten(), 1e-12)


def test_a_limit_that_is_never_reached_changes_nothing() -> None:
    named = problem("six-state")
    policy = named.policy(0)
    close(policy_gradient(named.mdp, policy, limit=9), policy_gradient(named.mdp, policy), 1e-13)
    limited = time_limited(named.mdp, 9)
    close(policy_gradient(limited, policy), policy_gradient(named.mdp, policy), 1e-13)


@pytest.mark.parametrize("name", ["time-limit", "short-corridor", "noisy-rewards"])
def test_a_limit_as_part_of_the_task_is_the_gradient_of_the_limited_return(name: str) -> None:
    named = problem(name)
    policy, limited = named.policy(0), time_limited(named.mdp, 4)
    rows = enumerate_episodes(named.mdp, policy, limit=4)
    gain = (rows.trajectory.reward * discounts(rows, named.mdp.gamma)).sum(-1)
    close(solve(limited, policy).objective.detach(), rows.behaviour_probability @ gain, 1e-12)
    close(policy_gradient(limited, policy), enumerated_gradient(rows, policy, named.mdp.gamma), 1e-12)
    close(policy_gradient(limited, policy), objective_gradient(limited, policy), 1e-12)
    assert solve(limited, policy).mean_length < 4.0 + 1e-12


def test_where_truncation_matters_it_matters_much() -> None:
    named = problem("time-limit")
    assert named.limit == 4
    policy = named.policy(0)
    bootstrapped = policy_gradient(named.mdp, policy, limit=named.limit)
    ended = policy_gradient(time_limited(named.mdp, named.limit), policy)
    assert float((bootstrapped - ended).norm() / bootstrapped.norm()) > 0.2


def test_reward_distributions_come_along_into_a_limited_problem() -> None:
    named = problem("noisy-rewards")
    policy = named.policy(0)
    assert len(enumerate_episodes(time_limited(named.mdp, 2), policy)) == len(
        enumerate_episodes(named.mdp, policy, limit=2)
    )


def layered(seed: int, states: int, actions: int, gamma: float) -> FiniteMDP:
    """Every state leads only to later ones."""
    generator = torch.Generator().manual_seed(seed)
    later = torch.ones(states, states).triu(1).to(torch.float64)
    weight = torch.rand(states, actions, states, generator=generator, dtype=torch.float64) * later.unsqueeze(1)
    weight[-1] = 1.0
    start = torch.rand(states, generator=generator, dtype=torch.float64)
    start[-1] = 0.0
    return FiniteMDP(
        transition=weight / weight.sum(-1, keepdim=True),
        reward=torch.randn(states, actions, states, generator=generator, dtype=torch.float64),
        start=start / start.sum(),
        terminal=torch.arange(states) == states - 1,
        gamma=gamma,
    )


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    states=st.integers(2, 5),
    actions=st.integers(1, 3),
    gamma=st.sampled_from([0.0, 0.7, 1.0]),
)
def test_three_ways_to_a_gradient_agree(seed: int, states: int, actions: int, gamma: float) -> None:
    mdp = layered(seed, states, actions, gamma)
    generator = torch.Generator().manual_seed(seed + 1)
    policy = TabularPolicy(states, actions, torch.randn(states, actions, generator=generator))
    theorem = policy_gradient(mdp, policy)
    close(theorem, objective_gradient(mdp, policy), 1e-11)
    close(theorem, enumerated_gradient(enumerate_episodes(mdp, policy), policy, gamma), 1e-11)


class Network(StatePolicy):
    """Preferences from a small network of the state's number, scaled."""

    def __init__(self, states: int, actions: int) -> None:
        super().__init__(states, actions)
        self.net = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, actions)).double()

    def preferences(self) -> Tensor:
        states = torch.arange(len(self.value), dtype=torch.float64).unsqueeze(-1)
        return self.net(states / len(self.value))


@pytest.mark.parametrize("name", ["six-state", "loops", "ring"])
def test_any_differentiable_policy_will_do(name: str) -> None:
    torch.manual_seed(0)
    named = problem(name)
    policy = Network(named.mdp.states, named.mdp.actions)
    theorem = policy_gradient(named.mdp, policy, gradient=the_gradient(name))
    close(theorem, objective_gradient(named.mdp, policy))
    count = len(policy.value)
    assert theorem[:count].tolist() == [0.0] * count
    assert theorem.norm() > 1e-3


def test_states_that_look_alike_share_their_gradient() -> None:
    named = problem("six-state")
    alike = replace(named.mdp, observation=torch.tensor([0, 1, 1, 2, 2, 0, 3]))
    policy = named.policy(0)
    close(policy_gradient(alike, policy), objective_gradient(alike, policy))
    theta = policy_gradient(alike, policy, parameters=[policy.theta]).view(7, 2)
    assert theta[4:].abs().max() == 0.0
    assert theta[:3].abs().min() > 0.0


def test_parameters_are_chosen_and_frozen_ones_left_out() -> None:
    named = problem("six-state")
    policy = named.policy(0)
    assert policy_gradient(named.mdp, policy).shape == (7 + 14,)
    assert policy_gradient(named.mdp, policy, parameters=[policy.theta]).shape == (14,)
    policy.value.requires_grad_(False)
    assert policy_gradient(named.mdp, policy).shape == (14,)
    policy.theta.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter to differentiate"):
        policy_gradient(named.mdp, policy)


def test_gradients_that_do_not_go_with_the_problem_are_refused() -> None:
    ring, six, baird = problem("ring"), problem("six-state"), problem("baird")
    with pytest.raises(ValueError, match="'discounted' does not go with a problem of kind 'continuing'"):
        policy_gradient(ring.mdp, ring.policy(0))
    with pytest.raises(ValueError, match="'average_reward' does not go with a problem of kind 'episodic'"):
        policy_gradient(six.mdp, six.policy(0), gradient="average_reward")
    with pytest.raises(ValueError, match="a continuing problem has no time limit"):
        policy_gradient(ring.mdp, ring.policy(0), gradient="average_reward", limit=3)
    with pytest.raises(ValueError, match="episodes of this policy need not end"):
        policy_gradient(baird.mdp, baird.policy(0), gradient="undiscounted_states")
    with pytest.raises(ValueError, match="a continuing problem has no time limit"):
        time_limited(ring.mdp, 3)
    with pytest.raises(ValueError, match="limit must be at least 1 step"):
        time_limited(six.mdp, 0)


def test_weights_of_states_are_visits() -> None:
    named = problem("loops")
    solution = solve(named.mdp, named.policy(0))
    close(state_weights(named.mdp, named.policy(0)), solution.visits.detach(), 1e-14)
    undiscounted = state_weights(named.mdp, named.policy(0), gradient="undiscounted_states")
    close(undiscounted, solution.undiscounted_visits.detach(), 1e-14)
