"""Objectives: values per step `[..., T]`, to be MAXIMISED, except the two value errors, which are losses.

Independent choices stay independent: a ratio (per step, or one per sequence from `sequence_log_ratio`),
a clip shape (`clipped_ratio`, `cispo`, a cap), a Psi (`advantages`), a divergence (`divergences`) and a
reduction (`reductions`). An objective is minimised as `-weighted_sum(value, weight)`. Psi, advantages,
targets and the log-probs of other policies are numbers here: no gradient flows into them.
"""

import torch
from torch import Tensor

from upslope.estimators._checks import require_bool, require_same_shape


def score_function(log_prob: Tensor, psi: Tensor) -> Tensor:
    """Score-function objective: l_t * Psi_t. Its gradient is the policy gradient; its value means nothing.

    Williams (1992); Sutton et al. (1999).

    >>> score_function(torch.tensor([-1.0, -2.0]), torch.tensor([3.0, 0.5]))
    tensor([-3., -1.])

    Args:
        log_prob: `[..., T]`, l, with gradient.
        psi: `[..., T]`.

    Raises:
        ValueError: shapes differ.
    """
    require_same_shape("log_prob", log_prob, ("psi", psi))
    return log_prob * psi.detach()


def importance_weighted(
    log_prob: Tensor, behaviour_log_prob: Tensor, psi: Tensor, *, cap: float | None = None
) -> Tensor:
    """Importance-weighted objective: e^{l-b} * Psi_t, or truncated: detach(min(cap, e^{l-b})) * l * Psi_t.

    On-policy (l = b) the gradient of both, with cap >= 1, is the score function's. Without a cap it is the
    surrogate of TRPO (Schulman et al. 2015); with one, truncated importance sampling (Ionides 2008).

    >>> l, b = torch.tensor([0.0, -1.0]), torch.tensor([0.0, -1.0]) - torch.tensor([3.0, 0.5]).log()
    >>> importance_weighted(l, b, torch.tensor([1.0, 2.0]))
    tensor([3., 1.])
    >>> importance_weighted(l, b, torch.tensor([1.0, 2.0]), cap=2.0)
    tensor([ 0., -1.])

    Args:
        log_prob: `[..., T]`, l, with gradient.
        behaviour_log_prob: `[..., T]`, b.
        psi: `[..., T]`.
        cap: largest weight, positive; None for the plain product.

    Raises:
        ValueError: shapes differ or cap <= 0.
    """
    require_same_shape("log_prob", log_prob, ("behaviour_log_prob", behaviour_log_prob), ("psi", psi))
    if cap is None:
        return (log_prob - behaviour_log_prob.detach()).exp() * psi.detach()
    if cap <= 0:
        raise ValueError(f"cap must be positive; got {cap}")
    weight = (log_prob.detach() - behaviour_log_prob.detach()).exp().clamp(max=cap)
    return weight * psi.detach() * log_prob


def clipped(
    log_prob: Tensor,
    proximal_log_prob: Tensor,
    advantage: Tensor,
    *,
    low: float,
    high: float,
    dual_clip: float | None = None,
) -> Tensor:
    """PPO's clipped surrogate: min(rho A, clip(rho, 1 - low, 1 + high) A), rho = e^{l-p}.

    At rho = 1 its gradient is exactly the score function's. Schulman et al. (2017).

    >>> p = -torch.tensor([1.5, 1.5, 0.5, 0.5]).log()
    >>> clipped(torch.zeros(4), p, torch.tensor([1.0, -1.0, 1.0, -1.0]), low=0.2, high=0.2)
    tensor([ 1.2000, -1.5000,  0.5000, -0.8000])

    Args:
        log_prob: `[..., T]`, l, with gradient.
        proximal_log_prob: `[..., T]`, p.
        advantage: `[..., T]`.
        low: in [0, 1].
        high: at least 0.
        dual_clip: c > 1: where A < 0 the objective is at least c A (Ye et al. 2020); None for off.

    Raises:
        ValueError: shapes differ or a number is out of its range.
    """
    require_same_shape("log_prob", log_prob, ("proximal_log_prob", proximal_log_prob), ("advantage", advantage))
    ratio = (log_prob - proximal_log_prob.detach()).exp()
    return clipped_ratio(ratio, advantage, low=low, high=high, dual_clip=dual_clip)


