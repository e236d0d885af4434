"""Potential-based shaping: a reward that changes what is learnt from each step and never what is best.

    F_t = g_t Phi(s'_t) - Phi(s_t)

Along a trajectory the terms cancel: from step t to the end, the discounted sum of F is -Phi(s_t). So q of the shaped
problem is q - Phi, whatever the policy: the same actions are best, and -Phi(s_t) is a baseline, so that the policy
gradient of whole returns is the same in the mean. With the critic V - Phi every TD residual is the same to the last
step, and GAE with it.
"""

import torch
from torch import Tensor

from upslope.estimators._checks import require_bool, require_same_shape
from upslope.estimators._skipping import skip_unchosen


def potential_shaping(
    discount: Tensor, potential: Tensor, next_potential: Tensor, cut: Tensor, *, mask: Tensor | None = None
) -> Tensor:
    """Shaping reward: F_t = g_t * Phi'_t - Phi_t, to be added to r_t; Phi counts as 0 once a trajectory has terminated.

    Ng, Harada & Russell (1999): F of this form, and of no other, leaves the optimal policies of every problem alone.
    gamma has to be that of the return.

    >>> discount, potential = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([1.0, 2.0, 4.0])
    >>> cut = torch.tensor([False, False, True])
    >>> potential_shaping(discount, potential, torch.tensor([2.0, 4.0, 9.0]), cut)
    tensor([ 0.,  0., -4.])

    Args:
        discount: `[..., T]`, gamma or 0.
        potential: `[..., T]`, Phi at the state of each step.
        next_potential: `[..., T]`, Phi at the state that really followed; not read where `discount` is 0.
        cut: `[..., T]`, boolean.
        mask: `[..., T]`, boolean; False positions are skipped: the result there is 0, and what follows a chosen step is
            the state after the last skipped position behind it.

    Raises:
        ValueError: shapes differ, or `cut` or `mask` is not boolean.
    """
    others = ("discount", discount), ("next_potential", next_potential), ("cut", cut)
    require_same_shape("potential", potential, *others)
    require_bool("cut", cut)
    if mask is None:
        return discount * torch.where(discount > 0, next_potential, 0.0) - potential
    _, following = skip_unchosen(mask, discount, next_potential, cut)
    return (discount * following - potential).masked_fill(~mask, 0.0)
