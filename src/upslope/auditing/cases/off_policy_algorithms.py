"""Rows of what learns from the data of other policies: importance weights, and the algorithms that take them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from upslope.algorithms import PPO, Algorithm, ImportanceSampled, Now, StaleData, VTraceActorCritic
from upslope.auditing.audit import audit
from upslope.auditing.cases.case import Case
from upslope.auditing.cases.measurement import Found, identity, row, row_gradients
from upslope.auditing.cases.stage import GRAD_J, Stage, by_loop, stage
from upslope.auditing.declared import Circumstances, Claim, put_to_the_test
from upslope.auditing.measuring import report
from upslope.auditing.moments import Moments
from upslope.auditing.report import AuditReport
from upslope.auditing.setting import FiniteSetting
from upslope.auditing.source import AlgorithmSource
from upslope.estimators import (
    discount_weight,
    effective_sample_size,
    per_decision_log_weight,
    reward_to_go,
    score_function,
    self_normalised_weight,
    sequence_log_ratio,
)
from upslope.exact import problem

_GAMMA, _LIMIT, _ROW_STEPS = 0.8, 2, 2
_FEW = 6_000
_WHOLE = 1e9
_CAPPED = "capped weights have a mean below 1"
_NORMALISED = "divided by the mean of a batch: a ratio of two means"
_FOLLOWED = "sum_s eta_b(s) sum_a grad pi(a|s) A_pi(s,a) / mean length, b the policy that acted"
_PLAIN = PPO(gamma=_GAMMA, normalize_advantage=False, epochs=1, minibatches=1, gae_lambda=0.0, clip=0.2)


def cases() -> Iterator[Case]:
    """All rows."""
    yield from _weights()
    yield from _normalised()
    yield row("effective_sample_size", "worked out by hand, one share per column", _effective)
    yield from _importance_sampled()
    yield from _on_tokens()
    yield from _vtrace()
    yield from _stale_ppo()


def _weights() -> Iterator[Case]:
    yield row("per_decision_log_weight", "rewards of another policy's episodes, at each step", _rewards)
    for cap, reason in ((None, ""), (1.1, _CAPPED)):
        yield row(
            "per_decision_log_weight",
            f"Psi = weighted reward to go, gamma^t kept; another policy acted, cap {cap}",
            partial(_per_decision, cap),
            biased_by=reason,
        )
    yield row("per_decision_log_weight", "steps that nobody chose in between: the loop", _spaced)


def _rewards() -> Found:
    """E_b[w_t r_t] is E_pi[r_t], step by step."""
    off, own = stage(behaviour="stale"), stage()
    weight = per_decision_log_weight(off.log_prob, off.behaviour_log_prob, off.mask).exp()
    estimate = torch.where(off.mask, weight * off.reward, 0.0)
    mean = off.probability @ estimate
    variance = float(off.probability @ (estimate - mean).square().sum(-1))
    return Found(
        problem=off.name,
        target_name="E[r_t] of the policy itself, at each step",
        target=own.probability @ torch.where(own.mask, own.reward, 0.0),
        moments=Moments(mean=mean, variance=variance),
        batches=len(off.rows),
    )


def _per_decision(cap: float | None) -> Found:
    on = stage(behaviour="stale")
    log_weight = per_decision_log_weight(on.log_prob, on.behaviour_log_prob, on.mask)
    weight = log_weight.clamp(max=math.inf if cap is None else math.log(cap)).exp()
    psi = reward_to_go(on.reward * weight, on.discount, on.cut, mask=on.mask)
    return on.ascent(score_function(on.log_prob, psi), on.gradient(), GRAD_J, weight=_discounts(on))


def _spaced() -> Found:
    on = stage(behaviour="stale")
    mask = on.spaced.mask
    log_prob, behaviour = (part.detach().repeat_interleave(2, -1) for part in (on.log_prob, on.behaviour_log_prob))
    ratio = torch.where(mask, log_prob - behaviour, 0.0)
    expected = by_loop(ratio.flip(-1), torch.ones_like(ratio)).flip(-1)
    found = per_decision_log_weight(torch.where(mask, log_prob, 99.0), behaviour, mask)
    return identity(found, expected, problem=on.name, target_name="sum over chosen k <= t of l_k - b_k")


def _normalised() -> Iterator[Case]:
    yield row("self_normalised_weight", "held against w / mean of w", _against_division)
    for behaviour, reason in (("on_policy", ""), ("stale", _NORMALISED)):
        on = partial(stage, behaviour=behaviour)
        acted = "the policy acted" if behaviour == "on_policy" else "another policy acted"
        yield row(
            "self_normalised_weight",
            f"of whole episodes, two in a batch, gamma^t kept; {acted}",
            lambda on=on: _pairs(on()),
            biased_by=reason,
        )


def _against_division() -> Found:
    on = stage(behaviour="stale")
    log_weight = per_decision_log_weight(on.log_prob, on.behaviour_log_prob, on.mask)
    expected = log_weight.exp() / log_weight.exp().mean(0)
    return identity(
        self_normalised_weight(log_weight), expected, problem=on.name, target_name="w / mean of w over the rows"
    )


def _pairs(on: Stage) -> Found:
    """Every batch of two episodes, each with its probability."""
    log_weight = sequence_log_ratio(on.log_prob, on.behaviour_log_prob, on.mask, length_normalised=False).detach()
    psi = reward_to_go(on.reward, on.discount, on.cut, mask=on.mask) * _discounts(on)
    ascent = row_gradients(torch.where(on.mask, on.log_prob * psi, 0.0).sum(-1), on.setting.parameters)
    rows = len(log_weight)
    both = torch.stack([log_weight.unsqueeze(-1).expand(rows, rows), log_weight.expand(rows, rows)])
    weight = self_normalised_weight(both)
    estimate = 0.5 * (weight[0].unsqueeze(-1) * ascent.unsqueeze(1) + weight[1].unsqueeze(-1) * ascent).flatten(0, 1)
    probability = (on.probability.unsqueeze(-1) * on.probability).flatten()
    mean = probability @ estimate
    return Found(
        problem=on.name,
        target_name=GRAD_J,
        target=on.gradient().detach(),
        moments=Moments(mean=mean, variance=float(probability @ (estimate - mean).square().sum(-1))),
        trajectories=2.0,
        steps=2.0 * on.setting.steps_per_row,
        batches=rows * rows,
    )


def _discounts(on: Stage) -> Tensor:
    return discount_weight(on.trajectory.time, on.gamma, dtype=torch.float64)


def _effective() -> Found:
    """Weights 3 and 1: 16 / (2 x 10); 1 and 1: all; e^1000 and 1: one of two."""
    log_weight = torch.tensor([[math.log(3.0), 0.0, 1000.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor([0.8, 1.0, 0.5], dtype=torch.float64)
    return identity(
        effective_sample_size(log_weight), expected, problem="3 pairs of weights", target_name="worked out by hand"
    )


def _importance_sampled() -> Iterator[Case]:
    stale = Circumstances(critic="perturbed", behaviour="stale")
    for words, algorithm in _variants():
        for circumstances in put_to_the_test(algorithm.target, limit=_LIMIT):
            yield _case(words, algorithm, circumstances)
        yield _case(words, algorithm, stale)
    limited = replace(stale, critic="exact", limit=_LIMIT)
    yield _case("per_decision, critic as baseline", ImportanceSampled(gamma=_GAMMA, baseline="critic"), limited)
    capped = ImportanceSampled(gamma=_GAMMA, cap=1.1)
    yield _case("per_decision, cap 1.1", capped, Circumstances())
    yield _case("per_decision, cap 1.1", capped, stale)
    yield _case("trajectory, cap 1.1", replace(capped, weights="trajectory"), stale)
    yield _case("per_decision, sampled", ImportanceSampled(gamma=_GAMMA), stale, samples=20_000)
    yield _case("per_decision, entropy bonus", ImportanceSampled(gamma=_GAMMA, entropy_coefficient=0.1), stale)


def _variants() -> Iterator[tuple[str, ImportanceSampled]]:
    """Full weights: unbiased whoever acted."""
    plain = ImportanceSampled(gamma=_GAMMA)
    yield "per_decision", plain
    yield "per_decision, gamma^t kept", replace(plain, discounted_states=True)
    yield "per_decision, critic as baseline", replace(plain, baseline="critic")
    yield "trajectory", replace(plain, weights="trajectory")
    yield "trajectory, critic as baseline", replace(plain, weights="trajectory", baseline="critic")


def _on_tokens() -> Iterator[Case]:
    """Completions; two prompts in a batch where weights are divided by their mean over it."""
    stale = Circumstances(behaviour="stale")
    plain = ImportanceSampled(gamma=1.0)
    for words, algorithm, groups in (
        ("per_decision", plain, 1),
        ("trajectory", replace(plain, weights="trajectory"), 1),
        ("trajectory, cap 1.1", replace(plain, weights="trajectory", cap=1.1), 1),
        ("per_decision, self-normalised, 2 completions", replace(plain, self_normalised=True), 2),
        (
            "trajectory, self-normalised, 2 completions",
            replace(plain, weights="trajectory", self_normalised=True),
            2,
        ),
    ):
        for circumstances in (Circumstances(), stale):
            yield _case(words, algorithm, circumstances, name="tokens", groups=groups, size=1)


def _vtrace() -> Iterator[Case]:
    plain = VTraceActorCritic(gamma=_GAMMA)
    for gae_lambda in (0.5, 1.0):
        algorithm = replace(plain, gae_lambda=gae_lambda)
        for circumstances in put_to_the_test(algorithm.target, limit=_LIMIT):
            yield _case(f"lambda {gae_lambda:g}", algorithm, circumstances)
    yield _case("lambda 1, sampled", plain, Circumstances(), samples=20_000)
    yield _case("standardised advantage", replace(plain, normalize_advantage=True), Circumstances(), samples=_FEW)
    yield _case("entropy bonus", replace(plain, entropy_coefficient=0.1), Circumstances())
    slow = replace(plain, rho_bar=_WHOLE, c_bar=0.5)
    yield _followed("whole weights", replace(plain, rho_bar=_WHOLE, c_bar=_WHOLE))
    yield _followed("rho whole, traces truncated at 0.5", slow)
    yield _followed("rho whole, lambda 0.5", replace(slow, gae_lambda=0.5))
    yield _followed("rho truncated at 1", plain, "truncated weights leave part of the other policy's preferences in")


def _stale_ppo() -> Iterator[Case]:
    decoupled = replace(_PLAIN, stale=StaleData(anchor="proximal", importance_cap=_WHOLE, advantage="vtrace"))
    yield _case("decoupled, V-trace", decoupled, Circumstances())
    yield _case("decoupled, V-trace, lambda 1", replace(decoupled, gae_lambda=1.0), Circumstances())
    yield _followed("decoupled, V-trace, lambda 0", decoupled, "what follows a step is weighted with truncation at 1")
    yield row("PPO", "advantages of V-trace; fragments of another policy: the loop", _vtrace_by_loop)
    one_step = replace(decoupled, stale=replace(decoupled.stale, advantage="gae"))
    yield _followed("decoupled, TD residual", one_step)
    capped = replace(one_step, stale=replace(one_step.stale, importance_cap=1.05))
    yield _followed("decoupled, TD residual, weights capped at 1.05", capped, _CAPPED)
    unweighted = replace(one_step, stale=replace(one_step.stale, importance_cap=None))
    yield _followed("clipped around the learner, no weights", unweighted, "no weight corrects for who acted")
    yield _followed("clipped at 0.9 around who acted", replace(_PLAIN, clip=0.9))
    yield _followed("clipped at 0.05 around who acted", replace(_PLAIN, clip=0.05), "the clip is felt at once")
    traced = replace(one_step, gae_lambda=1.0)
    yield _followed("decoupled, GAE, lambda 1", traced, "what follows a step is who acted's doing")


def _vtrace_by_loop() -> Found:
    """r_t + g_t v_{t+1} - V_t, where v_t = V_t + rho_t delta_t + g_t k_t (v_{t+1} - V_{t+1}), both truncated at 1."""
    on = stage(unit="fragments", critic="perturbed", behaviour="stale", limit=2)
    stale = StaleData(anchor="proximal", advantage="vtrace")
    trajectory = replace(on.trajectory, proximal_log_prob=on.log_prob.detach())
    algorithm = replace(_PLAIN, gamma=on.gamma, gae_lambda=0.7, stale=stale)
    found = algorithm.advantage(trajectory, on.value, on.next_value, Now()).advantage
    ratio = (on.log_prob.detach() - on.behaviour_log_prob).exp().clamp(max=1.0)
    residual = on.reward + on.discount * on.next_value - on.value
    target = on.value + by_loop(ratio * residual, on.discount * 0.7 * ratio * ~on.cut)
    following = torch.where(on.cut, on.next_value, target.roll(-1, -1))
    expected = on.reward + on.discount * following - on.value
    return identity(found, expected, problem=on.name, target_name="r + g v' - V of every step")


def _followed(words: str, algorithm: Algorithm, reason: str = "") -> Case:
    """Fragments of another policy, exact critic: held against what the algorithm follows there."""

    def run() -> AuditReport:
        on = stage(behaviour="stale")
        setting = FiniteSetting.build(
            problem("six-state"), gamma=_GAMMA, unit="fragments", behaviour="stale", row_steps=_ROW_STEPS
        )
        claim = Claim(
            target=on.off_policy_gradient.detach() / setting.mean_length,
            target_name=_FOLLOWED,
            declared="biased" if reason else "unbiased",
            reason=reason,
        )
        return report(setting, AlgorithmSource(algorithm), claim, subject=type(algorithm).__name__)

    return Case(
        subject=type(algorithm).__name__, setting=f"{words}; another policy acted, held against what follows", run=run
    )


def _case(
    words: str,
    algorithm: Algorithm,
    circumstances: Circumstances,
    *,
    samples: int | None = None,
    name: str = "six-state",
    groups: int = 1,
    size: int | None = None,
) -> Case:
    run = partial(
        audit,
        algorithm,
        name,
        circumstances=circumstances,
        samples=samples,
        row_steps=_ROW_STEPS,
        groups=groups,
        size=size,
    )
    place = "" if name == "six-state" else f", {name}"
    return Case(subject=type(algorithm).__name__, setting=f"{words}{place}; {circumstances}", run=run)
