"""Divergences between policies, and entropies.

From one sample x of pi, with d = l - f = log(pi / ref):

| | value | mean | gradient's mean as a term of the LOSS (through l) | as a term of the REWARD (detached) |
|---|---|---|---|---|
| `k1` | d | KL(pi, ref) | 0: useless | grad KL(pi, ref): right |
| `k2` | d^2 / 2 | not the KL | grad KL(pi, ref): right | wrong |
| `k3` | e^{-d} - 1 + d >= 0 | KL(pi, ref) | grad KL(ref, pi): the forward KL | wrong |

In a loss use `k2`, in a reward `k1`, to watch a run `k3`; where both distributions are at hand use the exact KL.
"""

import math

import torch
from torch import Tensor

from upslope.estimators._checks import require_same_shape


def k1(log_prob: Tensor, reference_log_prob: Tensor) -> Tensor:
    """KL estimate k1 = d = l - f: unbiased, may be negative; right in the reward, no gradient in the loss.

    Schulman (2020).

    >>> k1(torch.tensor([0.5]).log(), torch.tensor([0.25]).log())
    tensor([0.6931])

    Args:
        log_prob: `[..., T]`, l.
        reference_log_prob: `[..., T]`, f.

    Raises:
        ValueError: shapes differ.
    """
    require_same_shape("log_prob", log_prob, ("reference_log_prob", reference_log_prob))
    return log_prob - reference_log_prob


def k2(log_prob: Tensor, reference_log_prob: Tensor) -> Tensor:
    """KL estimate k2 = d^2 / 2, d = l - f: biased in value, but its gradient in the loss is that of KL(pi, ref).

    Schulman (2020).

    >>> k2(torch.tensor([0.0]), torch.tensor([-3.0]))
    tensor([4.5000])

    Args:
        log_prob: `[..., T]`, l.
        reference_log_prob: `[..., T]`, f.

    Raises:
        ValueError: shapes differ.
    """
    return 0.5 * k1(log_prob, reference_log_prob).square()


def k3(log_prob: Tensor, reference_log_prob: Tensor) -> Tensor:
    """KL estimate k3 = e^{-d} - 1 + d >= 0, d = l - f: unbiased in value; in the loss it is the forward KL(ref, pi).

    Schulman (2020).

    >>> k3(torch.tensor([0.5]).log(), torch.tensor([0.25]).log())
    tensor([0.1931])

    Args:
        log_prob: `[..., T]`, l.
        reference_log_prob: `[..., T]`, f.

    Raises:
        ValueError: shapes differ.
    """
    log_ratio = k1(log_prob, reference_log_prob)
    return (torch.expm1(-log_ratio) + log_ratio).clamp(min=0.0)


def categorical_kl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """Exact KL(p || q) = sum_a p_a (log p_a - log q_a) of categorical distributions, over the last axis.

    Actions with p = 0 (logit -inf) add nothing, whatever q is.

    >>> categorical_kl(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log())
    tensor(0.1438)

    Args:
        logits_p: `[..., A]`, unnormalised.
        logits_q: `[..., A]`, unnormalised.

    Returns:
        `[...]`.

    Raises:
        ValueError: shapes differ.
    """
    require_same_shape("logits_p", logits_p, ("logits_q", logits_q))
    log_p, log_q = logits_p.log_softmax(-1), logits_q.log_softmax(-1)
    p = log_p.exp()
    return (p * (log_p - log_q).masked_fill(p == 0, 0.0)).sum(-1)


def categorical_entropy(logits: Tensor) -> Tensor:
    """Exact entropy -sum_a p_a log p_a of a categorical distribution, over the last axis.

    Actions with p = 0 (logit -inf) add nothing.

    >>> categorical_entropy(torch.tensor([0.0, 0.0, -torch.inf]))
    tensor(0.6931)

    Args:
        logits: `[..., A]`, unnormalised.

    Returns:
        `[...]`.
    """
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)


def gaussian_kl(mean_p: Tensor, log_std_p: Tensor, mean_q: Tensor, log_std_q: Tensor) -> Tensor:
    """Exact KL(p || q) of diagonal Gaussians, summed over the last axis.

    sum_i log(sigma_q / sigma_p) + (sigma_p^2 + (mu_p - mu_q)^2) / (2 sigma_q^2) - 1/2.

    >>> zero, one = torch.zeros(2), torch.ones(2)
    >>> gaussian_kl(one, zero, zero, zero)
    tensor(1.)

    Args:
        mean_p: `[..., D]`.
        log_std_p: `[..., D]` or `[D]`.
        mean_q: `[..., D]`.
        log_std_q: `[..., D]` or `[D]`.

    Returns:
        `[...]`.

    Raises:
        ValueError: the means differ in shape, or a log_std has another last axis.
    """
    require_same_shape("mean_p", mean_p, ("mean_q", mean_q))
    for name, log_std in (("log_std_p", log_std_p), ("log_std_q", log_std_q)):
        if log_std.shape not in (mean_p.shape, mean_p.shape[-1:]):
            raise ValueError(
                f"{name} must have shape {tuple(mean_p.shape)} or {tuple(mean_p.shape[-1:])}; "
                f"got {tuple(log_std.shape)}"
            )
    log_scale = log_std_p - log_std_q
    distance = (mean_p - mean_q) * (-log_std_q).exp()
    return (0.5 * (torch.expm1(2.0 * log_scale) + distance.square()) - log_scale).sum(-1)


def gaussian_entropy(log_std: Tensor) -> Tensor:
    """Exact entropy of a diagonal Gaussian: sum_i log sigma_i + (1 + log(2 pi)) / 2, over the last axis.

    >>> gaussian_entropy(torch.zeros(2))
    tensor(2.8379)

    Args:
        log_std: `[..., D]`.

    Returns:
        `[...]`.
    """
    return (log_std + 0.5 * (1.0 + math.log(2.0 * math.pi))).sum(-1)


def sampled_entropy(log_prob: Tensor) -> Tensor:
    """Sample estimate of the entropy: -l. Unbiased in value, but its gradient in a loss has mean 0.

    Use it to watch a run; to raise the entropy use the exact one, or -l as a detached reward.

    >>> sampled_entropy(torch.tensor([0.5]).log())
    tensor([0.6931])

    Args:
        log_prob: `[..., T]`, l of the sampled action.
    """
    return -log_prob
