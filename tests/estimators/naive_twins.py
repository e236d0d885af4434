"""The estimators once more, written as loops over one trajectory at a time: slow, obvious, independent."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Random rows of steps, with terminations, truncations and skipped positions."""

    reward: Tensor
    discount: Tensor
    value: Tensor
    next_value: Tensor
    cut: Tensor
    mask: Tensor
    log_prob: Tensor
    behaviour_log_prob: Tensor


def make_steps(seed: int, shape: tuple[int, ...], gamma: float, *, holes: bool = True) -> Steps:
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def chance(probability: float) -> Tensor:
        return torch.rand(shape, generator=generator) < probability

    cut = chance(0.2)
    terminated = cut & chance(0.5)
    return Steps(
        reward=normal(),
        discount=torch.full(shape, gamma, dtype=torch.float64).masked_fill(terminated, 0.0),
        value=normal(),
        next_value=normal(),
        cut=cut,
        mask=chance(0.7) if holes else torch.ones(shape, dtype=torch.bool),
        log_prob=-normal().abs(),
        behaviour_log_prob=-normal().abs(),
    )


@st.composite
def steps(draw: st.DrawFn, *, holes: bool = True) -> Steps:
    shape = draw(st.sampled_from([(1,), (7,), (1, 1), (3, 5), (2, 3, 6), (4, 33), (2, 64), (0, 4)]))
    gamma = draw(st.sampled_from([0.0, 0.5, 0.99, 1.0]))
    return make_steps(draw(st.integers(0, 2**31)), shape, gamma, holes=holes)


@dataclass(frozen=True)
class Step:
    """One chosen step with what really follows it: the skipped positions are gone."""

    position: int
    reward: float
    discount: float
    value: float
    next_value: float
    ratio: float


def recurrence(x: Tensor, k: Tensor) -> Tensor:
    result = torch.zeros_like(x)
    following = torch.zeros_like(x[..., 0])
    for t in reversed(range(x.shape[-1])):
        following = x[..., t] + k[..., t] * following
        result[..., t] = following
    return result


def per_trajectory(data: Steps, function: Callable[[list[Step]], list[float]], *, masked: bool) -> Tensor:
    """Apply `function` to the chosen steps of every trajectory of every row; 0 elsewhere."""
    length = data.reward.shape[-1]
    result = torch.zeros_like(data.reward).reshape(-1, length)
    rows = [
        tensor.reshape(-1, length).tolist()
        for tensor in (
            data.reward,
            data.discount,
            data.value,
            data.next_value,
            data.cut,
            data.mask if masked else torch.ones_like(data.mask),
            data.log_prob - data.behaviour_log_prob,
        )
    ]
    for i in range(result.shape[0]):
        reward, discount, value, next_value, cut, mask, log_ratio = (row[i] for row in rows)
        start = 0
        for end in range(length):
            if not cut[end] and end < length - 1:
                continue
            chosen = [t for t in range(start, end + 1) if mask[t]]
            trajectory: list[Step] = []
            for n, t in enumerate(chosen):
                seen = chosen[n + 1] - 1 if n + 1 < len(chosen) else end
                following = next_value[seen] if discount[seen] > 0 else 0.0
                trajectory.append(Step(t, reward[t], discount[t], value[t], following, math.exp(log_ratio[t])))
            if trajectory:
                for step, number in zip(trajectory, function(trajectory), strict=True):
                    result[i, step.position] = number
            start = end + 1
    return result.reshape(data.reward.shape)


def lambda_return(trajectory: list[Step], trace_decay: float) -> list[float]:
    result: list[float] = []
    for step in reversed(trajectory):
        bracket = (1 - trace_decay) * step.next_value + trace_decay * result[0] if result else step.next_value
        result.insert(0, step.reward + step.discount * bracket)
    return result


def reward_to_go(trajectory: list[Step], *, bootstrap: bool) -> list[float]:
    result: list[float] = []
    for step in reversed(trajectory):
        following = result[0] if result else step.next_value * bootstrap
        result.insert(0, step.reward + step.discount * following)
    return result


def n_step_return(trajectory: list[Step], steps: int) -> list[float]:
    result: list[float] = []
    for t in range(len(trajectory)):
        total, weight = 0.0, 1.0
        window = trajectory[t : t + steps]
        for step in window:
            total += weight * step.reward
            weight *= step.discount
        result.append(total + weight * window[-1].next_value)
    return result


def gae(trajectory: list[Step], gae_lambda: float) -> list[float]:
    """The sum over l of the products of (g lambda), as printed in the paper."""
    result: list[float] = []
    for t in range(len(trajectory)):
        total, weight = 0.0, 1.0
        for step in trajectory[t:]:
            total += weight * (step.reward + step.discount * step.next_value - step.value)
            weight *= step.discount * gae_lambda
        result.append(total)
    return result


def vtrace_correction(trajectory: list[Step], trace_decay: float, rho_clip: float, trace_clip: float) -> list[float]:
    """v_t - V_t, as the explicit sum of Espeholt et al. (2018), equation 1."""
    result: list[float] = []
    for t in range(len(trajectory)):
        total, weight = 0.0, 1.0
        for step in trajectory[t:]:
            delta = step.reward + step.discount * step.next_value - step.value
            total += weight * min(rho_clip, step.ratio) * delta
            weight *= step.discount * trace_decay * min(trace_clip, step.ratio)
        result.append(total)
    return result
