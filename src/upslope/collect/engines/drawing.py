"""Tokens from logits and uniform numbers, by the inverse of the cumulative distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from upslope.policies.language.sampling import Sampling

_ELEMENTS = 1 << 23
"""Logits that are worked on at once."""


def draw(logits: Tensor, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row, and its log-prob under the distribution it was drawn from.

    The token is the first whose cumulative probability exceeds u times the sum; it has positive probability whatever
    the rounding, because the sum stands for 1 and u times it is kept below it.

    Args:
        logits: [B, V] of the model.
        sampling: what is drawn from; the likeliest token is taken where it is greedy.
        uniform: [B] float64 in [0, 1); not read where sampling is greedy.

    Returns:
        Tokens [B], and log-probs [B]: NaN for rows whose logits are no distribution.
    """
    rows = max(1, _ELEMENTS // logits.shape[-1])
    if len(logits) <= rows:
        return _draw(logits, sampling, uniform)
    parts = [_draw(*part) for part in _chunks(logits, sampling, uniform, rows)]
    return torch.cat([token for token, _ in parts]), torch.cat([log_prob for _, log_prob in parts])


def _chunks(logits: Tensor, sampling: Sampling, uniform: Tensor, rows: int) -> list[tuple[Tensor, Sampling, Tensor]]:
    return [(part, sampling, u) for part, u in zip(logits.split(rows), uniform.split(rows), strict=True)]


def _draw(logits: Tensor, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor]:
    log_policy = sampling.logits(logits).log_softmax(-1)
    if sampling.greedy:
        token = log_policy.argmax(-1, keepdim=True)
    else:
        cumulative = log_policy.exp().cumsum(-1, dtype=torch.float64)
        total = cumulative[:, -1:]
        below = torch.nextafter(total, torch.zeros_like(total))
        token = torch.searchsorted(cumulative, torch.minimum(uniform.unsqueeze(-1) * total, below), right=True)
        token.clamp_(max=logits.shape[-1] - 1)
    return token.squeeze(-1), log_policy.gather(-1, token).squeeze(-1)
