"""Returns and advantages: how they are made of each other, and what an end of a trajectory does to them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from identity_strategies import FRACTIONS, PROPERTY, SEEDS, Experience, close, experiences, normal
from torch import Tensor

from upslope.estimators import (
    accumulate_trace,
    backward_recurrence,
    baselined,
    differential_return,
    differential_td_residual,
    discount_weight,
    gae,
    lambda_return,
    n_step_return,
    reward_to_go,
    td_residual,
    total_reward,
    vtrace,
)

SHORT = {
    "reward": torch.tensor([[1.0, 2.0, -1.0]], dtype=torch.float64),
    "discount": torch.full((1, 3), 0.9, dtype=torch.float64),
    "value": torch.tensor([[0.5, -0.2, 0.1]], dtype=torch.float64),
    "next_value": torch.tensor([[-0.2, 0.1, 0.7]], dtype=torch.float64),
    "cut": torch.tensor([[False, False, True]]),
    "terminated": torch.zeros(1, 3, dtype=torch.bool),
    "mask": torch.ones(1, 3, dtype=torch.bool),
}
TWO_VIEWS = pytest.mark.parametrize("masked", [False, True])


def loop(x: Tensor, k: Tensor) -> Tensor:
    y, following = torch.zeros_like(x), torch.zeros_like(x[..., 0])
    for t in reversed(range(x.shape[-1])):
        following = x[..., t] + k[..., t] * following
        y[..., t] = following
    return y


@PROPERTY
@given(
    SEEDS,
    st.sampled_from([(1,), (9,), (3, 7), (2, 3, 17), (300, 5), (2, 700), (1, 1025)]),
    st.sampled_from([0.5, 1.0]),
)
def test_the_scan_is_the_loop(seed: int, shape: tuple[int, ...], bound: float) -> None:
    """y_t = x_t + k_t y_{t+1}, by substitution and by doubling, zeros and ones among k."""
    x, k = normal(seed, *shape), bound * torch.tanh(normal(seed + 1, *shape))
    k = torch.where(normal(seed + 2, *shape) > 1.0, 0.0, torch.where(normal(seed + 3, *shape) > 1.5, bound, k))
    close(backward_recurrence(x, k), loop(x, k))


@PROPERTY
@given(SEEDS, st.sampled_from([(6,), (3, 7), (300, 5)]))
def test_the_scan_has_the_gradient_of_the_loop(seed: int, shape: tuple[int, ...]) -> None:
    x, k = normal(seed, *shape).requires_grad_(), normal(seed + 1, *shape).tanh().requires_grad_()
    direction = normal(seed + 2, *shape)
    found = torch.autograd.grad(backward_recurrence(x, k), (x, k), direction)
    for one, two in zip(found, torch.autograd.grad(loop(x, k), (x, k), direction), strict=True):
        close(one, two)


@TWO_VIEWS
@PROPERTY
@given(experiences(holes=True))
def test_gae_1_is_monte_carlo_minus_v(masked: bool, data: Experience) -> None:
    """Bootstrapped by V' where cut and not terminated."""
    mask = data.mask if masked else None
    found = gae(*data.critic, gae_lambda=1.0, mask=mask)
    returns = reward_to_go(*data.steps, data.cut, bootstrap=data.next_value, mask=mask)
    chosen = data.mask if masked else torch.ones_like(data.mask)
    close(found[chosen], baselined(returns, data.value)[chosen])
    assert (found[~chosen] == 0).all()


@PROPERTY
@given(experiences())
def test_gae_0_is_the_td_residual(data: Experience) -> None:
    close(gae(*data.critic, gae_lambda=0.0), td_residual(*data.critic[:-1]))


@PROPERTY
@given(experiences(holes=True))
def test_gae_0_over_skipped_steps_is_the_td_residual_to_the_next_chosen_one(data: Experience) -> None:
    found = gae(*data.critic, gae_lambda=0.0, mask=data.mask)
    for row, t in data.mask.nonzero().tolist():
        last = t
        while not data.cut[row, last] and not data.mask[row, last + 1]:
            last += 1
        following = 0.0 if data.discount[row, last] == 0 else data.next_value[row, last]
        close(found[row, t], data.reward[row, t] + data.discount[row, t] * following - data.value[row, t])


