"""Log-probabilities in chunks are those of all logits at once, and so are their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from upslope.policies.language import token_head
from upslope.policies.language.sampling import Sampling
from upslope.policies.language.token_head import Head, kl_divergence, token_log_prob

SAMPLINGS = {
    "plain": Sampling(),
    "temperature": Sampling(temperature=0.6),
    "top_k": Sampling(top_k=4),
    "top_p": Sampling(temperature=1.3, top_p=0.7),
    "greedy": Sampling(temperature=0.0),
}


def problem(rows: int = 7, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 5, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(11, 5, generator=generator, dtype=dtype, requires_grad=True)
    bias = torch.randn(11, generator=generator, dtype=dtype, requires_grad=True)
    return hidden, weight, bias, torch.randint(11, (rows,), generator=generator)


def head_of(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    sampling: Sampling | None = None,
    softcap: float | None = None,
    dtype: torch.dtype | None = None,
) -> Head:
    return Head(weight=weight, bias=bias, softcap=softcap, sampling=sampling or Sampling(), dtype=dtype or weight.dtype)


def set_chunks(monkeypatch: pytest.MonkeyPatch, *, rows: int, kept: bool) -> None:
    monkeypatch.setattr(token_head, "LARGEST_CHUNK", rows * 11)
    monkeypatch.setattr(token_head, "KEPT", 10**9 if kept else 0)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize("softcap", [None, 1.5], ids=["uncapped", "capped"])
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_is_log_softmax(sampling: Sampling, softcap: float | None, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    set_chunks(monkeypatch, rows=3, kept=kept)
    hidden, weight, bias, action = problem()
    log_prob, entropy = token_log_prob(hidden, action, head_of(weight, bias, sampling=sampling, softcap=softcap))
    logits = hidden @ weight.T + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_policy = sampling.logits(logits, action).log_softmax(-1)
    expected = log_policy.gather(-1, action.unsqueeze(-1)).squeeze(-1)
    probability = log_policy.exp()
    entropies = -(probability * log_policy.masked_fill(probability == 0.0, 0.0)).sum(-1)
    torch.testing.assert_close(log_prob, expected)
    torch.testing.assert_close(entropy, entropies)
    factors = torch.linspace(-1.0, 2.0, 14, dtype=torch.float64).view(2, 7)
    inputs = (hidden, weight, bias)
    for pick in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        mine = sum(k * f @ x for k, f, x in zip(pick, factors, (log_prob, entropy), strict=True) if k)
        dense = sum(k * f @ x for k, f, x in zip(pick, factors, (expected, entropies), strict=True) if k)
        assert isinstance(mine, Tensor)
        assert isinstance(dense, Tensor)
        found = torch.autograd.grad(mine, inputs, retain_graph=True)
        torch.testing.assert_close(found, torch.autograd.grad(dense, inputs, retain_graph=True))


def test_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    set_chunks(monkeypatch, rows=2, kept=False)
    hidden, weight, bias, action = problem(rows=3)

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return token_log_prob(hidden, action, head_of(weight, bias, sampling=SAMPLINGS["temperature"], softcap=2.0))

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))
    assert torch.autograd.gradgradcheck(function, (hidden, weight, bias))


def test_gradcheck_of_the_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    set_chunks(monkeypatch, rows=2, kept=False)
    hidden, weight, bias, _ = problem(rows=3)
    other_hidden, other_weight = (x.detach().flip(0).requires_grad_() for x in (hidden, weight))

    def function(*inputs: Tensor) -> Tensor:
        sampling = SAMPLINGS["temperature"]
        p = head_of(inputs[1], inputs[2], sampling=sampling)
        return kl_divergence(inputs[0], p, inputs[3], head_of(inputs[4], sampling=sampling, softcap=1.5))

    assert torch.autograd.gradcheck(function, (hidden, weight, bias, other_hidden, other_weight))


def test_what_needs_no_gradient_gets_none() -> None:
    hidden, weight, bias, action = problem()
    log_prob, entropy = token_log_prob(hidden, action, head_of(weight.detach()))
    (log_prob.sum() + entropy.sum()).backward()
    assert hidden.grad is not None
    assert weight.grad is None
    log_prob, entropy = token_log_prob(hidden.detach(), action, head_of(weight.detach(), bias.detach()))
    assert not log_prob.requires_grad


def test_bfloat16_products_with_float32_sums() -> None:
    hidden, weight, _, action = problem(rows=50, dtype=torch.float32)
    exact, _ = token_log_prob(hidden, action, head_of(weight))
    rounded, entropy = token_log_prob(hidden, action, head_of(weight, dtype=torch.bfloat16))
    assert rounded.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, atol=0.1, rtol=0.0)
    found = torch.autograd.grad(rounded.sum(), (hidden, weight))
    torch.testing.assert_close(found, torch.autograd.grad(exact.sum(), (hidden, weight)), atol=0.3, rtol=0.05)


def test_no_rows() -> None:
    hidden, weight, _, action = problem(rows=0)
    log_prob, entropy = token_log_prob(hidden, action, head_of(weight))
    assert log_prob.shape == entropy.shape == (0,)
    assert kl_divergence(hidden, head_of(weight), hidden, head_of(weight)).shape == (0,)
