"""The importance-weighted surrogate that NPG and TRPO climb: Psi_t, weights, and its value and gradient.

    L(theta) = sum_t w_t [ e^{l_t - b_t} Psi_t + c_H H_t ]

At theta = theta_old its gradient is the policy gradient; the critic plays no part in it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from upslope.algorithms.group_baseline import group_signal
from upslope.algorithms.protocol import Condition, Loss, Now, ScheduleName, Target, scheduled, scheduled_in_words
from upslope.algorithms.ratios import chosen_log_prob, step_average
from upslope.algorithms.reference_kl import ReferenceKL
from upslope.estimators import (
    gae,
    importance_weighted,
    reward_to_go,
    standardise,
    step_mean,
    trajectory_sum,
    weighted_sum,
)
from upslope.trajectory import Batch, Evaluation, Signal, Trajectory

SurrogatePsi: TypeAlias = Literal["gae", "reward_to_go", "group"]
"""GAE of a critic; without one the reward to go, or the total reward less the mean of the others of the group."""

_NO_PENALTY = ReferenceKL()


def check_surrogate(psi: SurrogatePsi, gamma: float, damping: float, iterations: int, critic: tuple[int, int]) -> None:
    """Refuse settings that have no meaning.

    Args:
        psi, gamma, damping, iterations: of the algorithm.
        critic: epochs and minibatches of its fit.

    Raises:
        ValueError: with what to set instead.
    """
    if psi == "group" and gamma != 1.0:
        raise ValueError(f'psi="group" compares total rewards, which have no discount: set gamma to 1, got {gamma}')
    if damping < 0.0:
        raise ValueError(f"damping must be at least 0 (0.1 is usual), got {damping}")
    if iterations < 1:
        raise ValueError(f"conjugate_gradient_iterations must be at least 1 (10 is usual), got {iterations}")
    if min(critic) < 1:
        raise ValueError(f"critic_epochs and critic_minibatches must be at least 1, got {critic[0]} and {critic[1]}")


def surrogate_signal(
    psi: SurrogatePsi,
    trajectory: Trajectory,
    value: Tensor | None,
    next_value: Tensor | None,
    *,
    gamma: float,
    gae_lambda: float,
) -> Signal:
    """Psi_t, and the critic's target where there is one.

    Args:
        psi: which.
        trajectory: what was collected.
        value, next_value: [B, T] V_t and V'_t, for psi="gae".
        gamma: discount factor.
        gae_lambda: of GAE.
    """
    if psi == "group":
        return group_signal(trajectory, baseline="leave_one_out", scale="none", epsilon=0.0, reference_kl=_NO_PENALTY)
    reward, cut, discount, mask = trajectory.reward, trajectory.cut, trajectory.discount(gamma), trajectory.partial_mask
    if psi == "reward_to_go":
        return Signal(advantage=reward_to_go(reward, discount, cut, mask=mask))
    assert value is not None
    assert next_value is not None
    advantage = gae(reward, discount, value, next_value, cut, gae_lambda=gae_lambda, mask=mask)
    return Signal(advantage=advantage, value_target=advantage + value)


def surrogate_target(psi: SurrogatePsi, *, normalised: bool, entropy_coefficient: float) -> Target:
    """What the surrogate's gradient follows where theta is theta_old."""
    biases = ("the batch's standard deviation divides the advantage",) if normalised else ()
    if entropy_coefficient != 0.0:
        biases += ("the entropy bonus adds its own gradient",)
    with_critic = psi == "gae"
    requires: tuple[Condition, ...] = (
        ("on_policy", "exact_critic", "fixed_steps") if with_critic else ("on_policy", "no_time_limit")
    )
    return Target(
        gradient="undiscounted_states",
        per="step" if with_critic else "trajectory",
        requires=requires,
        biased_by=biases,
        batchwise=normalised,
    )


def prepared_surrogate(psi: SurrogatePsi, batch: Batch, *, normalised: bool) -> Batch:
    """The mean over steps of fragments; of whole episodes each one's sum."""
    advantage = standardise(batch.advantage, batch.mask) if normalised else batch.advantage
    reduction = step_mean if psi == "gae" else trajectory_sum
    return replace(batch, advantage=advantage, weight=reduction(batch.mask, dtype=batch.advantage.dtype))


def surrogate_loss(
    batch: Batch, evaluation: Evaluation, now: Now, *, entropy_coefficient: float, entropy_schedule: ScheduleName
) -> Loss:
    """-L: what a natural step is to make smaller."""
    log_prob = chosen_log_prob(batch, evaluation)
    objective = importance_weighted(log_prob, batch.behaviour_log_prob, batch.advantage)
    per_step, coefficient = -objective, scheduled(entropy_schedule, entropy_coefficient, now.progress)
    if coefficient != 0.0:
        per_step = per_step - coefficient * evaluation.entropy
    with torch.no_grad():
        metrics = {
            "policy_loss": -weighted_sum(objective, batch.weight),
            "entropy": step_average(evaluation.entropy, batch),
        }
    return Loss(value=weighted_sum(per_step, batch.weight), metrics=metrics)


def describe_surrogate(
    psi: SurrogatePsi,
    *,
    gamma: float,
    gae_lambda: float,
    normalised: bool,
    entropy: tuple[float, ScheduleName],
    critic: tuple[int, int],
) -> dict[str, str]:
    """The surrogate and the critic's fit in words."""
    words = {
        "gae": f"GAE(gamma={gamma}, lambda={gae_lambda})",
        "reward_to_go": f"reward_to_go(gamma={gamma})",
        "group": "total reward of the trajectory (gamma=1) less the mean of the others of its group, at every step",
    }
    coefficient, schedule = entropy
    fit = f"0.5 (V - target)^2, {critic[0]} epochs x {critic[1]} minibatches after the actor's step; target = GAE + V"
    return {
        "Psi": words[psi],
        "state weights": "gamma^t dropped",
        "advantage scale": "standardised over the batch" if normalised else "none",
        "ratio": "per step, exp(log_prob - behaviour_log_prob), unclipped",
        "value error": fit if psi == "gae" else "no critic",
        "entropy bonus": scheduled_in_words(schedule, coefficient),
        "reduction": "step_mean over the batch" if psi == "gae" else "trajectory_sum over the batch",
    }
