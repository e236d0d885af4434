"""The noise scale on gradients whose mean and covariance are known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from upslope.diagnostics import (
    MinibatchNoise,
    NoiseEstimate,
    SmoothedNoise,
    SuccessiveNoise,
    noise_of_minibatches,
    noise_of_pair,
)

MEAN = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
SPREAD = torch.tensor([2.0, 1.0, 3.0], dtype=torch.float64)
SIGNAL, NOISE = 5.25, 14.0


def signs() -> torch.Tensor:
    """All 8 equally likely samples of a gradient: MEAN plus or minus SPREAD in each direction, [8, 3]."""
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3)
    return MEAN + corners * SPREAD


def test_minibatches_are_unbiased_over_all_batches() -> None:
    """Parts of one sample each: the mean of the estimate over all 8^3 triples is exactly |G|^2 and tr Sigma."""
    samples, signal, noise = signs(), 0.0, 0.0
    for first in samples:
        for second in samples:
            for third in samples:
                minibatches = MinibatchNoise(MEAN)
                for gradient in (first, second, third):
                    minibatches.add(gradient, 1)
                estimate = minibatches.estimate()
                assert estimate is not None
                signal, noise = signal + estimate.signal / 512, noise + estimate.noise / 512
    assert signal == pytest.approx(SIGNAL, abs=1e-9)
    assert noise == pytest.approx(NOISE, abs=1e-9)


def test_pairs_of_batches_are_unbiased_in_their_size() -> None:
    """Batches of 2 samples: every pair of pairs."""
    samples = signs()
    batches = [(a + b) / 2 for a in samples for b in samples]
    signal = noise = 0.0
    for first in batches:
        for second in batches:
            squares = (float(first @ first), float(second @ second))
            estimate = noise_of_pair(squares=squares, product=float(first @ second), samples=2)
            signal, noise = signal + estimate.signal / 4096, noise + estimate.noise / 4096
    assert signal == pytest.approx(SIGNAL, abs=1e-9)
    assert noise == pytest.approx(NOISE, abs=1e-9)


def test_ratio_and_scale_by_hand() -> None:
    estimate = NoiseEstimate(signal=2.0, noise=64.0)
    assert estimate.scale == 32.0
    assert estimate.ratio(32) == 1.0
    assert estimate.ratio(8) == 0.25
    assert NoiseEstimate(signal=-1.0, noise=64.0).scale == math.inf
    assert math.isnan(NoiseEstimate(signal=1.0, noise=0.0).ratio(8))


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=2), st.lists(st.floats(-3, 3), min_size=2, max_size=2))
def test_a_pair_is_two_minibatches(first: list[float], second: list[float]) -> None:
    g, h = torch.tensor(first, dtype=torch.float64), torch.tensor(second, dtype=torch.float64)
    minibatches, successive = MinibatchNoise(g), SuccessiveNoise()
    for gradient in (g, h):
        minibatches.add(gradient, 16)
        pair = successive.add(gradient, 16)
    parts = minibatches.estimate()
    assert parts is not None
    assert pair is not None
    assert parts.signal == pytest.approx(pair.signal, abs=1e-9)
    assert parts.noise == pytest.approx(pair.noise, abs=1e-9)


def test_the_simple_noise_scale_of_a_quadratic() -> None:
    """Gradients with known G and Sigma, fixed seed: B_simple = tr Sigma / |G|^2 within two percent of many batches."""
    generator = torch.Generator().manual_seed(0)
    smoothed = SmoothedNoise(decay=0.9999)
    for _ in range(4000):
        minibatches = MinibatchNoise(MEAN)
        for _ in range(4):
            noise = torch.randn(3, generator=generator, dtype=torch.float64) * SPREAD / math.sqrt(8)
            minibatches.add(MEAN + noise, 8)
        estimate = minibatches.estimate()
        assert estimate is not None
        smoothed.add(estimate)
    assert smoothed.estimate is not None
    assert smoothed.estimate.scale == pytest.approx(NOISE / SIGNAL, rel=0.02)


def test_smoothing_starts_at_the_first_estimate_and_leaves_out_what_is_not_finite() -> None:
    smoothed = SmoothedNoise(decay=0.5)
    assert smoothed.estimate is None
    smoothed.add(NoiseEstimate(signal=4.0, noise=8.0))
    assert smoothed.estimate == NoiseEstimate(signal=4.0, noise=8.0)
    smoothed.add(NoiseEstimate(signal=math.nan, noise=1.0))
    smoothed.add(NoiseEstimate(signal=1.0, noise=2.0))
    assert smoothed.estimate.signal == pytest.approx((4.0 + 2 * 1.0) / 3)
    other = SmoothedNoise(decay=0.5)
    other.load_state(smoothed.state())
    assert other.estimate == smoothed.estimate


def test_successive_gradients_go_on_from_their_state() -> None:
    one, other = SuccessiveNoise(), SuccessiveNoise()
    assert one.add(MEAN, 4) is None
    other.load_state(one.state())
    assert one.add(SPREAD, 4) == other.add(SPREAD, 4) is not None


def test_one_part_says_nothing() -> None:
    minibatches = MinibatchNoise(MEAN)
    minibatches.add(MEAN, 4)
    assert minibatches.estimate() is None
    with pytest.raises(ValueError, match="at least 2 parts, got 1"):
        noise_of_minibatches(mean_square=1.0, square_of_mean=1.0, count=1, samples=1)
