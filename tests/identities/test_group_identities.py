"""Advantages relative to a group, and standardised ones: their sums, what leaves them alone, what they estimate."""

from __future__ import annotations

import itertools
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from identity_strategies import PROPERTY, SEEDS, Grouped, close, grouped, logits, normal
from torch import Tensor

from upslope.estimators import group_relative, leave_one_out, score_function, standardise

SCALES: list[Literal["none", "group", "batch"]] = ["none", "group", "batch"]
EVERY_SCALE = pytest.mark.parametrize("scale", SCALES)
AWKWARD = [*(number / 100 for number in range(1, 101, 3)), -0.1, 0.2, 0.3, 1.1, 1 / 3, 1e-30, 1e30, 0.0, 123456.789]


@EVERY_SCALE
@PROPERTY
@given(grouped())
def test_group_advantages_sum_to_zero_in_each_group(scale: Literal["none", "group", "batch"], data: Grouped) -> None:
    found = group_relative(data.total, data.group, scale=scale)
    for members in data.members():
        close(found[members].sum(), torch.zeros((), dtype=torch.float64))
        close(leave_one_out(data.total, data.group)[members].sum(), torch.zeros((), dtype=torch.float64))


@PROPERTY
@given(grouped())
def test_group_relative_is_the_reward_minus_the_mean_over_the_chosen_scale(data: Grouped) -> None:
    """Standard deviations with ddof 1, of the group or of all totals; epsilon is added to them."""
    centred, deviation, sizes, others = (torch.zeros_like(data.total) for _ in range(4))
    for members in data.members():
        centred[members] = data.total[members] - data.total[members].mean()
        deviation[members] = (centred[members].square().sum() / (len(members) - 1)).sqrt()
        sizes[members] = len(members)
        for member in members.tolist():
            rest = data.total[[other for other in members.tolist() if other != member]]
            alike = len(rest) < 2 or bool(rest.max() == rest.min())
            others[member] = 1.0 if alike else rest.std() + 0.1
    whole = ((data.total - data.total.mean()).square().sum() / (len(data.total) - 1)).sqrt()
    close(group_relative(data.total, data.group), centred)
    close(group_relative(data.total, data.group, scale="group"), centred / (deviation + 1e-6))
    close(group_relative(data.total, data.group, scale="group", epsilon=0.1), centred / (deviation + 0.1))
    close(group_relative(data.total, data.group, scale="batch", epsilon=0.1), centred / (whole + 0.1))
    for scale in ("none", "group", "batch", "leave_one_out"):
        mean = group_relative(data.total, data.group, scale=scale, epsilon=0.1)
        found = group_relative(data.total, data.group, baseline="leave_one_out", scale=scale, epsilon=0.1)
        close(found, mean * (sizes / (sizes - 1)))
    close(group_relative(data.total, data.group, scale="leave_one_out", epsilon=0.1), centred / others)


@PROPERTY
@given(grouped())
def test_leave_one_out_is_g_over_g_minus_1_times_mean_centred(data: Grouped) -> None:
    """And the reward minus the mean of the others."""
    found, centred = leave_one_out(data.total, data.group), group_relative(data.total, data.group)
    for members in data.members():
        size = len(members)
        close(found[members], size / (size - 1) * centred[members])
        others = torch.stack([data.total[members[members != one]].mean() for one in members])
        close(found[members], data.total[members] - others)


