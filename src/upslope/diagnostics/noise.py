"""How much of a gradient is signal: the simple noise scale of McCandlish et al. (2018), appendix A.1."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from upslope.trajectory import Tree


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseEstimate:
    """Unbiased estimates for a gradient whose every sample has mean G and covariance Sigma.

    Attributes:
        signal: |G|^2; may come out negative where the noise is much larger.
        noise: tr Sigma, per sample.
    """

    signal: float
    noise: float

    def ratio(self, samples: float) -> float:
        """Signal-to-noise of a mean over so many samples: |G|^2 / (tr Sigma / samples); NaN where nothing varies."""
        return self.signal * samples / self.noise if self.noise > 0.0 else math.nan

    @property
    def scale(self) -> float:
        """B_simple = tr Sigma / |G|^2: the samples at which signal and noise are equally large; inf without signal."""
        return self.noise / self.signal if self.signal > 0.0 else math.inf


def noise_of_minibatches(*, mean_square: float, square_of_mean: float, count: int, samples: float) -> NoiseEstimate:
    """From the gradients g_1 .. g_K of K equally large parts of one batch, at the same parameters.

        |G|^2    = (K |mean g|^2 - mean |g|^2) / (K - 1)
        tr Sigma = b K (mean |g|^2 - |mean g|^2) / (K - 1)

    The small batch of appendix A.1 is one part, the big one all of them.

    >>> noise_of_minibatches(mean_square=10.0, square_of_mean=4.0, count=4, samples=8)
    NoiseEstimate(signal=2.0, noise=64.0)

    Args:
        mean_square: the mean of |g_k|^2.
        square_of_mean: |mean of g_k|^2.
        count: K, at least 2.
        samples: b, the samples in one part.

    Raises:
        ValueError: fewer than 2 parts.
    """
    if count < 2:
        raise ValueError(f"the noise shows in the difference of gradients: give at least 2 parts, got {count}")
    signal = (count * square_of_mean - mean_square) / (count - 1)
    return NoiseEstimate(signal=signal, noise=samples * count * (mean_square - square_of_mean) / (count - 1))


def noise_of_pair(*, squares: tuple[float, float], product: float, samples: float) -> NoiseEstimate:
    """From the gradients g, h of two independent batches, at nearly the same parameters.

        |G|^2    = g . h
        tr Sigma = b ((|g|^2 + |h|^2) / 2 - g . h)

    `noise_of_minibatches` with K = 2, in other words.

    >>> noise_of_pair(squares=(9.0, 11.0), product=2.0, samples=8)
    NoiseEstimate(signal=2.0, noise=64.0)

    Args:
        squares: |g|^2 and |h|^2.
        product: g . h.
        samples: b, the samples in one batch.
    """
    return NoiseEstimate(signal=product, noise=samples * (0.5 * sum(squares) - product))


class SmoothedNoise:
    """Running means of signal and noise; the ratio of the means, since a mean of ratios would say nothing.

    Args:
        decay: of the exponential means, which are corrected for their start at zero.
    """

    def __init__(self, *, decay: float) -> None:
        self._decay = decay
        self._signal = self._noise = self._weight = 0.0

    def add(self, estimate: NoiseEstimate) -> None:
        """Take in one estimate; one that is not finite is left out."""
        if not (math.isfinite(estimate.signal) and math.isfinite(estimate.noise)):
            return
        decay, share = self._decay, 1.0 - self._decay
        self._signal = decay * self._signal + share * estimate.signal
        self._noise = decay * self._noise + share * estimate.noise
        self._weight = decay * self._weight + share

    @property
    def estimate(self) -> NoiseEstimate | None:
        """The means; None before the first estimate."""
        if self._weight == 0.0:
            return None
        return NoiseEstimate(signal=self._signal / self._weight, noise=self._noise / self._weight)

    def state(self) -> Tree:
        """For a checkpoint."""
        return {"signal": self._signal, "noise": self._noise, "weight": self._weight}

    def load_state(self, tree: Tree) -> None:
        """Go on from `state()`."""
        self._signal, self._noise, self._weight = tree["signal"], tree["noise"], tree["weight"]


class MinibatchNoise:
    """Takes the gradients of one pass, two vector operations each.

    Args:
        like: a tensor of the gradients' shape [P].
    """

    def __init__(self, like: Tensor) -> None:
        self._sum = like.new_zeros(like.shape)
        self._squares: list[Tensor] = []
        self._samples = 0

    def add(self, gradient: Tensor, samples: int) -> None:
        """One part's gradient [P] and its size."""
        self._sum += gradient
        self._squares.append(gradient.dot(gradient))
        self._samples += samples

    def estimate(self) -> NoiseEstimate | None:
        """None from fewer than two parts."""
        count = len(self._squares)
        if count < 2:
            return None
        mean_square = sum(float(square) for square in self._squares) / count
        square_of_mean = float(self._sum.dot(self._sum)) / count**2
        return noise_of_minibatches(
            mean_square=mean_square, square_of_mean=square_of_mean, count=count, samples=self._samples / count
        )


class SuccessiveNoise:
    """Compares the gradient of a batch with that of the batch before it, three vector operations each."""

    def __init__(self) -> None:
        self._gradient: Tensor | None = None
        self._square = 0.0
        self._samples = 0

    @property
    def waiting(self) -> bool:
        """Whether a gradient was kept that the next one is to be compared with."""
        return self._gradient is not None

    def add(self, gradient: Tensor, samples: int, *, keep: bool = True) -> NoiseEstimate | None:
        """One batch's gradient [P] and its size; None if none was kept before. `keep` keeps it for the next."""
        square = float(gradient.dot(gradient))
        estimate = None
        if self._gradient is not None:
            product = float(gradient.dot(self._gradient))
            mean = 0.5 * (samples + self._samples)
            estimate = noise_of_pair(squares=(square, self._square), product=product, samples=mean)
        self._gradient = gradient.clone() if keep else None
        self._square, self._samples = square, samples
        return estimate

    def state(self) -> Tree:
        """For a checkpoint."""
        gradient = None if self._gradient is None else self._gradient.clone()
        return {"gradient": gradient, "square": self._square, "samples": self._samples}

    def load_state(self, tree: Tree) -> None:
        """Go on from `state()`."""
        self._gradient = None if tree["gradient"] is None else tree["gradient"].clone()
        self._square, self._samples = tree["square"], tree["samples"]
