"""Rows of reductions: what each weighs the policy gradient by, and that splits add up to the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from upslope.auditing.cases.case import Case
from upslope.auditing.cases.measurement import Found, identity, row, weighted_moments
from upslope.auditing.cases.stage import STATES_UNDISCOUNTED, Stage, stage
from upslope.auditing.cases.token_stage import TokenStage, token_stage
from upslope.estimators import (
    fixed_length,
    score_function,
    step_count,
    step_mean,
    trajectory_count,
    trajectory_mean,
    trajectory_sum,
    weighted_sum,
)
from upslope.exact import solve_tokens

_DOUBLE = torch.float64
_LONGEST = 5
_GRAD = "grad J"
_PER_STEP = f"{STATES_UNDISCOUNTED} / mean length"
_SHORT_COUNT_MORE = "each trajectory counts by 1 / its length: steps of short ones count more"
_NUMBER_IS_CHANCE = "the number of steps in a batch is chance, and goes with what happened in it"

Reduction = Callable[[Tensor], Tensor]
"""A mask to weights."""


def cases() -> Iterator[Case]:
    """All rows of reductions."""
    yield from _by_episode()
    yield from _by_pair()
    yield from _by_fragment()
    yield from _counts()
    yield from _splits()
    yield from _sums()


def _by_episode() -> Iterator[Case]:
    """Batches of one whole episode."""
    fixed = _fixed(_LONGEST)
    yield row("trajectory_sum", "batches of one episode", partial(_episodes, _sum, 1.0))
    yield row("fixed_length", f"batches of one episode, L = {_LONGEST}", partial(_episodes, fixed, 1.0 / _LONGEST))
    for subject, reduction in (("trajectory_mean", _mean), ("step_mean", _steps)):
        yield row(subject, "batches of one episode", partial(_episodes, reduction, None), biased_by=_SHORT_COUNT_MORE)


def _by_pair() -> Iterator[Case]:
    """Batches of two completions."""
    yield row("trajectory_sum", "batches of two completions", lambda: _pairs(_sum, token_stage().gradient, _GRAD))
    yield row(
        "fixed_length",
        "batches of two completions, L = 7",
        lambda: _pairs(_fixed(7), token_stage().gradient / 7, f"{_GRAD} / L"),
    )
    yield row(
        "trajectory_mean",
        "batches of two completions, held against what it does follow",
        lambda: _pairs(_mean, _by_length(token_stage()), "E[R / length x grad log pi(completion)]"),
    )
    for subject, reduction, reason in (
        ("trajectory_mean", _mean, _SHORT_COUNT_MORE),
        ("step_mean", _steps, _NUMBER_IS_CHANCE),
    ):
        yield row(
            subject,
            "batches of two completions",
            lambda reduction=reduction: _pairs(
                reduction, token_stage().gradient / _mean_length(token_stage()), f"{_GRAD} / mean length"
            ),
            biased_by=reason,
        )


def _by_fragment() -> Iterator[Case]:
    """Batches of one fragment of three steps, which may hold ends and starts of episodes."""
    yield row("step_mean", "fragments of 3 steps", lambda: _fragments(lambda on: _each(_steps, on.mask), 1.0))
    yield row(
        "trajectory_sum",
        "fragments of 3 steps, N given",
        lambda: _fragments(lambda on: trajectory_sum(on.mask, cut=on.cut, trajectories=1, dtype=_DOUBLE), 3.0),
    )
    pieces: tuple[tuple[str, Callable[[Tensor, Tensor], Tensor], float], ...] = (
        ("trajectory_sum", lambda mask, cut: trajectory_sum(mask, cut=cut, dtype=_DOUBLE), 3.0),
        ("fixed_length", lambda mask, cut: fixed_length(mask, 3, cut=cut, dtype=_DOUBLE), 1.0),
        ("trajectory_mean", lambda mask, cut: trajectory_mean(mask, cut=cut, dtype=_DOUBLE), 1.0),
    )
    for subject, reduction, factor in pieces:
        yield row(
            subject,
            "fragments of 3 steps, per piece between cuts",
            lambda reduction=reduction, factor=factor: _fragments(partial(_each_piece, reduction), factor),
            biased_by="how many pieces a fragment has, and how long they are, is chance",
        )


def _counts() -> Iterator[Case]:
    yield row("step_count", "of whole episodes", _steps_of_episodes)
    yield row("step_count", "of completions, without their prompts", _steps_of_completions)
    yield row("trajectory_count", "pieces of fragments of 3 steps", _pieces_of_fragments)
    yield row("trajectory_count", "rows with a chosen step", _rows_with_a_step)


def _splits() -> Iterator[Case]:
    """The parts of a batch, each with the denominators of the whole, weigh as the whole does."""

    def whole() -> Tensor:
        return token_stage().mask[[0, 3, 9, 20, 29]]

    parts: tuple[tuple[str, Callable[[Tensor, int, int], Tensor], Reduction], ...] = (
        ("step_mean", lambda part, steps, _: step_mean(part, steps=steps, dtype=_DOUBLE), _steps),
        ("trajectory_mean", lambda part, _, count: trajectory_mean(part, trajectories=count, dtype=_DOUBLE), _mean),
        ("trajectory_sum", lambda part, _, count: trajectory_sum(part, trajectories=count, dtype=_DOUBLE), _sum),
        ("fixed_length", lambda part, _, count: fixed_length(part, 7, trajectories=count, dtype=_DOUBLE), _fixed(7)),
    )
    for subject, by_part, reduction in parts:

        def measure(by_part: Callable[[Tensor, int, int], Tensor] = by_part, reduction: Reduction = reduction) -> Found:
            chosen = whole()
            steps, count = step_count(chosen), trajectory_count(chosen)
            found = torch.cat([by_part(part, steps, count) for part in chosen.split([1, 3, 1])])
            return identity(found, reduction(chosen), problem="5 completions", target_name="weights of the whole batch")

        yield row(subject, "split into 1, 3 and 1 rows, counts of the whole given", measure)
    yield row(
        "step_mean",
        "split into 1, 3 and 1 rows, each by its own count, over 3",
        lambda: identity(
            torch.cat([_steps(part) / 3 for part in whole().split([1, 3, 1])]),
            _steps(whole()),
            problem="5 completions",
            target_name="weights of the whole batch",
        ),
        biased_by="a mean of means: steps of small parts count more",
    )


def _sums() -> Iterator[Case]:
    def values() -> tuple[Tensor, Tensor]:
        number = torch.arange(12, dtype=_DOUBLE).view(3, 4)
        return number.sin(), number.cos().masked_fill(number % 3 == 0, 0.0)

    def against(value: Tensor) -> Found:
        plain, weight = values()
        expected = sum(v * w for v, w in zip(plain.flatten().tolist(), weight.flatten().tolist(), strict=True))
        found = weighted_sum(value, weight).reshape(1)
        return identity(
            found, torch.tensor([expected], dtype=_DOUBLE), problem="12 steps", target_name="sum w_t value_t"
        )

    def spoilt() -> Tensor:
        value, weight = values()
        return value.masked_fill(weight == 0.0, torch.nan)

    def gradient() -> Found:
        value, weight = spoilt().requires_grad_(), values()[1]
        (found,) = torch.autograd.grad(weighted_sum(value, weight), value)
        return identity(found, weight, problem="12 steps, 4 of them NaN", target_name="w_t, 0 where it is 0")

    yield row("weighted_sum", "the sum", lambda: against(values()[0]))
    yield row("weighted_sum", "NaN where the weight is 0", lambda: against(spoilt()))
    yield row("weighted_sum", "its gradient, NaN where the weight is 0", gradient)


def _sum(mask: Tensor) -> Tensor:
    return trajectory_sum(mask, dtype=_DOUBLE)


def _mean(mask: Tensor) -> Tensor:
    return trajectory_mean(mask, dtype=_DOUBLE)


def _steps(mask: Tensor) -> Tensor:
    return step_mean(mask, dtype=_DOUBLE)


def _fixed(length: int) -> Reduction:
    return lambda mask: fixed_length(mask, length, dtype=_DOUBLE)


def _each(reduction: Reduction, mask: Tensor) -> Tensor:
    """Each row as a batch of its own."""
    return torch.cat([reduction(part) for part in mask.split(1)])


def _each_piece(reduction: Callable[[Tensor, Tensor], Tensor], on: Stage) -> Tensor:
    return torch.cat([reduction(*part) for part in zip(on.mask.split(1), on.cut.split(1), strict=True)])


def _episodes(reduction: Reduction, factor: float | None) -> Found:
    """Psi = A; `factor` times the gradient, or the gradient per step."""
    on = stage()
    target = on.gradient("undiscounted_states")
    if factor is None:
        target, name = target / on.setting.mean_length, _PER_STEP
    else:
        target, name = factor * target, STATES_UNDISCOUNTED if factor == 1.0 else f"{factor:g} x {STATES_UNDISCOUNTED}"
    weight = _each(reduction, on.mask)
    return on.ascent(score_function(on.log_prob, _advantage(on)), target, name, weight=weight)


def _fragments(weigh: Callable[[Stage], Tensor], factor: float) -> Found:
    on = stage(unit="fragments")
    target = factor / on.setting.mean_length * on.gradient("undiscounted_states")
    name = _PER_STEP if factor == 1.0 else f"{factor:g} x {_PER_STEP}"
    return on.ascent(score_function(on.log_prob, _advantage(on)), target, name, weight=weigh(on))


def _pairs(reduction: Reduction, target: Tensor, name: str) -> Found:
    """Psi = total reward, all pairs of completions."""
    on = token_stage()
    pair = torch.tensor(list(product(range(len(on.rows)), repeat=2)))
    weight = torch.stack([reduction(on.mask[rows]) for rows in pair])
    estimate = torch.einsum("kbt,kb,kbtp->kp", weight, on.total[pair], on.step_score[pair])
    return Found(
        problem=on.name,
        target_name=name,
        target=target,
        moments=weighted_moments(on.probability[pair].prod(-1), estimate),
        trajectories=2,
        steps=2 * _mean_length(on),
        batches=len(pair),
    )


def _advantage(on: Stage) -> Tensor:
    return on.solution.advantage[on.rows.state, on.trajectory.action]


def _mean_length(on: TokenStage) -> float:
    return float(on.probability @ on.length.to(_DOUBLE))


def _by_length(on: TokenStage) -> Tensor:
    return (on.probability * on.total / on.length) @ on.score


def _counted(count: Callable[[Tensor], int], mask: Tensor) -> Tensor:
    return torch.tensor([[count(part)] for part in mask.split(1)], dtype=_DOUBLE)


def _steps_of_episodes() -> Found:
    on = stage()
    return Found(
        problem=on.name,
        target_name="mean length, from the visits",
        target=on.solution.mean_length.reshape(1),
        moments=weighted_moments(on.probability, _counted(step_count, on.mask)),
        batches=len(on.rows),
    )


def _steps_of_completions() -> Found:
    on = token_stage()
    return Found(
        problem=on.name,
        target_name="mean length, from the visits of prefixes",
        target=solve_tokens(on.problem, on.policy).mean_length.detach().reshape(1),
        moments=weighted_moments(on.probability, _counted(step_count, on.mask)),
        batches=len(on.rows),
    )


def _pieces_of_fragments() -> Found:
    on = stage(unit="fragments")
    counts = [trajectory_count(mask, cut=cut) for mask, cut in zip(on.mask.split(1), on.cut.split(1), strict=True)]
    return Found(
        problem=on.name,
        target_name="1 + (T - 1) / mean length",
        target=torch.tensor([1.0 + 2.0 / on.setting.mean_length], dtype=_DOUBLE),
        moments=weighted_moments(on.probability, torch.tensor(counts, dtype=_DOUBLE).unsqueeze(-1)),
        batches=len(counts),
    )


def _rows_with_a_step() -> Found:
    mask = torch.tensor([[True, False, True], [False, False, False], [False, False, True]])
    found = torch.tensor([float(trajectory_count(mask))], dtype=_DOUBLE)
    return identity(found, torch.tensor([2.0], dtype=_DOUBLE), problem="3 rows, one of them empty", target_name="2")
