"""Rows of preference losses: expected gradients over all pairs of completions, and where they come to rest.

Two completions of a prompt are drawn from the reference; the first is preferred with probability s(r_1 - r_2)
(Bradley-Terry), and labels may be swapped at a rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from upslope.auditing.cases.case import Case
from upslope.auditing.cases.measurement import Found, identity, row, row_gradients, weighted_moments
from upslope.auditing.cases.token_stage import TokenStage, token_stage
from upslope.estimators import (
    dpo_sigmoid,
    hinge,
    ipo,
    kto,
    negative_log_likelihood,
    orpo,
    robust_dpo,
    sequence_log_prob,
    sequence_log_ratio,
    simpo,
)
from upslope.exact import PrefixTable, regularised_optimum, sequence_kl

_BETA, _NOISE = 0.5, 0.2
_DOUBLE = torch.float64
_SWAPPED = "labels are swapped now and then, and the loss takes them for true"
_AT_REST = "theta of ref exp(r / beta) / Z after a step: where it was"
_CLEAN = "sum over pairs of beta (s(D) - p)(score_1 - score_2), p true preferences"

Loss = Callable[[Tensor, Tensor], Tensor]
"""(log-ratio of the chosen, of the rejected) to a loss per pair."""

_dpo = partial(dpo_sigmoid, beta=_BETA)
_robust = partial(robust_dpo, beta=_BETA, label_smoothing=_NOISE)
_ipo = partial(ipo, beta=_BETA, length_normalised=False)
_hinge = partial(hinge, beta=_BETA)


def cases() -> Iterator[Case]:
    """All rows of preference losses."""
    yield from _sigmoid()
    yield from _robust_sigmoid()
    yield from _identity_preference()
    yield from _others()


def _sigmoid() -> Iterator[Case]:
    yield from _at_the_reference("dpo_sigmoid", _dpo, math.log(2.0), -0.5 * _BETA)
    yield row("dpo_sigmoid", "expected gradient", partial(_gradient, _dpo, 0.0, 0.0))
    yield row("dpo_sigmoid", "at the KL-regularised optimum", partial(_at_rest, _dpo, 0.0))
    yield row("dpo_sigmoid", f"expected gradient, labels swapped at {_NOISE}", _noisy(_dpo), biased_by=_SWAPPED)
    yield row(
        "dpo_sigmoid",
        f"at the KL-regularised optimum, labels swapped at {_NOISE}",
        partial(_at_rest, _dpo, _NOISE),
        biased_by=_SWAPPED,
    )
    smooth = partial(dpo_sigmoid, beta=_BETA, label_smoothing=_NOISE)
    yield row(
        "dpo_sigmoid",
        f"label smoothing {_NOISE}, true labels: the gradient of swapped ones",
        partial(_gradient, smooth, 0.0, _NOISE),
    )
    yield row(
        "dpo_sigmoid",
        f"label smoothing {_NOISE}, at the KL-regularised optimum, labels swapped at {_NOISE}",
        partial(_at_rest, smooth, _NOISE),
        biased_by="smoothing assumes swapped labels, and does not undo them: margins shrink",
    )


def _robust_sigmoid() -> Iterator[Case]:
    yield row("robust_dpo", f"expected gradient, labels swapped at {_NOISE}", _noisy(_robust))
    yield row(
        "robust_dpo", f"at the KL-regularised optimum, labels swapped at {_NOISE}", partial(_at_rest, _robust, _NOISE)
    )
    yield row("robust_dpo", "expected value, labels swapped: that of true ones", _value_under_noise)
    yield row(
        "robust_dpo",
        "expected gradient, true labels",
        partial(_gradient, _robust, 0.0, 0.0),
        biased_by="it undoes swapped labels that are not there",
    )
    none = partial(robust_dpo, beta=_BETA, label_smoothing=0.0)
    yield row("robust_dpo", "expected gradient at rate 0, true labels", partial(_gradient, none, 0.0, 0.0))


def _identity_preference() -> Iterator[Case]:
    yield from _at_the_reference("ipo", _ipo, 0.25 / _BETA**2, -1.0 / _BETA)
    yield row(
        "ipo",
        "preferences linear in rewards: at ref exp(r / (2 beta)) / Z",
        partial(_rest_of_ipo, lambda gap: 0.5 + 0.5 * gap),
    )
    yield row(
        "ipo",
        "preferences of Bradley-Terry: at ref exp(r / (2 beta)) / Z",
        partial(_rest_of_ipo, torch.sigmoid),
        biased_by="it fits preferences themselves, not the rewards behind them",
    )
    yield row("ipo", "length-normalised, by hand", _ipo_by_hand)


def _others() -> Iterator[Case]:
    yield from _at_the_reference("hinge", _hinge, 1.0, -_BETA)
    yield row("hinge", "margins below and beyond 1, by hand", _hinge_by_hand)
    yield row("simpo", "expected gradient", partial(_simpo, divided=True))
    yield row(
        "simpo",
        "expected gradient, log-probs summed",
        partial(_simpo, divided=False),
        biased_by="SimPO's log-prob is the mean over tokens: summed, long completions count more",
    )
    yield row("orpo", "expected gradient", _orpo)
    for estimate in (0.3, -0.4):
        words = "a divergence is not negative: taken as 0" if estimate < 0.0 else "a number, without gradient"
        yield row("kto", f"expected gradient, z = {estimate}: {words}", partial(_kto, estimate))
    yield row("kto", "at the reference, z = 0: half of each weight", _kto_at_reference)
    yield row("negative_log_likelihood", "completions of the reference", partial(_likelihood, acted="reference"))
    yield row(
        "negative_log_likelihood",
        "completions of the policy itself",
        partial(_likelihood, acted="policy"),
        biased_by="E[grad log pi] = 0: imitating itself, a policy stays where it is on average",
    )


class _Pairs:
    """All ordered pairs of a chosen and a rejected completion of one prompt, drawn from the reference."""

    def __init__(
        self, policy: PrefixTable, *, prefers: Callable[[Tensor], Tensor] = torch.sigmoid, noise: float = 0.0
    ) -> None:
        self.stage = token_stage(acted="reference")
        self.policy = policy
        group = self.stage.rows.trajectory.group
        assert group is not None
        self.chosen, self.rejected = (group.unsqueeze(-1) == group).nonzero().unbind(-1)
        given = self.stage.probability / self.stage.rows.luck
        drawn = self.stage.rows.luck[self.chosen] * given[self.chosen] * given[self.rejected]
        preferred = prefers(self.stage.total[self.chosen] - self.stage.total[self.rejected])
        self.preferred = (1.0 - noise) * preferred + noise * (1.0 - preferred)
        self.drawn = drawn
        self.probability = 2.0 * drawn * self.preferred

    @property
    def log_prob(self) -> Tensor:
        """[R, T] with gradient."""
        trajectory = self.stage.rows.trajectory
        return self.policy.log_prob(trajectory.observation, trajectory.action)

    @property
    def log_ratio(self) -> Tensor:
        """[R] with gradient."""
        stage = self.stage
        return sequence_log_ratio(self.log_prob, stage.reference_log_prob, stage.mask, length_normalised=False)

    def losses(self, loss: Loss) -> Tensor:
        """[K]."""
        log_ratio = self.log_ratio
        return loss(log_ratio[self.chosen], log_ratio[self.rejected])

    def gradients(self, losses: Tensor) -> Found:
        """The mean gradient, with nothing yet to hold it against."""
        return Found(
            problem=self.stage.name,
            target_name="",
            target=torch.zeros(0),
            moments=weighted_moments(self.probability, row_gradients(losses, [self.policy.theta])),
            trajectories=2.0,
            steps=2.0 * float(self.stage.probability @ self.stage.length.to(_DOUBLE)),
            batches=len(losses),
        )

    def held(self, losses: Tensor, target: Tensor, target_name: str) -> Found:
        """The mean gradient against an exact one."""
        return replace(self.gradients(losses), target=target.detach(), target_name=target_name)

    def apart(self, score: Tensor) -> Tensor:
        """[K, P] score of the chosen less that of the rejected."""
        return score[self.chosen] - score[self.rejected]

    def expected(self) -> Tensor:
        """sum over pairs (1, 2) drawn of beta (s(D) - p) (score_1 - score_2)."""
        stage, log_ratio = self.stage, self.log_ratio.detach()
        margin = _BETA * (log_ratio[self.chosen] - log_ratio[self.rejected])
        weight = self.drawn * _BETA * (torch.sigmoid(margin) - self.preferred)
        return weight @ self.apart(stage.score)


def _policy() -> PrefixTable:
    return token_stage(acted="reference").policy


def _at_the_reference(subject: str, loss: Loss, value: float, slope: float) -> Iterator[Case]:
    """Where pi = ref: a known value, and a gradient along score_w - score_l."""

    def pairs() -> tuple[_Pairs, Tensor]:
        stage = token_stage(acted="reference")
        built = _Pairs(stage.reference)
        return built, built.losses(loss)

    def worth() -> Found:
        built, losses = pairs()
        expected = torch.full_like(losses, value)
        return identity(losses, expected, problem=built.stage.name, target_name=f"{value:.4g} for every pair")

    def gradient() -> Found:
        built, losses = pairs()
        score = row_gradients(sequence_log_prob(built.log_prob, built.stage.mask), [built.policy.theta])
        target = slope * (built.probability @ built.apart(score))
        return built.held(losses, target, f"{slope:g} E[grad l_w - grad l_l]")

    yield row(subject, "value at the reference", worth)
    yield row(subject, "expected gradient at the reference", gradient)


def _gradient(loss: Loss, noise: float, assumed: float) -> Found:
    """With labels swapped at one rate, against the gradient of DPO with labels swapped at another."""
    built = _Pairs(_policy(), noise=noise)
    name = _CLEAN if assumed == 0.0 else f"{_CLEAN}, swapped at {assumed}"
    return built.held(built.losses(loss), _Pairs(_policy(), noise=assumed).expected(), name)


def _noisy(loss: Loss) -> Callable[[], Found]:
    return partial(_gradient, loss, _NOISE, 0.0)


def _after_a_step(built: _Pairs, loss: Loss, name: str) -> Found:
    """theta - E[gradient], against theta."""
    found = built.gradients(built.losses(loss))
    theta = built.policy.theta.detach().flatten()
    return replace(
        found, target=theta, target_name=name, moments=replace(found.moments, mean=theta - found.moments.mean)
    )


def _at_rest(loss: Loss, noise: float) -> Found:
    stage = token_stage(acted="reference")
    optimum = regularised_optimum(stage.problem, stage.reference, _BETA)
    return _after_a_step(_Pairs(optimum, noise=noise), loss, _AT_REST)


def _rest_of_ipo(prefers: Callable[[Tensor], Tensor]) -> Found:
    stage = token_stage(acted="reference")
    optimum = regularised_optimum(stage.problem, stage.reference, 2.0 * _BETA)
    built = _Pairs(optimum, prefers=prefers)
    return _after_a_step(built, _ipo, "theta of ref exp(r / (2 beta)) / Z after a step: where it was")


def _value_under_noise() -> Found:
    noisy, clean = _Pairs(_policy(), noise=_NOISE), _Pairs(_policy())
    losses = noisy.losses(_robust).detach().unsqueeze(-1)
    return Found(
        problem=noisy.stage.name,
        target_name="E[-log s(D)] under true labels",
        target=(clean.probability @ clean.losses(_dpo)).detach().reshape(1),
        moments=weighted_moments(noisy.probability, losses),
        batches=len(losses),
    )


def _ipo_by_hand() -> Found:
    """(3/2 - (-4)/4 - 1)^2 and (2/1 - 6/3 - 1)^2."""
    chosen, rejected = torch.tensor([3.0, 2.0], dtype=_DOUBLE), torch.tensor([-4.0, 6.0], dtype=_DOUBLE)
    found = ipo(
        chosen,
        rejected,
        beta=0.5,
        length_normalised=True,
        chosen_length=torch.tensor([2, 1]),
        rejected_length=torch.tensor([4, 3]),
    )
    expected = torch.tensor([2.25, 1.0], dtype=_DOUBLE)
    return identity(found, expected, problem="2 pairs", target_name="(d_w / n_w - d_l / n_l - 1 / (2 beta))^2")


def _hinge_by_hand() -> Found:
    """D = 0.5, 3, -1: losses 0.5, 0, 2; slopes -beta, 0, -beta."""
    chosen = torch.tensor([1.0, 5.0, 0.0], dtype=_DOUBLE, requires_grad=True)
    losses = hinge(chosen, torch.tensor([0.0, -1.0, 2.0], dtype=_DOUBLE), beta=0.5)
    (slope,) = torch.autograd.grad(losses.sum(), chosen)
    expected = torch.tensor([0.5, 0.0, 2.0, -0.5, 0.0, -0.5], dtype=_DOUBLE)
    return identity(torch.cat([losses, slope]), expected, problem="3 pairs", target_name="losses and slopes by hand")


def _simpo(*, divided: bool) -> Found:
    """-beta s(-m) (grad mean l_w - grad mean l_l), m = beta (mean l_w - mean l_l) - margin."""
    built, beta, margin = _Pairs(_policy()), 2.0, 0.6
    stage = built.stage
    log_prob = sequence_log_prob(built.log_prob, stage.mask, length_normalised=divided)
    losses = simpo(log_prob[built.chosen], log_prob[built.rejected], beta=beta, margin=margin)
    mean = sequence_log_prob(built.log_prob, stage.mask).detach() / stage.length
    gap = beta * (mean[built.chosen] - mean[built.rejected]) - margin
    weight = -beta * built.probability * torch.sigmoid(-gap)
    target = weight @ built.apart(stage.score / stage.length.unsqueeze(-1))
    return built.held(losses, target, "-beta E[s(-m)(grad l_w - grad l_l)], m = beta (l_w - l_l) - margin, l means")


def _orpo() -> Found:
    """-grad l_w - beta s(-o) (grad l_w / (1 - p_w) - grad l_l / (1 - p_l)), o = log odds_w - log odds_l."""
    built = _Pairs(_policy())
    stage = built.stage
    log_prob = sequence_log_prob(built.log_prob, stage.mask, length_normalised=True)
    losses = orpo(log_prob[built.chosen], log_prob[built.rejected], beta=_BETA)
    p = log_prob.detach().exp()
    odds = (p / (1.0 - p)).log()
    slope = stage.score / stage.length.unsqueeze(-1)
    pull = torch.sigmoid(odds[built.rejected] - odds[built.chosen])
    target = -built.probability @ slope[built.chosen]
    target = target - _BETA * (built.probability * pull) @ built.apart(slope / (1.0 - p).unsqueeze(-1))
    return built.held(losses, target, "-E[grad l_w] - beta E[s(-o) grad o], o the log odds ratio of mean log-probs")


def _kto(estimate: float) -> Found:
    """Slope -w_d beta s(g) s(-g) where desirable and +w_u beta s(g) s(-g) elsewhere, g = beta (d - max(z, 0))."""
    stage = token_stage(acted="reference")
    built = _Pairs(stage.policy)
    desirable = stage.total >= 0.5
    reference_kl = torch.tensor(estimate, dtype=_DOUBLE)
    losses = kto(built.log_ratio, desirable, reference_kl, beta=_BETA, desirable_weight=1.5, undesirable_weight=0.7)
    gain = _BETA * (built.log_ratio.detach() - max(estimate, 0.0))
    slope = _BETA * torch.sigmoid(gain) * torch.sigmoid(-gain) * (0.7 - 2.2 * desirable.to(_DOUBLE))
    target = (stage.probability * slope) @ stage.score
    return stage.ascent(losses, target, "E[-+ w beta s(g) s(-g) grad d], g = beta (d - max(z, 0))")


def _kto_at_reference() -> Found:
    stage = token_stage(acted="reference")
    built = _Pairs(stage.reference)
    desirable = stage.total >= 0.5
    losses = kto(
        built.log_ratio,
        desirable,
        torch.zeros((), dtype=_DOUBLE),
        beta=_BETA,
        desirable_weight=1.5,
        undesirable_weight=0.7,
    )
    expected = 0.35 + 0.4 * desirable.to(_DOUBLE)
    return identity(losses, expected, problem=stage.name, target_name="w / 2")


def _likelihood(acted: str) -> Found:
    stage: TokenStage = token_stage(acted=acted)
    losses = negative_log_likelihood(sequence_log_prob(stage.log_prob, stage.mask))
    target = stage.gradient_of(sequence_kl(stage.problem, stage.reference, stage.policy))
    return stage.ascent(losses, target, "grad KL(ref || pi)")
