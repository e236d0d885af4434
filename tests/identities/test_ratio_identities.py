"""Importance weights and the objectives built on them: what they are at ratio 1, and what they correct."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from identity_strategies import PROPERTY, SEEDS, close, logits, normal, two_logits
from torch import Tensor

from upslope.algorithms import A2C, PPO, Now
from upslope.estimators import (
    adapted_coefficient,
    cispo,
    clipped,
    clipped_ratio,
    clipped_value_error,
    importance_weighted,
    kl_penalised,
    score_function,
    sequence_log_prob,
    sequence_log_ratio,
    squared_value_error,
    step_mean,
)
from upslope.exact import TabularPolicy
from upslope.trajectory import Batch

CLIPS = st.floats(0.01, 0.99)


def gradient(value: Tensor, log_prob: Tensor) -> Tensor:
    return torch.autograd.grad(value.sum(), log_prob)[0]


@PROPERTY
@given(SEEDS, CLIPS, CLIPS, st.sampled_from([None, 1.5, 3.0]), st.floats(0.0, 5.0))
def test_at_ratio_1_every_surrogate_has_the_vanilla_gradient(
    seed: int, low: float, high: float, dual_clip: float | None, beta: float
) -> None:
    """For any clip and either sign of the advantage; exactly, as e^0 = 1."""
    log_prob, advantage = -normal(seed, 3, 4).abs(), normal(seed + 1, 3, 4)
    before, now = log_prob, log_prob.clone().requires_grad_()
    vanilla = gradient(score_function(now, advantage), now)
    assert torch.equal(vanilla, advantage)
    mask = torch.ones(3, 4, dtype=torch.bool)
    whole = sequence_log_ratio(now, before, mask, length_normalised=False).exp()
    for objective in (
        clipped(now, before, advantage, low=low, high=high, dual_clip=dual_clip),
        clipped(now, before, advantage, low=0.0, high=0.0, dual_clip=dual_clip),
        importance_weighted(now, before, advantage),
        importance_weighted(now, before, advantage, cap=1.0),
        importance_weighted(now, before, advantage, cap=1.0 + high),
        cispo(now, before, advantage, high=high),
        cispo(now, before, advantage, low=low, high=high),
        kl_penalised(now, before, advantage, 0.5 * (now - before).square(), coefficient=beta),
    ):
        assert torch.equal(gradient(objective, now), vanilla)
    per_sequence = clipped_ratio(whole, advantage[:, 0], low=low, high=high, dual_clip=dual_clip)
    assert torch.equal(gradient(per_sequence, now), advantage[:, :1].expand(3, 4))
    mean = sequence_log_ratio(now, before, mask).exp()
    close(gradient(clipped_ratio(mean, advantage[:, 0], low=low, high=high), now), advantage[:, :1].expand(3, 4) / 4)


@st.composite
def ppo_settings(draw: st.DrawFn) -> dict[str, Any]:
    clip = draw(st.one_of(st.none(), CLIPS))
    return {
        "clip": clip,
        "dual_clip": None if clip is None else draw(st.sampled_from([None, 1.5, 3.0])),
        "kl_coefficient": draw(st.floats(0.1, 5.0)) if clip is None else draw(st.sampled_from([0.0, 2.0])),
        "value_clip": draw(st.sampled_from([None, 0.1])),
    }


@PROPERTY
@given(SEEDS, ppo_settings(), st.sampled_from([-1.0, 1.0, None]), st.booleans())
def test_at_ratio_1_the_loss_of_ppo_has_the_vanilla_gradient(
    seed: int, options: dict[str, Any], sign: float | None, standardised: bool
) -> None:
    """The class's own loss, against minus the mean of l A and against A2C's loss, whole."""
    policy = TabularPolicy(4, 3, normal(seed, 4, 3))
    generator = torch.Generator().manual_seed(seed)
    state, action = torch.randint(4, (9,), generator=generator), torch.randint(3, (9,), generator=generator)
    advantage = normal(seed + 1, 9)
    advantage = advantage if sign is None else sign * advantage.abs()
    with torch.no_grad():
        policy.value.copy_(normal(seed + 2, 4))
        log_prob = policy.log_prob(state, action)
    batch = Batch(
        observation=state,
        action=action,
        mask=torch.ones(9, dtype=torch.bool),
        behaviour_log_prob=log_prob,
        advantage=advantage,
        value_target=normal(seed + 3, 9),
        behaviour_value=policy.value.detach()[state],
        behaviour_distribution=None,
        weight=log_prob,
    )
    batch = Batch(
        **{name: getattr(batch, name) for name in Batch.__slots__ if name != "behaviour_distribution"},
        behaviour_distribution=policy.evaluate(batch).distribution.detach(),
    )
    common = {"normalize_advantage": standardised, "value_coefficient": 0.3, "entropy_coefficient": 0.01}
    ppo, a2c = PPO(**common, **options), A2C(**common)
    found: list[tuple[Tensor, ...]] = []
    for algorithm in (ppo, a2c):
        prepared = algorithm.prepare(batch)
        loss = algorithm.loss(prepared, policy.evaluate(prepared), Now(state=algorithm.initial_state()))
        found.append(torch.autograd.grad(loss.value, (policy.theta, policy.value)))
    for one, two in zip(*found, strict=True):
        close(one, two)
    alone = PPO(**options, normalize_advantage=False, value_coefficient=0.0)
    prepared = alone.prepare(batch)
    loss = alone.loss(prepared, policy.evaluate(prepared), Now(state=alone.initial_state()))
    vanilla = -score_function(policy.log_prob(state, action), advantage).mean()
    close(torch.autograd.grad(loss.value, policy.theta)[0], torch.autograd.grad(vanilla, policy.theta)[0])


@PROPERTY
@given(st.floats(0.05, 4.0), st.floats(-3.0, 3.0), CLIPS, CLIPS, st.sampled_from([None, 1.5, 3.0]))
def test_the_clip_is_pessimistic_and_stops_the_gradient_only_where_it_helps(
    ratio: float, advantage: float, low: float, high: float, dual_clip: float | None
) -> None:
    """Never above rho A; the gradient is rho A, or 0 where rho left the interval in the direction A wants."""
    log_prob = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    zero, psi = torch.zeros(1, dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64)
    value = clipped(log_prob, zero, psi, low=low, high=high, dual_clip=dual_clip)
    bound = min(max(ratio, 1 - low), 1 + high)
    floor = -math.inf if dual_clip is None or advantage >= 0 else dual_clip * advantage
    assert value.item() == pytest.approx(max(min(ratio * advantage, bound * advantage), floor), abs=1e-9)
    stopped = (advantage > 0 and ratio > 1 + high) or (advantage < 0 and ratio < 1 - low) or ratio * advantage < floor
    close(gradient(value, log_prob), torch.tensor([0.0 if stopped else ratio * advantage], dtype=torch.float64))
    weighted = importance_weighted(log_prob, zero, psi)
    close(gradient(weighted, log_prob), torch.tensor([ratio * advantage], dtype=torch.float64))
    kept = cispo(log_prob, zero, psi, low=low, high=high)
    close(gradient(kept, log_prob), torch.tensor([bound * advantage], dtype=torch.float64))
    cap = 1.0 + high
    truncated = importance_weighted(log_prob, zero, psi, cap=cap)
    close(truncated.detach(), (min(ratio, cap) * psi * log_prob).detach())
    close(gradient(truncated, log_prob), torch.tensor([min(ratio, cap) * advantage], dtype=torch.float64))


@PROPERTY
@given(two_logits(), SEEDS)
def test_importance_weights_have_mean_1_and_correct_the_expectation(pair: tuple[Tensor, Tensor], seed: int) -> None:
    """Under b: E[e^{l-b}] = 1, E[e^{l-b} psi] = E_pi[psi], and the gradient is E_pi[psi grad l]."""
    policy, behaviour = pair[0].requires_grad_(), pair[1]
    psi, chance = normal(seed, len(behaviour)), behaviour.softmax(-1)
    log_prob, other = policy.log_softmax(-1), behaviour.log_softmax(-1)
    close((chance * importance_weighted(log_prob, other, torch.ones_like(psi))).sum(), torch.ones(()).double())
    weighted = (chance * importance_weighted(log_prob, other, psi)).sum()
    exact = (policy.softmax(-1) * psi).sum()
    close(weighted, exact)
    for value in (weighted, (chance * importance_weighted(log_prob, other, psi, cap=1e9)).sum()):
        found = torch.autograd.grad(value, policy, retain_graph=True)[0]
        close(found, torch.autograd.grad(exact, policy, retain_graph=True)[0])


@PROPERTY
@given(two_logits(), SEEDS)
def test_sequence_ratios_have_mean_1_and_correct_the_expectation(pair: tuple[Tensor, Tensor], seed: int) -> None:
    """exp of the SUM of (l - b) over the chosen steps of all sequences of three."""
    policy, behaviour = (torch.stack([one, one.flip(0), one.roll(1)]) for one in pair)
    count = policy.shape[-1]
    tokens = torch.cartesian_prod(*[torch.arange(count)] * 3)
    place = torch.arange(3)
    log_prob, other = (rows.log_softmax(-1)[place, tokens] for rows in (policy, behaviour))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    ratio = sequence_log_ratio(log_prob, other, mask, length_normalised=False).exp()
    chance = sequence_log_prob(other, mask).exp()
    close((chance * ratio).sum(), torch.ones((), dtype=torch.float64))
    reward = normal(seed, len(tokens))
    close((chance * ratio * reward).sum(), (sequence_log_prob(log_prob, mask).exp() * reward).sum())
    normalised = sequence_log_ratio(log_prob, other, mask)
    close(3 * normalised, (log_prob - other).sum(-1))


@PROPERTY
@given(two_logits(), SEEDS, st.floats(0.05, 3.0))
def test_truncated_weights_underestimate(pair: tuple[Tensor, Tensor], seed: int, cap: float) -> None:
    """For rewards that are not negative; exact where the cap is above every weight, too little where it is not."""
    policy, behaviour = pair
    reward, chance = normal(seed, len(behaviour)).abs(), behaviour.softmax(-1)
    start = policy.log_softmax(-1).detach().requires_grad_()
    objective = importance_weighted(start, behaviour.log_softmax(-1), reward, cap=cap)
    weighted = torch.autograd.grad((chance * objective).sum(), start)[0]  # per action, b(a) min(cap, ratio) R
    exact = policy.softmax(-1) * reward
    assert float(weighted.sum()) <= float(exact.sum()) + 1e-12
    felt = (policy.softmax(-1) / chance) > cap
    close(weighted[~felt], exact[~felt])
    assert (weighted[felt] < exact[felt]).all()
    close(weighted[felt], (cap * chance * reward)[felt])


@PROPERTY
@given(SEEDS, st.floats(0.0, 3.0))
def test_the_kl_penalty_is_subtracted(seed: int, beta: float) -> None:
    log_prob, other, advantage, kl = normal(seed, 4, 5)
    found = kl_penalised(log_prob, other, advantage, kl, coefficient=beta)
    close(found, (log_prob - other).exp() * advantage - beta * kl)


@PROPERTY
@given(st.floats(1e-4, 1.0), st.floats(0.01, 10.0))
def test_the_adaptive_penalty_turns_back_what_it_did(target: float, beta: float) -> None:
    """Twice as much beyond 1.5 target, half below target / 1.5; inside, and at, the bounds as it was."""
    assert adapted_coefficient(beta, 1.51 * target, target=target) == 2 * beta
    assert adapted_coefficient(beta, 0.66 * target, target=target) == beta / 2
    assert adapted_coefficient(2 * beta, 0.0, target=target) == beta
    assert adapted_coefficient(beta, target / 1.5, target=target) == beta
    for inside in (0.67, 1.0, 1.49, 1.5):
        assert adapted_coefficient(beta, inside * target, target=target) == beta


@PROPERTY
@given(SEEDS, st.floats(0.05, 2.0))
def test_the_clipped_value_error_is_the_larger_and_the_plain_one_inside_the_clip(seed: int, clip: float) -> None:
    """0.5 (V - target)^2, with gradient V - target; at V = b both are one."""
    value, target, before = normal(seed, 3, 7)
    value = value.requires_grad_()
    plain = squared_value_error(value, target)
    close(plain.detach(), 0.5 * (value.detach() - target) ** 2)
    close(gradient(plain, value), value.detach() - target)
    held = (before + (value - before).clamp(-clip, clip)).detach()
    found = clipped_value_error(value, target, before, clip=clip)
    close(found.detach(), torch.maximum(plain, 0.5 * (held - target) ** 2).detach())
    alone = clipped_value_error(value, target, before, clip=clip, pessimistic=False)
    close(alone.detach(), 0.5 * (held - target) ** 2)
    inside = (value - before).abs() < clip
    close(gradient(alone, value), torch.where(inside, value - target, 0.0).detach())
    assert torch.equal(clipped_value_error(before, target, before, clip=clip), squared_value_error(before, target))


@PROPERTY
@given(logits(), SEEDS)
def test_numbers_carry_no_gradient(policy: Tensor, seed: int) -> None:
    """Psi, advantages, targets and the log-probs of other policies are numbers."""
    log_prob, other = normal(seed, 2, 5)
    other, psi = other.requires_grad_(), normal(seed + 1, 5).requires_grad_()
    now = log_prob.requires_grad_()
    mask = torch.ones(5, dtype=torch.bool)
    for value in (
        score_function(now, psi),
        importance_weighted(now, other, psi),
        importance_weighted(now, other, psi, cap=1.0),
        clipped(now, other, psi, low=0.2, high=0.2),
        cispo(now, other, psi, high=0.2),
        clipped_ratio(now.exp(), psi, low=0.2, high=0.2, dual_clip=3.0),
        kl_penalised(now, other, psi, torch.zeros(5).double(), coefficient=1.0),
        squared_value_error(now, psi),
        clipped_value_error(now, psi, other, clip=0.1),
        sequence_log_ratio(now, other, mask) * step_mean(mask, dtype=torch.float64).sum(),
    ):
        assert torch.autograd.grad(value.sum(), (other, psi), allow_unused=True, retain_graph=True) == (None, None)
