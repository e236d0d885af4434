"""Returns: what followed each step, added up. Every one is `backward_recurrence` with its own x and k.

All arguments are `[..., T]`, time last. `discount` is gamma, or 0 where the step truly terminated; `cut`
is True where the trajectory stops after the step in this row (terminated, truncated, or the data end) and
the last step of a row counts as cut whether or not it says so; `next_value` is the critic at the state
that really followed. Where a function takes `mask`, a False position is skipped: no time passes there, its
reward is not read, its result is 0, and a chosen step's V' is the `next_value` of the last skipped position
after it (0 if the trajectory terminated there).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from upslope.estimators._checks import require_bool, require_same_shape, require_within
from upslope.estimators._skipping import chosen_first, skip_unchosen, with_last_cut
from upslope.estimators.recurrence import backward_recurrence


def reward_to_go(
    reward: Tensor,
    discount: Tensor,
    cut: Tensor,
    *,
    bootstrap: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Reward to go: G_t = r_t + g_t * G_{t+1}, with G_{t+1} = V'_t where cut (0 without `bootstrap`).

    Sutton & Barto (2018) section 3.3; the bootstrap at a time limit is Pardo et al. (2018).

    >>> reward, discount = torch.ones(3), torch.tensor([0.5, 0.5, 0.5])
    >>> cut = torch.tensor([False, False, True])
    >>> reward_to_go(reward, discount, cut)
    tensor([1.7500, 1.5000, 1.0000])
    >>> reward_to_go(reward, discount, cut, bootstrap=torch.full((3,), 4.0))
    tensor([2.2500, 2.5000, 3.0000])

    Args:
        reward: `[..., T]`.
        discount: `[..., T]`, gamma or 0.
        cut: `[..., T]`, boolean.
        bootstrap: `[..., T]`, V'; read only where cut and `discount > 0`.
        mask: `[..., T]`, boolean; False positions are skipped.

    Raises:
        ValueError: shapes differ, or `cut` or `mask` is not boolean.
    """
    require_same_shape("reward", reward, ("discount", discount), ("cut", cut))
    require_bool("cut", cut)
    following = torch.zeros_like(reward) if bootstrap is None else bootstrap
    require_same_shape("reward", reward, ("bootstrap", following))
    returns = _lambda_recurrence(reward, discount, following, cut, 1.0, mask)
    return returns if mask is None else returns.masked_fill(~mask, 0.0)


