"""Rows of potential-based shaping: it takes Phi off every return, and nothing off the gradient or the best actions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from upslope.auditing.cases.case import Case
from upslope.auditing.cases.measurement import Found, identity, row
from upslope.auditing.cases.stage import GRAD_J, STATES_UNDISCOUNTED, Stage, stage
from upslope.estimators import discount_weight, gae, potential_shaping, reward_to_go, score_function
from upslope.exact import FiniteMDP, solve

_SUBJECT = "potential_shaping"
_LEFT_OUT = "without a bootstrap, Phi where the limit cuts stays in the return"


def cases() -> Iterator[Case]:
    """All rows."""
    yield row(_SUBJECT, "F in reward to go: q - Phi; whole episodes", lambda: _less_potential(stage()))
    yield row(_SUBJECT, "F in reward to go: q - Phi; noisy rewards", lambda: _less_potential(stage("noisy-rewards")))
    parts = "F in reward to go: q - Phi; fragments, bootstrapped by v - Phi"
    yield row(_SUBJECT, parts, lambda: _less_potential(stage(unit="fragments"), bootstrap=True))
    limited = "F in reward to go: q - Phi; time limit"
    yield row(_SUBJECT, f"{limited}, bootstrapped by v - Phi", lambda: _less_potential(stage(limit=2), bootstrap=True))
    yield row(_SUBJECT, limited, lambda: _less_potential(stage(limit=2)), biased_by=_LEFT_OUT)
    yield row(_SUBJECT, "as Psi in reward to go, gamma^t kept", lambda: _as_psi(stage(), kept=True))
    yield row(_SUBJECT, "as Psi in reward to go", lambda: _as_psi(stage(), kept=False))
    yield row(_SUBJECT, "GAE with v - Phi is GAE with v, step by step", lambda: _same_residuals(stage()))
    yield row(_SUBJECT, "q of the shaped problem, from its tables", _solved)


def potential_of(states: int) -> Tensor:
    """[S] a potential without pattern, other than 0 on terminal states, too."""
    return 1.5 + torch.sin(2.0 * torch.arange(states, dtype=torch.float64) + 0.5)


def shaped_problem(mdp: FiniteMDP, potential: Tensor) -> FiniteMDP:
    """The same with F in the expected reward of every transition, F by the estimator."""
    shape = mdp.transition.shape
    discount = ((~mdp.terminal).to(torch.float64) * mdp.gamma).expand(shape)
    shaping = potential_shaping(
        discount.reshape(-1, 1),
        potential.view(-1, 1, 1).expand(shape).reshape(-1, 1),
        potential.expand(shape).reshape(-1, 1),
        torch.ones(mdp.transition.numel(), 1, dtype=torch.bool),
    )
    reward = mdp.reward + shaping.view(shape)
    return replace(mdp, reward=reward, reward_value=None, reward_probability=None)


def _potentials(on: Stage) -> tuple[Tensor, Tensor, Tensor]:
    """Phi of every state, and [R, T] at each step and after it, as a critic that knew Phi would have them."""
    potential = potential_of(on.setting.mdp.states)
    at = on.with_critic(potential)
    return potential, at.value, at.next_value


def _shaped(on: Stage) -> Tensor:
    _, present, following = _potentials(on)
    return on.reward + potential_shaping(on.discount, present, following, on.cut, mask=on.mask_if_needed)


def _less_potential(on: Stage, *, bootstrap: bool = False) -> Found:
    potential, _, following = _potentials(on)
    beyond = on.next_value - following if bootstrap else None
    returns = reward_to_go(_shaped(on), on.discount, on.cut, bootstrap=beyond, mask=on.mask_if_needed)
    truth = on.solution.action_value - torch.where(on.setting.mdp.terminal, 0.0, potential).unsqueeze(-1)
    return on.estimate(returns, truth, "q(s,a) - Phi(s) of every state and action")


def _as_psi(on: Stage, *, kept: bool) -> Found:
    returns = reward_to_go(_shaped(on), on.discount, on.cut, mask=on.mask_if_needed)
    weight = discount_weight(on.trajectory.time, on.gamma if kept else 1.0, dtype=torch.float64)
    target = on.gradient("discounted" if kept else "undiscounted_states")
    name = f"{GRAD_J if kept else STATES_UNDISCOUNTED} of the problem without F"
    return on.ascent(score_function(on.log_prob, returns), target, name, weight=weight)


def _same_residuals(on: Stage) -> Found:
    _, present, following = _potentials(on)
    parts = {"gae_lambda": 0.5, "mask": on.mask_if_needed}
    plain = gae(on.reward, on.discount, on.value, on.next_value, on.cut, **parts)
    shaped = gae(_shaped(on), on.discount, on.value - present, on.next_value - following, on.cut, **parts)
    return identity(shaped, plain, problem=on.name, target_name="GAE without F")


def _solved() -> Found:
    on = stage()
    mdp = on.setting.mdp
    potential = potential_of(mdp.states)
    with torch.no_grad():
        found = solve(shaped_problem(mdp, potential), on.setting.policy).action_value
    going = ~mdp.terminal
    expected = on.solution.action_value - potential.unsqueeze(-1)
    return identity(found[going], expected[going], problem=on.name, target_name="q(s,a) - Phi(s)")
