"""Mean and spread of an ascent direction over batches: by weighting every batch there is, or by sampling."""

from __future__ import annotations

import math
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
        spread: [N, P] deviations of the N independent blocks behind an estimated mean, scaled so that spread' spread is
            the covariance of the mean; None where the mean is exact.
    """

    mean: Tensor
    variance: float
    spread: Tensor | None = None

    @property
    def exact(self) -> bool:
        """Whether every batch was weighted, so that nothing is left to chance."""
        return self.spread is None

    @property
    def covariance_of_mean(self) -> Tensor | None:
        """[P, P] of the estimated mean; None where it is exact."""
        return None if self.spread is None else self.spread.mT @ self.spread

    @property
    def variance_of_mean(self) -> float:
        """The trace of that, 0 where the mean is exact."""
        return 0.0 if self.spread is None else float(self.spread.square().sum())

    def p_value(self, deviation: Tensor, *, rounding: float) -> float:
        """Chance that an estimated mean is at least this far off, if it is right on average.

        Hotelling's statistic over the directions in which the batches vary, as chi-squared; where there are too many of
        those for the batches at hand, the squared length with Satterthwaite's degrees of freedom. Being off in a
        direction in which nothing varies is certain.

        Args:
            deviation: [P] of the mean from what it is held to be.
            rounding: a length below which a deviation is rounding.

        Raises:
            ValueError: if the mean is exact.
        """
        if self.spread is None:
            raise ValueError("an exact mean has no p-value")
        squared = float(deviation @ deviation)
        values, vectors = torch.linalg.eigh(self.spread @ self.spread.mT)
        kept = values > 1e-10 * values[-1]
        rank, draws = int(kept.sum()), len(self.spread)
        if rank == 0:
            return float(squared <= rounding**2)
        if 4 * rank >= draws:
            total, squares = float(values.sum()), float(values.square().sum())
            return _chi_squared_tail(total**2 / squares, squared * total / squares)
        along = (vectors[:, kept].mT @ (self.spread @ deviation)).square() / values[kept]
        if squared - float(along.sum()) > rounding**2:
            return 0.0
        shrink = (draws - rank - 2) / (draws - 1)
        return _chi_squared_tail(rank, shrink * float((along / values[kept]).sum()))


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
    variance = float(deviation.square().sum()) / (count - 1) * length
    return Moments(mean=mean, variance=variance, spread=deviation / math.sqrt(count * (count - 1)))


def _chi_squared_tail(degrees: float, statistic: float) -> float:
    half = torch.tensor([degrees / 2, max(statistic, 0.0) / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))
