"""One-step actor-critic and A2C on one fragment worked out by hand."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from tabular_world import TabularPolicy, gradients, whole_batch
from two_episodes import EXPECTED, chosen, policy_with_values, two_episodes

from upslope.algorithms import A2C, OneStepActorCritic
from upslope.algorithms.reference_kl import ReferenceKL


def test_one_step_takes_the_td_residual() -> None:
    policy = policy_with_values()
    trajectory = two_episodes(policy)
    batch = whole_batch(policy, OneStepActorCritic(gamma=0.5), trajectory)
    assert chosen(trajectory, batch.advantage) == EXPECTED["td_residual"]
    assert batch.value_target is not None
    assert chosen(trajectory, batch.value_target) == ([2.0, 3.5, 4.0], [4.0, 11.0])


def test_one_step_with_discounted_states_weighs_the_actor_and_not_the_critic() -> None:
    policy = policy_with_values()
    trajectory = two_episodes(policy)
    batch = whole_batch(policy, OneStepActorCritic(gamma=0.5, discounted_states=True), trajectory)
    assert chosen(trajectory, batch.advantage) == ([1.0, 0.75, 0.25], [2.0, 3.5])
    assert batch.value_target is not None
    assert chosen(trajectory, batch.value_target) == ([2.0, 3.5, 4.0], [4.0, 11.0])


def test_a2c_takes_gae_and_teaches_the_lambda_return() -> None:
    policy = policy_with_values()
    trajectory = two_episodes(policy)
    batch = whole_batch(policy, A2C(gamma=0.5, gae_lambda=0.5), trajectory)
    assert chosen(trajectory, batch.advantage) == EXPECTED["advantage"]
    assert batch.value_target is not None
    assert chosen(trajectory, batch.value_target) == EXPECTED["action_value"]


def test_a2c_with_lambda_1_is_the_bootstrapped_return_minus_the_value() -> None:
    """Second episode: 2 + 0.5 * (6 + 0.5 * 10) - 2 and 6 + 0.5 * 10 - 4."""
    policy = policy_with_values()
    trajectory = two_episodes(policy)
    batch = whole_batch(policy, A2C(gamma=0.5), trajectory)
    assert chosen(trajectory, batch.advantage) == ([2.0, 2.0, 1.0], [5.5, 7.0])


def test_a2c_with_lambda_0_is_the_one_step_actor_critic() -> None:
    policy = policy_with_values()
    trajectory = two_episodes(policy)
    one_step = OneStepActorCritic(gamma=0.5, value_coefficient=0.3, entropy_coefficient=0.01)
    a2c = A2C(gamma=0.5, gae_lambda=0.0, value_coefficient=0.3, entropy_coefficient=0.01)
    left = gradients(policy, one_step, whole_batch(policy, one_step, trajectory))
    right = gradients(policy, a2c, whole_batch(policy, a2c, trajectory))
    for one, two in zip(left, right, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


def test_the_gradient_is_the_mean_over_steps() -> None:
    policy = policy_with_values()
    trajectory = two_episodes(policy)
    algorithm = A2C(gamma=0.5, gae_lambda=0.5, value_coefficient=0.3)
    actor, critic = gradients(policy, algorithm, whole_batch(policy, algorithm, trajectory))
    psi = torch.zeros(7, dtype=torch.float64)
    psi[:5] = torch.tensor([*EXPECTED["advantage"][0], *EXPECTED["advantage"][1]])
    taken = torch.zeros(7, 2, dtype=torch.float64)
    taken[range(5), [0, 1, 0, 1, 1]] = 1.0
    score = taken - policy.logits.detach().softmax(-1)
    torch.testing.assert_close(actor, -psi.unsqueeze(-1) * score / 5, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(critic, -0.3 * psi / 5, rtol=1e-12, atol=1e-14)


def test_a2c_standardises_if_asked() -> None:
    policy = policy_with_values()
    trajectory = two_episodes(policy)
    batch = whole_batch(policy, A2C(gamma=0.5, normalize_advantage=True), trajectory)
    advantage = batch.advantage[trajectory.mask]
    assert float(advantage.mean()) == pytest.approx(0.0, abs=1e-12)
    assert float(advantage.std()) == pytest.approx(1.0, abs=1e-7)


def test_a_tabular_policy_improves_by_a_step() -> None:
    """Downhill on the loss raises the probability of the action that did better than expected."""
    policy = TabularPolicy(states=7)
    trajectory = two_episodes(policy)
    algorithm = A2C(gamma=0.5)
    batch = whole_batch(policy, algorithm, trajectory)
    before = policy.log_prob(trajectory.observation, trajectory.action).detach()
    actor, _ = gradients(policy, algorithm, batch)
    with torch.no_grad():
        policy.logits -= 1e-3 * actor
    moved = policy.log_prob(trajectory.observation, trajectory.action).detach() - before
    assert torch.equal(moved[trajectory.mask] > 0, batch.advantage[trajectory.mask] > 0)


ONE_STEP_CHANGES = {
    "gamma": 0.5,
    "discounted_states": True,
    "value_coefficient": 0.123,
    "entropy_coefficient": 0.123,
    "entropy_schedule": "linear",
}
A2C_CHANGES = {
    "gamma": 0.5,
    "gae_lambda": 0.123,
    "normalize_advantage": True,
    "value_coefficient": 0.123,
    "entropy_coefficient": 0.123,
    "entropy_schedule": "linear",
    "reference_kl": ReferenceKL(coefficient=0.1),
}


@pytest.mark.parametrize(
    ("base", "changes"),
    [(OneStepActorCritic(entropy_coefficient=0.01), ONE_STEP_CHANGES), (A2C(entropy_coefficient=0.01), A2C_CHANGES)],
)
def test_describe_tells_every_setting(base: A2C | OneStepActorCritic, changes: dict[str, Any]) -> None:
    assert set(changes) == {field.name for field in fields(base)}
    for name, value in changes.items():
        assert replace(base, **{name: value}).describe() != base.describe(), name
