"""Reinforce on two episodes small enough for paper: one that terminates, one that a time limit ends."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from tabular_world import gradients, whole_batch
from two_episodes import BOOTSTRAPPED_RETURN, EXPECTED, chosen, policy_with_values, two_episodes

from upslope.algorithms import Now, ReferenceKL, Reinforce
from upslope.algorithms.reinforce import Psi


@pytest.mark.parametrize("psi", EXPECTED)
def test_psi_by_hand(psi: Psi) -> None:
    policy = policy_with_values()
    trajectory = two_episodes(policy)
    batch = whole_batch(policy, Reinforce(gamma=0.5, psi=psi, gae_lambda=0.5), trajectory)
    assert chosen(trajectory, batch.advantage) == EXPECTED[psi]


@pytest.mark.parametrize("psi", EXPECTED)
def test_discounted_states_multiply_psi_by_gamma_to_the_t(psi: Psi) -> None:
    policy = policy_with_values()
    trajectory = two_episodes(policy)
    algorithm = Reinforce(gamma=0.5, psi=psi, gae_lambda=0.5, discounted_states=True)
    first, second = EXPECTED[psi]
    if psi != "total_reward":
        first = [x * w for x, w in zip(first, (1.0, 0.5, 0.25), strict=True)]
        second = [x * w for x, w in zip(second, (1.0, 0.5), strict=True)]
    assert chosen(trajectory, whole_batch(policy, algorithm, trajectory).advantage) == (first, second)


@pytest.mark.parametrize("psi", EXPECTED)
def test_what_the_critic_is_taught(psi: Psi) -> None:
    """The baseline learns the return; critics that are asked for the future learn the lambda-return."""
    policy = policy_with_values()
    trajectory = two_episodes(policy)
    algorithm = Reinforce(gamma=0.5, psi=psi, gae_lambda=0.5, discounted_states=True)
    target = whole_batch(policy, algorithm, trajectory).value_target
    if psi in ("total_reward", "reward_to_go"):
        assert target is None
        assert not algorithm.passes.critic
    else:
        assert target is not None
        expected = BOOTSTRAPPED_RETURN if psi == "baselined" else EXPECTED["action_value"]
        assert chosen(trajectory, target) == expected


def test_the_gradient_is_the_sum_over_steps_and_the_mean_over_episodes() -> None:
    policy = policy_with_values()
    trajectory = two_episodes(policy)
    algorithm = Reinforce(gamma=0.5, psi="baselined", value_coefficient=0.3)
    actor, critic = gradients(policy, algorithm, whole_batch(policy, algorithm, trajectory))
    psi = torch.zeros(7, dtype=torch.float64)
    psi[:5] = torch.tensor([2.0, 2.0, 1.0, 5.5, 7.0])
    taken = torch.zeros(7, 2, dtype=torch.float64)
    taken[range(5), [0, 1, 0, 1, 1]] = 1.0
    score = taken - policy.logits.detach().softmax(-1)
    torch.testing.assert_close(actor, -0.5 * psi.unsqueeze(-1) * score, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(critic, -0.5 * 0.3 * psi, rtol=1e-12, atol=1e-14)


def test_standardised_psi_has_mean_0_and_deviation_1_over_the_chosen_steps() -> None:
    policy = policy_with_values()
    trajectory = two_episodes(policy)
    batch = whole_batch(policy, Reinforce(gamma=0.5, normalize_advantage=True), trajectory)
    advantage = batch.advantage[trajectory.mask]
    plain = torch.tensor([3.0, 4.0, 4.0, 5.0, 6.0], dtype=torch.float64)
    torch.testing.assert_close(advantage, (plain - plain.mean()) / plain.std(), rtol=1e-7, atol=1e-7)


def test_padding_never_matters() -> None:
    """Not its action, not the log-prob or value it gives, and not what the Psi there would be."""
    policy = policy_with_values()
    trajectory = two_episodes(policy)
    algorithm = Reinforce(gamma=0.5, psi="advantage", gae_lambda=0.5, entropy_coefficient=0.1)
    expected = gradients(policy, algorithm, whole_batch(policy, algorithm, trajectory))
    other = replace(
        trajectory,
        reward=trajectory.reward.masked_fill(~trajectory.mask, -1e9),
        action=trajectory.action.masked_fill(~trajectory.mask, 1),
    )
    with torch.no_grad():
        policy.value[6] = -1e9
        policy.logits[6] = torch.nan
    found = gradients(policy, algorithm, whole_batch(policy, algorithm, other))
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one[:6], two[:6])


def test_metrics_are_means_over_chosen_steps() -> None:
    policy = policy_with_values()
    trajectory = two_episodes(policy)
    algorithm = Reinforce(gamma=0.5, psi="baselined")
    batch = whole_batch(policy, algorithm, trajectory)
    evaluation = policy.evaluate(batch)
    metrics = algorithm.loss(batch, evaluation, Now()).metrics
    assert float(metrics["value_loss"]) == pytest.approx(0.5 * (4 + 4 + 1 + 5.5**2 + 49) / 5)
    assert float(metrics["entropy"]) == pytest.approx(float(evaluation.entropy[trajectory.mask].detach().mean()))


CHANGES: dict[str, tuple[Reinforce, float | str | ReferenceKL]] = {
    "gamma": (Reinforce(), 0.5),
    "psi": (Reinforce(), "total_reward"),
    "gae_lambda": (Reinforce(psi="td_residual"), 0.5),
    "discounted_states": (Reinforce(), True),
    "normalize_advantage": (Reinforce(), True),
    "value_coefficient": (Reinforce(psi="baselined"), 0.123),
    "entropy_coefficient": (Reinforce(), 0.123),
    "entropy_schedule": (Reinforce(entropy_coefficient=0.1), "linear"),
    "reference_kl": (Reinforce(), ReferenceKL(coefficient=0.1)),
}


def test_describe_tells_every_setting() -> None:
    assert set(CHANGES) == {field.name for field in fields(Reinforce)}
    for name, (base, value) in CHANGES.items():
        assert replace(base, **{name: value}).describe() != base.describe(), name


@pytest.mark.parametrize("psi", ["action_value", "advantage", "td_residual"])
def test_describe_tells_lambda_wherever_it_is_used(psi: Psi) -> None:
    assert any("0.123" in text for text in Reinforce(psi=psi, gae_lambda=0.123).describe().values())
