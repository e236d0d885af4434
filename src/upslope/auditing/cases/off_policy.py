"""Rows of V-trace: values and advantages from steps that another policy chose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from upslope.auditing.cases.case import Case
from upslope.auditing.cases.measurement import Found, identity, row
from upslope.auditing.cases.stage import STATES_UNDISCOUNTED, Stage, by_loop, stage
from upslope.auditing.setting import Critic
from upslope.estimators import VTrace, lambda_return, score_function, vtrace
from upslope.exact import TabularPolicy, solve

_CRITICS: tuple[Critic, ...] = ("exact", "perturbed")
_V = "v(s) of every state"
_FAR = float("inf")


def cases() -> Iterator[Case]:
    """All rows of V-trace."""
    yield from _targets()
    yield from _advantages()


def _targets() -> Iterator[Case]:
    """v_t, held against v of the policy differentiated, and against what it follows where rho is truncated."""
    slow = "truncated traces lean on the critic, which is wrong"
    choices: tuple[tuple[str, Critic, float, float, str], ...] = (
        ("whole weights, perturbed critic", "perturbed", _FAR, _FAR, ""),
        ("traces truncated at 0.5, exact critic", "exact", _FAR, 0.5, ""),
        ("traces truncated at 0.5, perturbed critic", "perturbed", _FAR, 0.5, slow),
        ("rho truncated at 1, exact critic", "exact", 1.0, 1.0, "its fixed point is v of a policy in between"),
    )
    for setting, critic, rho_clip, trace_clip, reason in choices:
        yield row(
            "vtrace",
            f"target as v_pi; another policy acted, {setting}",
            partial(_value, partial(_stale, critic), rho_clip, trace_clip),
            biased_by=reason,
        )
    yield row("vtrace", "target where rho is truncated at 1, held against what it does follow", _fixed_point)
    yield row("vtrace", "on-policy: the lambda-return", _on_policy)
    parts = partial(stage, unit="fragments", behaviour="stale", limit=2)
    yield row(
        "vtrace",
        "target as v_pi; fragments in which time limits fall, whole weights, exact critic",
        partial(_value, parts, _FAR, _FAR),
    )
    yield row("vtrace", "target; fragments in which time limits fall, perturbed critic: the loop", _vtrace_by_loop)
    yield row("vtrace", "target as v_pi; steps that nobody chose in between, perturbed critic", _value_between)


def _advantages() -> Iterator[Case]:
    """rho_t (r_t + g_t v_{t+1} - V_t), held against gradients, and rho_t."""
    yield row(
        "VTrace",
        "advantage; fragments in which time limits fall, perturbed critic: the loop",
        partial(_vtrace_by_loop, advantage=True),
    )
    for critic in _CRITICS:
        yield row(
            "VTrace",
            f"advantage as Psi; another policy acted, whole weights, {critic} critic",
            partial(_followed, critic, _FAR),
        )
    yield row("VTrace", "rho, truncated at 1.1", _ratios)
    yield row(
        "VTrace",
        "advantage as Psi, rho truncated at 1, exact critic",
        partial(_followed, "exact", 1.0),
        biased_by="truncated weights leave part of the other policy's preferences in",
    )
    yield row(
        "VTrace",
        "advantage as Psi, whole weights, held against the gradient of the policy's own states",
        _own_states,
        biased_by="states are visited as often as the policy that acted visits them",
    )


def _stale(critic: Critic) -> Stage:
    return stage(behaviour="stale", critic=critic)


def _value(built: Callable[[], Stage], rho_clip: float, trace_clip: float) -> Found:
    on = built()
    return on.estimate_of_state(_vtrace(on, rho_clip, trace_clip).value_target, on.solution.value, _V)


def _value_between() -> Found:
    """Of every second step: nobody chose the others."""
    on = _stale("perturbed")
    reward, discount, value, next_value, cut, mask = on.spaced
    log_prob, behaviour = (part.repeat_interleave(2, -1) for part in (on.log_prob, on.behaviour_log_prob))
    target = vtrace(
        log_prob, behaviour, reward, discount, value, next_value, cut, rho_clip=_FAR, trace_clip=_FAR, mask=mask
    ).value_target
    return on.estimate_of_state(target[:, ::2], on.solution.value, _V)


def _followed(critic: Critic, clip: float) -> Found:
    """The advantage as Psi, both weights truncated at `clip`, held against what whole weights follow."""
    on = _stale(critic)
    score = score_function(on.log_prob, _vtrace(on, clip, clip).advantage)
    return on.ascent(
        score, on.off_policy_gradient, "sum_s eta_b(s) sum_a grad pi(a|s) q_pi(s,a), b the policy that acted"
    )


def _own_states() -> Found:
    on = _stale("exact")
    score = score_function(on.log_prob, _vtrace(on, _FAR, _FAR).advantage)
    return on.ascent(score, on.gradient("undiscounted_states"), STATES_UNDISCOUNTED)


def _ratios() -> Found:
    on = _stale("exact")
    policy, acted = (who.preferences().softmax(-1) for who in (on.setting.policy, on.setting.behaviour))
    truth = (policy / acted).clamp(max=1.1)
    return on.estimate(_vtrace(on, 1.1, 0.5).rho, truth, "min(1.1, pi(a|s) / b(a|s))")


def _vtrace_by_loop(*, advantage: bool = False) -> Found:
    """v_t = V_t + rho_t delta_t + g_t k_t (v_{t+1} - V_{t+1}), and rho_t (r_t + g_t v_{t+1} - V_t), V'_t where cut."""
    on = stage(unit="fragments", critic="perturbed", behaviour="stale", limit=2)
    made = _vtrace(on, 1.1, 0.9, decay=0.7)
    ratio = (on.log_prob.detach() - on.behaviour_log_prob).exp()
    rho, trace = ratio.clamp(max=1.1), 0.7 * ratio.clamp(max=0.9)
    residual = on.reward + on.discount * on.next_value - on.value
    target = on.value + by_loop(rho * residual, on.discount * trace * ~on.cut)
    if not advantage:
        return identity(made.value_target, target, problem=on.name, target_name="v_t of every step")
    following = torch.where(on.cut, on.next_value, target.roll(-1, -1))
    expected = rho * (on.reward + on.discount * following - on.value)
    return identity(made.advantage, expected, problem=on.name, target_name="rho (r + g v' - V) of every step")