@TWO_VIEWS
@PROPERTY
@given(experiences(holes=True), FRACTIONS)
def test_gae_plus_v_is_the_lambda_return(masked: bool, data: Experience, decay: float) -> None:
    mask = data.mask if masked else None
    advantage = gae(*data.critic, gae_lambda=decay, mask=mask)
    returns = lambda_return(*data.steps, data.next_value, data.cut, trace_decay=decay, mask=mask)
    chosen = data.mask if masked else torch.ones_like(data.mask)
    close((advantage + data.value)[chosen], returns[chosen])


@TWO_VIEWS
@PROPERTY
@given(experiences(holes=True), FRACTIONS)
def test_gae_is_the_mixture_of_n_step_advantages(masked: bool, data: Experience, decay: float) -> None:
    """A = (1 - lambda) sum_n lambda^{n-1} (G^(n) - V), where all n from the end of the trajectory on are one."""
    mask = data.mask if masked else None
    length = data.reward.shape[-1]
    mixture = torch.zeros_like(data.reward)
    for n in range(1, length + 1):
        weight = decay ** (n - 1) * (1.0 if n == length else 1.0 - decay)
        returns = n_step_return(*data.steps, data.next_value, data.cut, steps=n, mask=mask)
        mixture = mixture + weight * (returns - data.value)
    chosen = data.mask if masked else torch.ones_like(data.mask)
    close(gae(*data.critic, gae_lambda=decay, mask=mask)[chosen], mixture[chosen])


@PROPERTY
@given(experiences(holes=True))
def test_n_step_returns_reach_from_the_td_target_to_the_reward_to_go(data: Experience) -> None:
    """G^(n)_t = r_t + g_t G^(n-1)_{t+1}, never across a cut."""
    target = data.reward + data.discount * data.next_value
    close(n_step_return(*data.steps, data.next_value, data.cut, steps=1), target)
    previous = target
    for n in range(2, data.reward.shape[-1] + 2):
        returns = n_step_return(*data.steps, data.next_value, data.cut, steps=n)
        close(returns, torch.where(data.cut, target, data.reward + data.discount * previous.roll(-1, -1)))
        previous = returns
    close(previous, reward_to_go(*data.steps, data.cut, bootstrap=data.next_value))


@PROPERTY
@given(experiences())
def test_an_advantage_does_not_see_beyond_a_cut(data: Experience) -> None:
    """Everything of one trajectory is as if the others of its row were elsewhere."""
    found = gae(*data.critic, gae_lambda=0.8), reward_to_go(*data.steps, data.cut), total_reward(*data.steps, data.cut)
    for row in range(data.cut.shape[0]):
        start = 0
        for end in data.cut[row].nonzero().squeeze(-1).tolist():
            own = slice(start, end + 1)
            reward, discount, value, following, cut = (tensor[row, own] for tensor in data.critic)
            close(found[0][row, own], gae(reward, discount, value, following, cut, gae_lambda=0.8))
            close(found[1][row, own], reward_to_go(reward, discount, cut))
            close(found[2][row, own], reward_to_go(reward, discount, cut)[:1].expand(end + 1 - start))
            start = end + 1


@PROPERTY
@given(experiences(), st.floats(-2.0, 2.0))
def test_past_rewards_are_the_difference_of_total_reward_and_reward_to_go(data: Experience, change: float) -> None:
    """total_t = past_t + (product of discounts) G_t; a reward at t moves no reward to go after t."""
    total, returns = total_reward(*data.steps, data.cut), reward_to_go(*data.steps, data.cut)
    past, weight = torch.zeros(data.cut.shape[0], dtype=torch.float64), torch.ones(data.cut.shape[0]).double()
    for t in range(data.reward.shape[-1]):
        close(total[:, t], past + weight * returns[:, t])
        past = torch.where(data.cut[:, t], 0.0, past + weight * data.reward[:, t])
        weight = torch.where(data.cut[:, t], 1.0, weight * data.discount[:, t])
        changed = data.reward.clone()
        changed[:, t] += change
        assert torch.equal(reward_to_go(changed, data.discount, data.cut)[:, t + 1 :], returns[:, t + 1 :])


def trajectories_through(data: Experience, features: Tensor, decay: float, weight: Tensor) -> Tensor:
    """sum_t delta_t z_t, with z restarted where a trajectory begins."""
    delta = td_residual(*data.critic[:-1])
    trace = torch.zeros_like(features[:, 0])
    found = torch.zeros_like(trace)
    for t in range(delta.shape[-1]):
        restart = torch.ones_like(data.cut[:, 0]) if t == 0 else data.cut[:, t - 1]
        trace = accumulate_trace(trace, features[:, t], decay=decay, weight=weight[:, t], restart=restart)
        found = found + delta[:, t].unsqueeze(-1) * trace
    return found


