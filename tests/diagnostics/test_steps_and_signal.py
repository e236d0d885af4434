"""Shares of steps, variances of Psi and groups, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from upslope.diagnostics import (
    ChosenSteps,
    effective_sample_size,
    explained_variance,
    gradient_shares,
    psi_variances,
    zero_advantage_groups,
)
from upslope.estimators import clipped
from upslope.trajectory import Trajectory


def test_effective_sample_size_by_hand() -> None:
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    assert float(effective_sample_size(weights.log())) == pytest.approx(100 / (4 * 30))
    assert float(effective_sample_size(torch.zeros(7))) == 1.0
    huge = torch.tensor([500.0, 0.0, 0.0, 0.0])
    assert float(effective_sample_size(huge)) == 0.25


def record(ratio: list[float], advantage: list[float], *, dual_clip: float | None = None) -> ChosenSteps:
    """Steps of PPO's clipped objective with clip 0.2, and the gradient it gives them."""
    behaviour = torch.zeros(len(ratio), dtype=torch.float64)
    log_prob = torch.tensor(ratio, dtype=torch.float64).log().requires_grad_()
    psi = torch.tensor(advantage, dtype=torch.float64)
    clipped(log_prob, behaviour, psi, low=0.2, high=0.2, dual_clip=dual_clip).sum().backward()
    return ChosenSteps(log_ratio=log_prob.detach(), advantage=psi, gradient=log_prob.grad)


def test_clip_shares_by_sign_by_hand() -> None:
    """Clipped: 1.5 with A > 0 and 0.5 with A < 0; 1.5 with A < 0 and 0.5 with A > 0 keep their gradient."""
    shares = gradient_shares(
        record([1.5, 1.5, 0.5, 0.5, 1.1, 1.0, 0.7, 1.0], [1.0, -1.0, 1.0, -1.0, 2.0, 3.0, -1.0, 0.0])
    )
    assert float(shares["clip_share_positive"]) == pytest.approx(1 / 4)
    assert float(shares["clip_share_negative"]) == pytest.approx(2 / 3)
    assert float(shares["dead_gradient_share"]) == pytest.approx(4 / 8)


def test_the_dual_clip_kills_steps_that_are_clipped_on_neither_side() -> None:
    shares = gradient_shares(record([5.0, 1.0], [-1.0, -1.0], dual_clip=3.0))
    assert float(shares["dead_gradient_share"]) == 0.5
    assert float(shares["clip_share_negative"]) == 0.0


def test_shares_among_no_steps_are_zero() -> None:
    shares = gradient_shares(record([1.0, 1.0], [0.0, 0.0]))
    assert {name: float(share) for name, share in shares.items()} == {
        "dead_gradient_share": 1.0,
        "clip_share_positive": 0.0,
        "clip_share_negative": 0.0,
    }


def test_a_loss_that_ignores_the_log_prob_has_no_shares() -> None:
    assert gradient_shares(ChosenSteps(log_ratio=torch.zeros(2), advantage=torch.ones(2), gradient=None)) == {}


def test_explained_variance() -> None:
    target = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert explained_variance(target, target) == 1.0
    assert explained_variance(torch.full((4,), 3.0), target) == 0.0
    assert math.isnan(explained_variance(target, torch.ones(4)))


def row(reward: list[float], mask: list[bool] | None = None) -> Trajectory:
    steps = len(reward)
    empty = torch.zeros(1, steps, dtype=torch.bool)
    terminated = empty.clone()
    terminated[0, -1] = True
    return Trajectory(
        observation=torch.zeros(1, steps, 1),
        action=torch.zeros(1, steps, dtype=torch.long),
        reward=torch.tensor([reward], dtype=torch.float64),
        terminated=terminated,
        truncated=empty,
        mask=~empty if mask is None else torch.tensor([mask]),
        behaviour_log_prob=torch.zeros(1, steps),
        time=torch.arange(steps).unsqueeze(0),
        final_observation=torch.zeros(0, 1),
        final_index=torch.zeros(0, dtype=torch.long),
    )


def test_variances_of_psi_by_hand() -> None:
    """gamma = 1, rewards 1 2 3, V = 5 4 3: returns 6 5 3, minus V 1 1 0, TD residuals 0 1 0."""
    trajectory = row([1.0, 2.0, 3.0])
    value = torch.tensor([[5.0, 4.0, 3.0]], dtype=torch.float64)
    following = torch.tensor([[4.0, 3.0, 0.0]], dtype=torch.float64)
    psi = torch.tensor([[3.0, 0.0, -3.0]], dtype=torch.float64)
    found = psi_variances(trajectory, psi, value, following, gamma=1.0)
    assert {name: float(variance) for name, variance in found.items()} == pytest.approx(
        {
            "psi": 6.0,
            "reward_to_go": 14 / 9,
            "baselined": 2 / 9,
            "td_residual": 2 / 9,
            "gae": float(torch.tensor([0.95, 1.0, 0.0], dtype=torch.float64).var(unbiased=False)),
        }
    )


def test_variances_without_a_critic_and_over_chosen_steps_alone() -> None:
    trajectory = row([1.0, 2.0, 3.0], [True, True, False])
    found = psi_variances(trajectory, trajectory.reward, None, None, gamma=1.0)
    assert {name: float(variance) for name, variance in found.items()} == pytest.approx(
        {"psi": 0.25, "total_reward": 0.0, "reward_to_go": 0.25}
    )


def test_groups_without_advantage_by_hand() -> None:
    """Group 7 is rewarded alike, group 2 is not, group 4 differs at a step that does not count."""
    advantage = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [-1.0, 0.0], [0.0, 9.0]])
    mask = torch.ones(5, 2, dtype=torch.bool)
    mask[4, 1] = False
    share = zero_advantage_groups(advantage, mask, torch.tensor([7, 2, 7, 2, 4]))
    assert float(share) == pytest.approx(2 / 3)
