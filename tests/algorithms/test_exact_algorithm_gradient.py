"""The code that trains, against the exact gradient of an MDP in which every trajectory can be enumerated."""

from __future__ import annotations

import pytest
import torch
from tabular_world import GAMMA, Path, TabularPolicy, TinyWorld, expected_ascent

from upslope.algorithms import A2C, PPO, Algorithm, OneStepActorCritic, Reinforce
from upslope.algorithms.reinforce import Psi

EXACT = {"rtol": 1e-12, "atol": 1e-13}


def steps_of(path: Path) -> float:
    return float(len(path.states))


def set_exact_critic(policy: TabularPolicy, world: TinyWorld) -> None:
    with torch.no_grad():
        policy.value.copy_(world.action_values(policy.logits, GAMMA)[1][:-1])


def test_every_trajectory_is_enumerated() -> None:
    world, policy = TinyWorld(), TabularPolicy()
    probability = policy.logits.detach().softmax(-1)
    total = 0.0
    for path in world.paths():
        chance = path.luck
        for state, action in zip(path.states, path.actions, strict=True):
            chance *= float(probability[state, action])
        total += chance
    assert total == pytest.approx(1.0, abs=1e-14)


def test_the_two_targets_differ() -> None:
    world, policy = TinyWorld(), TabularPolicy()
    kept = world.gradient_of_return(policy.logits, GAMMA)
    dropped = world.gradient_without_discounted_states(policy.logits, GAMMA)
    assert (kept - dropped).abs().max() > 0.01


def test_without_discounting_the_two_targets_are_one() -> None:
    world, policy = TinyWorld(), TabularPolicy()
    kept = world.gradient_of_return(policy.logits, 1.0)
    torch.testing.assert_close(kept, world.gradient_without_discounted_states(policy.logits, 1.0), **EXACT)


@pytest.mark.parametrize("discounted_states", [True, False])
@pytest.mark.parametrize(
    ("psi", "gae_lambda", "exact_critic"),
    [
        ("total_reward", 0.5, False),
        ("reward_to_go", 0.5, False),
        ("baselined", 0.5, False),
        ("action_value", 1.0, False),
        ("action_value", 0.5, True),
        ("advantage", 1.0, False),
        ("advantage", 0.5, True),
        ("td_residual", 0.5, True),
    ],
)
def test_reinforce_follows_its_target(psi: Psi, gae_lambda: float, exact_critic: bool, discounted_states: bool) -> None:
    world, policy = TinyWorld(), TabularPolicy()
    if exact_critic:
        set_exact_critic(policy, world)
    algorithm = Reinforce(gamma=GAMMA, psi=psi, gae_lambda=gae_lambda, discounted_states=discounted_states)
    actor, _ = expected_ascent(world, policy, algorithm)
    if discounted_states or psi == "total_reward":
        expected = world.gradient_of_return(policy.logits, GAMMA)
    else:
        expected = world.gradient_without_discounted_states(policy.logits, GAMMA)
    torch.testing.assert_close(actor, expected, **EXACT)


@pytest.mark.parametrize("psi", ["action_value", "advantage", "td_residual"])
def test_a_wrong_critic_biases_what_bootstraps_from_it(psi: Psi) -> None:
    world, policy = TinyWorld(), TabularPolicy()
    with torch.no_grad():
        policy.value.add_(torch.tensor([1.0, -5.0, 5.0, 10.0]))
    algorithm = Reinforce(gamma=GAMMA, psi=psi, gae_lambda=0.5, discounted_states=True)
    actor, _ = expected_ascent(world, policy, algorithm)
    assert (actor - world.gradient_of_return(policy.logits, GAMMA)).abs().max() > 0.01


def test_the_baseline_learns_the_value_where_the_policy_goes() -> None:
    """Minus the critic's gradient is c_V eta_1(s) (v(s) - V(s)), and 0 at the exact critic."""
    world, policy = TinyWorld(), TabularPolicy()
    algorithm = Reinforce(gamma=GAMMA, psi="baselined", value_coefficient=0.3)
    _, critic = expected_ascent(world, policy, algorithm)
    exact = world.action_values(policy.logits, GAMMA)[1][:-1]
    expected = 0.3 * world.visits(policy.logits, 1.0) * (exact - policy.value)
    torch.testing.assert_close(critic, expected.detach(), **EXACT)
    set_exact_critic(policy, world)
    _, critic = expected_ascent(world, policy, algorithm)
    torch.testing.assert_close(critic, torch.zeros_like(critic), **EXACT)


@pytest.mark.parametrize(
    "algorithm",
    [
        OneStepActorCritic(gamma=GAMMA),
        A2C(gamma=GAMMA, gae_lambda=0.5),
        PPO(gamma=GAMMA, gae_lambda=0.5, normalize_advantage=False),
        PPO(gamma=GAMMA, gae_lambda=0.5, normalize_advantage=False, clip=None, kl_coefficient=3.0),
    ],
    ids=["one_step", "a2c", "ppo_clip", "ppo_kl"],
)
def test_actor_critics_follow_the_undiscounted_visits(algorithm: Algorithm) -> None:
    """With the exact critic; times its length, a mean over the steps of an episode is a sum over them."""
    world, policy = TinyWorld(), TabularPolicy()
    set_exact_critic(policy, world)
    actor, critic = expected_ascent(world, policy, algorithm, scale=steps_of)
    expected = world.gradient_without_discounted_states(policy.logits, GAMMA)
    torch.testing.assert_close(actor, expected, **EXACT)
    torch.testing.assert_close(critic, torch.zeros_like(critic), **EXACT)


def test_one_step_actor_critic_with_discounted_states_follows_the_gradient_of_the_return() -> None:
    world, policy = TinyWorld(), TabularPolicy()
    set_exact_critic(policy, world)
    algorithm = OneStepActorCritic(gamma=GAMMA, discounted_states=True)
    actor, _ = expected_ascent(world, policy, algorithm, scale=steps_of)
    torch.testing.assert_close(actor, world.gradient_of_return(policy.logits, GAMMA), **EXACT)


def test_the_entropy_bonus_adds_its_gradient() -> None:
    world, policy = TinyWorld(), TabularPolicy()
    plain, _ = expected_ascent(world, policy, Reinforce(gamma=GAMMA))
    with_bonus, _ = expected_ascent(world, policy, Reinforce(gamma=GAMMA, entropy_coefficient=0.2))
    free = policy.logits.detach().clone().requires_grad_()
    probability = free.softmax(-1)
    entropy = -(probability * probability.log()).sum(-1)
    weight = world.visits(policy.logits, 1.0)
    bonus = torch.autograd.grad((weight * entropy).sum(), free)[0]
    torch.testing.assert_close(with_bonus - plain, 0.2 * bonus, **EXACT)
