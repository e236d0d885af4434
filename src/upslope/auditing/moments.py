"""Mean and spread of an ascent direction over batches: by weighting every batch there is, or by sampling."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """What is known of a random vector, one draw per batch.

    Attributes:
        mean: [P].
        variance: E |g - E g|^2 of one batch (the trace of its covariance).
        covariance_of_mean: [P, P] of the estimated mean; None where the mean is exact.
        draws: independent blocks behind `covariance_of_mean`; 0 where the mean is exact.
    """

    mean: Tensor
    variance: float
    covariance_of_mean: Tensor | None = None
    draws: int = 0

    @property
    def exact(self) -> bool:
        """Whether every batch was weighted, so that nothing is left to chance."""
        return self.covariance_of_mean is None


def exact_moments(weighted: Iterable[tuple[float, Tensor]]) -> Moments:
    """From every batch there is.

    Args:
        weighted: (probability, ascent [P]) of each.

    Raises:
        ValueError: if the probabilities do not sum to 1.
    """
    total, mean, square = 0.0, torch.zeros(()), 0.0
    for probability, ascent in weighted:
        total += probability
        mean = mean + probability * ascent
        square += probability * float(ascent @ ascent)
    if abs(total - 1.0) > 1e-9:
        raise ValueError(f"the probabilities of all batches sum to {total!r}, not to 1: some are missing")
    return Moments(mean=mean, variance=max(square - float(mean @ mean), 0.0))


def sampled_moments(ascents: Tensor, *, blocks: int = 200) -> Moments:
    """From batches drawn one after the other, by the method of batch means.

    Successive batches of environments that go on are correlated; the means of long blocks hardly are. The variance is
    that of one batch as far as the mean is concerned: the block's variance times the block's length.

    Args:
        ascents: [K, P], in the order they were drawn.
        blocks: how many blocks to cut them into (fewer if there are fewer batches).

    Raises:
        ValueError: if there are fewer than 20 batches.
    """
    count = min(blocks, len(ascents))
    if count < 20:
        raise ValueError(f"{count} batches are too few to know their spread: ask for at least 20 batches of samples")
    length = len(ascents) // count
    means = ascents[: count * length].to(torch.float64).view(count, length, -1).mean(1)
    mean = means.mean(0)
    deviation = means - mean
    covariance = deviation.T @ deviation / (count - 1)
    return Moments(
        mean=mean,
        variance=float(covariance.diagonal().sum()) * length,
        covariance_of_mean=covariance / count,
        draws=count,
    )