def times(cut: Tensor) -> Tensor:
    """Steps since each trajectory's start."""
    time = torch.zeros_like(cut, dtype=torch.long)
    for t in range(1, cut.shape[-1]):
        time[:, t] = torch.where(cut[:, t - 1], 0, time[:, t - 1] + 1)
    return time


@PROPERTY
@given(experiences(), FRACTIONS, FRACTIONS, SEEDS)
def test_backward_view_is_forward_view_offline_critic(data: Experience, gamma: float, decay: float, seed: int) -> None:
    """sum_t delta_t z_t = sum_t (G^lambda_t - V_t) grad V_t."""
    discount = torch.full_like(data.reward, gamma).masked_fill(data.terminated, 0.0)
    data = Experience(**{**vars(data), "discount": discount})
    features = normal(seed, *data.reward.shape, 3)
    target = lambda_return(*data.steps, data.next_value, data.cut, trace_decay=decay)
    backward = trajectories_through(data, features, gamma * decay, torch.ones_like(data.reward))
    close(backward, ((target - data.value).unsqueeze(-1) * features).sum(1))


@PROPERTY
@given(experiences(), FRACTIONS, FRACTIONS, SEEDS)
def test_backward_view_is_forward_view_offline_actor(data: Experience, gamma: float, decay: float, seed: int) -> None:
    """sum_t delta_t z_t = sum_t gamma^t A^lambda_t grad l_t, with the I = gamma^t of the score's own step."""
    discount = torch.full_like(data.reward, gamma).masked_fill(data.terminated, 0.0)
    data = Experience(**{**vars(data), "discount": discount})
    scores = normal(seed, *data.reward.shape, 3)
    weight = discount_weight(times(data.cut), gamma, dtype=torch.float64)
    forward = (weight * gae(*data.critic, gae_lambda=decay)).unsqueeze(-1) * scores
    close(trajectories_through(data, scores, gamma * decay, weight), forward.sum(1))


@PROPERTY
@given(SEEDS, FRACTIONS, st.floats(-2.0, 2.0))
def test_backward_view_is_forward_view_in_a_continuing_task(seed: int, decay: float, average: float) -> None:
    """No gamma, no I, no restart: sum_t delta_t z_t = sum_t grad v_t sum_l lambda^l delta_{t+l}."""
    length, features = 7, normal(seed, 7, 3)
    reward, value = normal(seed + 1, 2, length)
    following = value.roll(-1)
    delta = differential_td_residual(reward, average, value, following)
    close(delta, reward - average + following - value)
    trace, backward = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for t in range(length):
        trace = accumulate_trace(trace, features[t], decay=decay)
        backward = backward + delta[t] * trace
    forward = loop(delta, torch.full_like(delta, decay))
    close(backward, (forward.unsqueeze(-1) * features).sum(0))
    cut = torch.zeros(length, dtype=torch.bool)
    close(
        differential_return(reward, average, following, cut) - value,
        loop(delta, torch.ones_like(delta)),
    )


@PROPERTY
@given(experiences(), FRACTIONS, FRACTIONS)
def test_truncation_differs_from_termination_by_gamma_v_final(data: Experience, gamma: float, decay: float) -> None:
    """At the last step by exactly gamma V(final), and k steps before by (gamma lambda)^k of it."""
    one_trajectory = torch.zeros_like(data.cut)
    one_trajectory[:, -1] = True
    going = torch.full_like(data.reward, gamma)
    ended = going.masked_fill(one_trajectory, 0.0)
    critic = data.value, data.next_value, one_trajectory
    truncated = gae(data.reward, going, *critic, gae_lambda=decay)
    terminated = gae(data.reward, ended, *critic, gae_lambda=decay)
    length = data.reward.shape[-1]
    before_end = torch.arange(length - 1, -1, -1)
    final = gamma * data.next_value[:, -1:]
    close(truncated - terminated, discount_weight(before_end, gamma * decay, dtype=torch.float64) * final)
    returns = reward_to_go(data.reward, going, one_trajectory, bootstrap=data.next_value)
    without = reward_to_go(data.reward, ended, one_trajectory, bootstrap=data.next_value)
    close(returns - without, discount_weight(before_end, gamma, dtype=torch.float64) * final)
    close(without, reward_to_go(data.reward, going, one_trajectory))


