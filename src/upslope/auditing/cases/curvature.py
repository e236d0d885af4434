"""Rows of curvature: Fisher-vector products, the natural step and its bounds, flat vectors, eligibility traces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from upslope.auditing.cases.case import Case
from upslope.auditing.cases.measurement import Found, identity, row, row_gradients, weighted_moments
from upslope.auditing.cases.stage import GRAD_J, Stage, stage
from upslope.auditing.setting import Critic, Unit
from upslope.estimators import (
    LineSearch,
    accumulate_trace,
    backtracking_line_search,
    conjugate_gradient,
    discount_weight,
    fisher_vector_product,
    flatten,
    lambda_return,
    td_residual,
    trust_region_scale,
    unflatten,
)
from upslope.exact import fisher_matrix, natural_gradient

_DOUBLE = torch.float64
_DAMPING, _DELTA = 0.1, 0.01
_CRITICS: tuple[Critic, ...] = ("exact", "perturbed")


def cases() -> Iterator[Case]:
    """All rows of curvature."""
    yield from _fisher()
    yield from _natural()
    yield from _line_searches()
    yield from _flat()
    yield from _traces()


def _fisher() -> Iterator[Case]:
    for forward in (True, False):
        words = "KL(old || new)" if forward else "KL(new || old)"
        yield row("fisher_vector_product", f"{words}, weighed by eta_gamma", partial(_product, forward, 0.0))
    yield row("fisher_vector_product", f"damping {_DAMPING}", partial(_product, True, _DAMPING))
    yield row("fisher_vector_product", "mean over the steps of all episodes", _product_by_steps)
    yield row(
        "fisher_vector_product",
        "of a policy that has moved",
        _product_elsewhere,
        biased_by="the Hessian of the divergence is F only where new = old",
    )


def _natural() -> Iterator[Case]:
    yield row("conjugate_gradient", f"(F + {_DAMPING}) x = grad J", _damped_step)
    yield row("conjugate_gradient", "F x = grad J, F with flat directions", _natural_step)
    yield row(
        "conjugate_gradient",
        "F x = grad J, 2 iterations",
        partial(_natural_step, 2),
        biased_by="stopped before as many iterations as F has distinct eigenvalues",
    )
    yield row(
        "conjugate_gradient",
        f"(F + {_DAMPING}) x = grad J, held against the natural gradient",
        _damped_for_natural,
        biased_by="damping turns the step towards the plain gradient",
    )
    yield row("trust_region_scale", "quadratic divergence of the scaled step", _scaled)
    yield row("trust_region_scale", "no curvature: no step", _no_curvature)


def _line_searches() -> Iterator[Case]:
    yield row("backtracking_line_search", "first that is better: by hand", _better)
    yield row("backtracking_line_search", "first that stays within the divergence: by hand", _within)
    yield row("backtracking_line_search", "the TRPO step: better, and within its bound", _trpo)
    yield row("LineSearch", "refused: the start itself, fraction 0", partial(_refused, "worse"))
    yield row("LineSearch", "NaN never qualifies: the start itself, fraction 0", partial(_refused, "nan"))


def _flat() -> Iterator[Case]:
    yield row("flatten", "by hand", _flattened)
    yield row("unflatten", "back again", _there_and_back)


def _traces() -> Iterator[Case]:
    units: tuple[Unit, ...] = ("episodes", "fragments")
    for decay in (0.0, 0.5, 1.0):
        for unit in units:
            yield row(
                "accumulate_trace",
                f"critic, lambda = {decay:g}, {unit}: backward view = forward view",
                partial(_backward_view, unit, decay),
            )
        for critic in _CRITICS:
            free = critic == "exact" or decay == 1.0
            yield row(
                "accumulate_trace",
                f"actor with gamma^t, lambda = {decay:g}, {critic} critic",
                partial(_actor, critic, decay),
                biased_by="" if free else "the critic is wrong, and lambda < 1 leans on it",
            )
    yield row("accumulate_trace", "actor of a continuing task, lambda = 0.5, exact v~ and r_bar", _continuing)
    yield row(
        "accumulate_trace",
        "critic, lambda = 0.5, fragments, never restarted: backward view = forward view",
        partial(_backward_view, "fragments", 0.5, restarts=False),
        biased_by="credit flows from one episode back into the one before",
    )


def _tables() -> tuple[Stage, Tensor, Tensor, list[Tensor]]:
    """The stage, eta_gamma, a probing vector, and the parameters."""
    on = stage()
    parameters: list[Tensor] = list(on.setting.parameters)
    vector = torch.arange(sum(p.numel() for p in parameters), dtype=_DOUBLE).cos()
    return on, on.solution.visits, vector, parameters


def _divergence(on: Stage, weight: Tensor, *, forward: bool = True, moved: float = 0.0) -> Callable[[], Tensor]:
    """sum_s w(s) KL of the policy as it is (moved by so much) and the one differentiated."""

    def mean() -> Tensor:
        preferences = on.setting.policy.preferences()
        shift = moved * torch.arange(preferences.numel(), dtype=_DOUBLE).view(preferences.shape).sin()
        new, old = preferences.log_softmax(-1), (preferences.detach() + shift).log_softmax(-1)
        first, second = (old, new) if forward else (new, old)
        return weight @ (first.exp() * (first - second)).sum(-1)

    return mean


def _exact_fisher(on: Stage) -> Tensor:
    return fisher_matrix(on.setting.mdp, on.setting.policy, parameters=on.setting.parameters)


def _product(forward: bool, damping: float) -> Found:
    on, weight, vector, parameters = _tables()
    found = fisher_vector_product(_divergence(on, weight, forward=forward), parameters, damping=damping)(vector)
    expected = _exact_fisher(on) @ vector + damping * vector
    name = "F v" if damping == 0.0 else "F v + damping v"
    return identity(found, expected, problem=on.name, target_name=name)


def _product_elsewhere() -> Found:
    on, weight, vector, parameters = _tables()
    found = fisher_vector_product(_divergence(on, weight, forward=False, moved=0.5), parameters)(vector)
    return identity(found, _exact_fisher(on) @ vector, problem=on.name, target_name="F v")


def _product_by_steps() -> Found:
    """The divergence as training has it, sum over steps of KL(s_t), of each episode with its probability."""
    on, _, vector, parameters = _tables()

    def mean() -> Tensor:
        preferences = on.setting.policy.preferences()
        new, old = preferences.log_softmax(-1), preferences.detach().log_softmax(-1)
        each = (old.exp() * (old - new)).sum(-1)[on.rows.state]
        return on.probability @ torch.where(on.mask, each, 0.0).sum(-1)

    score = row_gradients(on.log_prob.flatten(), parameters).view(*on.mask.shape, -1)
    along = torch.where(on.mask, score @ vector, 0.0)
    estimate = torch.einsum("rt,rtp->rp", along, score)
    exact = weighted_moments(on.probability, estimate)
    found = fisher_vector_product(mean, parameters)(vector)
    return identity(found, exact.mean, problem=on.name, target_name="E[sum_t grad l_t (grad l_t . v)]")


def _damped_step() -> Found:
    on, weight, _, parameters = _tables()
    gradient, fisher = on.gradient(), _exact_fisher(on)
    matvec = fisher_vector_product(_divergence(on, weight), parameters, damping=_DAMPING)
    found = conjugate_gradient(matvec, gradient, iterations=50, tolerance=1e-28)
    expected = torch.linalg.solve(fisher + _DAMPING * torch.eye(len(gradient), dtype=_DOUBLE), gradient)
    return identity(found, expected, problem=on.name, target_name="(F + damping)^-1 grad J, by elimination")


def _natural_step(iterations: int = 50) -> Found:
    on, weight, _, parameters = _tables()
    matvec = fisher_vector_product(_divergence(on, weight), parameters)
    found = conjugate_gradient(matvec, on.gradient(), iterations=iterations, tolerance=1e-28)
    return identity(found, _natural_gradient(on), problem=on.name, target_name="natural gradient F^+ grad J")


def _damped_for_natural() -> Found:
    on, weight, _, parameters = _tables()
    matvec = fisher_vector_product(_divergence(on, weight), parameters, damping=_DAMPING)
    found = conjugate_gradient(matvec, on.gradient(), iterations=50, tolerance=1e-28)
    return identity(found, _natural_gradient(on), problem=on.name, target_name="natural gradient F^+ grad J")


def _natural_gradient(on: Stage) -> Tensor:
    return natural_gradient(on.setting.mdp, on.setting.policy, parameters=on.setting.parameters)


def _scaled() -> Found:
    on = stage()
    direction, fisher = _natural_gradient(on), _exact_fisher(on)
    step = trust_region_scale(direction, fisher @ direction, max_divergence=_DELTA) * direction
    found = (0.5 * step @ fisher @ step).reshape(1)
    return identity(found, torch.tensor([_DELTA], dtype=_DOUBLE), problem=on.name, target_name="delta = x'Fx / 2")


def _no_curvature() -> Found:
    direction = torch.ones(3, dtype=_DOUBLE)
    found = [trust_region_scale(direction, image, max_divergence=_DELTA) for image in (0.0 * direction, -direction)]
    one_more = torch.tensor(found, dtype=_DOUBLE) + 1.0
    return identity(one_more, torch.ones(2, dtype=_DOUBLE), problem="x'Fx = 0 and -3", target_name="1 + 0 twice")


def _told(found: LineSearch) -> Tensor:
    """All fields in one vector."""
    numbers = torch.tensor([found.fraction, found.objective, found.divergence], dtype=_DOUBLE)
    return torch.cat([found.parameters, numbers])


def _better() -> Found:
    """From 0 by steps 8, 4, 2 uphill of -(x - 1)^2: 8 and 4 and 2 are no better than 0 (2 is as good), 1 is."""
    found = backtracking_line_search(
        lambda x: (-float((x - 1.0).square().sum()), 0.5 * float(x.abs().sum())),
        torch.zeros(1, dtype=_DOUBLE),
        torch.full((1,), 8.0, dtype=_DOUBLE),
        objective=-1.0,
        max_divergence=100.0,
        backtrack=0.5,
    )
    expected = torch.tensor([1.0, 0.125, 0.0, 0.5], dtype=_DOUBLE)
    return identity(_told(found), expected, problem="-(x - 1)^2", target_name="x, fraction, objective, divergence")


def _within() -> Found:
    """Uphill of x with divergence x^2 <= 1: 4 and 2 are too far, 1 is just within."""
    found = backtracking_line_search(
        lambda x: (float(x.sum()), float(x.square().sum())),
        torch.zeros(1, dtype=_DOUBLE),
        torch.full((1,), 4.0, dtype=_DOUBLE),
        objective=0.0,
        max_divergence=1.0,
        backtrack=0.5,
    )
    expected = torch.tensor([1.0, 0.25, 1.0, 1.0], dtype=_DOUBLE)
    return identity(_told(found), expected, problem="x", target_name="x, fraction, objective, divergence")


def _trpo() -> Found:
    """The full natural step, ten times too long, on the exact surrogate: what is taken obeys both conditions."""
    on = stage()
    states, actions = on.solution.policy.shape
    start = flatten([p.detach() for p in on.setting.parameters])
    visits, old = on.solution.visits, on.solution.policy

    def evaluate(flat: Tensor) -> tuple[float, float]:
        new = flat.view(states, actions).softmax(-1)
        surrogate = visits @ (new * on.solution.advantage).sum(-1)
        divergence = visits @ (old * (old / new).log()).sum(-1) / visits.sum()
        return float(surrogate), float(divergence)

    direction = _natural_gradient(on)
    image = _exact_fisher(on) @ direction / visits.sum()
    step = 10.0 * trust_region_scale(direction, image, max_divergence=_DELTA) * direction
    found = backtracking_line_search(
        evaluate, start, step, objective=evaluate(start)[0], max_divergence=_DELTA, attempts=40
    )
    kept = [found.objective > 0.0, found.divergence <= _DELTA, 0.0 < found.fraction < 0.15]
    kept.append(evaluate(found.parameters) == (found.objective, found.divergence))
    kept.append(evaluate(start + found.fraction / 0.8 * step)[1] > _DELTA)
    told = torch.tensor([float(each) for each in kept], dtype=_DOUBLE)
    name = "better; within delta; shortened; as told; the one before was not within delta"
    return identity(told, torch.ones(5, dtype=_DOUBLE), problem=on.name, target_name=name)


def _refused(why: str) -> Found:
    start = torch.tensor([0.1, -0.3], dtype=_DOUBLE)
    reached = float("nan") if why == "nan" else -2.0
    found = backtracking_line_search(
        lambda x: (reached, 0.0), start, torch.ones(2, dtype=_DOUBLE), objective=-1.0, max_divergence=1.0
    )
    expected = torch.tensor([0.1, -0.3, 0.0, -1.0, 0.0], dtype=_DOUBLE)
    return identity(_told(found), expected, problem="2 parameters", target_name="start, 0, objective there, 0")


def _pieces() -> list[Tensor]:
    return [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor(5.0), torch.tensor([6.0])]


def _flattened() -> Found:
    expected = torch.arange(1.0, 7.0, dtype=_DOUBLE)
    return identity(flatten(_pieces()), expected, problem="a matrix, a number, a vector", target_name="1 to 6")


def _there_and_back() -> Found:
    pieces = _pieces()
    back = unflatten(torch.arange(1.0, 7.0), pieces)
    same = [float(a.shape == b.shape and torch.equal(a, b)) for a, b in zip(pieces, back, strict=True)]
    found = torch.tensor(same, dtype=_DOUBLE)
    problem = "a matrix, a number, a vector"
    return identity(found, torch.ones(3, dtype=_DOUBLE), problem=problem, target_name="the same shapes and numbers")


def _traced(gradient: Tensor, residual: Tensor, decay: float, weight: Tensor, restart: Tensor | None) -> Tensor:
    """sum_t delta_t z_t of each row, [R, P], from gradients [R, T, P]."""
    trace, total = torch.zeros_like(gradient[:, 0]), torch.zeros_like(gradient[:, 0])
    for time in range(gradient.shape[1]):
        trace = accumulate_trace(
            trace,
            gradient[:, time],
            decay=decay,
            weight=weight[:, time],
            restart=None if restart is None else restart[:, time],
        )
        total = total + residual[:, time].unsqueeze(-1) * trace
    return total


def _residual(on: Stage) -> Tensor:
    return td_residual(on.reward, on.discount, on.value, on.next_value).masked_fill(~on.mask, 0.0)


def _backward_view(unit: Unit, decay: float, *, restarts: bool = True) -> Found:
    """For the critic's table, row by row: sum_t delta_t z_t against sum_t (G^lambda_t - V_t) grad V_t."""
    on = stage(unit=unit, critic="perturbed")
    states = on.solution.value.shape[0]
    gradient = torch.nn.functional.one_hot(on.rows.state, states).to(_DOUBLE)
    ones = torch.ones_like(on.reward)
    restart = (on.trajectory.time == 0) if restarts else None
    found = _traced(gradient, _residual(on), on.gamma * decay, ones, restart)
    target = lambda_return(on.reward, on.discount, on.next_value, on.cut, trace_decay=decay, mask=on.mask)
    ahead = torch.where(on.mask, target - on.value, 0.0)
    expected = torch.einsum("rt,rtp->rp", ahead, gradient)
    return identity(found, expected, problem=on.name, target_name="sum_t (G^lambda_t - V_t) grad V_t of every row")


def _actor(critic: Critic, decay: float) -> Found:
    on = stage(critic=critic)
    weight = discount_weight(on.trajectory.time, on.gamma, dtype=_DOUBLE)
    score = row_gradients(on.log_prob.flatten(), on.setting.parameters).view(*on.mask.shape, -1)
    estimate = _traced(score, _residual(on), on.gamma * decay, weight, on.trajectory.time == 0)
    return _held(on, estimate, on.gradient(), GRAD_J)


def _continuing() -> Found:
    on = stage("ring", unit="fragments")
    score = row_gradients(on.log_prob.flatten(), on.setting.parameters).view(*on.mask.shape, -1)
    residual = on.reward - on.solution.objective + on.next_value - on.value
    estimate = _traced(score, residual, 0.5, torch.ones_like(residual), None) / residual.shape[1]
    return _held(on, estimate, on.gradient("average_reward"), "grad r_bar")


def _held(on: Stage, estimate: Tensor, target: Tensor, target_name: str) -> Found:
    return Found(
        problem=on.name,
        target_name=target_name,
        target=target,
        moments=weighted_moments(on.probability, estimate),
        batches=len(on.rows),
    )
