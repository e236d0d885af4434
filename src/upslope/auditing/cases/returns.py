"""Rows of returns: as estimates of q, A or v state by state, and as Psi of the policy gradient."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from upslope.auditing.cases.case import Case
from upslope.auditing.cases.stage import GRAD_J, STATES_UNDISCOUNTED, Found, Stage, by_loop, identity, row, stage
from upslope.auditing.setting import Critic, Unit
from upslope.estimators import (
    VTrace,
    backward_recurrence,
    differential_return,
    differential_td_residual,
    discount_weight,
    lambda_return,
    n_step_return,
    reward_to_go,
    score_function,
    td_residual,
    total_reward,
    vtrace,
)
from upslope.exact import TabularPolicy, solve

_CRITICS: tuple[Critic, ...] = ("exact", "perturbed")
_UNITS: tuple[Unit, ...] = ("episodes", "fragments")
_WRONG_CRITIC = "the critic is wrong, and Psi leans on it"
_Q, _A, _V = "q(s,a) of every state and action", "A(s,a) of every state and action", "v(s) of every state"
_Q_TILDE, _A_TILDE = "differential q~(s,a)", "differential q~(s,a) - v~(s)"
_EXACT_STEPS = 5
"""No episode of the six-state problem is longer."""


def cases() -> Iterator[Case]:
    """All rows of returns, and of the recurrence under them."""
    yield from _rewards_to_go()
    yield from _total_rewards()
    yield from _n_step_returns()
    yield from _lambda_returns()
    yield from _residuals()
    yield from _differential()
    yield from _discount_weights()
    yield from _vtraces()
    yield from _recurrences()
    yield from _unchosen_steps()


def _rewards_to_go() -> Iterator[Case]:
    yield row("reward_to_go", "as q; whole episodes", lambda: _as_q(stage(), _to_go(stage())))
    yield row("reward_to_go", "as q; random rewards", lambda: _as_q(_noisy(), _to_go(_noisy())))
    yield row("reward_to_go", "as Psi, gamma^t kept", lambda: _as_psi(stage(), _to_go(stage()), kept=True))
    bootstrapped = "bootstrapped by V' where cut"
    for critic in _CRITICS:
        wrong = _WRONG_CRITIC if critic == "perturbed" else ""
        limited = partial(stage, critic=critic, limit=2)
        yield row(
            "reward_to_go",
            f"as q; time limit, {bootstrapped}, {critic} critic",
            lambda limited=limited: _as_q(limited(), _to_go(limited(), bootstrap=True)),
            biased_by=wrong,
        )
        parts = partial(stage, critic=critic, unit="fragments")
        yield row(
            "reward_to_go",
            f"as q; fragments, {bootstrapped}, {critic} critic",
            lambda parts=parts: _as_q(parts(), _to_go(parts(), bootstrap=True)),
            biased_by=wrong,
        )
    yield row(
        "reward_to_go",
        "as q; time limit without bootstrap",
        lambda: _as_q(stage(limit=2), _to_go(stage(limit=2))),
        biased_by="truncation counts as termination: what would have followed is left out",
    )

    yield row(
        "reward_to_go",
        f"as q; fragments in which time limits fall, {bootstrapped}, exact critic",
        lambda: _as_q(_parts(), _bootstrapped(_parts())),
    )


def _total_rewards() -> Iterator[Case]:
    def total(on: Stage) -> Tensor:
        return total_reward(on.reward, on.discount, on.cut, mask=on.mask_if_needed)

    yield row("total_reward", "as Psi, no gamma^t", lambda: _as_psi(stage(), total(stage()), kept=False, of_j=True))
    yield row(
        "total_reward",
        "as Psi, gamma^t on top",
        lambda: _as_psi(stage(), total(stage()), kept=True),
        biased_by="its discount counts from the start already: gamma^t on top counts it twice",
    )
    yield row(
        "total_reward",
        "as q",
        lambda: _as_q(stage(), total(stage())),
        biased_by="rewards before the action are in it",
    )
    yield row(
        "total_reward",
        "as Psi, time limit",
        lambda: _as_psi(stage(limit=2), total(stage(limit=2)), kept=False, of_j=True),
        biased_by="it knows no bootstrap: truncation counts as termination",
    )


def _n_step_returns() -> Iterator[Case]:
    def returns(on: Stage, steps: int) -> Tensor:
        return n_step_return(on.reward, on.discount, on.next_value, on.cut, steps=steps, mask=on.mask_if_needed)

    for unit in _UNITS:
        for critic in _CRITICS:
            for steps in (1, 2, 3):
                yield row(
                    "n_step_return",
                    f"as q; n = {steps}, {unit}, {critic} critic",
                    lambda unit=unit, critic=critic, steps=steps: _as_q(
                        stage(unit=unit, critic=critic), returns(stage(unit=unit, critic=critic), steps)
                    ),
                    biased_by=_WRONG_CRITIC if critic == "perturbed" else "",
                )
    yield row(
        "n_step_return",
        "as q; n = 2, fragments in which time limits fall, exact critic",
        lambda: _as_q(_parts(), returns(_parts(), 2)),
    )
    for steps in (1, 2, 3):
        yield row(
            "n_step_return",
            f"n = {steps}, episodes, perturbed critic, held against what it does follow",
            lambda steps=steps: (on := stage(critic="perturbed")).estimate(
                returns(on, steps), on.looking_ahead(steps), f"{steps} rewards and then gamma^{steps} V, on average"
            ),
        )
    yield row(
        "n_step_return",
        f"as q; n = {_EXACT_STEPS}, which no episode outlasts, perturbed critic",
        lambda: _as_q(stage(critic="perturbed"), returns(stage(critic="perturbed"), _EXACT_STEPS)),
    )


def _lambda_returns() -> Iterator[Case]:
    def returns(on: Stage, decay: float) -> Tensor:
        return lambda_return(on.reward, on.discount, on.next_value, on.cut, trace_decay=decay, mask=on.mask_if_needed)

    for unit in _UNITS:
        for critic in _CRITICS:
            for decay in (0.0, 0.5, 1.0):
                free = critic == "exact" or (unit == "episodes" and decay == 1.0)
                yield row(
                    "lambda_return",
                    f"as q; lambda = {decay:g}, {unit}, {critic} critic",
                    lambda unit=unit, critic=critic, decay=decay: _as_q(
                        stage(unit=unit, critic=critic), returns(stage(unit=unit, critic=critic), decay)
                    ),
                    biased_by="" if free else _WRONG_CRITIC,
                )

    yield row(
        "lambda_return",
        "as q; lambda = 0.5, fragments in which time limits fall, exact critic",
        lambda: _as_q(_parts(), returns(_parts(), 0.5)),
    )
    yield row(
        "lambda_return",
        "lambda = 0.5, episodes, perturbed critic, held against what it does follow",
        lambda: (on := stage(critic="perturbed")).estimate(
            returns(on, 0.5), on.leaning(0.5), "(1 - lambda) sum_n lambda^(n-1) n-step returns, on average"
        ),
    )


def _residuals() -> Iterator[Case]:
    def residual(on: Stage) -> Tensor:
        return td_residual(on.reward, on.discount, on.value, on.next_value)

    for unit in _UNITS:
        for critic in _CRITICS:
            wrong = _WRONG_CRITIC if critic == "perturbed" else ""
            yield row(
                "td_residual",
                f"as A; {unit}, {critic} critic",
                lambda unit=unit, critic=critic: _as_advantage(
                    stage(unit=unit, critic=critic), residual(stage(unit=unit, critic=critic))
                ),
                biased_by=wrong,
            )
            yield row(
                "td_residual",
                f"as Psi, gamma^t kept; {unit}, {critic} critic",
                lambda unit=unit, critic=critic: _as_psi(
                    stage(unit=unit, critic=critic), residual(stage(unit=unit, critic=critic)), kept=True
                ),
                biased_by=wrong,
            )


def _differential() -> Iterator[Case]:
    def returns(on: Stage, error: float) -> Tensor:
        return differential_return(on.reward, float(on.solution.objective) + error, on.next_value, on.cut)

    def residual(on: Stage, error: float) -> Tensor:
        return differential_td_residual(on.reward, float(on.solution.objective) + error, on.value, on.next_value)

    exact, perturbed = (partial(stage, "ring", unit="fragments", critic=critic) for critic in _CRITICS)
    off = "r_bar off by 0.3"
    shifted = "an error in r_bar adds up over what is left of the row"
    for subject, made, truth, words in (
        ("differential_return", returns, _Q_TILDE, "as q~"),
        ("differential_td_residual", residual, _A_TILDE, "as A"),
    ):
        for on, error, setting, reason in (
            (exact, 0.0, "exact v~ and r_bar", ""),
            (perturbed, 0.0, "perturbed critic", _WRONG_CRITIC),
            (exact, 0.3, f"exact v~, {off}", shifted if subject == "differential_return" else "r_bar is wrong"),
        ):
            yield row(
                subject,
                f"{words}; {setting}",
                lambda on=on, made=made, error=error, truth=truth: on().estimate(
                    made(on(), error),
                    on().solution.action_value if truth == _Q_TILDE else on().solution.advantage,
                    truth,
                ),
                biased_by=reason,
            )
        for on, error, setting, reason in (
            (exact, 0.0, "exact v~ and r_bar", ""),
            (perturbed, 0.0, "perturbed critic", _WRONG_CRITIC),
            (exact, 0.3, f"exact v~, {off}: an action-independent baseline", ""),
        ):
            yield row(
                subject,
                f"as Psi; {setting}",
                lambda on=on, made=made, error=error: on().ascent(
                    score_function(on().log_prob, made(on(), error)),
                    on().gradient("average_reward"),
                    "grad r_bar",
                    weight=1.0 / on().trajectory.shape[1],
                ),
                biased_by=reason,
            )


def _discount_weights() -> Iterator[Case]:
    dropped = "gamma^t is dropped: later states count too much, and no function has this gradient"
    for unit in _UNITS:
        on = partial(stage, unit=unit)
        yield row(
            "discount_weight", f"gamma^t kept; {unit}", lambda on=on: _as_psi(on(), _bootstrapped(on()), kept=True)
        )
        yield row(
            "discount_weight",
            f"gamma^t dropped; {unit}",
            lambda on=on: _as_psi(on(), _bootstrapped(on()), kept=False, of_j=True),
            biased_by=dropped,
        )
        yield row(
            "discount_weight",
            f"gamma^t dropped; {unit}, held against what it does follow",
            lambda on=on: _as_psi(on(), _bootstrapped(on()), kept=False),
        )
    limited = partial(stage, "time-limit", unit="fragments", limit=4)
    yield row(
        "discount_weight",
        "gamma^t kept; fragments, time limit",
        lambda: _as_psi(limited(), _bootstrapped(limited()), kept=True),
    )


def _vtraces() -> Iterator[Case]:
    far = float("inf")
    exact = partial(stage, behaviour="stale")
    perturbed = partial(stage, behaviour="stale", critic="perturbed")
    slow = "truncated traces lean on the critic, which is wrong"
    for setting, on, rho_clip, trace_clip, reason in (
        ("whole weights, perturbed critic", perturbed, far, far, ""),
        ("traces truncated at 0.5, exact critic", exact, far, 0.5, ""),
        ("traces truncated at 0.5, perturbed critic", perturbed, far, 0.5, slow),
        ("rho truncated at 1, exact critic", exact, 1.0, 1.0, "its fixed point is v of a policy in between"),
    ):
        yield row(
            "vtrace",
            f"target as v_pi; another policy acted, {setting}",
            lambda on=on, rho_clip=rho_clip, trace_clip=trace_clip: on().estimate_of_state(
                _vtrace(on(), rho_clip, trace_clip).value_target, on().solution.value, _V
            ),
            biased_by=reason,
        )
    yield row("vtrace", "target where rho is truncated at 1, held against what it does follow", _fixed_point)
    yield row("vtrace", "on-policy: the lambda-return", _on_policy)
    parts = partial(stage, unit="fragments", behaviour="stale", limit=2)
    yield row(
        "vtrace",
        "target as v_pi; fragments in which time limits fall, whole weights, exact critic",
        lambda: parts().estimate_of_state(_vtrace(parts(), far, far).value_target, parts().solution.value, _V),
    )
    yield row("vtrace", "target; fragments in which time limits fall, perturbed critic: the loop", _vtrace_by_loop)
    yield row(
        "VTrace",
        "advantage; fragments in which time limits fall, perturbed critic: the loop",
        partial(_vtrace_by_loop, advantage=True),
    )
    followed = "sum_s eta_b(s) sum_a grad pi(a|s) q_pi(s,a), b the policy that acted"
    for critic in _CRITICS:
        built = partial(stage, behaviour="stale", critic=critic)
        yield row(
            "VTrace",
            f"advantage as Psi; another policy acted, whole weights, {critic} critic",
            lambda built=built: built().ascent(
                score_function(built().log_prob, _vtrace(built(), far, far).advantage), off_policy(built()), followed
            ),
        )
    yield row("VTrace", "rho, truncated at 1.1", _ratios)
    yield row(
        "VTrace",
        "advantage as Psi, rho truncated at 1, exact critic",
        lambda: exact().ascent(
            score_function(exact().log_prob, _vtrace(exact(), 1.0, 1.0).advantage), off_policy(exact()), followed
        ),
        biased_by="truncated weights leave part of the other policy's preferences in",
    )
    yield row(
        "VTrace",
        "advantage as Psi, whole weights, held against the gradient of the policy's own states",
        lambda: exact().ascent(
            score_function(exact().log_prob, _vtrace(exact(), far, far).advantage),
            exact().gradient("undiscounted_states"),
            STATES_UNDISCOUNTED,
        ),
        biased_by="states are visited as often as the policy that acted visits them",
    )


def _recurrences() -> Iterator[Case]:
    for length, kind in ((7, "substitution"), (700, "doubling")):
        yield row(
            "backward_recurrence", f"{length} steps, by {kind}: the loop", lambda length=length: _by_loop(length, 300)
        )
    yield row("backward_recurrence", "its gradient: the one of the loop", _gradient_by_loop)


def _unchosen_steps() -> Iterator[Case]:
    """Steps between the chosen ones, with rewards and values that must not be read."""

    def to_go(on: Stage) -> Tensor:
        reward, discount, _, next_value, cut, mask = on.spaced
        return reward_to_go(reward, discount, cut, bootstrap=next_value, mask=mask)

    def n_step(on: Stage) -> Tensor:
        reward, discount, _, next_value, cut, mask = on.spaced
        return n_step_return(reward, discount, next_value, cut, steps=2, mask=mask)

    def mixed(on: Stage) -> Tensor:
        reward, discount, _, next_value, cut, mask = on.spaced
        return lambda_return(reward, discount, next_value, cut, trace_decay=0.5, mask=mask)

    for subject, made in (("reward_to_go", to_go), ("n_step_return", n_step), ("lambda_return", mixed)):
        on = partial(stage, limit=3)
        yield row(
            subject,
            "as q; steps that nobody chose in between, time limit, exact critic",
            lambda on=on, made=made: _as_q(on(), made(on())[:, ::2]),
        )

    def total(on: Stage) -> Tensor:
        reward, discount, _, _, cut, mask = on.spaced
        return total_reward(reward, discount, cut, mask=mask)

    yield row(
        "total_reward",
        "as Psi, no gamma^t; steps that nobody chose in between",
        lambda: _as_psi(stage(), total(stage())[:, ::2], kept=False, of_j=True),
    )

    def target(on: Stage) -> Tensor:
        reward, discount, value, next_value, cut, mask = on.spaced
        log_prob, behaviour = (part.repeat_interleave(2, -1) for part in (on.log_prob, on.behaviour_log_prob))
        far = float("inf")
        return vtrace(
            log_prob, behaviour, reward, discount, value, next_value, cut, rho_clip=far, trace_clip=far, mask=mask
        ).value_target

    yield row(
        "vtrace",
        "target as v_pi; steps that nobody chose in between, perturbed critic",
        lambda: (on := stage(behaviour="stale", critic="perturbed")).estimate_of_state(
            target(on)[:, ::2], on.solution.value, _V
        ),
    )


def _noisy() -> Stage:
    return stage("noisy-rewards")


def _parts() -> Stage:
    """Fragments of 3 steps of episodes that are truncated after 2."""
    return stage(unit="fragments", limit=2)


def _to_go(on: Stage, *, bootstrap: bool = False) -> Tensor:
    following = on.next_value if bootstrap else None
    return reward_to_go(on.reward, on.discount, on.cut, bootstrap=following, mask=on.mask_if_needed)


def _bootstrapped(on: Stage) -> Tensor:
    return _to_go(on, bootstrap=True)


def _as_q(on: Stage, psi: Tensor) -> Found:
    return on.estimate(psi, on.solution.action_value, _Q)


def _as_advantage(on: Stage, psi: Tensor) -> Found:
    return on.estimate(psi, on.solution.advantage, _A)


def _as_psi(on: Stage, psi: Tensor, *, kept: bool, of_j: bool | None = None) -> Found:
    """The policy gradient with it; per step where rows are fragments."""
    discounted = kept if of_j is None else of_j
    kind: Literal["discounted", "undiscounted_states"] = "discounted" if discounted else "undiscounted_states"
    target, name = on.gradient(kind), GRAD_J if discounted else STATES_UNDISCOUNTED
    weight = discount_weight(on.trajectory.time, on.gamma if kept else 1.0, dtype=torch.float64)
    if on.setting.unit == "fragments":
        target, name = target / on.setting.mean_length, f"{name} / mean length"
        weight = weight / on.trajectory.shape[1]
    return on.ascent(score_function(on.log_prob, psi), target, name, weight=weight)


def off_policy(on: Stage) -> Tensor:
    """sum_s eta_b(s) sum_a grad pi(a|s) q_pi(s,a): states as the policy that acted visits them, actions of ours."""
    with torch.no_grad():
        visits = solve(on.setting.mdp, on.setting.behaviour).undiscounted_visits
    policy = on.setting.policy.preferences().softmax(-1)
    worth = (visits.unsqueeze(-1) * policy * on.solution.advantage).sum()
    return torch.cat([part.flatten() for part in torch.autograd.grad(worth, on.setting.parameters)])


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


def _ratios() -> Found:
    on = stage(behaviour="stale")
    policy, acted = (who.preferences().softmax(-1) for who in (on.setting.policy, on.setting.behaviour))
    truth = (policy / acted).clamp(max=1.1)
    return on.estimate(_vtrace(on, 1.1, 0.5).rho, truth, "min(1.1, pi(a|s) / b(a|s))")


def _fixed_point() -> Found:
    """With V = v of pi_rho ~ min(rho_bar b, pi) the mean target is V (Espeholt et al. 2018, appendix A)."""
    on = stage(behaviour="stale")
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


def _waves(rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Numbers without pattern, k in [-1, 1] with zeros among them."""
    step = torch.arange(rows * length, dtype=torch.float64).view(rows, length)
    k = torch.cos(1.7 * step + 0.1 * step.square())
    return torch.sin(2.3 * step * step), k.masked_fill(step % 5 == 3, 0.0)


def _by_loop(length: int, rows: int) -> Found:
    x, k = _waves(rows if length > 100 else 3, length)
    return identity(
        backward_recurrence(x, k), by_loop(x, k), problem=f"{length} steps", target_name="y_t = x_t + k_t y_{t+1}"
    )


def _gradient_by_loop() -> Found:
    x, k = (part.requires_grad_() for part in _waves(3, 9))
    weight = torch.linspace(-1.0, 1.0, 27, dtype=torch.float64).view(3, 9)
    found, expected = (
        torch.cat([part.flatten() for part in torch.autograd.grad((weight * solved).sum(), (x, k))])
        for solved in (backward_recurrence(x, k), by_loop(x, k))
    )
    return identity(found, expected, problem="9 steps", target_name="gradient of sum_t w_t y_t in x and k")
