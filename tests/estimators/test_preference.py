"""Preference losses: golden values, identities and the direction of their gradients."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from upslope.estimators import (
    dpo_sigmoid,
    hinge,
    ipo,
    kto,
    negative_log_likelihood,
    orpo,
    robust_dpo,
    simpo,
)

NUMBERS = st.floats(-8.0, 8.0)
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dpo": lambda w, r: dpo_sigmoid(w, r, beta=0.3),
    "cdpo": lambda w, r: dpo_sigmoid(w, r, beta=0.3, label_smoothing=0.1),
    "robust": lambda w, r: robust_dpo(w, r, beta=0.3, label_smoothing=0.1),
    "ipo": lambda w, r: ipo(w, r, beta=0.3, length_normalised=False),
    "hinge": lambda w, r: hinge(w, r, beta=0.3),
    "simpo": lambda w, r: simpo(w, r, beta=0.3, margin=0.5),
    "orpo": lambda w, r: orpo(w, r, beta=0.3),
}


def pair(chosen: float, rejected: float) -> tuple[Tensor, Tensor]:
    return torch.tensor([chosen], dtype=torch.float64), torch.tensor([rejected], dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("name", list(LOSSES))
def test_at_no_preference_every_loss_pushes_the_pair_apart(name: str) -> None:
    chosen, rejected = (tensor.requires_grad_() for tensor in pair(-1.0, -1.0))
    loss = LOSSES[name](chosen, rejected)
    assert loss.shape == (1,)
    gradients = torch.autograd.grad(loss.sum(), (chosen, rejected))
    assert float(gradients[0]) < 0 < float(gradients[1])


@given(NUMBERS, NUMBERS, st.floats(0.05, 2.0), st.floats(0.0, 0.45))
def test_sigmoid_family(chosen: float, rejected: float, beta: float, rate: float) -> None:
    arguments, d = pair(chosen, rejected), beta * (chosen - rejected)
    plain, swapped = -math.log(sigmoid(d)), -math.log(sigmoid(-d))
    assert float(dpo_sigmoid(*arguments, beta=beta)) == pytest.approx(plain, abs=1e-12)
    smoothed = dpo_sigmoid(*arguments, beta=beta, label_smoothing=rate)
    assert float(smoothed) == pytest.approx((1 - rate) * plain + rate * swapped, abs=1e-9)
    robust = robust_dpo(*arguments, beta=beta, label_smoothing=rate)
    assert float(robust) == pytest.approx(((1 - rate) * plain - rate * swapped) / (1 - 2 * rate), abs=1e-9)
    flipped = robust_dpo(*reversed(arguments), beta=beta, label_smoothing=rate)
    unbiased = (1 - rate) * float(robust) + rate * float(flipped)
    assert unbiased == pytest.approx(plain, abs=1e-9)


def test_ipo_summed_and_averaged() -> None:
    chosen, rejected = pair(3.0, -2.0)
    assert float(ipo(chosen, rejected, beta=0.25, length_normalised=False)) == pytest.approx((5.0 - 2.0) ** 2)
    lengths = torch.tensor([3]), torch.tensor([4])
    averaged = ipo(
        chosen,
        rejected,
        beta=0.25,
        length_normalised=True,
        chosen_length=lengths[0],
        rejected_length=lengths[1],
    )
    assert float(averaged) == pytest.approx((1.0 + 0.5 - 2.0) ** 2)
    with pytest.raises(ValueError, match="exactly when length_normalised=True"):
        ipo(chosen, rejected, beta=0.25, length_normalised=True)
    with pytest.raises(ValueError, match="exactly when length_normalised=True"):
        ipo(chosen, rejected, beta=0.25, length_normalised=False, chosen_length=lengths[0])


@given(st.floats(-6.0, -0.01), st.floats(-6.0, -0.01))
def test_orpo_is_its_definition(chosen: float, rejected: float) -> None:
    def odds(log_prob: float) -> float:
        return math.exp(log_prob) / (1 - math.exp(log_prob))

    ratio = odds(chosen) / odds(rejected)
    expected = -chosen + 0.3 * -math.log(ratio / (1 + ratio))
    assert float(orpo(*pair(chosen, rejected), beta=0.3)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes_are_finite(dtype: torch.dtype) -> None:
    for chosen, rejected in ((0.0, 0.0), (0.0, -1e4), (-1e4, 0.0), (-1e4, -1e4)):
        for loss in LOSSES.values():
            w, r = (torch.tensor([x], dtype=dtype, requires_grad=True) for x in (chosen, rejected))
            value = loss(w, r)
            gradients = torch.autograd.grad(value.sum(), (w, r))
            assert torch.isfinite(value).all()
            assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_hinge_and_simpo_by_hand() -> None:
    assert float(hinge(*pair(9.0, 1.0), beta=0.5)) == 0.0
    assert float(simpo(*pair(-1.0, -2.0), beta=2.0, margin=0.5)) == pytest.approx(-math.log(sigmoid(1.5)))


def test_kto() -> None:
    log_ratio = torch.tensor([2.0, 2.0], requires_grad=True)
    desirable = torch.tensor([True, False])
    kl = torch.tensor(0.5, requires_grad=True)
    loss = kto(log_ratio, desirable, kl, beta=0.4, desirable_weight=2.0, undesirable_weight=3.0)
    assert loss.tolist() == pytest.approx([2 * (1 - sigmoid(0.6)), 3 * (1 - sigmoid(-0.6))])
    gradients = torch.autograd.grad(loss.sum(), (log_ratio, kl), allow_unused=True)
    assert gradients[1] is None
    assert float(gradients[0][0]) < 0 < float(gradients[0][1])
    negative = kto(log_ratio, desirable, torch.tensor(-7.0), beta=0.4)
    assert torch.equal(negative, kto(log_ratio, desirable, torch.tensor(0.0), beta=0.4))


def test_negative_log_likelihood() -> None:
    assert negative_log_likelihood(torch.tensor([[-2.0]])).tolist() == [[2.0]]


def test_errors() -> None:
    ok = torch.zeros(2)
    for name, loss in LOSSES.items():
        with pytest.raises(ValueError, match=r"the rejected sequences must have the shape of the chosen"):
            loss(ok, torch.zeros(3))
        assert name
    with pytest.raises(ValueError, match="beta must be positive"):
        hinge(ok, ok, beta=0.0)
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 0.5\)"):
        robust_dpo(ok, ok, beta=0.1, label_smoothing=0.5)
    with pytest.raises(ValueError, match="desirable must be a boolean tensor"):
        kto(ok, ok, torch.tensor(0.0), beta=0.1)
    with pytest.raises(ValueError, match="reference_kl must be one number"):
        kto(ok, ok.bool(), ok, beta=0.1)
