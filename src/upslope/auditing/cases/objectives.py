"""Rows of objectives: their expected gradients where the policy itself acted, and where another one did."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from upslope.auditing.cases.case import Case
from upslope.auditing.cases.measurement import Found, identity, row
from upslope.auditing.cases.stage import GRAD_J, STATES_UNDISCOUNTED, Stage, stage
from upslope.auditing.cases.token_stage import TokenStage, token_stage
from upslope.estimators import (
    adapted_coefficient,
    cispo,
    clipped,
    clipped_ratio,
    clipped_value_error,
    discount_weight,
    importance_weighted,
    kl_penalised,
    lambda_return,
    reward_to_go,
    score_function,
    sequence_log_prob,
    sequence_log_ratio,
    squared_value_error,
)

_SURROGATE = "sum_s eta_b(s) sum_a grad pi(a|s) A_pi(s,a), b the policy that acted"
_BY_LENGTH = "E[R / length x grad log pi(completion)]"
_GRAD = "grad J"
_HOLDS_ON = "steps beyond the clip lose their gradient"
_BY_OTHER_STATES = "states, and what follows them, are those of the policy that acted"
_OFF_LENGTH = "each completion counts by 1 / its length"
_FAR = 1e9
_BETA = 0.7

_on = stage
_off = partial(stage, behaviour="stale")

Shape = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(log_prob, log-prob of the policy that acted, A) -> objective per step."""


def cases() -> Iterator[Case]:
    """All rows of objectives."""
    yield from _score_functions()
    yield from _importance_weighted()
    yield from _clipped()
    yield from _clipped_ratios()
    yield from _cispo()
    yield from _penalised()
    yield from _sequences()
    yield from _value_errors()
    yield row("adapted_coefficient", "far above, above, within, below and far below its target", _adapted)


def _score_functions() -> Iterator[Case]:
    def shape(log_prob: Tensor, behaviour: Tensor, psi: Tensor) -> Tensor:
        return score_function(log_prob, psi)

    yield _first_step("score_function", "Psi = A", shape)
    yield row("score_function", "Psi = reward to go, gamma^t kept", _reinforce)
    yield _held("score_function", "another policy acted", shape, reason="no ratio corrects for who acted")


def _importance_weighted() -> Iterator[Case]:
    capped = partial(importance_weighted, cap=1.1)
    yield _first_step("importance_weighted", "no cap", importance_weighted)
    yield _first_step("importance_weighted", "cap 1.1", capped)
    yield _held("importance_weighted", "another policy acted, no cap", importance_weighted)
    yield _held(
        "importance_weighted", "another policy acted, cap 1.1", capped, reason="truncated weights: a mean below 1"
    )
    yield _follows(
        "importance_weighted",
        "another policy acted, cap 1.1",
        capped,
        lambda ratio, advantage: ratio.clamp(max=1.1),
        "sum_s eta_b(s) sum_a b(a|s) min(cap, rho) A grad log pi(a|s)",
    )
    yield row(
        "importance_weighted",
        "another policy acted, per-step weights, held against the gradient of the policy's own states",
        lambda: _off().ascent(
            importance_weighted(_off().log_prob, _off().behaviour_log_prob, _advantage(_off())),
            _off().gradient("undiscounted_states"),
            STATES_UNDISCOUNTED,
        ),
        biased_by=_BY_OTHER_STATES,
    )
    for cap in (None, 1.5):
        yield row(
            "importance_weighted",
            f"another policy acted, one weight per episode, cap {cap}",
            lambda cap=cap: _whole_weights(cap),
            biased_by="" if cap is None else "truncated weights: a mean below 1",
        )


