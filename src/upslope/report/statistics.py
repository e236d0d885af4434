"""Statistics over a handful of seeds."""

from __future__ import annotations

import numpy as np


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """The mean of the middle half of the sorted values, along the first axis.

        IQM = sum_i w_i x_(i) / sum_i w_i,   w_i = length of [i, i + 1] intersected with [n / 4, 3 n / 4]

    A quarter of the weight is cut off each end, in fractions of a value where n is no multiple of 4 (where it is,
    this is `scipy.stats.trim_mean(values, 0.25)`). Up to two values it is the mean.

    Args:
        values: [n, ...], n at least 1.

    Returns:
        [...].

    Source: Agarwal et al. 2021, Deep Reinforcement Learning at the Edge of the Statistical Precipice.
    """
    count = len(values)
    if count == 0:
        raise ValueError("the interquartile mean needs at least one value")
    start = np.arange(count)
    weight = np.clip(np.minimum(start + 1, 0.75 * count) - np.maximum(start, 0.25 * count), 0.0, None)
    return np.tensordot(weight / weight.sum(), np.sort(values, axis=0), axes=1)


def bootstrap_interval(
    values: np.ndarray, *, level: float = 0.95, samples: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap interval of the interquartile mean: seeds are drawn anew with replacement.

    Args:
        values: [n, ...], one entry per seed. The same draws serve all columns.
        level: share of the draws inside.
        samples: draws.
        seed: makes the draws repeatable.

    Returns:
        Lower and upper end, both [...]; NaN where n is 1, since one seed says nothing about the spread.
    """
    count = len(values)
    if count < 2:
        unknown = np.full(values.shape[1:], np.nan)
        return unknown, unknown.copy()
    draws = np.random.default_rng(seed).integers(count, size=(count, samples))
    means = interquartile_mean(values[draws])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high
