"""Families of distributions over real actions: `Gaussian`, `SquashedGaussian`, `Beta`."""

from __future__ import annotations

import math
from typing import final

import numpy as np
import torch
from torch import Tensor

from upslope.policies.distributions import Head, softplus
from upslope.policies.fused_distributions import gaussian


class _Spread:
    """How a Gaussian's log_std follows from its raw parameter: the same number, or smoothly kept within bounds.

    log_std = low + (high - low) sigmoid(4 (raw - centre) / (high - low)): the identity around the centre, and with a
    gradient everywhere, so that no parameter is ever stuck at a bound.
    """

    def __init__(self, initial: float, bounds: tuple[float, float] | None) -> None:
        self.bounds, self.initial = bounds, initial
        if bounds is not None:
            low, high = bounds
            if not low < initial < high:
                raise ValueError(
                    f"log_std_init must lie strictly within log_std_bounds, got {initial} and {bounds}: "
                    f"{0.5 * (low + high)} would do"
                )
            fraction = (initial - low) / (high - low)
            self.initial = 0.5 * (low + high) + 0.25 * (high - low) * math.log(fraction / (1.0 - fraction))

    def of_array(self, raw: np.ndarray) -> np.ndarray:
        if self.bounds is None:
            return raw
        low, high = self.bounds
        return low + (high - low) * (0.5 + 0.5 * np.tanh((raw - 0.5 * (low + high)) * (2.0 / (high - low))))

    def of_parameters(self, parameters: Tensor) -> Tensor:
        if self.bounds is None:
            return parameters
        low, high = self.bounds
        mean, raw = parameters.chunk(2, dim=-1)
        log_std = low + (high - low) * torch.sigmoid((raw - 0.5 * (low + high)) * (4.0 / (high - low)))
        return torch.cat([mean, log_std], dim=-1)


def _gaussian_sample(spread: _Spread, parameters: np.ndarray, noise: np.ndarray) -> np.ndarray:
    size = noise.shape[-1]
    action = np.exp(spread.of_array(parameters[:, size:]))
    action *= noise
    action += parameters[:, :size]
    return action


def _gaussian_kl(parameters: Tensor, other: Tensor) -> Tensor:
    """sum_i [ log(q_std/p_std) + (p_std^2 + (p_mean - q_mean)^2) / (2 q_std^2) - 1/2 ]."""
    p_mean, p_log_std = parameters.chunk(2, dim=-1)
    q_mean, q_log_std = other.chunk(2, dim=-1)
    gap, ratio = q_log_std - p_log_std, (p_mean - q_mean) * torch.exp(-q_log_std)
    # expm1 keeps the digits of a small divergence, which 1/2 e^{-2 gap} + gap - 1/2 would lose.
    return (0.5 * torch.expm1(-2.0 * gap) + gap + 0.5 * ratio * ratio).sum(-1)