def _clipped() -> Iterator[Case]:
    for low, high in ((0.2, 0.2), (0.0, 0.0), (0.2, 0.28)):
        shape = partial(clipped, low=low, high=high)
        yield _first_step("clipped", f"clip {low:g} and {high:g}", shape)
    yield _first_step("clipped", "dual clip 3", partial(clipped, low=0.2, high=0.2, dual_clip=3.0))
    narrow = partial(clipped, low=0.05, high=0.2)
    yield _held("clipped", "another policy acted, clip 1 and 1e9", partial(clipped, low=1.0, high=_FAR))
    yield _held("clipped", "another policy acted, clip 0.05 and 0.2", narrow, reason=_HOLDS_ON)

    def kept(ratio: Tensor, advantage: Tensor) -> Tensor:
        over, under = (ratio > 1.2) & (advantage > 0), (ratio < 0.95) & (advantage < 0)
        return ratio.masked_fill(over | under, 0.0)

    followed = "the same without the steps that are beyond the clip and would go further"
    yield _follows("clipped", "another policy acted, clip 0.05 and 0.2", narrow, kept, followed)

    def kept_dual(ratio: Tensor, advantage: Tensor) -> Tensor:
        return kept(ratio, advantage).masked_fill((ratio > 1.2) & (advantage < 0), 0.0)

    dual = partial(clipped, low=0.05, high=0.2, dual_clip=1.2)
    yield _follows("clipped", "dual clip 1.2", dual, kept_dual, f"{followed}, and A < 0 at rho > 1.2")


def _clipped_ratios() -> Iterator[Case]:
    def shape(low: float, high: float) -> Shape:
        return lambda log_prob, behaviour, psi: clipped_ratio(
            (log_prob - behaviour.detach()).exp(), psi, low=low, high=high
        )

    yield _first_step("clipped_ratio", "per step", shape(0.2, 0.2))
    yield _held("clipped_ratio", "per step, another policy acted, clip 1 and 1e9", shape(1.0, _FAR))
    yield _held(
        "clipped_ratio", "per step, another policy acted, clip 0.05 and 0.2", shape(0.05, 0.2), reason=_HOLDS_ON
    )
    yield row(
        "clipped_ratio",
        "ratio of sequences by the mean over tokens (GSPO) at 1",
        lambda: _gspo(_by_length(token_stage()), _BY_LENGTH),
    )
    yield row(
        "clipped_ratio",
        "ratio of sequences by the mean over tokens (GSPO) at 1, held against the gradient over the mean length",
        lambda: _gspo(token_stage().gradient / _mean_length(token_stage()), f"{_GRAD} / mean length"),
        biased_by=_OFF_LENGTH,
    )


def _cispo() -> Iterator[Case]:
    yield _first_step("cispo", "cap 1.2, no floor", partial(cispo, high=0.2))
    yield _first_step("cispo", "cap 1, floor 1", partial(cispo, low=0.0, high=0.0))
    yield _held("cispo", "another policy acted, no floor, cap 1e9", partial(cispo, high=_FAR))
    for low in (None, 0.1):
        narrow = partial(cispo, low=low, high=0.15)
        floor = 0.0 if low is None else 1.0 - low
        words = f"another policy acted, floor {floor:g}, cap 1.15"
        yield _held("cispo", words, narrow, reason="clipped weights: every step keeps a gradient, of another length")
        yield _follows(
            "cispo",
            words,
            narrow,
            lambda ratio, advantage, floor=floor: ratio.clamp(floor, 1.15),
            "sum_s eta_b(s) sum_a b(a|s) clip(rho) A grad log pi(a|s)",
        )


def _penalised() -> Iterator[Case]:
    for built, words in (
        (_on, "the policy acted: the penalty has no slope"),
        (_off, "another policy acted, no penalty"),
    ):
        beta = _BETA if built is _on else 0.0
        yield row(
            "kl_penalised",
            words,
            lambda built=built, beta=beta: built().ascent(
                _penalty(built(), beta), built().off_policy_gradient, _SURROGATE
            ),
        )
    yield row(
        "kl_penalised",
        f"another policy acted, beta {_BETA}",
        lambda: _off().ascent(
            _penalty(_off(), _BETA),
            _off().off_policy_gradient - _BETA * _kl_gradient(_off()),
            f"{_SURROGATE}, less beta sum_s eta_b(s) grad KL(b || pi)",
        ),
    )
    yield row(
        "kl_penalised",
        f"another policy acted, beta {_BETA}, held against the surrogate alone",
        lambda: _off().ascent(_penalty(_off(), _BETA), _off().off_policy_gradient, _SURROGATE),
        biased_by="the penalty pulls back towards the policy that acted",
    )


