"""Rows of returns: as estimates of q, A or v state by state, and as Psi of the policy gradient."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from upslope.auditing.cases import off_policy
from upslope.auditing.cases.case import Case
from upslope.auditing.cases.measurement import Found, identity, row
from upslope.auditing.cases.stage import GRAD_J, STATES_UNDISCOUNTED, Stage, by_loop, stage
from upslope.auditing.setting import Critic, Unit
from upslope.estimators import (
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
)

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
    yield from off_policy.cases()
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
