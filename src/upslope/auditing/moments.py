"""Mean and spread of an ascent direction over batches: by weighting every batch there is, or by sampling."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

FEWEST = 20
"""Batches below which nothing is said of their spread."""


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

    def p_value(self, deviation: Tensor) -> float:
        """Chance that an estimated mean is at least this far off in the directions that were drawn, if it is right.

        Hotelling's T^2 and its F distribution; where there are too many directions for the blocks at hand, the squared
        length with Satterthwaite's degrees of freedom, which is cautious. 1 where nothing varied at all.

        Args:
            deviation: [P] of the mean from what it is held to be.

        Raises:
            ValueError: if the mean is exact.
        """
        values, along = self._drawn(deviation)
        rank, draws = len(values), 0 if self.spread is None else len(self.spread)
        if rank == 0:
            return 1.0
        if 4 * rank >= draws:
            total, squares = float(values.sum()), float(values.square().sum())
            return chi_squared_tail(float(along.sum()) * total / squares, total**2 / squares)
        statistic = float((along / values).sum())
        return f_tail(statistic * (draws - rank) / (rank * (draws - 1)), rank, draws - rank)

    def undrawn(self, deviation: Tensor) -> float:
        """The length of a deviation in directions in which no two blocks differed: of those the draws say nothing.

        Raises:
            ValueError: if the mean is exact.
        """
        _, along = self._drawn(deviation)
        return math.sqrt(max(float(deviation @ deviation) - float(along.sum()), 0.0))

    def _drawn(self, deviation: Tensor) -> tuple[Tensor, Tensor]:
        """[R] variances of the mean along the directions that vary, and the squared parts of a deviation along them."""
        if self.spread is None:
            raise ValueError("an exact mean has no p-value")
        values, vectors = torch.linalg.eigh(self.spread @ self.spread.mT)
        kept = values > 1e-10 * values[-1]
        return values[kept], (vectors[:, kept].mT @ (self.spread @ deviation)).square() / values[kept]


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

    Successive batches of environments that go on are correlated; the means of blocks of them hardly are. The variance
    is that of one batch as far as the mean is concerned: the block's variance times the block's length.

    Args:
        ascents: [K, P], in the order they were drawn.
        blocks: how many blocks to cut them into: fewer where a block would hold fewer than five batches, but never
            fewer than 20.

    Raises:
        ValueError: if there are fewer than `FEWEST` batches.
    """
    if len(ascents) < FEWEST:
        raise ValueError(f"{len(ascents)} batches are too few to know their spread: at least {FEWEST} are needed")
    count = min(blocks, max(len(ascents) // 5, FEWEST))
    length = len(ascents) // count
    means = ascents[: count * length].to(torch.float64).view(count, length, -1).mean(1)
    mean = means.mean(0)
    deviation = means - mean
    variance = float(deviation.square().sum()) / (count - 1) * length
    return Moments(mean=mean, variance=variance, spread=deviation / math.sqrt(count * (count - 1)))


def chi_squared_tail(statistic: float, degrees: float) -> float:
    """Pr(chi^2 with these degrees of freedom > statistic).

    >>> round(chi_squared_tail(3.841459, 1), 6)
    0.05
    """
    half = torch.tensor([degrees / 2, max(statistic, 0.0) / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def f_tail(statistic: float, above: float, below: float) -> float:
    """Pr(F(above, below) > statistic), by the continued fraction of the incomplete beta function.

    Lentz's method (Numerical Recipes, section 6.4).

    >>> round(f_tail(4.964603, 1, 10), 6), round(f_tail(2.866081, 4, 20), 6)
    (0.05, 0.05)
    """
    if statistic <= 0.0:
        return 1.0
    x = below / (below + above * statistic)
    a, b = below / 2, above / 2
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    if x < (a + 1) / (a + b + 2):
        return math.exp(log_front) * _beta_fraction(x, a, b) / a
    return 1.0 - math.exp(log_front) * _beta_fraction(1.0 - x, b, a) / b


def _beta_fraction(x: float, a: float, b: float) -> float:
    upper, lower = 1.0, 1.0 / (1.0 - (a + b) * x / (a + 1))
    fraction = lower
    for m in range(1, 1_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        before = fraction
        for coefficient in (even, odd):
            lower, upper = 1.0 / (1.0 + coefficient * lower), 1.0 + coefficient / upper
            fraction *= lower * upper
        if abs(fraction - before) <= 1e-14 * abs(fraction):
            break
    return fraction