def clipped_ratio(
    ratio: Tensor, advantage: Tensor, *, low: float, high: float, dual_clip: float | None = None
) -> Tensor:
    """Clip shape of PPO for any ratio: min(ratio A, clip(ratio, 1 - low, 1 + high) A).

    With `sequence_log_ratio(...).exp()` and one advantage per sequence this is GSPO.

    >>> clipped_ratio(torch.tensor([5.0, 5.0]), torch.tensor([1.0, -1.0]), low=0.2, high=0.2, dual_clip=3.0)
    tensor([ 1.2000, -3.0000])

    Args:
        ratio: `[..., T]`, with gradient.
        advantage: `[..., T]`.
        low: in [0, 1].
        high: at least 0.
        dual_clip: c > 1: where A < 0 the objective is at least c A; None for off.

    Raises:
        ValueError: shapes differ or a number is out of its range.
    """
    require_same_shape("ratio", ratio, ("advantage", advantage))
    if not (0.0 <= low <= 1.0 and high >= 0.0):
        raise ValueError(f"low must lie in [0, 1] and high must be at least 0; got low={low} and high={high}")
    advantage = advantage.detach()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1.0 - low, 1.0 + high) * advantage)
    if dual_clip is None:
        return surrogate
    if dual_clip <= 1.0:
        raise ValueError(f"dual_clip must be greater than 1 (3 is usual), or None for off; got {dual_clip}")
    return torch.where(advantage < 0, torch.maximum(surrogate, dual_clip * advantage), surrogate)


def cispo(
    log_prob: Tensor, proximal_log_prob: Tensor, advantage: Tensor, *, low: float | None = None, high: float
) -> Tensor:
    """CISPO: detach(clip(rho, 1 - low, 1 + high)) * A_t * l_t: every step keeps a gradient. MiniMax (2025).

    At rho = 1 its gradient is the score function's.

    >>> l, p = torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -1.0]) - torch.tensor([3.0, 1.0]).log()
    >>> cispo(l, p, torch.tensor([2.0, 2.0]), high=1.0)
    tensor([-4., -2.])

    Args:
        log_prob: `[..., T]`, l, with gradient.
        proximal_log_prob: `[..., T]`, p.
        advantage: `[..., T]`.
        low: in [0, 1]; None for no lower clip.
        high: at least 0; the cap is 1 + high.

    Raises:
        ValueError: shapes differ or a number is out of its range.
    """
    require_same_shape("log_prob", log_prob, ("proximal_log_prob", proximal_log_prob), ("advantage", advantage))
    floor = 0.0 if low is None else 1.0 - low
    if not (0.0 <= floor <= 1.0 and high >= 0.0):
        raise ValueError(f"low must lie in [0, 1] and high must be at least 0; got low={low} and high={high}")
    weight = (log_prob.detach() - proximal_log_prob.detach()).exp().clamp(floor, 1.0 + high)
    return weight * advantage.detach() * log_prob


def sequence_log_ratio(
    log_prob: Tensor, other_log_prob: Tensor, mask: Tensor, *, length_normalised: bool = True
) -> Tensor:
    """One log-ratio per sequence: the mean over its chosen steps of (l - p), or their sum.

    exp of the mean is GSPO's ratio (Zheng et al. 2025); exp of the sum is the ratio of the probabilities of
    the full sequences. A sequence without chosen steps has log-ratio 0.

    >>> l, p = torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    >>> sequence_log_ratio(l, p, torch.tensor([[True, True, False]]))
    tensor([1.5000])
    >>> sequence_log_ratio(l, p, torch.tensor([[True, True, False]]), length_normalised=False)
    tensor([3.])

    Args:
        log_prob: `[..., T]`, l, with gradient.
        other_log_prob: `[..., T]`, p, b or f; no gradient flows into it.
        mask: `[..., T]`, boolean; at False positions nothing is read.
        length_normalised: mean if True, sum if False.

    Returns:
        `[...]`, one per row.

    Raises:
        ValueError: shapes differ or `mask` is not boolean.
    """
    require_same_shape("log_prob", log_prob, ("other_log_prob", other_log_prob), ("mask", mask))
    return sequence_log_prob(log_prob - other_log_prob.detach(), mask, length_normalised=length_normalised)