class _Bounds:
    """A bounded box: the affine map from (0, 1), and what it does to log-densities."""

    def __init__(self, family: str, low: np.ndarray, high: np.ndarray) -> None:
        width = high.astype(np.float64) - low
        if not (np.isfinite(width).all() and (width > 0.0).all()):
            raise ValueError(
                f"a {family} distribution needs finite action bounds with low < high, got low={low} and high={high}: "
                'use distribution="gaussian", which clips at the door'
            )
        self.low, self.high, self.width = low, high, width
        self.log_width = float(np.log(width).sum())

    def place(self, fraction: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        action = (self.low + self.width * fraction).astype(dtype)
        np.minimum(action, self.high, out=action)
        return np.maximum(action, self.low, out=action).reshape(-1, *shape)


@final
class Gaussian(Head):
    """Independent normal distributions: a_i = mean_i + exp(log_std_i) z_i.

    The raw sample is stored and its own density is used; bounds are applied by clipping at the door only.
    """

    def __init__(
        self,
        low: np.ndarray,
        high: np.ndarray,
        *,
        log_std_init: float = 0.0,
        log_std_bounds: tuple[float, float] | None = None,
        state_dependent_std: bool = False,
    ) -> None:
        self.low, self.high, dimensions = low.ravel(), high.ravel(), low.size
        self._shape, self._dtype = low.shape, low.dtype
        self._spread = _Spread(log_std_init, log_std_bounds)
        self.size, self.constant = 2 * dimensions, 0 if state_dependent_std else dimensions
        self.initial = (0.0,) * dimensions + (self._spread.initial,) * dimensions

    def noise(self, generator: np.random.Generator, steps: int, environments: int) -> np.ndarray:
        """Standard normal numbers, [steps, environments, A]."""
        return generator.standard_normal((steps, environments, self.size // 2), dtype=np.float32)

    def sample(self, parameters: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """[N, A], unbounded."""
        return _gaussian_sample(self._spread, parameters, noise)

    def mode(self, parameters: np.ndarray) -> np.ndarray:
        """[N, A], the means."""
        return parameters[:, : self.size // 2].copy()

    def to_environment(self, action: np.ndarray) -> np.ndarray:
        """Clipped to the bounds, in the space's shape and number type."""
        clipped = np.minimum(action, self.high, dtype=self._dtype)
        return np.maximum(clipped, self.low, out=clipped).reshape(-1, *self._shape)

    def log_prob_and_entropy(self, parameters: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Of the unclipped sample; exact."""
        return gaussian(self._spread.of_parameters(parameters), action)

    def kl(self, parameters: Tensor, other: Tensor) -> Tensor:
        """In closed form."""
        return _gaussian_kl(self._spread.of_parameters(parameters), self._spread.of_parameters(other))


def _log_tanh_slope(u: Tensor) -> Tensor:
    """log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)), without cancellation for any u."""
    return 2.0 * (math.log(2.0) - u - softplus(-2.0 * u))


@final
class SquashedGaussian(Head):
    """A Gaussian sample u squashed into the bounds: a = low + (high - low) (tanh(u) + 1) / 2 (Haarnoja et al. 2018).

    What is stored is u, from which the density of a follows exactly however large |u| is:
    log pi(a) = log N(u; mean, std) - sum_i [ log((high_i - low_i)/2) + log(1 - tanh(u_i)^2) ].

    The entropy has no closed form. It is the Gaussian's plus E[log |da/du|], the latter estimated by averaging over 32
    fixed quantiles of the normal distribution (Gauss-Hermite nodes): an estimate without sampling noise.
    """

    def __init__(
        self,
        low: np.ndarray,
        high: np.ndarray,
        *,
        log_std_init: float = 0.0,
        log_std_bounds: tuple[float, float] | None = None,
        state_dependent_std: bool = False,
    ) -> None:
        self._bounds = _Bounds("squashed_gaussian", low.ravel(), high.ravel())
        self._shape, self._dtype, dimensions = low.shape, low.dtype, low.size
        self._spread = _Spread(log_std_init, log_std_bounds)
        self.size, self.constant = 2 * dimensions, 0 if state_dependent_std else dimensions
        self.initial = (0.0,) * dimensions + (self._spread.initial,) * dimensions
        nodes, weights = np.polynomial.hermite_e.hermegauss(32)
        self._nodes, self._weights = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
        self._log_scale = self._bounds.log_width - dimensions * math.log(2.0)

    def noise(self, generator: np.random.Generator, steps: int, environments: int) -> np.ndarray:
        """Standard normal numbers, [steps, environments, A]."""
        return generator.standard_normal((steps, environments, self.size // 2), dtype=np.float32)

    def sample(self, parameters: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """u [N, A], before the squash."""
        return _gaussian_sample(self._spread, parameters, noise)

    def mode(self, parameters: np.ndarray) -> np.ndarray:
        """u [N, A]: the means, whose squash is the median action."""
        return parameters[:, : self.size // 2].copy()

    def to_environment(self, action: np.ndarray) -> np.ndarray:
        """Squashed into the bounds, in the space's shape and number type."""
        return self._bounds.place(0.5 + 0.5 * np.tanh(action.astype(np.float64)), self._shape, self._dtype)

    def log_prob_and_entropy(self, parameters: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Density of the environment's action; the entropy is an estimate."""
        parameters = self._spread.of_parameters(parameters)
        log_prob, entropy = gaussian(parameters, action)
        mean, log_std = parameters.chunk(2, dim=-1)
        u = mean.unsqueeze(-1) + log_std.exp().unsqueeze(-1) * self._nodes.to(mean)
        slope = (_log_tanh_slope(u) * self._weights.to(mean)).sum((-1, -2))
        return log_prob - _log_tanh_slope(action).sum(-1) - self._log_scale, entropy + slope + self._log_scale

    def kl(self, parameters: Tensor, other: Tensor) -> Tensor:
        """That of the underlying Gaussians: the squash is one-to-one and leaves it unchanged."""
        return _gaussian_kl(self._spread.of_parameters(parameters), self._spread.of_parameters(other))


@final
class Beta(Head):
    """x_i ~ Beta(alpha_i, beta_i) with alpha, beta = 1 + softplus(outputs), placed in the bounds (Chou et al. 2017).

    Log-probabilities and entropies are those of the environment's action, low + (high - low) x.

    Samples are ratios of two Gamma numbers by Marsaglia and Tsang (2000): each of `PROPOSALS` pre-drawn proposals is
    accepted with probability above 0.95 (concentrations are above 1), so that all fail with probability below 1e-15.
    """

    PROPOSALS = 12
    EDGE = 2.0**-24
    """How near to 0 and 1 a sample comes at most: 1 - EDGE is the last float32 below 1."""

    def __init__(self, low: np.ndarray, high: np.ndarray) -> None:
        self._bounds = _Bounds("beta", low.ravel(), high.ravel())
        self._shape, self._dtype = low.shape, low.dtype
        self.size, self.initial = 2 * low.size, (0.0,) * (2 * low.size)

    def noise(self, generator: np.random.Generator, steps: int, environments: int) -> np.ndarray:
        """Proposals, [steps, environments, 2, PROPOSALS, P]: normal numbers, and logarithms of uniform ones."""
        noise = np.empty((steps, environments, 2, self.PROPOSALS, self.size))
        noise[:, :, 0] = generator.standard_normal(noise[:, :, 0].shape)
        noise[:, :, 1] = -generator.standard_exponential(noise[:, :, 1].shape)
        return noise

    def sample(self, parameters: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """x [N, A], strictly between 0 and 1."""
        d = 1.0 + np.logaddexp(0.0, parameters[:, None, :], dtype=np.float64) - 1.0 / 3.0
        normal, log_uniform = noise[:, 0], noise[:, 1]
        root = np.maximum(1.0 + normal / np.sqrt(9.0 * d), 1e-90)
        cube = root**3
        accepted = (root > 1e-90) & (log_uniform < 0.5 * normal**2 + d * (1.0 - cube + np.log(cube)))
        first = accepted.argmax(axis=1)[:, None, :]
        gamma = (d * np.take_along_axis(cube, first, axis=1))[:, 0, :]
        half = self.size // 2
        x = gamma[:, :half] / (gamma[:, :half] + gamma[:, half:])
        return np.clip(x, self.EDGE, 1.0 - self.EDGE).astype(parameters.dtype)

    def mode(self, parameters: np.ndarray) -> np.ndarray:
        """(alpha - 1) / (alpha + beta - 2)."""
        excess = np.logaddexp(0.0, parameters, dtype=np.float64)
        half = self.size // 2
        total = excess[:, :half] + excess[:, half:]
        x = np.where(total > 0.0, excess[:, :half], 0.5) / np.where(total > 0.0, total, 1.0)
        return np.clip(x, self.EDGE, 1.0 - self.EDGE).astype(parameters.dtype)

    def to_environment(self, action: np.ndarray) -> np.ndarray:
        """Placed in the bounds, in the space's shape and number type."""
        return self._bounds.place(action, self._shape, self._dtype)

    def log_prob_and_entropy(self, parameters: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """log pi = (a-1) log x + (b-1) log(1-x) - log B(a, b) - log(high - low); the entropy is exact.

        An x that no sample can be, such as the 0 of a position that is no step, counts as the nearest that one can be.
        """
        action = action.clamp(self.EDGE, 1.0 - self.EDGE)
        alpha, beta = (1.0 + softplus(parameters)).chunk(2, dim=-1)
        log_beta = torch.lgamma(alpha) + torch.lgamma(beta) - torch.lgamma(alpha + beta)
        log_prob = (alpha - 1.0) * torch.log(action) + (beta - 1.0) * torch.log1p(-action) - log_beta
        entropy = (
            log_beta
            - (alpha - 1.0) * torch.digamma(alpha)
            - (beta - 1.0) * torch.digamma(beta)
            + (alpha + beta - 2.0) * torch.digamma(alpha + beta)
        )
        return log_prob.sum(-1) - self._bounds.log_width, entropy.sum(-1) + self._bounds.log_width

    def kl(self, parameters: Tensor, other: Tensor) -> Tensor:
        """log B(a', b') - log B(a, b) + (a-a') psi(a) + (b-b') psi(b) + (a'-a+b'-b) psi(a+b), in closed form."""
        a, b = (1.0 + softplus(parameters)).chunk(2, dim=-1)
        c, d = (1.0 + softplus(other)).chunk(2, dim=-1)
        log_beta = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
        log_beta_other = torch.lgamma(c) + torch.lgamma(d) - torch.lgamma(c + d)
        slopes = (a - c) * torch.digamma(a) + (b - d) * torch.digamma(b) + (c - a + d - b) * torch.digamma(a + b)
        return (log_beta_other - log_beta + slopes).sum(-1)