@pytest.mark.parametrize("size", [2, 3, 4])
@PROPERTY
@given(logits(actions=3), SEEDS)
def test_leave_one_out_is_unbiased_and_the_group_mean_shrinks(size: int, theta: Tensor, seed: int) -> None:
    """Every group there can be: the gradient itself, (G-1)/G of it, and for a constant baseline the gradient too."""
    reward, theta = normal(seed, 3), theta.requires_grad_()
    exact = torch.autograd.grad((theta.softmax(-1) * reward).sum(), theta)[0]
    draws = torch.tensor(list(itertools.product(range(3), repeat=size)))
    group = torch.arange(len(draws)).unsqueeze(-1).expand_as(draws)
    log_prob = theta.log_softmax(-1)[draws]
    chance = log_prob.detach().sum(-1).exp()
    close(chance.sum(), torch.ones((), dtype=torch.float64))

    def mean_gradient(advantage: Tensor) -> Tensor:
        objective = (chance * score_function(log_prob, advantage).mean(-1)).sum()
        return torch.autograd.grad(objective, theta, retain_graph=True)[0]

    total = reward[draws]
    close(mean_gradient(leave_one_out(total, group)), exact)
    close(mean_gradient(group_relative(total, group)), (size - 1) / size * exact)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_dividing_by_the_groups_deviation_biases_the_direction(size: int) -> None:
    """Negative control: no multiple of the gradient is the mean of the scaled advantage's."""
    theta = torch.tensor([0.3, -0.9, 0.5], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([1.0, 0.1, 0.0], dtype=torch.float64)
    exact = torch.autograd.grad((theta.softmax(-1) * reward).sum(), theta)[0]
    draws = torch.tensor(list(itertools.product(range(3), repeat=size)))
    group = torch.arange(len(draws)).unsqueeze(-1).expand_as(draws)
    log_prob = theta.log_softmax(-1)[draws]
    advantage = group_relative(reward[draws], group, scale="group")
    objective = (log_prob.detach().sum(-1).exp() * score_function(log_prob, advantage).mean(-1)).sum()
    found = torch.autograd.grad(objective, theta)[0]
    assert float(torch.cosine_similarity(found, exact, dim=0)) < 0.999


@PROPERTY
@given(grouped(), st.floats(0.01, 100.0), st.floats(-50.0, 50.0))
def test_a_scaled_group_is_affine_invariant_without_epsilon(data: Grouped, factor: float, shift: float) -> None:
    for scale in ("group", "batch"):
        plain = group_relative(data.total, data.group, scale=scale, epsilon=0.0)
        close(group_relative(factor * data.total + shift, data.group, scale=scale, epsilon=0.0), plain)
        close(group_relative(-data.total, data.group, scale=scale, epsilon=0.0), -plain)


@PROPERTY
@given(grouped(), st.floats(-50.0, 50.0))
def test_a_constant_added_to_the_rewards_changes_nothing(data: Grouped, shift: float) -> None:
    """One constant for all, or one for each group (prompts may be of any difficulty)."""
    per_group = data.group.to(torch.float64) * 0.37 + shift
    close(leave_one_out(data.total + shift, data.group), leave_one_out(data.total, data.group))
    close(leave_one_out(data.total + per_group, data.group), leave_one_out(data.total, data.group))
    for scale in ("none", "group"):
        plain = group_relative(data.total, data.group, scale=scale)
        close(group_relative(data.total + shift, data.group, scale=scale), plain)
        close(group_relative(data.total + per_group, data.group, scale=scale), plain)
    close(
        group_relative(data.total + shift, data.group, scale="batch"),
        group_relative(data.total, data.group, scale="batch"),
    )


@pytest.mark.parametrize("size", range(2, 12))
def test_rewards_of_zero_and_one_have_a_closed_form(size: int) -> None:
    """With a share p of ones: 1 - p and -p; over the group's deviation sqrt((1-p)/p (G-1)/G) and its inverse."""
    for right in range(1, size):
        total = torch.tensor([1.0] * right + [0.0] * (size - right), dtype=torch.float64)
        group, p, ddof = torch.zeros(size, dtype=torch.long), right / size, (size - 1) / size
        good, bad = total == 1, total == 0
        found = group_relative(total, group)
        close(found[good], torch.full_like(found[good], 1 - p))
        close(found[bad], torch.full_like(found[bad], -p))
        found = leave_one_out(total, group)
        close(found[good], torch.full_like(found[good], (size - right) / (size - 1)))
        close(found[bad], torch.full_like(found[bad], -right / (size - 1)))
        found = group_relative(total, group, scale="group", epsilon=0.0)
        close(found[good], torch.full_like(found[good], (ddof * (1 - p) / p) ** 0.5))
        close(found[bad], torch.full_like(found[bad], -((ddof * p / (1 - p)) ** 0.5)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", range(2, 34))
def test_a_group_without_spread_is_exactly_zero(size: int, dtype: torch.dtype) -> None:
    """0.1 repeated and other awkward numbers, next to a group with spread and without: rounding is never signal."""
    same = torch.tensor(AWKWARD, dtype=dtype).repeat_interleave(size)
    group = torch.arange(len(AWKWARD)).repeat_interleave(size)
    both, labels = torch.cat((same, torch.tensor([0.0, 1.0], dtype=dtype))), torch.cat((group, torch.tensor([-7, -7])))
    for scale in SCALES:
        for epsilon in (0.0, 1e-12, 1e-4):
            assert (group_relative(both, labels, scale=scale, epsilon=epsilon)[:-2] == 0).all()
            assert (group_relative(same[:size], group[:size], scale=scale, epsilon=epsilon) == 0).all()
    assert (leave_one_out(same, group) == 0).all()
    assert (leave_one_out(both, labels)[:-2] == 0).all()
    for number in AWKWARD:
        alone = torch.full((size + 1,), number, dtype=dtype)
        assert (standardise(alone) == 0).all()
        alone[-1] = 7.0
        assert (standardise(alone, torch.arange(size + 1) < size) == 0).all()


@EVERY_SCALE
@PROPERTY
@given(grouped(), SEEDS)
def test_permutation_of_members_and_groups(scale: Literal["none", "group", "batch"], data: Grouped, seed: int) -> None:
    """Advantages move with their trajectories; the names of the groups mean nothing."""
    order = torch.randperm(len(data.total), generator=torch.Generator().manual_seed(seed))
    renamed = 7 - 3 * data.group
    close(
        group_relative(data.total[order], renamed[order], scale=scale),
        group_relative(data.total, data.group, scale=scale)[order],
    )
    close(leave_one_out(data.total[order], renamed[order]), leave_one_out(data.total, data.group)[order])


@PROPERTY
@given(SEEDS, st.integers(3, 12), st.integers(0, 1), st.floats(0.1, 10.0), st.floats(-5.0, 5.0))
def test_standardised_has_mean_0_and_deviation_1(seed: int, count: int, ddof: int, factor: float, shift: float) -> None:
    """Up to epsilon; with a mask, of the chosen alone, whatever the others are."""
    advantage = normal(seed, count)
    found = standardise(advantage, epsilon=1e-14, ddof=ddof)
    close(found.mean(), torch.zeros((), dtype=torch.float64))
    close(found.square().sum() / (count - ddof), torch.ones((), dtype=torch.float64))
    close(standardise(factor * advantage + shift, epsilon=1e-14, ddof=ddof), found)
    mask = torch.cat((torch.zeros(2, dtype=torch.bool), torch.ones(count, dtype=torch.bool)))
    padded = torch.cat((torch.tensor([torch.nan, 1e30], dtype=torch.float64), advantage))
    close(standardise(padded, mask, epsilon=1e-14, ddof=ddof), torch.cat((torch.zeros(2).double(), found)))
    close(standardise(advantage, epsilon=1.0) * (advantage.std() + 1.0), advantage - advantage.mean())
    close(standardise(padded, mask, epsilon=1.0)[2:], standardise(advantage, epsilon=1.0))
    close(standardise(advantage) * (advantage.std() + 1e-8), advantage - advantage.mean())
    close(standardise(padded, mask)[2:], standardise(advantage))
