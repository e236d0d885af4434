"""Rows of divergences and entropies: as values, and as gradients in the loss and in the reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from upslope.auditing.cases.case import Case
from upslope.auditing.cases.measurement import Found, identity, row, row_gradients, weighted_moments
from upslope.auditing.cases.token_stage import token_stage
from upslope.auditing.moments import Moments
from upslope.estimators import (
    categorical_entropy,
    categorical_kl,
    gaussian_entropy,
    gaussian_kl,
    k1,
    k2,
    k3,
    sampled_entropy,
    sequence_log_prob,
)
from upslope.exact import sequence_kl, solve_tokens

_KL, _FORWARD = "KL(pi || ref)", "KL(ref || pi)"
_NO_GRADIENT = "E[grad log pi] = 0: in the loss it has no gradient on average"
_SEQUENCE = "completions"
_CHOICE = "5 actions"

Estimate = Callable[[Tensor, Tensor], Tensor]
"""(log pi, log ref) of a sample -> an estimate of the divergence."""


def cases() -> Iterator[Case]:
    """All rows of divergences and entropies."""
    another = "half a squared log-ratio is another divergence"
    no_gradient = f"the score times k3 is no gradient of {_KL}"
    for subject, estimate, of_value, in_loss, in_reward in (
        ("k1", k1, "", _NO_GRADIENT, ""),
        ("k2", k2, another, "", "the score times k2 is the gradient of another divergence"),
        ("k3", k3, "", f"its mean gradient is that of {_FORWARD}", no_gradient),
    ):
        for on in (_CHOICE, _SEQUENCE):
            yield row(subject, f"value; {on}", partial(_value, estimate, on), biased_by=of_value)
            yield row(subject, f"in the loss; {on}", partial(_in_loss, estimate, on, _KL), biased_by=in_loss)
            yield row(subject, f"in the reward; {on}", partial(_in_reward, estimate, on), biased_by=in_reward)
    yield row("k3", "in the loss, held against what it does follow", partial(_in_loss, k3, _CHOICE, _FORWARD))
    yield row("k2", "value, held against what it does estimate", _half_square)
    yield row(
        "k2",
        "in the loss, held against the other direction",
        partial(_in_loss, k2, _CHOICE, _FORWARD),
        biased_by=f"it follows grad {_KL}",
    )
    for subject, estimate in (("k1", k1), ("k3", k3)):
        yield row(subject, "value; summed over the tokens of a completion", partial(_token_value, estimate))
    by_token = "in the loss; summed over the tokens of a completion"
    yield row(
        "k2",
        by_token,
        partial(_token_loss, whole=True),
        biased_by="what later tokens diverge is not charged to the earlier ones that led there",
    )
    yield row("k2", f"{by_token}, held against what it does follow", partial(_token_loss, whole=False))
    yield row("k3", "never negative, and 0 at the reference", _least_of_k3)
    yield from _exact_divergences()
    yield from _entropies()


def _exact_divergences() -> Iterator[Case]:
    yield row("categorical_kl", "value", partial(_categorical, gradient=False))
    yield row("categorical_kl", "gradient in the first", partial(_categorical, gradient=True))
    yield row("categorical_kl", "actions that the first never takes", _impossible_actions)
    yield row(
        "categorical_kl",
        "held against the other direction",
        partial(_categorical, gradient=False, other=True),
        biased_by="a divergence is not symmetric",
    )
    yield row("gaussian_kl", "value, by Gauss-Hermite quadrature", partial(_gaussian, gradient=False))
    yield row("gaussian_kl", "gradient in mean and spread of the first", partial(_gaussian, gradient=True))
    yield row(
        "gaussian_kl",
        "held against the other direction",
        partial(_gaussian, gradient=False, other=True),
        biased_by="a divergence is not symmetric",
    )


def _entropies() -> Iterator[Case]:
    yield row("categorical_entropy", "value", _categorical_entropy)
    yield row("categorical_entropy", "gradient", _categorical_entropy_gradient)
    yield row("categorical_entropy", "as an estimate from samples: no variance", _no_variance)
    yield row("gaussian_entropy", "value, by Gauss-Hermite quadrature", _gaussian_entropy)
    for on in (_CHOICE, _SEQUENCE):
        yield row("sampled_entropy", f"value; {on}", partial(_entropy_of_samples, on))
        yield row(
            "sampled_entropy",
            f"in the loss; {on}",
            partial(_entropy_in_loss, on),
            biased_by=_NO_GRADIENT,
        )
        yield row("sampled_entropy", f"in the reward; {on}", partial(_entropy_in_reward, on))


def _logits() -> Tensor:
    return torch.tensor([0.3, -1.0, 1.2, 0.0, 0.5], dtype=torch.float64, requires_grad=True)


def _other_logits() -> Tensor:
    return torch.tensor([-0.4, 0.6, 0.1, 1.0, -0.2], dtype=torch.float64)


class _Sampled:
    """All that can be drawn: log pi with gradient and log ref, [R, 1], how likely each is; actions or completions."""

    def __init__(self, on: str) -> None:
        if on == _CHOICE:
            self.name, chance = on, torch.ones(5, dtype=torch.float64)
            self.parameter = _logits()
            log_prob, reference = self.parameter.log_softmax(-1), _other_logits().log_softmax(-1)
            self.kl = (log_prob.exp() * (log_prob - reference)).sum()
            self.forward_kl = (reference.exp() * (reference - log_prob)).sum()
        else:
            stage = token_stage()
            self.name, chance = stage.name, stage.rows.luck
            self.parameter = stage.policy.theta
            log_prob = sequence_log_prob(stage.log_prob, stage.mask)
            reference = sequence_log_prob(stage.reference_log_prob, stage.mask)
            self.kl = sequence_kl(stage.problem, stage.policy, stage.reference)
            self.forward_kl = sequence_kl(stage.problem, stage.reference, stage.policy)
        self.log_prob, self.reference = log_prob.unsqueeze(-1), reference.unsqueeze(-1)
        self.probability = chance * log_prob.detach().exp()
        self.entropy = -(chance * log_prob.exp()) @ log_prob

    def gradient(self, value: Tensor) -> Tensor:
        return torch.autograd.grad(value, self.parameter, retain_graph=True)[0].flatten()

    def value(self, estimate: Tensor, truth: Tensor, name: str) -> Found:
        moments = weighted_moments(self.probability, estimate.detach())
        return Found(
            problem=self.name,
            target_name=name,
            target=truth.detach().reshape(1),
            moments=moments,
            batches=len(estimate),
        )

    def ascent(self, objective: Tensor, truth: Tensor, name: str) -> Found:
        """The mean gradient of one number per sample, [R]."""
        gradient = row_gradients(objective, [self.parameter])
        return Found(
            problem=self.name,
            target_name=name,
            target=truth,
            moments=weighted_moments(self.probability, gradient),
            batches=len(objective),
        )


def _value(estimate: Estimate, on: str) -> Found:
    drawn = _Sampled(on)
    return drawn.value(estimate(drawn.log_prob, drawn.reference), drawn.kl, _KL)


def _in_loss(estimate: Estimate, on: str, followed: str) -> Found:
    drawn = _Sampled(on)
    truth = drawn.gradient(drawn.kl if followed == _KL else drawn.forward_kl)
    return drawn.ascent(estimate(drawn.log_prob, drawn.reference).squeeze(-1), truth, f"grad {followed}")


def _in_reward(estimate: Estimate, on: str) -> Found:
    drawn = _Sampled(on)
    cost = estimate(drawn.log_prob, drawn.reference).detach()
    return drawn.ascent((drawn.log_prob * cost).squeeze(-1), drawn.gradient(drawn.kl), f"grad {_KL}")


def _token_value(estimate: Estimate) -> Found:
    on = token_stage()
    with torch.no_grad():
        each = estimate(on.log_prob, on.reference_log_prob)
    truth = sequence_kl(on.problem, on.policy, on.reference).detach()
    return _Sampled(_SEQUENCE).value(torch.where(on.mask, each, 0.0).sum(-1, keepdim=True), truth, _KL)


def _token_loss(*, whole: bool) -> Found:
    on = token_stage()
    objective = torch.where(on.mask, k2(on.log_prob, on.reference_log_prob), 0.0).sum(-1)
    if whole:
        return on.ascent(objective, on.gradient_of(sequence_kl(on.problem, on.policy, on.reference)), f"grad {_KL}")
    own, other = (solve_tokens(on.problem, who) for who in (on.policy, on.reference))
    levels = zip(own.visits, own.policy, other.policy, strict=True)
    total = torch.stack([(visits.detach().unsqueeze(-1) * p * (p / q).log()).sum() for visits, p, q in levels]).sum()
    return on.ascent(objective, on.gradient_of(total), "sum_prefix eta(prefix) grad KL(pi || ref)(prefix)")


def _half_square() -> Found:
    drawn = _Sampled(_CHOICE)
    pi, ref = _logits().softmax(-1), _other_logits().softmax(-1)
    truth = (0.5 * pi * (pi / ref).log().square()).sum()
    return drawn.value(k2(drawn.log_prob, drawn.reference), truth, "E[(log pi - log ref)^2] / 2")


def _least_of_k3() -> Found:
    log_prob = torch.linspace(-3.0, 3.0, 13, dtype=torch.float64)
    zero = torch.zeros_like(log_prob)
    found = torch.stack([k3(log_prob, zero).min(), k3(log_prob, log_prob).max()]) + 1.0
    return identity(found, torch.ones(2, dtype=torch.float64), problem="13 log-ratios", target_name="1 + 0 twice")


def _probabilities() -> tuple[Tensor, Tensor]:
    """Three pairs of distributions over 5 actions."""
    shift = torch.tensor([[0.0], [1.0], [-2.0]], dtype=torch.float64) * torch.arange(5, dtype=torch.float64)
    return _logits().detach() + shift, (_other_logits() - 0.5 * shift).cos()


def _categorical(*, gradient: bool, other: bool = False) -> Found:
    first, second = _probabilities()
    first.requires_grad_()

    def summed(logits_p: Tensor, logits_q: Tensor) -> Tensor:
        p, q = (logits.exp() / logits.exp().sum(-1, keepdim=True) for logits in (logits_p, logits_q))
        return (p * (p / q).log()).sum(-1)

    found, expected = categorical_kl(first, second + 3.0), summed(first, second)
    if other:
        expected = summed(second, first)
    if gradient:
        weight = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
        found, expected = (torch.autograd.grad(value @ weight, first)[0] for value in (found, expected))
    name = "KL(q || p)" if other else "grad KL(p || q)" if gradient else "sum_a p_a log(p_a / q_a)"
    return identity(found, expected, problem="3 pairs over 5 actions", target_name=name)


def _impossible_actions() -> Found:
    first, second = (logits.detach().clone() for logits in _probabilities())
    first[:, 1], second[0, 1] = -torch.inf, -torch.inf
    p, q = first.softmax(-1), second.softmax(-1)
    others = [0, 2, 3, 4]
    expected = (p[:, others] * (p[:, others] / q[:, others]).log()).sum(-1)
    return identity(
        categorical_kl(first, second), expected, problem="3 pairs over 5 actions", target_name="the sum over the others"
    )


def _gaussians() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means [2, 3] and log-spreads [3] of two diagonal Gaussians."""
    numbers = torch.arange(6, dtype=torch.float64).view(2, 3)
    return numbers.sin(), 0.3 * numbers[0].cos(), (2.0 * numbers).cos(), 0.4 * numbers[1].sin()