@PROPERTY
@given(experiences(holes=True), FRACTIONS)
def test_skipped_steps_are_as_if_they_were_not_there(data: Experience, decay: float) -> None:
    """A row with holes gives its chosen steps what the row without them does."""
    rows = [gae(*data.critic, gae_lambda=decay, mask=data.mask)]
    rows.append(lambda_return(*data.steps, data.next_value, data.cut, trace_decay=decay, mask=data.mask))
    rows.append(reward_to_go(*data.steps, data.cut, bootstrap=data.next_value, mask=data.mask))
    rows.append(total_reward(*data.steps, data.cut, mask=data.mask))
    rows.append(n_step_return(*data.steps, data.next_value, data.cut, steps=2, mask=data.mask))
    for row in range(data.cut.shape[0]):
        kept = data.mask[row].nonzero().squeeze(-1).tolist()
        if not kept:
            continue
        cut, following = [], []
        for t in kept:
            last = t
            while not data.cut[row, last] and not data.mask[row, last + 1]:
                last += 1
            cut.append(bool(data.cut[row, last]))
            following.append(float(data.next_value[row, last]) if data.discount[row, last] > 0 else 0.0)
        ends, next_value = torch.tensor(cut), torch.tensor(following, dtype=torch.float64)
        steps = data.reward[row, kept], data.discount[row, kept]
        compact = [
            gae(*steps, data.value[row, kept], next_value, ends, gae_lambda=decay),
            lambda_return(*steps, next_value, ends, trace_decay=decay),
            reward_to_go(*steps, ends, bootstrap=next_value),
            total_reward(*steps, ends),
            n_step_return(*steps, next_value, ends, steps=2),
        ]
        for found, expected in zip(rows, compact, strict=True):
            close(found[row, kept], expected)


@TWO_VIEWS
@PROPERTY
@given(experiences(holes=True), FRACTIONS, SEEDS)
def test_vtrace_on_policy_is_the_lambda_return(masked: bool, data: Experience, decay: float, seed: int) -> None:
    """And at lambda = 1 its advantage is that of the bootstrapped return."""
    mask = data.mask if masked else None
    chosen = data.mask if masked else torch.ones_like(data.mask)
    same = normal(seed, *data.reward.shape)
    found = vtrace(same, same, *data.critic, trace_decay=decay, mask=mask)
    returns = lambda_return(*data.steps, data.next_value, data.cut, trace_decay=decay, mask=mask)
    close(found.value_target[chosen], returns[chosen])
    assert (found.rho[chosen] == 1).all()
    if decay == 1.0:
        close(found.advantage[chosen], gae(*data.critic, gae_lambda=1.0, mask=mask)[chosen])


@PROPERTY
@given(experiences(), FRACTIONS, SEEDS, st.sampled_from([1.0, 0.5, 2.0]), st.sampled_from([1.0, 0.5, 2.0]))
@example(Experience(**SHORT), 1.0, 3, 1.0, 1.0)
def test_vtrace_is_its_recursion(data: Experience, decay: float, seed: int, rho_clip: float, trace_clip: float) -> None:
    """v_t - V_t = rho_t delta_t + g_t k_t (v_{t+1} - V_{t+1}); A_t = rho_t (r_t + g_t v_{t+1} - V_t)."""
    log_prob, behaviour = normal(seed, 2, *data.reward.shape)
    found = vtrace(log_prob, behaviour, *data.critic, trace_decay=decay, rho_clip=rho_clip, trace_clip=trace_clip)
    ratio = (log_prob - behaviour).exp()
    rho, trace = ratio.clamp(max=rho_clip), decay * ratio.clamp(max=trace_clip)
    correction = torch.zeros_like(data.reward[:, 0])
    for t in reversed(range(data.reward.shape[-1])):
        correction = correction.masked_fill(data.cut[:, t], 0.0)
        target = data.reward[:, t] + data.discount[:, t] * (data.next_value[:, t] + correction)
        close(found.advantage[:, t], rho[:, t] * (target - data.value[:, t]))
        delta = data.reward[:, t] + data.discount[:, t] * data.next_value[:, t] - data.value[:, t]
        correction = rho[:, t] * delta + data.discount[:, t] * trace[:, t] * correction
        close(found.value_target[:, t], data.value[:, t] + correction)
    close(found.rho, rho)
    if decay == rho_clip == trace_clip == 1.0:
        for one, two in zip(vtrace(log_prob, behaviour, *data.critic), found, strict=True):
            assert torch.equal(one, two)
