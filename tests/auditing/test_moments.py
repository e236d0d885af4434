"""Means and spreads of an ascent direction."""

import doctest

import pytest
import torch

from upslope.auditing import exact_moments, moments, sampled_moments


def test_exact_moments_by_hand():
    """Ascents (1, 0) and (0, 3) with probabilities 1/3 and 2/3: mean (1/3, 2), E|g|^2 = 1/3 + 6."""
    first, second = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 3.0], dtype=torch.float64)
    moments = exact_moments([(1 / 3, first), (2 / 3, second)])
    torch.testing.assert_close(moments.mean, torch.tensor([1 / 3, 2.0], dtype=torch.float64))
    assert moments.variance == pytest.approx(19 / 3 - 37 / 9)
    assert moments.exact


def test_missing_batches_are_noticed():
    with pytest.raises(ValueError, match=r"sum to 0\.5"):
        exact_moments([(0.5, torch.ones(2))])


def test_sampled_moments_of_independent_draws():
    generator = torch.Generator().manual_seed(3)
    scale = torch.tensor([1.0, 2.0], dtype=torch.float64)
    draws = torch.randn(20_000, 2, generator=generator, dtype=torch.float64) * scale + 5.0
    moments = sampled_moments(draws)
    assert not moments.exact
    assert moments.spread is not None
    assert len(moments.spread) == 200
    assert moments.covariance_of_mean is not None
    torch.testing.assert_close(moments.mean, torch.full((2,), 5.0, dtype=torch.float64), atol=0.06, rtol=0.0)
    assert moments.variance == pytest.approx(5.0, rel=0.15)
    assert float(moments.covariance_of_mean[0, 0]) == pytest.approx(1.0 / 20_000, rel=0.25)


def test_correlated_draws_are_not_taken_for_independent():
    """x_k = 0.9 x_{k-1} + noise: the mean's variance is 19 times that of independent draws of the same spread."""
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(40_000, generator=generator, dtype=torch.float64)
    chain = torch.zeros(40_000, dtype=torch.float64)
    for k in range(1, len(chain)):
        chain[k] = 0.9 * chain[k - 1] + noise[k]
    moments = sampled_moments(chain.unsqueeze(-1))
    assert moments.covariance_of_mean is not None
    naive = float(chain.var()) / len(chain)
    assert 10.0 < float(moments.covariance_of_mean[0, 0]) / naive < 28.0


def test_too_few_batches_are_refused():
    with pytest.raises(ValueError, match="at least 20"):
        sampled_moments(torch.zeros(19, 2))


def test_the_examples_in_the_docstrings_are_true():
    found = doctest.testmod(moments)
    assert found.attempted >= 2
    assert found.failed == 0
