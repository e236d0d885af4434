"""Preference losses: where they stand at the reference, what swapping does, which of them are one another."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from identity_strategies import PROPERTY, SEEDS, close, normal
from torch import Tensor

from upslope.estimators import (
    dpo_sigmoid,
    hinge,
    ipo,
    kto,
    negative_log_likelihood,
    orpo,
    robust_dpo,
    sequence_log_ratio,
    simpo,
)

BETAS = st.floats(0.01, 5.0)
RATES = st.floats(0.0, 0.45)
RATIOS = st.floats(-5.0, 5.0)


def number(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


@PROPERTY
@given(SEEDS, BETAS)
def test_dpo_at_the_reference_is_log_2_with_gradient_half_beta_times_the_difference_of_scores(
    seed: int, beta: float
) -> None:
    """Through a softmax table and ragged masks: grad = -beta/2 (sum of chosen scores - sum of rejected ones)."""
    theta = normal(seed, 4, 3).requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    state, action = torch.randint(4, (2, 6, 5), generator=generator), torch.randint(3, (2, 6, 5), generator=generator)
    mask = torch.rand(2, 6, 5, generator=generator) < 0.6
    log_prob = theta.log_softmax(-1)[state, action]
    chosen, rejected = sequence_log_ratio(log_prob, log_prob.detach(), mask, length_normalised=False)
    loss = dpo_sigmoid(chosen, rejected, beta=beta)
    close(loss.detach(), torch.full((6,), math.log(2.0), dtype=torch.float64))
    found = torch.autograd.grad(loss.sum(), theta, retain_graph=True)[0]
    difference = (log_prob * mask)[0].sum() - (log_prob * mask)[1].sum()
    close(found, -0.5 * beta * torch.autograd.grad(difference, theta)[0])


@PROPERTY
@given(RATIOS, RATIOS, BETAS)
def test_swapping_the_pair_negates_the_margin(chosen: float, rejected: float, beta: float) -> None:
    """-log s(D) becomes -log s(-D): e^-loss of the two add up to 1, and their difference is the margin."""
    won, lost = number(chosen), number(rejected)
    loss, swapped = dpo_sigmoid(won, lost, beta=beta), dpo_sigmoid(lost, won, beta=beta)
    margin = beta * (chosen - rejected)
    close(swapped - loss, number(margin))
    close((-loss).exp() + (-swapped).exp(), number(1.0))
    close(hinge(won, lost, beta=beta), number(max(0.0, 1.0 - margin)))
    close(hinge(lost, won, beta=beta), number(max(0.0, 1.0 + margin)))


@PROPERTY
@given(RATIOS, RATIOS, BETAS, RATES)
def test_smoothed_losses_are_the_mixtures_they_say(chosen: float, rejected: float, beta: float, rate: float) -> None:
    """cDPO mixes the loss and the swapped one; robust DPO, met with labels swapped at that rate, has the clean mean."""
    won, lost = number(chosen), number(rejected)
    loss, swapped = dpo_sigmoid(won, lost, beta=beta), dpo_sigmoid(lost, won, beta=beta)
    close(dpo_sigmoid(won, lost, beta=beta, label_smoothing=rate), (1 - rate) * loss + rate * swapped)
    robust = robust_dpo(won, lost, beta=beta, label_smoothing=rate)
    robust_swapped = robust_dpo(lost, won, beta=beta, label_smoothing=rate)
    close((1 - rate) * robust + rate * robust_swapped, loss)
    close(robust_dpo(won, lost, beta=beta, label_smoothing=0.0), loss)


@PROPERTY
@given(RATIOS, RATIOS, BETAS, st.integers(1, 9), st.integers(1, 9))
def test_ipo_is_zero_exactly_at_its_target_gap(
    chosen: float, rejected: float, beta: float, length: int, other_length: int
) -> None:
    """(d_w - d_l - 1 / (2 beta))^2; divided by lengths it is that of the averages."""
    won, lost = number(chosen), number(rejected)
    close(ipo(lost + 0.5 / beta, lost, beta=beta, length_normalised=False), number(0.0))
    found = ipo(won, lost, beta=beta, length_normalised=False)
    close(found, number((chosen - rejected - 0.5 / beta) ** 2))
    lengths = {"chosen_length": torch.tensor([length]), "rejected_length": torch.tensor([other_length])}
    averaged = ipo(length * won, other_length * lost, beta=beta, length_normalised=True, **lengths)
    close(averaged, found)


@PROPERTY
@given(RATIOS, RATIOS, BETAS, st.floats(-2.0, 2.0))
def test_simpo_is_dpo_of_mean_log_probs_with_a_margin(
    chosen: float, rejected: float, beta: float, margin: float
) -> None:
    won, lost = number(chosen), number(rejected)
    close(simpo(won, lost, beta=beta, margin=0.0), dpo_sigmoid(won, lost, beta=beta))
    close(simpo(won + margin / beta, lost, beta=beta, margin=margin), dpo_sigmoid(won, lost, beta=beta))


@PROPERTY
@given(st.floats(-5.0, -0.01), st.floats(-5.0, -0.01), BETAS)
def test_orpo_is_the_likelihood_and_the_odds_ratio(chosen: float, rejected: float, beta: float) -> None:
    """-l_w - beta log [odds_w / (odds_w + odds_l)]."""
    won, lost = math.exp(chosen) / (1 - math.exp(chosen)), math.exp(rejected) / (1 - math.exp(rejected))
    found = orpo(number(chosen), number(rejected), beta=beta)
    close(found, number(-chosen - beta * math.log(won / (won + lost))))
    alone = orpo(number(chosen), number(chosen), beta=beta)
    close(alone - negative_log_likelihood(number(chosen)), number(beta * math.log(2.0)))


@PROPERTY
@given(RATIOS, st.floats(-2.0, 2.0), BETAS, st.floats(0.1, 3.0), st.floats(0.1, 3.0))
def test_kto_is_a_sigmoid_of_the_distance_from_the_kl(
    ratio: float, kl: float, beta: float, weight: float, other_weight: float
) -> None:
    """w_d (1 - s(beta (d - z))) and w_u (1 - s(beta (z - d))), half the weight at d = z; z not below 0, no gradient."""
    both, desirable = torch.full((2,), ratio, dtype=torch.float64), torch.tensor([True, False])
    z = torch.tensor(kl, dtype=torch.float64, requires_grad=True)
    weights = {"desirable_weight": weight, "undesirable_weight": other_weight}
    both.requires_grad_()
    found = kto(both, desirable, z, beta=beta, **weights)
    distance = beta * (ratio - max(kl, 0.0))
    close(found[:1], number(weight * (1 - sigmoid(distance))))
    close(found[1:], number(other_weight * (1 - sigmoid(-distance))))
    gradients = torch.autograd.grad(found.sum(), (both, z), allow_unused=True)
    assert gradients[1] is None
    assert gradients[0][0] < 0.0 < gradients[0][1]
    close(kto(both, desirable, z, beta=beta), found / torch.tensor([weight, other_weight], dtype=torch.float64))
    even = kto(torch.full_like(both, max(kl, 0.0)), desirable, z, beta=beta, **weights)
    close(even, torch.tensor([weight / 2, other_weight / 2], dtype=torch.float64))


PAIRED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dpo": lambda won, lost: dpo_sigmoid(won, lost, beta=0.3),
    "cdpo": lambda won, lost: dpo_sigmoid(won, lost, beta=0.3, label_smoothing=0.1),
    "robust": lambda won, lost: robust_dpo(won, lost, beta=0.3, label_smoothing=0.1),
    "ipo": lambda won, lost: ipo(won, lost, beta=0.1, length_normalised=False),
    "hinge": lambda won, lost: hinge(won, lost, beta=0.3),
    "simpo": lambda won, lost: simpo(won, lost, beta=0.3, margin=0.5),
}


@pytest.mark.parametrize("name", list(PAIRED))
@PROPERTY
@given(st.floats(-1.0, 1.0))
def test_every_paired_loss_sees_the_difference_alone(name: str, shift: float) -> None:
    """At no preference it pushes the two apart equally hard; the same added to both changes nothing."""
    won, lost = number(-0.4).requires_grad_(), number(-0.4).requires_grad_()
    loss = PAIRED[name](won, lost)
    up, down = torch.autograd.grad(loss, (won, lost))
    assert float(up) < 0.0
    close(up, -down)
    close(PAIRED[name](won + shift, lost + shift), loss)
