"""What Psi_t and the critic are worth on the batch at hand."""

from __future__ import annotations

import torch
from torch import Tensor

from upslope.estimators import gae, reward_to_go, td_residual, total_reward
from upslope.trajectory import Trajectory

GAE_LAMBDA = 0.95
"""lambda of the GAE that the chosen Psi_t is held against."""


def explained_variance(value: Tensor, target: Tensor) -> float:
    """1 - Var[target - V] / Var[target]: 1 is a perfect critic, 0 one no better than a constant.

    NaN where the target does not vary, since the question has no answer then.
    """
    both = torch.stack([target.flatten(), (target - value).flatten()])
    variance, left = both.var(dim=1, unbiased=False).tolist()
    return float("nan") if variance == 0.0 else 1.0 - left / variance


def psi_variances(
    trajectory: Trajectory, psi: Tensor, value: Tensor | None, next_value: Tensor | None, *, gamma: float
) -> dict[str, Tensor]:
    """Var[Psi_t] over the chosen steps, of the Psi_t in use and of what could have stood in its place.

        with a critic: reward to go (bootstrapped), the same minus V, TD residual, GAE(gamma, 0.95)
        without: total reward, reward to go

    Of two that are unbiased the one of smaller variance gives the steadier gradient; TD residual and GAE buy theirs
    with the critic's bias.

    Args:
        trajectory: [B, T].
        psi: [B, T], in use, before any standardising.
        value: [B, T], V, or None.
        next_value: [B, T], V', or None.
        gamma: discount factor of the alternatives.

    Returns:
        Scalars: "psi" and the alternatives by name.
    """
    reward, cut, discount, mask = trajectory.reward, trajectory.cut, trajectory.discount(gamma), trajectory.mask
    hidden = None if bool(mask.all()) else mask
    choices = {"psi": psi}
    if value is None or next_value is None:
        choices["total_reward"] = total_reward(reward, discount, cut, mask=hidden)
        choices["reward_to_go"] = reward_to_go(reward, discount, cut, mask=hidden)
    else:
        baselined = gae(reward, discount, value, next_value, cut, gae_lambda=1.0, mask=hidden)
        choices["reward_to_go"] = baselined + value
        choices["baselined"] = baselined
        choices["td_residual"] = td_residual(reward, discount, value, next_value)
        choices["gae"] = gae(reward, discount, value, next_value, cut, gae_lambda=GAE_LAMBDA, mask=hidden)
    chosen = torch.stack(list(choices.values())).flatten(1)
    if hidden is not None:
        chosen = chosen[:, mask.flatten()]
    return dict(zip(choices, chosen.var(1, unbiased=False), strict=True))


def zero_advantage_groups(advantage: Tensor, mask: Tensor, group: Tensor) -> Tensor:
    """The share of groups in which no chosen step has an advantage: all their rows were rewarded alike.

    Args:
        advantage: [B, T].
        mask: [B, T], the chosen steps.
        group: [B], rows that share a start.
    """
    _, index = group.unique(return_inverse=True)
    alive = ((advantage != 0.0) & mask).any(-1)
    count = int(index.max()) + 1
    living = torch.zeros(count, dtype=torch.long, device=index.device).index_add_(0, index, alive.long())
    return (living == 0).double().mean()
