"""What potential-based shaping must not change, and bonuses that fall over the run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from identity_strategies import PROPERTY, SEEDS, Experience, close, experiences, normal
from torch import Tensor

from upslope.algorithms import A2C, GRPO, PPO, RLOO, Algorithm, Now, OneStepActorCritic, Reinforce
from upslope.auditing.cases.shaping import potential_of, shaped_problem
from upslope.estimators import gae, potential_shaping, reward_to_go
from upslope.exact import TabularPolicy, policy_iteration, problem
from upslope.trajectory import Batch


def drawn(seed: int, given: Experience) -> tuple[Tensor, Tensor]:
    """Phi at every step and after it."""
    potential, final = normal(seed, 2, *given.reward.shape)
    return potential, torch.where(given.cut, final, potential.roll(-1, -1))


def shaping(given: Experience, potential: Tensor, following: Tensor) -> Tensor:
    return potential_shaping(given.discount, potential, following, given.cut, mask=given.mask)


@PROPERTY
@given(experiences(holes=True), SEEDS)
def test_shaping_takes_the_potential_off_every_return(given: Experience, seed: int) -> None:
    potential, following = drawn(seed, given)
    end = torch.where(given.terminated, 0.0, given.next_value)
    plain = reward_to_go(*given.steps, given.cut, bootstrap=end, mask=given.mask)
    shaped = given.reward + shaping(given, potential, following)
    found = reward_to_go(shaped, given.discount, given.cut, bootstrap=given.next_value - following, mask=given.mask)
    close(found, (plain - potential).masked_fill(~given.mask, 0.0))


@PROPERTY
@given(experiences(holes=True), st.sampled_from([0.0, 0.6, 1.0]), SEEDS)
def test_advantages_are_the_same_with_a_critic_less_the_potential(
    given: Experience, gae_lambda: float, seed: int
) -> None:
    potential, following = drawn(seed, given)
    settings = {"gae_lambda": gae_lambda, "mask": given.mask}
    critic = given.discount, given.value - potential, given.next_value - following, given.cut
    found = gae(given.reward + shaping(given, potential, following), *critic, **settings)
    close(found, gae(*given.critic, **settings))


@PROPERTY
@given(experiences(holes=True), SEEDS)
def test_steps_that_nobody_chose_and_states_after_the_end_are_not_read(given: Experience, seed: int) -> None:
    potential, following = drawn(seed, given)
    unread = potential.masked_fill(~given.mask, 1e6)
    beyond = following.masked_fill(given.discount == 0, float("nan"))
    close(shaping(given, unread, beyond), shaping(given, potential, following))


@pytest.mark.parametrize("name", ["six-state", "two-state", "noisy-rewards"])
def test_the_best_actions_stay_the_best(name: str) -> None:
    mdp = problem(name).mdp
    potential = potential_of(mdp.states)
    plain = policy_iteration(mdp).iterations[-1]
    shaped = policy_iteration(shaped_problem(mdp, potential)).iterations[-1]
    going = ~mdp.terminal
    assert torch.equal(shaped.actions[going], plain.actions[going])
    close(shaped.action_value[going], (plain.action_value - potential.unsqueeze(-1))[going])


WITH_BONUS: dict[str, A2C | GRPO | OneStepActorCritic | PPO | Reinforce | RLOO] = {
    "a2c": A2C(entropy_coefficient=0.1),
    "grpo": GRPO(entropy_coefficient=0.1),
    "one step": OneStepActorCritic(entropy_coefficient=0.1),
    "ppo": PPO(entropy_coefficient=0.1),
    "reinforce": Reinforce(psi="baselined", entropy_coefficient=0.1),
    "rloo": RLOO(entropy_coefficient=0.1),
}


@torch.no_grad()
def loss_of(algorithm: Algorithm, progress: float) -> float:
    steps = 7
    policy = TabularPolicy(states=5, actions=3)
    with torch.no_grad():
        policy.theta.copy_(normal(1, *policy.theta.shape))
    action = torch.arange(steps) % 3
    batch = Batch(
        observation=torch.arange(steps) % 5,
        action=action,
        mask=torch.ones(steps, dtype=torch.bool),
        behaviour_log_prob=normal(2, steps),
        advantage=normal(3, steps),
        value_target=normal(4, steps),
        behaviour_value=None,
        behaviour_distribution=None,
        weight=torch.full((steps,), 1.0 / steps, dtype=torch.float64),
    )
    return float(algorithm.loss(batch, policy.evaluate(batch), Now(progress=progress, state={})).value)


@pytest.mark.parametrize("name", WITH_BONUS)
def test_a_bonus_falls_as_it_is_scheduled(name: str) -> None:
    algorithm = WITH_BONUS[name]
    falling = replace(algorithm, entropy_schedule="linear")
    assert loss_of(falling, 0.0) == pytest.approx(loss_of(algorithm, 0.75), abs=1e-12)
    quarter = replace(algorithm, entropy_coefficient=0.025)
    assert loss_of(falling, 0.75) == pytest.approx(loss_of(quarter, 0.0), abs=1e-12)
    assert loss_of(falling, 0.75) != pytest.approx(loss_of(algorithm, 0.75), abs=1e-6)
