"""KL estimates and entropies by exact enumeration on softmax policies; all expectations are finite sums."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from identity_strategies import PROPERTY, SEEDS, close, logits, normal, two_logits
from torch import Tensor

from upslope.estimators import (
    categorical_entropy,
    categorical_kl,
    gaussian_entropy,
    gaussian_kl,
    k1,
    k2,
    k3,
    negative_log_likelihood,
    sampled_entropy,
    sequence_log_ratio,
)

Estimate = Callable[[Tensor, Tensor], Tensor]


def mean(estimate: Estimate, policy: Tensor, reference: Tensor) -> Tensor:
    """E_pi[estimate], differentiable through l alone: the sampling is not."""
    log_prob = policy.log_softmax(-1)
    return (log_prob.detach().exp() * estimate(log_prob, reference.log_softmax(-1))).sum()


def gradient_in_the_loss(estimate: Estimate, policy: Tensor, reference: Tensor) -> Tensor:
    return torch.autograd.grad(mean(estimate, policy, reference), policy)[0]


def gradient_in_the_reward(estimate: Estimate, policy: Tensor, reference: Tensor) -> Tensor:
    """E_pi[grad l * detach(estimate)]."""
    log_prob = policy.log_softmax(-1)
    psi = estimate(log_prob, reference.log_softmax(-1)).detach()
    return torch.autograd.grad((log_prob.detach().exp() * psi * log_prob).sum(), policy)[0]


@PROPERTY
@given(st.floats(-30.0, 0.0), st.floats(-30.0, 0.0), st.sampled_from([torch.float32, torch.float64]))
def test_k3_is_never_negative(log_prob: float, reference: float, dtype: torch.dtype) -> None:
    """And 0 only where nothing differs; d of 1e-6 and less included."""
    one = torch.tensor([log_prob], dtype=dtype)
    for other in (torch.tensor([reference], dtype=dtype), one - 1e-7, one + 1e-6, one):
        assert (k3(one, other) >= 0).all()
    assert (k3(one, one) == 0).all()


@PROPERTY
@given(st.floats(-3.0, 0.0), st.floats(-3.0, 0.0))
def test_the_estimates_are_their_definitions(log_prob: float, reference: float) -> None:
    one, other = torch.tensor([log_prob], dtype=torch.float64), torch.tensor([reference], dtype=torch.float64)
    difference = log_prob - reference
    close(k1(one, other), torch.tensor([difference], dtype=torch.float64))
    close(k2(one, other), torch.tensor([difference**2 / 2], dtype=torch.float64))
    close(k3(one, other), torch.tensor([math.exp(-difference) - 1 + difference], dtype=torch.float64))
    assert torch.equal(sampled_entropy(one), -one)
    assert torch.equal(negative_log_likelihood(one), -one)


@PROPERTY
@given(two_logits())
def test_the_means_of_k1_and_k3_are_the_kl(pair: tuple[Tensor, Tensor]) -> None:
    policy, reference = pair
    exact = categorical_kl(policy, reference)
    p, log_ratio = policy.softmax(-1), policy.log_softmax(-1) - reference.log_softmax(-1)
    close(exact, (p * log_ratio).sum())
    close(mean(k1, policy, reference), exact)
    close(mean(k3, policy, reference), exact)


def test_the_mean_of_k2_is_not_the_kl() -> None:
    """Negative control."""
    policy, reference = torch.tensor([0.2, -0.5, 1.1]).double(), torch.tensor([-0.3, 0.8, 0.1]).double()
    assert abs(float(mean(k2, policy, reference) - categorical_kl(policy, reference))) > 1e-2


@PROPERTY
@given(two_logits())
def test_gradients_in_the_loss_k1_is_zero_k2_is_the_kl_k3_is_the_forward_kl(pair: tuple[Tensor, Tensor]) -> None:
    policy, reference = pair[0].requires_grad_(), pair[1]
    reverse = torch.autograd.grad(categorical_kl(policy, reference), policy)[0]
    forward = torch.autograd.grad(categorical_kl(reference, policy), policy)[0]
    close(gradient_in_the_loss(k1, policy, reference), torch.zeros_like(policy))
    close(gradient_in_the_loss(k2, policy, reference), reverse)
    close(gradient_in_the_loss(k3, policy, reference), forward)
    close(forward, (policy.softmax(-1) - reference.softmax(-1)).detach())
    close(
        gradient_in_the_loss(lambda log_prob, _: sampled_entropy(log_prob), policy, reference), torch.zeros_like(policy)
    )


@PROPERTY
@given(two_logits())
def test_gradients_in_the_reward_only_k1_is_the_kl(pair: tuple[Tensor, Tensor]) -> None:
    """k3 in the reward has the mean grad KL(pi, ref) + grad of the mass that ref moves: E[grad l ref/pi] = 0."""
    policy, reference = pair[0].requires_grad_(), pair[1]
    reverse = torch.autograd.grad(categorical_kl(policy, reference), policy)[0]
    close(gradient_in_the_reward(k1, policy, reference), reverse)
    p, f = policy.softmax(-1).detach(), reference.softmax(-1)
    moved = f - p * f.sum()
    close(gradient_in_the_reward(k3, policy, reference), reverse + moved)
    entropy_gradient = torch.autograd.grad(categorical_entropy(policy), policy)[0]
    close(gradient_in_the_reward(lambda log_prob, _: sampled_entropy(log_prob), policy, reference), entropy_gradient)


def test_k2_and_k3_in_the_reward_are_wrong() -> None:
    """Negative control."""
    policy = torch.tensor([0.2, -0.5, 1.1], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-0.3, 0.8, 0.1], dtype=torch.float64)
    reverse = torch.autograd.grad(categorical_kl(policy, reference), policy)[0]
    for estimate in (k2, k3):
        assert float((gradient_in_the_reward(estimate, policy, reference) - reverse).abs().max()) > 1e-2


@pytest.mark.parametrize("estimate", [k1, k3])
@PROPERTY
@given(SEEDS)
def test_token_kls_sum_to_the_sequence_kl(estimate: Estimate, seed: int) -> None:
    """Sequences of two to three tokens that stop at token 0: the mean of the sum of each token's own KL is the KL.

    Sum over all sequences of their probability, with the sum of log-ratios of a sequence as its k1.
    """
    policy, reference = normal(seed, 2, 1 + 3 + 9, 3)
    whole = torch.zeros((), dtype=torch.float64)
    by_token, by_estimate = torch.zeros_like(whole), torch.zeros_like(whole)
    for tokens in itertools.product(range(3), repeat=3):
        length = next((place + 1 for place, token in enumerate(tokens) if token == 0), 3)
        if any(tokens[length:]):
            continue
        contexts = 0, 1 + tokens[0], 4 + 3 * tokens[0] + tokens[1]
        log_prob, log_reference, exact = [], [], []
        for place, row in enumerate(contexts):
            log_prob.append(policy[row].log_softmax(-1)[tokens[place]])
            log_reference.append(reference[row].log_softmax(-1)[tokens[place]])
            exact.append(categorical_kl(policy[row], reference[row]))
        mask = torch.arange(3) < length
        tokenwise = torch.stack(log_prob), torch.stack(log_reference)
        chance = tokenwise[0][mask].sum().exp()
        log_ratio = sequence_log_ratio(*tokenwise, mask, length_normalised=False)
        whole = whole + chance * log_ratio
        by_token = by_token + chance * torch.stack(exact)[mask].sum()
        by_estimate = by_estimate + chance * estimate(*tokenwise)[mask].sum()
    close(by_token, whole)
    close(by_estimate, whole)


@PROPERTY
@given(logits())
def test_entropy_lies_between_0_and_log_a(policy: Tensor) -> None:
    """log A at the uniform policy, 0 at a certain one; log A minus the KL to the uniform; the mean of -l."""
    entropy, most = categorical_entropy(policy), math.log(len(policy))
    assert 0.0 <= float(entropy) <= most + 1e-12
    close(entropy, most - categorical_kl(policy, torch.zeros_like(policy)))
    close(entropy, mean(lambda log_prob, _: sampled_entropy(log_prob), policy, policy))
    close(categorical_entropy(torch.zeros_like(policy)), torch.tensor(most, dtype=torch.float64))
    certain = torch.full_like(policy, -torch.inf)
    certain[0] = 0.0
    assert float(categorical_entropy(certain)) == 0.0


@PROPERTY
@given(two_logits())
def test_impossible_actions_add_nothing(pair: tuple[Tensor, Tensor]) -> None:
    """A preference of -inf is as good as an action that is not there, in value and in gradient."""
    policy, reference = (logits.clone().requires_grad_() for logits in pair)
    never = torch.full((1,), -torch.inf, dtype=torch.float64)
    longer, other = torch.cat((policy, never)), torch.cat((reference, never))
    for found, expected in (
        (categorical_entropy(longer), categorical_entropy(policy)),
        (categorical_kl(longer, other), categorical_kl(policy, reference)),
    ):
        close(found, expected)
        close(torch.autograd.grad(found, policy)[0], torch.autograd.grad(expected, policy)[0])
    possible = torch.cat((reference.detach(), torch.zeros(1, dtype=torch.float64)))
    assert categorical_kl(longer, possible).isfinite()
    assert categorical_kl(possible, longer).isinf()


@PROPERTY
@given(two_logits())
def test_pinsker(pair: tuple[Tensor, Tensor]) -> None:
    """KL >= 2 TV^2 in both directions, and 0 between equals."""
    policy, reference = pair
    variation = 0.5 * (policy.softmax(-1) - reference.softmax(-1)).abs().sum()
    for one, other in ((policy, reference), (reference, policy)):
        assert float(categorical_kl(one, other)) >= float(2 * variation.square()) - 1e-12
    close(categorical_kl(policy, policy + 0.7), torch.zeros((), dtype=torch.float64))
    rows = torch.stack((policy, reference, policy)), torch.stack((reference, policy, policy))
    close(categorical_kl(*rows), torch.stack([categorical_kl(*pair) for pair in zip(*rows, strict=True)]))
    close(categorical_entropy(rows[0]), torch.stack([categorical_entropy(row) for row in rows[0]]))


@PROPERTY
@given(SEEDS)
def test_gaussian_divergences_are_the_integrals(seed: int) -> None:
    """Quadrature of k1 and of -l over each dimension, to rounding for smooth tails; sums over dimensions alone."""
    mean_p, log_std_p, mean_q, log_std_q = 0.7 * normal(seed, 4, 3, 2)
    nodes = torch.linspace(-12.0, 12.0, 1201, dtype=torch.float64).view(-1, 1, 1)
    x = mean_p + log_std_p.exp() * nodes
    weight = (-0.5 * nodes.square()).exp() / (-0.5 * nodes.square()).exp().sum()

    def log_density(mean: Tensor, log_std: Tensor) -> Tensor:
        return -0.5 * ((x - mean) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)

    inside, outside = log_density(mean_p, log_std_p), log_density(mean_q, log_std_q)
    close(gaussian_kl(mean_p, log_std_p, mean_q, log_std_q), (weight * k1(inside, outside)).sum((0, 2)))
    close(gaussian_entropy(log_std_p), (weight * sampled_entropy(inside)).sum((0, 2)))
    close(gaussian_kl(mean_p, log_std_p, mean_p, log_std_p), torch.zeros(3, dtype=torch.float64))
    shared = gaussian_kl(mean_p, log_std_p[0], mean_q, log_std_q[0])
    close(shared, gaussian_kl(mean_p, log_std_p[:1].expand(3, 2), mean_q, log_std_q[:1].expand(3, 2)))


@PROPERTY
@given(two_logits(), SEEDS, st.floats(0.1, 3.0))
def test_the_kl_regularised_optimum_is_stationary(pair: tuple[Tensor, Tensor], seed: int, beta: float) -> None:
    """pi* proportional to ref e^{R/beta}: grad of E[R] - beta KL(pi, ref) vanishes, in each right form."""
    reference, reward = pair[1], normal(seed, len(pair[1]))
    best = (reference.log_softmax(-1) + reward / beta).requires_grad_()
    objective = (best.softmax(-1) * reward).sum() - beta * categorical_kl(best, reference)
    close(torch.autograd.grad(objective, best)[0], torch.zeros_like(best))
    psi = reward.expand_as(best)
    score = gradient_in_the_reward(lambda *_: psi, best, reference)
    close(score - beta * gradient_in_the_reward(k1, best, reference), torch.zeros_like(best))
    close(score - beta * gradient_in_the_loss(k2, best, reference), torch.zeros_like(best))
    partition = (reference.softmax(-1) * (reward / beta).exp()).sum().log()
    close(objective.detach(), beta * partition)
    elsewhere = pair[0]
    worse = (elsewhere.softmax(-1) * reward).sum() - beta * categorical_kl(elsewhere, reference)
    close(worse, beta * (partition - categorical_kl(elsewhere, best.detach())))
