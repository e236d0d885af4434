"""Gymnasium's toy-text environments as tables: known optima, shared ends, random rewards."""

import gymnasium
import numpy as np
import pytest
import torch

from upslope.exact import FiniteMDP, TabularPolicy, objective_gradient, policy_gradient, solve


def best_return(mdp: FiniteMDP, *, sweeps: int) -> float:
    """By value iteration."""
    going = (~mdp.terminal).unsqueeze(-1)
    expected = (mdp.transition * mdp.reward).sum(-1)
    value = torch.zeros(mdp.states, dtype=torch.float64)
    for _ in range(sweeps):
        value = ((expected + mdp.gamma * (mdp.transition @ value)) * going).max(-1).values
    return float(mdp.start @ value)


@pytest.mark.parametrize(("slippery", "success"), [(True, 14 / 17), (False, 1.0)])
def test_frozen_lake_has_its_known_success_rate(slippery: bool, success: float) -> None:
    mdp = FiniteMDP.from_toy_text(gymnasium.make("FrozenLake-v1", is_slippery=slippery))
    assert int(mdp.terminal.sum()) == 5
    assert best_return(mdp, sweeps=3000) == pytest.approx(success, abs=1e-9)


def test_cliff_walking_has_its_known_return() -> None:
    mdp = FiniteMDP.from_toy_text(gymnasium.make("CliffWalking-v1"))
    assert mdp.terminal.nonzero().flatten().tolist() == [47]
    assert best_return(mdp, sweeps=100) == -13.0


def test_taxi_has_its_known_return_and_an_exact_gradient() -> None:
    mdp = FiniteMDP.from_toy_text(gymnasium.make("Taxi-v4"), gamma=0.99)
    assert mdp.states == 500
    assert int(mdp.terminal.sum()) == 4
    policy = TabularPolicy(500, 6, torch.randn(500, 6, generator=torch.Generator().manual_seed(0)))
    theorem = policy_gradient(mdp, policy, parameters=[policy.theta])
    assert theorem.shape == (3000,)
    torch.testing.assert_close(theorem, objective_gradient(mdp, policy, parameters=[policy.theta]), rtol=0, atol=1e-10)


def test_the_best_return_of_taxi_is_what_is_known() -> None:
    mdp = FiniteMDP.from_toy_text(gymnasium.make("Taxi-v4"))
    assert best_return(mdp, sweeps=30) == pytest.approx(7.93, abs=1e-9)


class Tables:
    """State 1 ends an episode if it is reached from 0, and goes on if reached from 2."""

    def __init__(self) -> None:
        self.P = {
            0: {0: [(0.5, 1, 1.0, True), (0.25, 2, 0.0, False), (0.25, 2, 4.0, False)]},
            1: {0: [(1.0, 0, 0.0, False)]},
            2: {0: [(1.0, 1, 2.0, False)]},
        }
        self.initial_state_distrib = np.array([1.0, 0.0, 0.0])

    @property
    def unwrapped(self) -> "Tables":
        return self


def test_a_state_reached_with_and_without_done_gets_an_absorbing_copy() -> None:
    mdp = FiniteMDP.from_toy_text(Tables())
    assert mdp.states == 4
    assert mdp.terminal.tolist() == [False, False, False, True]
    assert mdp.observation.tolist() == [0, 1, 2, 1]
    assert mdp.transition[0, 0].tolist() == [0.0, 0.0, 0.5, 0.5]
    assert mdp.transition[2, 0].tolist() == [0.0, 1.0, 0.0, 0.0]
    policy = TabularPolicy(3, 1)
    assert float(solve(mdp, policy).objective.detach()) == pytest.approx((0.5 + 0.5 * (2 + 2)) / 0.5)


def test_different_rewards_of_one_transition_are_a_distribution() -> None:
    mdp = FiniteMDP.from_toy_text(Tables())
    assert mdp.reward_value is not None
    assert mdp.reward_probability is not None
    assert mdp.reward[0, 0, 2] == 2.0
    assert mdp.reward_value[0, 0, 2].tolist() == [0.0, 4.0]
    assert mdp.reward_probability[0, 0, 2].tolist() == [0.5, 0.5]
    assert mdp.reward_probability[0, 0, 3].tolist() == [1.0, 0.0]


def test_an_environment_without_tables_is_refused() -> None:
    with pytest.raises(ValueError, match="CartPoleEnv has no tables P and initial_state_distrib"):
        FiniteMDP.from_toy_text(gymnasium.make("CartPole-v1"))