def _quadrature(mean: Tensor, log_std: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """E[f(x)] of each dimension, by 40 nodes: x = mean + sqrt(2) sigma node; summed over the last axis."""
    node, weight = (torch.from_numpy(part) for part in np.polynomial.hermite.hermgauss(40))
    x = mean.unsqueeze(-1) + math.sqrt(2.0) * log_std.exp().unsqueeze(-1) * node
    return (function(x) @ weight / math.sqrt(math.pi)).sum(-1)


def _log_density(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    scaled = (x - mean.unsqueeze(-1)) / log_std.exp().unsqueeze(-1)
    return -0.5 * scaled.square() - log_std.unsqueeze(-1) - 0.5 * math.log(2.0 * math.pi)


def _gaussian(*, gradient: bool, other: bool = False) -> Found:
    mean, log_std, mean_q, log_std_q = _gaussians()
    mean.requires_grad_()
    log_std.requires_grad_()
    first, second = (mean, log_std), (mean_q, log_std_q)
    found = gaussian_kl(*first, *second)
    own, against = (second, first) if other else (first, second)
    expected = _quadrature(*own, lambda x: _log_density(x, *own) - _log_density(x, *against))
    if gradient:
        weight = torch.tensor([1.0, -2.0], dtype=torch.float64)
        found, expected = (
            torch.cat([part.flatten() for part in torch.autograd.grad(value @ weight, first)])
            for value in (found, expected)
        )
    name = "E_q[log q - log p]" if other else "E_p[log p - log q]"
    return identity(
        found, expected, problem="2 pairs in 3 dimensions", target_name=f"grad {name}" if gradient else name
    )


def _categorical_entropy() -> Found:
    logits = torch.cat([_probabilities()[0], torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf, -torch.inf]])])
    p = logits.softmax(-1)
    expected = -(p * p.clamp(min=1e-300).log()).sum(-1)
    return identity(
        categorical_entropy(logits - 2.0),
        expected,
        problem="4 distributions over 5 actions",
        target_name="-sum p log p",
    )


