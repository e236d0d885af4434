"""Rows of advantages: GAE, baselines, groups, and what standardising does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from math import comb

import torch
from torch import Tensor

from upslope.auditing.cases.case import Case
from upslope.auditing.cases.measurement import Found, identity, row, row_gradients, weighted_moments
from upslope.auditing.cases.stage import GRAD_J, Stage, by_loop, stage
from upslope.auditing.cases.token_stage import TokenStage, token_stage
from upslope.auditing.setting import Critic, Unit
from upslope.estimators import (
    baselined,
    discount_weight,
    gae,
    group_relative,
    lambda_return,
    leave_one_out,
    reward_to_go,
    score_function,
    standardise,
)

_CRITICS: tuple[Critic, ...] = ("exact", "perturbed")
_UNITS: tuple[Unit, ...] = ("episodes", "fragments")
_WRONG_CRITIC = "the critic is wrong, and lambda < 1 leans on it"
_WRONG_AT_ENDS = "the critic is wrong where rows are cut"
_GRAD = "grad J"
_EPSILON = 1e-6


def cases() -> Iterator[Case]:
    """All rows of advantages."""
    yield from _generalised()
    yield from _baselines()
    yield from _standardised()
    yield from _group_relative()
    yield from _left_out()


def _generalised() -> Iterator[Case]:
    for unit, critic, lam in product(_UNITS, _CRITICS, (0.0, 0.5, 1.0)):
        wrong = _WRONG_CRITIC if lam < 1.0 else _WRONG_AT_ENDS
        yield row(
            "gae",
            f"as Psi, gamma^t kept; lambda = {lam:g}, {unit}, {critic} critic",
            lambda unit=unit, critic=critic, lam=lam: _as_psi(
                stage(unit=unit, critic=critic), _gae(stage(unit=unit, critic=critic), lam)
            ),
            biased_by="" if critic == "exact" or (unit == "episodes" and lam == 1.0) else wrong,
        )
    for critic, lam in product(_CRITICS, (0.0, 0.5, 1.0)):
        on = partial(stage, critic=critic, limit=2)
        yield row(
            "gae",
            f"as Psi, gamma^t kept; lambda = {lam:g}, time limit, {critic} critic",
            lambda on=on, lam=lam: _as_psi(on(), _gae(on(), lam)),
            biased_by="" if critic == "exact" else _WRONG_CRITIC if lam < 1.0 else _WRONG_AT_ENDS,
        )
    for lam in (0.0, 0.5, 1.0):
        yield row("gae", f"as A; lambda = {lam:g}, episodes, exact critic", partial(_as_advantage, lam, spaced=False))
    for given, words in ((False, "no mask"), (True, "with a mask")):
        yield row(
            "gae",
            f"as A; lambda = 0.5, fragments in which time limits fall, {words}, exact critic",
            partial(_across_limits, given=given),
        )
        yield row(
            "gae",
            f"lambda = 0.5, fragments in which time limits fall, {words}, perturbed critic: the loop",
            partial(_generalised_by_loop, given=given),
        )
    for spaced in (False, True):
        between = ", steps that nobody chose in between" if spaced else ""
        yield row(
            "gae",
            f"lambda = 0.5, episodes, perturbed critic{between}, held against what it does follow",
            partial(_leaning, spaced=spaced),
        )
    yield row("gae", "as A; lambda = 0.5, steps that nobody chose in between", partial(_as_advantage, 0.5, spaced=True))
    yield row("gae", "lambda = 0.5, A + V: the lambda-return", _plus_value)


def _baselines() -> Iterator[Case]:
    on = partial(stage)

    def of_state(make: Callable[[Stage], Tensor]) -> Callable[[], Found]:
        return lambda: _as_psi(on(), baselined(_to_go(on()), make(on())))

    yield row("baselined", "as Psi; no baseline", of_state(lambda built: torch.zeros_like(built.reward)))
    yield row("baselined", "as Psi; v(s)", of_state(lambda built: built.value))
    yield row("baselined", "as Psi; a constant 10", of_state(lambda built: torch.full_like(built.reward, 10.0)))
    yield row(
        "baselined",
        "as Psi; any numbers per state and time",
        of_state(lambda built: torch.cos(7.0 * built.rows.state + built.trajectory.time)),
    )
    yield row(
        "baselined",
        "as Psi; any numbers per state and action",
        of_state(lambda built: torch.cos(7.0 * built.rows.state + 3.0 * built.trajectory.action)),
        biased_by="this baseline depends on the action",
    )
    yield row(
        "baselined",
        "as A; reward to go less v(s)",
        lambda: on().estimate(baselined(_to_go(on()), on().value), on().solution.advantage, "A(s,a)"),
    )


def _standardised() -> Iterator[Case]:
    yield row(
        "standardise",
        "as Psi; batches of 3 decisions",
        partial(_standardised_batches, 3),
        biased_by="each batch is divided by its own spread, and centred by a mean that each action is part of",
    )
    yield row("standardise", "mean and spread of the result", _mean_and_spread)
    yield row("standardise", "of 3 A + 7: that of A", _affine)
    yield row("standardise", "with a mask: that of the chosen steps alone", _masked)


def _group_relative() -> Iterator[Case]:
    for size in (2, 3):
        factor = (size - 1) / size
        name = f"(G - 1)/G x {_GRAD}"
        on = partial(token_stage)
        yield row(
            "group_relative",
            f"scale none, G = {size}",
            lambda on=on, size=size, factor=factor, name=name: on().ascent_of_groups(
                group_relative, factor * on().gradient, name, size=size
            ),
        )
    yield row(
        "group_relative",
        "scale none, G = 2, held against the gradient itself",
        lambda: token_stage().ascent_of_groups(group_relative, token_stage().gradient, _GRAD, size=2),
        biased_by="the group's mean contains each member's own total: the gradient comes out (G - 1)/G long",
    )
    by_group = partial(group_relative, scale="group", epsilon=_EPSILON)
    yield row(
        "group_relative",
        "scale group, G = 3, graded rewards",
        lambda: token_stage().ascent_of_groups(by_group, token_stage().gradient, _GRAD, size=3),
        biased_by="dividing by the group's spread weighs prompts and groups by how sure the policy is of them",
    )
    yield row(
        "group_relative",
        "scale group, G = 4, right or wrong, two prompts",
        lambda: _binary().ascent_of_groups(by_group, _binary().gradient, _GRAD, size=4),
        biased_by="dividing by the group's spread weighs prompts by their difficulty",
    )
    yield row(
        "group_relative",
        "scale group, G = 4, right or wrong, held against what it does follow",
        lambda: _binary().ascent_of_groups(
            by_group, _reweighted(_binary(), 4), "each prompt's gradient times f(p), p its chance to be right", size=4
        ),
    )
    yield row(
        "group_relative",
        "scale batch, 2 groups of 2",
        lambda: _binary().ascent_of_groups(
            partial(group_relative, scale="batch", epsilon=_EPSILON),
            0.5 * _binary().gradient,
            f"(G - 1)/G x {_GRAD}",
            size=2,
            groups=2,
            batchwise=True,
        ),
        biased_by="each batch is divided by its own spread",
    )
    yield row("group_relative", "scale batch, by hand", _by_hand)
    yield row("group_relative", "totals all 0.1: exactly 0 under every scale", _no_spread)


def _left_out() -> Iterator[Case]:
    for size in (2, 3):
        yield row(
            "leave_one_out",
            f"G = {size}",
            lambda size=size: token_stage().ascent_of_groups(leave_one_out, token_stage().gradient, _GRAD, size=size),
        )
    yield row(
        "leave_one_out",
        "2 groups of 2",
        lambda: _binary().ascent_of_groups(leave_one_out, _binary().gradient, _GRAD, size=2, groups=2),
    )
    yield row(
        "leave_one_out",
        "G = 2, held against the mean-centred one",
        lambda: _binary().ascent_of_groups(leave_one_out, 0.5 * _binary().gradient, f"(G - 1)/G x {_GRAD}", size=2),
        biased_by="it is G/(G - 1) times as long",
    )


def _gae(on: Stage, lam: float) -> Tensor:
    return gae(on.reward, on.discount, on.value, on.next_value, on.cut, gae_lambda=lam, mask=on.mask_if_needed)


def _to_go(on: Stage) -> Tensor:
    return reward_to_go(on.reward, on.discount, on.cut, mask=on.mask)


def _binary() -> TokenStage:
    return token_stage("tokens-binary")


def _as_psi(on: Stage, psi: Tensor) -> Found:
    """The gradient of J_gamma with it; per step where rows are fragments."""
    target, name = on.gradient(), GRAD_J
    weight = discount_weight(on.trajectory.time, on.gamma, dtype=torch.float64)
    if on.setting.unit == "fragments":
        target, name = target / on.setting.mean_length, f"{name} / mean length"
        weight = weight / on.trajectory.shape[1]
    return on.ascent(score_function(on.log_prob, psi), target, name, weight=weight)


def _as_advantage(lam: float, *, spaced: bool) -> Found:
    on = stage(limit=3) if spaced else stage()
    if spaced:
        reward, discount, value, next_value, cut, mask = on.spaced
        psi = gae(reward, discount, value, next_value, cut, gae_lambda=lam, mask=mask)[:, ::2]
    else:
        psi = _gae(on, lam)
    return on.estimate(psi, on.solution.advantage, "A(s,a) of every state and action")


def _across_limits(*, given: bool) -> Found:
    on = stage(unit="fragments", limit=2)
    mask = on.mask if given else None
    psi = gae(on.reward, on.discount, on.value, on.next_value, on.cut, gae_lambda=0.5, mask=mask)
    return on.estimate(psi, on.solution.advantage, "A(s,a) of every state and action")


def _generalised_by_loop(*, given: bool) -> Found:
    on = stage(unit="fragments", critic="perturbed", limit=2)
    mask = on.mask if given else None
    found = gae(on.reward, on.discount, on.value, on.next_value, on.cut, gae_lambda=0.5, mask=mask)
    residual = on.reward + on.discount * on.next_value - on.value
    expected = by_loop(residual, 0.5 * on.discount * ~on.cut)
    return identity(found, expected, problem=on.name, target_name="delta_t + g_t lambda (1 - c_t) A_{t+1}")


def _leaning(*, spaced: bool) -> Found:
    on = stage(critic="perturbed")
    psi = _gae(on, 0.5)
    if spaced:
        reward, discount, value, next_value, cut, mask = on.spaced
        psi = gae(reward, discount, value, next_value, cut, gae_lambda=0.5, mask=mask)[:, ::2]
    truth = on.leaning(0.5) - on.setting.policy.value.detach().unsqueeze(-1)
    return on.estimate(psi, truth, "the mean lambda-return less V")


def _plus_value() -> Found:
    on = stage(unit="fragments", critic="perturbed")
    returns = lambda_return(on.reward, on.discount, on.next_value, on.cut, trace_decay=0.5, mask=on.mask)
    return identity(_gae(on, 0.5) + on.value, returns, problem=on.name, target_name="lambda-return of every step")


def _standardised_batches(size: int) -> Found:
    on = stage("bandit")
    member = torch.tensor(list(product(range(len(on.rows)), repeat=size)))
    psi = torch.stack([standardise(batch) for batch in on.reward[member].squeeze(-1)])
    score = row_gradients(on.log_prob.squeeze(-1), on.setting.parameters)
    return Found(
        problem=on.name,
        target_name=GRAD_J,
        target=on.gradient(),
        moments=weighted_moments(
            on.probability[member].prod(-1), torch.einsum("kb,kbp->kp", psi, score[member]) / size
        ),
        trajectories=size,
        steps=size,
        batches=len(member),
    )


def _numbers() -> Tensor:
    return torch.sin(torch.arange(24, dtype=torch.float64).square()).view(4, 6)


def _mean_and_spread() -> Found:
    found = standardise(_numbers(), epsilon=1e-12)
    moments = torch.stack([found.mean(), found.square().sum() / (found.numel() - 1)])
    target = torch.tensor([0.0, 1.0], dtype=torch.float64)
    return identity(moments, target, problem="24 numbers", target_name="mean 0, variance 1 (divided by n - 1)")


def _affine() -> Found:
    plain, moved = (standardise(part, epsilon=1e-12) for part in (_numbers(), 3.0 * _numbers() + 7.0))
    return identity(moved, plain, problem="24 numbers", target_name="the standardised numbers themselves")


def _masked() -> Found:
    mask = torch.arange(24).view(4, 6) % 3 != 1
    filled = _numbers().masked_fill(~mask, 1e6)
    alone = torch.zeros_like(filled).masked_scatter(mask, standardise(_numbers()[mask]))
    return identity(standardise(filled, mask), alone, problem="24 numbers, 8 masked", target_name="of the other 16")


def _reweighted(on: TokenStage, size: int) -> Tensor:
    """sum_prompts Pr(prompt) f(p) grad p, with f(p) = E[A of a right one] - E[A of a wrong one]."""
    right = on.total
    target = torch.zeros_like(on.gradient)
    assert on.rows.trajectory.group is not None
    for prompt, chance in enumerate(on.problem.chance):
        mine = on.rows.trajectory.group == prompt
        given = on.probability[mine] / chance
        p = float(given @ right[mine])
        factor = 0.0
        for k in range(size):
            likely = comb(size - 1, k) * p**k * (1.0 - p) ** (size - 1 - k)
            factor += likely * (_advantage_of_right(k + 1, size) - _advantage_of_wrong(k, size))
        target += chance * factor * ((given * right[mine]) @ on.score[mine])
    return target


def _spread(right: int, size: int) -> float:
    """Standard deviation, ddof 1, of so many ones among zeros, plus epsilon."""
    return (right * (size - right) / size / (size - 1)) ** 0.5 + _EPSILON


def _advantage_of_right(right: int, size: int) -> float:
    return (1.0 - right / size) / _spread(right, size)


def _advantage_of_wrong(right: int, size: int) -> float:
    return -(right / size) / _spread(right, size)


def _by_hand() -> Found:
    """Totals 1, 3 and 5, 5, 2: centred -1, 1 and 1, 1, -2; of all five the mean is 3.2 and the variance 12.8 / 4."""
    total, group = torch.tensor([1.0, 3.0, 5.0, 5.0, 2.0], dtype=torch.float64), torch.tensor([4, 4, 9, 9, 9])
    found = group_relative(total, group, scale="batch", epsilon=0.25)
    expected = torch.tensor([-1.0, 1.0, 1.0, 1.0, -2.0], dtype=torch.float64) / (3.2**0.5 + 0.25)
    return identity(found, expected, problem="2 groups, of 2 and 3", target_name="centred / (std + 0.25)")


def _no_spread() -> Found:
    total, group = torch.full((3, 7), 0.1, dtype=torch.float64), torch.arange(3).unsqueeze(-1).expand(3, 7)
    psi = [group_relative(total, group, scale=scale, epsilon=0.0) for scale in ("none", "group", "batch")]
    found = torch.stack([*psi, leave_one_out(total, group)])
    return identity(
        found + 1.0, torch.ones(found.shape, dtype=torch.float64), problem="3 groups of 7", target_name="1 + 0"
    )