def _vtrace(on: Stage, rho_clip: float, trace_clip: float, *, decay: float = 1.0) -> VTrace:
    return vtrace(
        on.log_prob,
        on.behaviour_log_prob,
        on.reward,
        on.discount,
        on.value,
        on.next_value,
        on.cut,
        trace_decay=decay,
        rho_clip=rho_clip,
        trace_clip=trace_clip,
        mask=on.mask_if_needed,
    )


def _fixed_point() -> Found:
    """With V = v of pi_rho ~ min(rho_bar b, pi) the mean target is V (Espeholt et al. 2018, appendix A)."""
    on = _stale("exact")
    with torch.no_grad():
        acted, ours = (who.preferences().softmax(-1) for who in (on.setting.behaviour, on.setting.policy))
        between = TabularPolicy(*ours.shape, preferences=torch.minimum(acted, ours).log())
        value = solve(on.setting.mdp, between).value
    known = on.with_critic(value)
    target = _vtrace(known, 1.0, 0.7).value_target
    return known.estimate_of_state(target, value, "v(s) of the policy proportional to min(b(a|s), pi(a|s))")


def _on_policy() -> Found:
    on = stage(unit="fragments", critic="perturbed")
    expected = lambda_return(on.reward, on.discount, on.next_value, on.cut, trace_decay=0.7, mask=on.mask_if_needed)
    found = _vtrace(on, 1.0, 1.0, decay=0.7).value_target
    return identity(found, expected, problem=on.name, target_name="lambda-return, lambda = 0.7, of every step")