def total_reward(reward: Tensor, discount: Tensor, cut: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Total reward: the discounted sum of the whole trajectory, sum_k (g_0 ... g_{k-1}) r_k, at every t.

    A trajectory is what lies between two cuts of a row; the discounting counts from its first step in the
    row. As Psi it takes no weight gamma^t: the discount is inside.

    >>> total_reward(torch.ones(3), torch.full((3,), 0.5), torch.tensor([False, True, True]))
    tensor([1.5000, 1.5000, 1.0000])

    Args:
        reward: `[..., T]`.
        discount: `[..., T]`, gamma or 0.
        cut: `[..., T]`, boolean.
        mask: `[..., T]`, boolean; False positions are skipped.

    Raises:
        ValueError: shapes differ, or `cut` or `mask` is not boolean.
    """
    require_same_shape("reward", reward, ("discount", discount), ("cut", cut))
    require_bool("cut", cut)
    returns = _lambda_recurrence(reward, discount, torch.zeros_like(reward), cut, 1.0, mask)
    position = torch.arange(reward.shape[-1], device=reward.device).expand_as(cut)
    starts = cut.roll(1, -1)
    starts[..., 0] = True
    start = torch.where(starts, position, 0).cummax(-1).values
    total = returns.gather(-1, start)
    return total if mask is None else total.masked_fill(~mask, 0.0)


def n_step_return(
    reward: Tensor,
    discount: Tensor,
    next_value: Tensor,
    cut: Tensor,
    *,
    steps: int,
    mask: Tensor | None = None,
) -> Tensor:
    """n-step return: n rewards, then V' of the last of them; never across a cut, where V' comes sooner.

    G^(n)_t = r_t + g_t * G^(n-1)_{t+1}, G^(1)_t = r_t + g_t * V'_t, and G^(m)_t = G^(1)_t where cut.
    steps=1 is the TD target; steps >= T is the bootstrapped reward to go. Sutton & Barto (2018) section 7.1.

    >>> values = torch.tensor([10.0, 20.0, 30.0])
    >>> end = torch.tensor([False, False, True])
    >>> n_step_return(torch.ones(3), torch.full((3,), 0.5), values, end, steps=2)
    tensor([ 6.5000,  9.0000, 16.0000])

    Args:
        reward: `[..., T]`.
        discount: `[..., T]`, gamma or 0.
        next_value: `[..., T]`, V'.
        cut: `[..., T]`, boolean.
        steps: n, at least 1.
        mask: `[..., T]`, boolean; False positions are skipped: n counts chosen steps.

    Raises:
        ValueError: shapes differ, `cut` or `mask` is not boolean, or steps < 1.
    """
    require_same_shape("reward", reward, ("discount", discount), ("next_value", next_value), ("cut", cut))
    require_bool("cut", cut)
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")
    if mask is None:
        return _windows(reward, discount, next_value, cut, steps)
    cut, next_value = skip_unchosen(mask, discount, next_value, cut)
    order = chosen_first(mask)
    chosen = mask.gather(-1, order)
    compact = _windows(
        reward.gather(-1, order).masked_fill(~chosen, 0.0),
        discount.gather(-1, order).masked_fill(~chosen, 0.0),
        next_value.gather(-1, order).masked_fill(~chosen, 0.0),
        cut.gather(-1, order) | ~chosen,
        steps,
    )
    return torch.zeros_like(compact).scatter(-1, order, compact)


def lambda_return(
    reward: Tensor,
    discount: Tensor,
    next_value: Tensor,
    cut: Tensor,
    *,
    trace_decay: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Lambda-return: G_t = r_t + g_t * [(1 - lambda) V'_t + lambda G_{t+1}], with V'_t for the bracket where cut.

    lambda=0 is the TD target, lambda=1 the bootstrapped reward to go; minus V it is GAE.
    Sutton & Barto (2018) section 12.1.

    >>> reward, discount = torch.ones(2), torch.full((2,), 0.5)
    >>> lambda_return(reward, discount, torch.tensor([4.0, 8.0]), torch.tensor([False, True]), trace_decay=0.5)
    tensor([3.2500, 5.0000])

    Args:
        reward: `[..., T]`.
        discount: `[..., T]`, gamma or 0.
        next_value: `[..., T]`, V'; not read where `discount` is 0.
        cut: `[..., T]`, boolean.
        trace_decay: lambda, in [0, 1].
        mask: `[..., T]`, boolean; False positions are skipped.

    Raises:
        ValueError: shapes differ, `cut` or `mask` is not boolean, or lambda is outside [0, 1].
    """
    require_same_shape("reward", reward, ("discount", discount), ("next_value", next_value), ("cut", cut))
    require_bool("cut", cut)
    require_within("trace_decay", trace_decay, 0.0, 1.0)
    returns = _lambda_recurrence(reward, discount, next_value, cut, trace_decay, mask)
    return returns if mask is None else returns.masked_fill(~mask, 0.0)


def differential_return(reward: Tensor, average_reward: float | Tensor, next_value: Tensor, cut: Tensor) -> Tensor:
    """Differential return of a continuing task: G_t = r_t - r_bar + G_{t+1}, with V'_t for G_{t+1} where cut.

    There is no discount and nothing terminates; `cut` marks the end of the row's data.
    Sutton & Barto (2018) section 10.3.

    >>> differential_return(torch.tensor([1.0, 3.0]), 2.0, torch.tensor([7.0, 5.0]), torch.tensor([False, True]))
    tensor([5., 6.])

    Args:
        reward: `[..., T]`.
        average_reward: r_bar, a number or a tensor that broadcasts to `[..., T]`.
        next_value: `[..., T]`, the differential value that follows; read only where cut.
        cut: `[..., T]`, boolean.

    Raises:
        ValueError: shapes differ or `cut` is not boolean.
    """
    require_same_shape("reward", reward, ("next_value", next_value), ("cut", cut))
    return reward_to_go(reward - average_reward, torch.ones_like(reward), cut, bootstrap=next_value)


def td_residual(reward: Tensor, discount: Tensor, value: Tensor, next_value: Tensor) -> Tensor:
    """One-step temporal-difference residual: delta_t = r_t + g_t * V'_t - V_t.

    >>> td_residual(torch.ones(2), torch.tensor([0.5, 0.0]), torch.tensor([3.0, 4.0]), torch.tensor([8.0, 9.0]))
    tensor([ 2., -3.])

    Args:
        reward: `[..., T]`.
        discount: `[..., T]`, gamma or 0.
        value: `[..., T]`, V.
        next_value: `[..., T]`, V', finite.

    Raises:
        ValueError: shapes differ.
    """
    require_same_shape("reward", reward, ("discount", discount), ("value", value), ("next_value", next_value))
    return torch.addcmul(reward, discount, next_value) - value


def differential_td_residual(
    reward: Tensor, average_reward: float | Tensor, value: Tensor, next_value: Tensor
) -> Tensor:
    """Average-reward TD residual: delta_t = r_t - r_bar + V'_t - V_t, with differential values.

    >>> differential_td_residual(torch.ones(2), 0.5, torch.tensor([3.0, 4.0]), torch.tensor([4.0, 2.0]))
    tensor([ 1.5000, -1.5000])

    Args:
        reward: `[..., T]`.
        average_reward: r_bar, a number or a tensor that broadcasts to `[..., T]`.
        value: `[..., T]`, V.
        next_value: `[..., T]`, V'.

    Raises:
        ValueError: shapes differ.
    """
    require_same_shape("reward", reward, ("value", value), ("next_value", next_value))
    return reward - average_reward + next_value - value


def discount_weight(time: Tensor, gamma: float, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weight gamma^t of a step's score in the gradient of the discounted objective; 0^0 = 1.

    Without it (gamma=1 here) the direction followed is not the gradient of J_gamma
    (Thomas 2014; Nota & Thomas 2020).

    >>> discount_weight(torch.tensor([0, 1, 2]), 0.5)
    tensor([1.0000, 0.5000, 0.2500])

    Args:
        time: `[..., T]`, integer number of steps since the trajectory's start.
        gamma: in [0, 1].
        dtype: of the result.

    Raises:
        ValueError: gamma outside [0, 1], or `time` not of an integer type.
    """
    require_within("gamma", gamma, 0.0, 1.0)
    if time.is_floating_point() or time.dtype == torch.bool:
        raise ValueError(f"time must be an integer tensor, steps since the start; got {time.dtype}")
    return torch.pow(gamma, time.to(torch.float64)).to(dtype)


class VTrace(NamedTuple):
    """What V-trace returns, each `[..., T]`."""

    value_target: Tensor
    advantage: Tensor
    rho: Tensor


def vtrace(
    log_prob: Tensor,
    behaviour_log_prob: Tensor,
    reward: Tensor,
    discount: Tensor,
    value: Tensor,
    next_value: Tensor,
    cut: Tensor,
    *,
    trace_decay: float = 1.0,
    rho_clip: float = 1.0,
    trace_clip: float = 1.0,
    mask: Tensor | None = None,
) -> VTrace:
    """V-trace targets and advantages for steps chosen by another policy.

    rho_t = min(rho_bar, e^{l-b}), k_t = lambda min(c_bar, e^{l-b});
    v_t = V_t + rho_t delta_t + g_t k_t (v_{t+1} - V_{t+1}), the last term 0 where cut;
    A_t = rho_t (r_t + g_t v_{t+1} - V_t), with V'_t for v_{t+1} where cut.

    On-policy (l = b) the target is the lambda-return. The ratio carries no gradient.
    Espeholt et al. (2018), with lambda as in their remark 2.

    >>> same, cut = torch.zeros(2), torch.tensor([False, True])
    >>> reward, discount = torch.ones(2), torch.full((2,), 0.5)
    >>> value, next_value = torch.tensor([2.0, 4.0]), torch.tensor([4.0, 8.0])
    >>> vtrace(same, same, reward, discount, value, next_value, cut).value_target
    tensor([3.5000, 5.0000])
    >>> vtrace(same, same + torch.tensor(2.0).log(), reward, discount, value, next_value, cut).advantage
    tensor([0.6250, 0.5000])

    Args:
        log_prob: `[..., T]`, l, under the policy that learns.
        behaviour_log_prob: `[..., T]`, b, under the one that acted.
        reward: `[..., T]`.
        discount: `[..., T]`, gamma or 0.
        value: `[..., T]`, V.
        next_value: `[..., T]`, V'.
        cut: `[..., T]`, boolean.
        trace_decay: lambda, in [0, 1].
        rho_clip: rho_bar, positive; it sets which policy's value is the fixed point.
        trace_clip: c_bar, positive; it sets only the speed.
        mask: `[..., T]`, boolean; False positions are skipped: their target is V, their advantage 0.

    Raises:
        ValueError: shapes differ, `cut` or `mask` is not boolean, or a number is out of its range.
    """
    require_same_shape("reward", reward, ("log_prob", log_prob), ("behaviour_log_prob", behaviour_log_prob))
    require_same_shape(
        "reward", reward, ("discount", discount), ("value", value), ("next_value", next_value), ("cut", cut)
    )
    require_bool("cut", cut)
    require_within("trace_decay", trace_decay, 0.0, 1.0)
    if min(rho_clip, trace_clip) <= 0:
        raise ValueError(f"rho_clip and trace_clip must be positive; got {rho_clip} and {trace_clip}")
    log_ratio = (log_prob - behaviour_log_prob).detach()
    ends = with_last_cut(cut)
    if mask is not None:
        ends, next_value = skip_unchosen(mask, discount, next_value, cut)
        log_ratio = log_ratio.masked_fill(~mask, 0.0)
    ratio = log_ratio.exp()
    rho = ratio.clamp(max=rho_clip)
    x = rho * td_residual(reward, discount, value, next_value)
    k = (discount * ratio.clamp(max=trace_clip) * trace_decay).masked_fill(ends, 0.0)
    if mask is not None:
        x, k = torch.where(mask, x, 0.0), torch.where(mask, k, 1.0)
    correction = backward_recurrence(x, k)
    next_target = next_value + _shift(correction, 1).masked_fill(ends, 0.0)
    advantage = rho * td_residual(reward, discount, value, next_target)
    if mask is None:
        return VTrace(value + correction, advantage, rho)
    return VTrace(
        torch.where(mask, value + correction, value),
        torch.where(mask, advantage, 0.0),
        rho.masked_fill(~mask, 0.0),
    )


def _lambda_recurrence(
    reward: Tensor, discount: Tensor, next_value: Tensor, cut: Tensor, trace_decay: float, mask: Tensor | None
) -> Tensor:
    ends = with_last_cut(cut)
    if mask is not None:
        ends, next_value = skip_unchosen(mask, discount, next_value, cut)
    bootstrap = torch.where(discount > 0, discount * next_value, 0.0)
    x = reward + torch.where(ends, bootstrap, 0.0 if trace_decay == 1.0 else (1.0 - trace_decay) * bootstrap)
    k = (discount * trace_decay).masked_fill(ends, 0.0)
    if mask is not None:
        x, k = torch.where(mask, x, 0.0), torch.where(mask, k, 1.0)
    return backward_recurrence(x, k)


def _windows(reward: Tensor, discount: Tensor, next_value: Tensor, cut: Tensor, steps: int) -> Tensor:
    """Compose the `steps - 1` affine maps y -> x_t + k_t y from t on, by binary powers; apply them to the last."""
    ends = with_last_cut(cut)
    one_step = reward + torch.where(discount > 0, discount * next_value, 0.0)
    x = torch.where(ends, one_step, reward)
    k = discount.masked_fill(ends, 0.0)
    remaining = min(steps, reward.shape[-1]) - 1
    last, size, covered = remaining, 1, 0
    window_x, window_k = torch.zeros_like(x), torch.ones_like(k)
    while remaining:
        if remaining & 1:
            window_x = window_x + window_k * _shift(x, covered)
            window_k = window_k * _shift(k, covered)
            covered += size
        x, k = x + k * _shift(x, size), k * _shift(k, size)
        size *= 2
        remaining >>= 1
    return window_x + window_k * _shift(one_step, last)


def _shift(tensor: Tensor, distance: int) -> Tensor:
    """Entry t is `tensor` at t + distance, 0 beyond the end."""
    kept = tensor[..., distance:]
    return torch.nn.functional.pad(kept, (0, tensor.shape[-1] - kept.shape[-1]))
