"""k1, k2, k3 at their edges; exact divergences against torch.distributions. Their identities: tests/identities."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, Independent, Normal, kl_divergence

from upslope.estimators import (
    categorical_entropy,
    categorical_kl,
    gaussian_entropy,
    gaussian_kl,
    k3,
)

PI = torch.tensor([0.2, -0.5, 1.1], dtype=torch.float64)
REF = torch.tensor([-0.3, 0.8, 0.1], dtype=torch.float64)


def test_k3_keeps_its_digits_near_zero() -> None:
    assert float(k3(torch.tensor(1e-4).view(1), torch.zeros(1))) == pytest.approx(5e-9, rel=1e-3)


@given(st.integers(0, 2**31))
def test_categorical_equals_torch_distributions(seed: int) -> None:
    p, q = 3 * torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(
        categorical_kl(p, q),
        kl_divergence(Categorical(logits=p), Categorical(logits=q)),
        rtol=1e-9,
        atol=1e-12,
    )
    torch.testing.assert_close(categorical_entropy(p), Categorical(logits=p).entropy(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scaled", [True, False])
def test_gaussian_equals_torch_distributions(scaled: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    mean_p, mean_q = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    log_std_p, log_std_q = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    if not scaled:
        log_std_p, log_std_q = log_std_p[0], log_std_q[0]
    p = Independent(Normal(mean_p, log_std_p.exp().expand(4, 3)), 1)
    q = Independent(Normal(mean_q, log_std_q.exp().expand(4, 3)), 1)
    torch.testing.assert_close(
        gaussian_kl(mean_p, log_std_p, mean_q, log_std_q), kl_divergence(p, q), rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(gaussian_entropy(log_std_p.expand(4, 3)), p.entropy(), rtol=1e-9, atol=1e-12)


def test_a_gaussian_kl_of_equals_is_exactly_zero() -> None:
    mean, log_std = torch.randn(4, 3), torch.randn(3)
    assert (gaussian_kl(mean, log_std, mean, log_std) == 0).all()


def test_impossible_actions_add_nothing_and_have_no_gradient() -> None:
    logits = torch.tensor([0.3, -torch.inf, 0.9], requires_grad=True)
    other = torch.tensor([0.1, -torch.inf, 0.2], requires_grad=True)
    short, rest = logits.detach()[[0, 2]], other.detach()[[0, 2]]
    for found, expected_value in (
        (categorical_entropy(logits), categorical_entropy(short)),
        (categorical_kl(logits, other), categorical_kl(short, rest)),
    ):
        torch.testing.assert_close(found, expected_value)
        gradients = torch.autograd.grad(found, (logits, other), allow_unused=True)
        assert all(g is None or torch.isfinite(g).all() for g in gradients)
        assert gradients[0] is not None
        assert float(gradients[0][1]) == 0.0
    possible = torch.tensor([0.1, 0.5, 0.2])
    assert torch.isfinite(categorical_kl(logits, possible))
    assert torch.isinf(categorical_kl(possible, logits))


def test_errors_name_the_argument() -> None:
    ok = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="reference_log_prob must have the shape of log_prob"):
        k3(ok, ok[0])
    with pytest.raises(ValueError, match="logits_q must have the shape of logits_p"):
        categorical_kl(ok, ok[:, :2])
    with pytest.raises(ValueError, match=r"log_std_q must have shape \(2, 3\) or \(3,\); got \(2,\)"):
        gaussian_kl(ok, ok, ok, torch.zeros(2))