def sequence_log_prob(log_prob: Tensor, mask: Tensor, *, length_normalised: bool = False) -> Tensor:
    """One log-prob per sequence: the sum over its chosen steps of l, or their mean.

    >>> sequence_log_prob(torch.tensor([[-1.0, -3.0, -9.0]]), torch.tensor([[True, True, False]]))
    tensor([-4.])

    Args:
        log_prob: `[..., T]`.
        mask: `[..., T]`, boolean; at False positions nothing is read.
        length_normalised: mean if True, sum if False.

    Returns:
        `[...]`, one per row.

    Raises:
        ValueError: shapes differ or `mask` is not boolean.
    """
    require_same_shape("log_prob", log_prob, ("mask", mask))
    require_bool("mask", mask)
    total = torch.where(mask, log_prob, 0.0).sum(-1)
    return total / mask.sum(-1).clamp(min=1) if length_normalised else total


def kl_penalised(
    log_prob: Tensor, proximal_log_prob: Tensor, advantage: Tensor, kl: Tensor, *, coefficient: float
) -> Tensor:
    """KL-penalised surrogate: rho A - beta * KL(old || new), rho = e^{l-p}. Schulman et al. (2017) section 4.

    >>> zeros = torch.zeros(2)
    >>> kl_penalised(zeros, zeros, torch.tensor([1.0, -1.0]), torch.tensor([0.5, 0.5]), coefficient=2.0)
    tensor([ 0., -2.])

    Args:
        log_prob: `[..., T]`, l, with gradient.
        proximal_log_prob: `[..., T]`, p.
        advantage: `[..., T]`.
        kl: `[..., T]`, KL(old || new) at each step, with gradient, exact where the distributions are at hand.
        coefficient: beta, at least 0.

    Raises:
        ValueError: shapes differ or coefficient < 0.
    """
    require_same_shape("log_prob", log_prob, ("kl", kl))
    if coefficient < 0:
        raise ValueError(f"coefficient must be at least 0; got {coefficient}")
    return importance_weighted(log_prob, proximal_log_prob, advantage) - coefficient * kl


def adapted_coefficient(coefficient: float, kl: float, *, target: float) -> float:
    """PPO's adaptive beta: doubled if KL > 1.5 target, halved if KL < target / 1.5, else kept.

    >>> adapted_coefficient(1.0, 0.02, target=0.01), adapted_coefficient(1.0, 0.001, target=0.01)
    (2.0, 0.5)

    Args:
        coefficient: beta now.
        kl: mean KL(old || new) after the update.
        target: positive.

    Raises:
        ValueError: target <= 0.
    """
    if target <= 0:
        raise ValueError(f"target must be positive; got {target}")
    if kl > 1.5 * target:
        return 2.0 * coefficient
    return coefficient / 2.0 if kl < target / 1.5 else coefficient


def squared_value_error(value: Tensor, target: Tensor) -> Tensor:
    """Squared value error, a loss: 0.5 * (V - target)^2. A value coefficient multiplies exactly this.

    >>> squared_value_error(torch.tensor([1.0, 3.0]), torch.tensor([3.0, 3.0]))
    tensor([2., 0.])

    Args:
        value: `[..., T]`, V, with gradient.
        target: `[..., T]`.

    Raises:
        ValueError: shapes differ.
    """
    require_same_shape("value", value, ("target", target))
    return 0.5 * (value - target.detach()).square()


def clipped_value_error(
    value: Tensor, target: Tensor, behaviour_value: Tensor, *, clip: float, pessimistic: bool = True
) -> Tensor:
    """Clipped value error, a loss: max of the error of V and of b + clip(V - b, -clip, clip), each 0.5 (.)^2.

    `pessimistic=False` takes the clipped error alone (Stable-Baselines3), which has no gradient outside.

    >>> value, target, before = torch.tensor([2.0, 2.0]), torch.tensor([0.0, 4.0]), torch.tensor([1.0, 1.0])
    >>> clipped_value_error(value, target, before, clip=0.5)
    tensor([2.0000, 3.1250])
    >>> clipped_value_error(value, target, before, clip=0.5, pessimistic=False)
    tensor([1.1250, 3.1250])

    Args:
        value: `[..., T]`, V, with gradient.
        target: `[..., T]`.
        behaviour_value: `[..., T]`, b, the critic's value when the data was collected.
        clip: positive, in units of the value.
        pessimistic: the larger of the two errors; False for the clipped one alone.

    Raises:
        ValueError: shapes differ or clip <= 0.
    """
    require_same_shape("value", value, ("target", target), ("behaviour_value", behaviour_value))
    if clip <= 0:
        raise ValueError(f"clip must be positive; got {clip}")
    anchor = behaviour_value.detach()
    error = squared_value_error(anchor + (value - anchor).clamp(-clip, clip), target)
    return torch.maximum(squared_value_error(value, target), error) if pessimistic else error