def _sequences() -> Iterator[Case]:
    other = partial(token_stage, acted="reference")

    def weighted(on: TokenStage, normalised: bool) -> Tensor:
        log_ratio = sequence_log_ratio(on.log_prob, on.reference_log_prob, on.mask, length_normalised=normalised)
        return log_ratio.exp() * on.total

    yield row(
        "sequence_log_ratio",
        "sum over tokens, another policy acted",
        lambda: other().ascent(weighted(other(), False), other().gradient, _GRAD),
    )
    yield row(
        "sequence_log_ratio",
        "mean over tokens, another policy acted",
        lambda: other().ascent(weighted(other(), True), other().gradient, _GRAD),
        biased_by="the length-th root of a sequence's ratio corrects for little of who acted",
    )
    yield row("sequence_log_ratio", "of itself, mean over tokens: the score over the length", _ratio_at_one)
    for normalised, words in ((False, "sum"), (True, "mean")):
        yield row(
            "sequence_log_prob",
            f"{words} over tokens, times the total reward",
            lambda normalised=normalised: token_stage().ascent(
                _log_prob_times_total(token_stage(), normalised), token_stage().gradient, _GRAD
            ),
            biased_by=_OFF_LENGTH if normalised else "",
        )
    yield row(
        "sequence_log_prob",
        "mean over tokens, held against what it does follow",
        lambda: token_stage().ascent(_log_prob_times_total(token_stage(), True), _by_length(token_stage()), _BY_LENGTH),
    )


def _value_errors() -> Iterator[Case]:
    built = partial(stage, critic="perturbed")
    name = "eta_1(s) (v(s) - V(s)) of every state"

    def found(decay: float, error: Callable[[Tensor, Tensor], Tensor]) -> Found:
        on = built()
        target = lambda_return(on.reward, on.discount, on.next_value, on.cut, trace_decay=decay, mask=on.mask)
        assert isinstance(on.trajectory.observation, Tensor)
        value = on.setting.policy.value
        truth = on.solution.undiscounted_visits * (on.solution.value - value)
        return on.ascent(-error(value[on.trajectory.observation], target), truth, name, parameters=[value])

    yield row("squared_value_error", "target: the return", lambda: found(1.0, squared_value_error))
    for decay in (0.0, 0.5):
        yield row(
            "squared_value_error",
            f"target: the lambda-return, lambda = {decay:g}",
            lambda decay=decay: found(decay, squared_value_error),
            biased_by="a semi-gradient: the target leans on the critic it corrects",
        )
    for pessimistic in (True, False):
        words = "the larger error" if pessimistic else "the clipped error alone"

        def error(value: Tensor, target: Tensor, away: float, pessimistic: bool = pessimistic) -> Tensor:
            before = value.detach() + away * torch.cos(torch.arange(value.shape[-1]))
            return clipped_value_error(value, target, before, clip=0.2, pessimistic=pessimistic)

        for away, where, reason in (
            (0.0, "at the values of collection", ""),
            (0.19, "values moved by less than the clip", ""),
            (0.5, "values moved by more than the clip", "where the clip holds there is no gradient"),
        ):
            yield row(
                "clipped_value_error",
                f"{words}; {where}",
                lambda error=error, away=away: found(1.0, partial(error, away=away)),
                biased_by=reason,
            )
        yield row("clipped_value_error", f"{words}; by hand", partial(_clipped_value_by_hand, pessimistic))


def _first_step(subject: str, setting: str, shape: Shape) -> Case:
    """At ratio 1: the policy gradient. What is a number to the objective comes with a gradient that must not count."""

    def measure() -> Found:
        on = _on()
        leak = on.log_prob - on.log_prob.detach()
        objective = shape(on.log_prob, on.log_prob, _advantage(on) + 3.0 * leak)
        return on.ascent(objective, on.gradient("undiscounted_states"), STATES_UNDISCOUNTED)

    return row(subject, f"the policy acted, {setting}", measure)


def _held(subject: str, setting: str, shape: Shape, *, reason: str = "") -> Case:
    """Where another policy acted: held against the gradient of the surrogate without clip."""
    return row(
        subject,
        setting,
        lambda: _off().ascent(
            shape(_off().log_prob, _off().behaviour_log_prob, _advantage(_off())),
            _off().off_policy_gradient,
            _SURROGATE,
        ),
        biased_by=reason,
    )