def _categorical_entropy_gradient() -> Found:
    """The gradient of -sum p log p in logit a is -p_a (log p_a + H)."""
    logits = _logits()
    (found,) = torch.autograd.grad(categorical_entropy(logits), logits)
    p = logits.detach().softmax(-1)
    expected = -p * (p.log() - (p * p.log()).sum())
    return identity(found, expected, problem=_CHOICE, target_name="-p_a (log p_a + H)")


def _no_variance() -> Found:
    drawn = _Sampled(_CHOICE)
    entropy = categorical_entropy(_logits()).detach().reshape(1)
    moments = Moments(mean=entropy, variance=0.0)
    return Found(problem=_CHOICE, target_name="H(pi)", target=drawn.entropy.detach().reshape(1), moments=moments)


def _gaussian_entropy() -> Found:
    mean, log_std, _, _ = _gaussians()
    expected = _quadrature(mean, log_std, lambda x: -_log_density(x, mean, log_std))
    found = gaussian_entropy(log_std.expand(2, 3))
    return identity(found, expected, problem="2 Gaussians in 3 dimensions", target_name="E[-log p]")


def _entropy_of_samples(on: str) -> Found:
    drawn = _Sampled(on)
    return drawn.value(sampled_entropy(drawn.log_prob), drawn.entropy, "H(pi)")


def _entropy_in_loss(on: str) -> Found:
    drawn = _Sampled(on)
    return drawn.ascent(sampled_entropy(drawn.log_prob).squeeze(-1), drawn.gradient(drawn.entropy), "grad H(pi)")


def _entropy_in_reward(on: str) -> Found:
    drawn = _Sampled(on)
    bonus = sampled_entropy(drawn.log_prob).detach()
    return drawn.ascent((drawn.log_prob * bonus).squeeze(-1), drawn.gradient(drawn.entropy), "grad H(pi)")
