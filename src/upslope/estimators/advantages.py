"""Psi_t: what the score of step t is multiplied by. grad J = E[sum_t gamma^t grad log pi(a_t|s_t) Psi_t].

| Psi | formula | function | bias |
|---|---|---|---|
| total reward | sum over the whole trajectory, at every t | `total_reward` | none; takes no gamma^t |
| reward to go | G_t = r_t + g_t G_{t+1} | `reward_to_go` | none, up to the bootstrap |
| baselined | G_t - b(s_t) | `baselined` | none |
| action value | q(s_t, a_t) | a critic's own number | that of the critic |
| advantage | q - v; sum of (g lambda)^l delta_{t+l} | `baselined`, `gae` | the critic's, times how far lambda < 1 |
| TD residual | r_t + g_t V'_t - V_t | `td_residual` | none only with the exact V |

For groups of trajectories that share a start, `group_relative` and `leave_one_out` take the baseline from the
group itself. `discount_weight` gives gamma^t.
"""

from typing import Literal

import torch
from torch import Tensor

from upslope.estimators._checks import require_bool, require_same_shape, require_within
from upslope.estimators._skipping import skip_unchosen
from upslope.estimators.recurrence import backward_recurrence
from upslope.estimators.returns import td_residual


def gae(
    reward: Tensor,
    discount: Tensor,
    value: Tensor,
    next_value: Tensor,
    cut: Tensor,
    *,
    gae_lambda: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Generalised advantage estimate: A_t = delta_t + g_t * lambda * (1 - c_t) * A_{t+1}.

    delta_t = r_t + g_t V'_t - V_t. lambda=1 is the bootstrapped reward to go minus V, lambda=0 the TD
    residual; A + V is the lambda-return, the target of the critic. Schulman et al. (2016).

    >>> reward, discount = torch.ones(3), torch.tensor([0.5, 0.5, 0.0])
    >>> value, next_value = torch.tensor([2.0, 4.0, 6.0]), torch.tensor([4.0, 6.0, 8.0])
    >>> gae(reward, discount, value, next_value, torch.tensor([False, False, True]), gae_lambda=0.8)
    tensor([ 0.2000, -2.0000, -5.0000])

    Args:
        reward: `[..., T]`.
        discount: `[..., T]`, gamma, or 0 where the step terminated.
        value: `[..., T]`, V.
        next_value: `[..., T]`, V' at the state that really followed; finite.
        cut: `[..., T]`, boolean: terminated, truncated, or the row's data ends.
        gae_lambda: in [0, 1].
        mask: `[..., T]`, boolean. False positions are skipped: no decay passes there, a chosen step's V' is
            the `next_value` of the last skipped position after it, and their own advantage is 0.

    Raises:
        ValueError: shapes differ, `cut` or `mask` is not boolean, or lambda is outside [0, 1].
    """
    require_same_shape(
        "reward", reward, ("discount", discount), ("value", value), ("next_value", next_value), ("cut", cut)
    )
    require_bool("cut", cut)
    require_within("gae_lambda", gae_lambda, 0.0, 1.0)
    if mask is None:
        residual = torch.addcmul(reward, discount, next_value) - value
        return backward_recurrence(residual, (discount * gae_lambda).masked_fill(cut, 0.0))
    cut, next_value = skip_unchosen(mask, discount, next_value, cut)
    residual = torch.where(mask, td_residual(reward, discount, value, next_value), 0.0)
    decay = torch.where(mask, (discount * gae_lambda).masked_fill(cut, 0.0), 1.0)
    return backward_recurrence(residual, decay).masked_fill(~mask, 0.0)


def baselined(returns: Tensor, baseline: Tensor) -> Tensor:
    """Return minus baseline: G_t - b(s_t). Any b that does not depend on the action leaves the mean unchanged.

    With G = q and b = v it is the advantage. Williams (1992); Sutton & Barto (2018) section 13.4.

    >>> baselined(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 2.0]))
    tensor([ 1., -1.])

    Args:
        returns: `[..., T]`.
        baseline: `[..., T]`.

    Raises:
        ValueError: shapes differ.
    """
    require_same_shape("returns", returns, ("baseline", baseline))
    return returns - baseline


def group_relative(
    total: Tensor,
    group: Tensor,
    *,
    baseline: Literal["mean", "leave_one_out"] = "mean",
    scale: Literal["none", "group", "batch", "leave_one_out"] = "none",
    epsilon: float = 1e-6,
) -> Tensor:
    """Group-relative advantage: R_i - baseline of its group, divided by the chosen scale.

    scale="none" keeps the direction unbiased, with the mean of the group as baseline up to the factor (G-1)/G
    (Dr. GRPO); "group" divides by the group's standard deviation (ddof 1) + epsilon (GRPO, DeepSeekMath), which
    re-weights groups and biases the gradient; "batch" divides by the standard deviation of all totals (ddof 1) +
    epsilon; "leave_one_out" by that of the other members (ddof 1) + epsilon, and by nothing where these are all equal
    or fewer than two (NeMo-RL). A group whose totals are all equal (max == min) has advantage exactly 0 under every
    scale. Statistics are two-pass in float64.

    >>> total, group = torch.tensor([1.0, 0.0, 5.0, 5.0]), torch.tensor([7, 7, 3, 3])
    >>> group_relative(total, group)
    tensor([ 0.5000, -0.5000,  0.0000,  0.0000])
    >>> group_relative(total, group, scale="group")
    tensor([ 0.7071, -0.7071,  0.0000,  0.0000])
    >>> total, group = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([2, 2, 2])
    >>> group_relative(total, group, baseline="leave_one_out", scale="leave_one_out")
    tensor([ 1.0000, -0.7071, -0.7071])

    Args:
        total: any shape, one number per trajectory.
        group: of the same shape, integer label of the group.
        baseline: "mean" of the group, or "leave_one_out" for the mean of the others: G/(G-1) times as much.
        scale: "none", "group", "batch" or "leave_one_out".
        epsilon: added to the standard deviation, at least 0.

    Raises:
        ValueError: shapes differ, `group` is not of an integer type, a group has one member, or an unknown choice.
    """
    if baseline not in ("mean", "leave_one_out"):
        raise ValueError(f'baseline must be "mean" or "leave_one_out"; got {baseline!r}')
    centred, index, sizes = _centre(total, group)
    if epsilon < 0:
        raise ValueError(f"epsilon must be at least 0; got {epsilon}")
    if scale == "group":
        spread = (_per_group(centred.square(), index, sizes) / (sizes - 1)).sqrt()[index] + epsilon
    elif scale == "batch":
        spread = total.reshape(-1).to(torch.float64).std() + epsilon
    elif scale == "leave_one_out":
        spread = _spread_of_others(centred, index, sizes, epsilon)
    elif scale == "none":
        spread = torch.ones((), dtype=torch.float64, device=total.device)
    else:
        raise ValueError(f'scale must be "none", "group", "batch" or "leave_one_out"; got {scale!r}')
    scaled = torch.where(centred == 0, 0.0, centred / spread)
    if baseline == "leave_one_out":
        scaled = scaled * (sizes / (sizes - 1))[index]
    return scaled.to(total.dtype).view(total.shape)


def leave_one_out(total: Tensor, group: Tensor) -> Tensor:
    """Leave-one-out advantage: R_i - mean of the others of its group = G / (G - 1) * (R_i - mean).

    Its mean is exactly the policy gradient; a group whose totals are all equal has advantage exactly 0.
    Kool et al. (2019); Ahmadian et al. (2024).

    >>> leave_one_out(torch.tensor([3.0, 0.0, 0.0]), torch.tensor([1, 1, 1]))
    tensor([ 3.0000, -1.5000, -1.5000])

    Args:
        total: any shape, one number per trajectory.
        group: of the same shape, integer label of the group.

    Raises:
        ValueError: shapes differ, `group` is not of an integer type, or a group has one member.
    """
    centred, index, sizes = _centre(total, group)
    return (centred * (sizes / (sizes - 1))[index]).to(total.dtype).view(total.shape)


def standardise(advantage: Tensor, mask: Tensor | None = None, *, epsilon: float = 1e-8, ddof: int = 1) -> Tensor:
    """Standardised advantage over the whole tensor: (A - mean) / (std + epsilon).

    A constant batch gives exactly 0. With a mask the statistics are those of the True positions and the
    others become 0.

    >>> standardise(torch.tensor([1.0, 2.0, 3.0]))
    tensor([-1.,  0.,  1.])
    >>> standardise(torch.full((3,), 0.1))
    tensor([0., 0., 0.])

    Args:
        advantage: any shape.
        mask: of the same shape, boolean.
        epsilon: added to the standard deviation, positive.
        ddof: 1 divides the sum of squares by n - 1, 0 by n.

    Raises:
        ValueError: shapes differ, `mask` is not boolean, epsilon <= 0, or there are not more than `ddof` elements.
    """
    if epsilon <= 0:
        raise ValueError(f"epsilon must be positive; got {epsilon}")
    if mask is not None:
        require_same_shape("advantage", advantage, ("mask", mask))
        require_bool("mask", mask)
    if mask is None or bool(mask.all()):
        _require_spread(advantage.numel(), ddof)
        shifted = advantage - advantage[(0,) * advantage.dim()]  # a constant becomes zeros, in any kernel's rounding
        deviation, mean = torch.std_mean(shifted, correction=ddof)
        return (shifted - mean).div_(deviation + epsilon)
    count = int(mask.sum())
    _require_spread(count, ddof)
    lowest = torch.where(mask, advantage, torch.inf).min()
    shifted = torch.where(mask, advantage - lowest, 0.0)
    centred = torch.where(mask, shifted - shifted.sum() / count, 0.0)
    return centred / ((centred.square().sum() / (count - ddof)).sqrt() + epsilon)


def _require_spread(count: int, ddof: int) -> None:
    if count <= max(ddof, 0):
        raise ValueError(
            f"standardise needs more than {max(ddof, 0)} elements to measure a spread with ddof={ddof}; "
            f"got {count} (use larger minibatches, or do not standardise)"
        )


def _centre(total: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return, flat: totals minus their group's mean (exactly 0 without spread), group index, group sizes."""
    if total.shape != group.shape:
        raise ValueError(f"group must have the shape of total, {tuple(total.shape)}; got {tuple(group.shape)}")
    if group.is_floating_point() or group.dtype == torch.bool:
        raise ValueError(f"group must be an integer tensor of labels; got {group.dtype}")
    if not total.numel():
        raise ValueError("total must hold at least one trajectory; got an empty tensor")
    flat = total.reshape(-1).to(torch.float64)
    ordered, order = group.reshape(-1).sort()
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    labels = ordered[first]
    index = torch.empty_like(order).scatter(0, order, first.cumsum(0) - 1)
    sizes = torch.bincount(index).to(torch.float64)
    alone = labels[sizes == 1]
    if alone.numel():
        raise ValueError(
            f"every group needs at least two members, for one has no baseline; these have one: "
            f"{[int(label) for label in alone[:8]]} (draw more trajectories per group, or drop them)"
        )
    lowest = torch.full(labels.shape, torch.inf, dtype=flat.dtype, device=flat.device)
    lowest = lowest.scatter_reduce(0, index, flat, "amin")[index]
    shifted = flat - lowest
    return shifted - (_per_group(shifted, index, sizes) / sizes)[index], index, sizes


def _spread_of_others(centred: Tensor, index: Tensor, sizes: Tensor, epsilon: float) -> Tensor:
    """The standard deviation (ddof 1) of the other members + epsilon; 1 where they are equal or fewer than two.

    With c the totals less the group's mean and S the sum of c^2, the others' sum of squares is S - c^2 G / (G - 1).
    """
    size = sizes[index]
    squares = _per_group(centred.square(), index, sizes)[index] - centred.square() * size / (size - 1)
    ends = torch.zeros_like(centred, dtype=torch.bool)
    for end in ("amin", "amax"):
        extreme = torch.zeros_like(sizes).scatter_reduce(0, index, centred, end, include_self=False)[index]
        here = centred == extreme
        ends |= _per_group(here.to(torch.float64), index, sizes)[index] - here.to(torch.float64) == size - 1
    spread = (squares.clamp(min=0.0) / (size - 2).clamp(min=1)).sqrt() + epsilon
    return torch.where(ends, 1.0, spread)


def _per_group(values: Tensor, index: Tensor, sizes: Tensor) -> Tensor:
    return torch.zeros(sizes.shape, dtype=values.dtype, device=values.device).index_add(0, index, values)