def _follows(
    subject: str, setting: str, shape: Shape, weight: Callable[[Tensor, Tensor], Tensor], followed: str
) -> Case:
    """Held against sum_s eta_b(s) sum_a b(a|s) w(rho, A) A grad log pi(a|s), from the tables."""

    def measure() -> Found:
        on = _off()
        visits, acted = on.acted
        log_policy = on.setting.policy.preferences().log_softmax(-1)
        advantage = on.solution.advantage
        share = visits.unsqueeze(-1) * acted * weight(log_policy.exp() / acted, advantage).detach()
        (truth,) = torch.autograd.grad((share * advantage * log_policy).sum(), on.setting.parameters)
        objective = shape(on.log_prob, on.behaviour_log_prob, _advantage(on))
        return on.ascent(objective, truth.flatten(), followed)

    return row(subject, f"{setting}, held against what it does follow", measure)


def _advantage(on: Stage) -> Tensor:
    """The exact A of each step."""
    return on.solution.advantage[on.rows.state, on.trajectory.action]


def _kl(on: Stage) -> Tensor:
    """KL(b || pi) of every state, [S]."""
    _, acted = on.acted
    return (acted * (acted.log() - on.setting.policy.preferences().log_softmax(-1))).sum(-1)


def _kl_gradient(on: Stage) -> Tensor:
    visits, _ = on.acted
    return torch.autograd.grad(visits @ _kl(on), on.setting.parameters)[0].flatten()


def _penalty(on: Stage, beta: float) -> Tensor:
    return kl_penalised(on.log_prob, on.behaviour_log_prob, _advantage(on), _kl(on)[on.rows.state], coefficient=beta)


def _reinforce() -> Found:
    on = _on()
    psi = reward_to_go(on.reward, on.discount, on.cut, mask=on.mask)
    weight = discount_weight(on.trajectory.time, on.gamma, dtype=torch.float64)
    return on.ascent(score_function(on.log_prob, psi), on.gradient(), GRAD_J, weight=weight)


def _whole_weights(cap: float | None) -> Found:
    on = _off()
    log_prob, behaviour = (sequence_log_prob(part, on.mask) for part in (on.log_prob, on.behaviour_log_prob))
    worth = (discount_weight(on.trajectory.time, on.gamma, dtype=torch.float64) * on.reward * on.mask).sum(-1)
    return on.ascent_of_rows(importance_weighted(log_prob, behaviour, worth, cap=cap), on.gradient(), GRAD_J)


def _mean_length(on: TokenStage) -> float:
    return float(on.probability @ on.length.to(torch.float64))


def _by_length(on: TokenStage) -> Tensor:
    return (on.probability * on.total / on.length) @ on.score


def _gspo(target: Tensor, name: str) -> Found:
    on = token_stage()
    ratio = sequence_log_ratio(on.log_prob, on.log_prob, on.mask).exp()
    return on.ascent(clipped_ratio(ratio, on.total, low=3e-4, high=4e-4), target, name)


def _ratio_at_one() -> Found:
    on = token_stage()
    ratio = sequence_log_ratio(on.log_prob, on.log_prob, on.mask)
    return on.ascent(ratio * on.total, _by_length(on), _BY_LENGTH)


def _log_prob_times_total(on: TokenStage, normalised: bool) -> Tensor:
    return sequence_log_prob(on.log_prob, on.mask, length_normalised=normalised) * on.total


def _clipped_value_by_hand(pessimistic: bool) -> Found:
    """V = 1, 2, 2, 2; clipped at b = 1 +- 0.5 it is 1, 1.5, 1.5, 1.5; targets 0, 0, 4, 1.4."""
    value, before = torch.tensor([1.0, 2.0, 2.0, 2.0], dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    target = torch.tensor([0.0, 0.0, 4.0, 1.4], dtype=torch.float64)
    found = clipped_value_error(value, target, before, clip=0.5, pessimistic=pessimistic)
    by_hand = [0.5, 2.0, 3.125, 0.18] if pessimistic else [0.5, 1.125, 3.125, 0.005]
    expected = torch.tensor(by_hand, dtype=torch.float64)
    return identity(found, expected, problem="4 values", target_name="worked out by hand")


def _adapted() -> Found:
    found = [adapted_coefficient(0.5, kl, target=0.01) for kl in (0.1, 0.0151, 0.0149, 0.0067, 0.0066, 0.0)]
    expected = torch.tensor([1.0, 1.0, 0.5, 0.5, 0.25, 0.25], dtype=torch.float64)
    return identity(
        torch.tensor(found, dtype=torch.float64),
        expected,
        problem="6 divergences",
        target_name="beta doubled above 1.5 x target, halved below target / 1.5",
    )
