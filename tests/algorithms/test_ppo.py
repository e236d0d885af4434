"""PPO: the shapes of its clips by hand, its KL penalty, its rules for stopping, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from tabular_world import Choice, TabularPolicy, gradients, whole_batch
from torch import Tensor
from two_episodes import EXPECTED, chosen, policy_with_values, two_episodes

from upslope.algorithms import A2C, PPO, Now, ReferenceKL, StaleData
from upslope.train.config import OptimizerConfig
from upslope.train.optimizer import FlatOptimizer
from upslope.train.step import Learned, learn
from upslope.trajectory import Batch, Evaluation


def steps(
    ratio: list[float],
    advantage: list[float],
    *,
    value: tuple[list[float], list[float], list[float]] | None = None,
) -> tuple[Batch, Evaluation, Tensor]:
    """Steps with these ratios and advantages, and (V, old V, target); the log-probs to differentiate by."""
    count = len(ratio)
    log_prob = torch.tensor(ratio, dtype=torch.float64).log().requires_grad_()
    zero = torch.zeros(count, dtype=torch.float64)
    v, old, target = (zero, zero, zero) if value is None else (torch.tensor(x, dtype=torch.float64) for x in value)
    batch = Batch(
        observation=torch.zeros(count, dtype=torch.long),
        action=torch.zeros(count, dtype=torch.long),
        mask=torch.ones(count, dtype=torch.bool),
        behaviour_log_prob=zero,
        advantage=torch.tensor(advantage, dtype=torch.float64),
        value_target=target,
        behaviour_value=old,
        behaviour_distribution=Choice(torch.zeros(count, 2, dtype=torch.float64)),
        weight=zero,
    )
    logits = torch.tensor([[0.0, 1.0]], dtype=torch.float64).expand(count, 2)
    evaluation = Evaluation(log_prob=log_prob, entropy=zero, distribution=Choice(logits), value=v.requires_grad_())
    return batch, evaluation, log_prob


def loss_of(algorithm: PPO, batch: Batch, evaluation: Evaluation, now: Now | None = None) -> Any:
    return algorithm.loss(algorithm.prepare(batch), evaluation, now or Now(state=algorithm.initial_state()))


PLAIN = PPO(normalize_advantage=False, clip=0.2)


def test_the_clipped_objective_and_where_its_gradient_ends() -> None:
    """min(rho A, clip(rho) A) for rho of 1.5 and 0.5 and both signs of A; -1/4 of its mean's gradient is rho A."""
    batch, evaluation, log_prob = steps([1.5, 1.5, 0.5, 0.5, 1.1], [1.0, -1.0, 1.0, -1.0, 2.0])
    loss = loss_of(PLAIN, batch, evaluation)
    assert float(loss.value.detach()) == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8 + 2.2) / 5, abs=1e-12)
    loss.value.backward()
    assert log_prob.grad is not None
    expected = torch.tensor([0.0, 1.5, -0.5, 0.0, -2.2], dtype=torch.float64) / 5
    torch.testing.assert_close(log_prob.grad, expected, rtol=1e-12, atol=1e-14)
    assert float(loss.metrics["clip_fraction"]) == pytest.approx(4 / 5)
    kl = sum(ratio - 1.0 - math.log(ratio) for ratio in (1.5, 1.5, 0.5, 0.5, 1.1)) / 5
    assert float(loss.metrics["kl"]) == pytest.approx(kl, abs=1e-12)


def test_the_dual_clip_bounds_what_a_negative_advantage_can_do() -> None:
    batch, evaluation, log_prob = steps([5.0, 5.0], [1.0, -1.0])
    loss = loss_of(replace(PLAIN, dual_clip=3.0), batch, evaluation)
    assert float(loss.value.detach()) == pytest.approx(-(1.2 - 3.0) / 2, abs=1e-12)
    loss.value.backward()
    assert log_prob.grad is not None
    assert log_prob.grad.tolist() == [0.0, 0.0]


def test_the_clip_shrinks_along_its_schedule() -> None:
    batch, evaluation, _ = steps([1.5], [1.0])
    for progress, clip in ((0.0, 0.2), (0.5, 0.1), (1.0, 0.0)):
        loss = loss_of(replace(PLAIN, clip_schedule="linear"), batch, evaluation, Now(progress=progress))
        assert float(loss.value.detach()) == pytest.approx(-(1.0 + clip), abs=1e-12)


def value_gradient(algorithm: PPO) -> tuple[float, list[float]]:
    """V = 2, old V = 1 and targets on both sides: beyond the clip and towards the target, and away from it."""
    batch, evaluation, _ = steps([1.0, 1.0], [0.0, 0.0], value=([2.0, 2.0], [1.0, 1.0], [0.0, 4.0]))
    loss = loss_of(algorithm, batch, evaluation)
    loss.value.backward()
    assert evaluation.value is not None
    assert evaluation.value.grad is not None
    return float(loss.value.detach()), evaluation.value.grad.tolist()


def test_the_plain_value_error() -> None:
    """0.5 * (2 - 0)^2 and 0.5 * (2 - 4)^2, times c_V / 2."""
    value, gradient = value_gradient(replace(PLAIN, value_coefficient=0.5))
    assert value == pytest.approx(0.5 * (2.0 + 2.0) / 2)
    assert gradient == pytest.approx([0.5, -0.5])


def test_the_pessimistic_value_clip_takes_the_larger_error() -> None:
    """Clipped to 1.5: errors 1.125 and 3.125; the larger are 2 (with a gradient) and 3.125 (without)."""
    value, gradient = value_gradient(replace(PLAIN, value_coefficient=0.5, value_clip=0.5))
    assert value == pytest.approx(0.5 * (2.0 + 3.125) / 2)
    assert gradient == pytest.approx([0.5, 0.0])


def test_the_value_clip_of_sb3_takes_the_clipped_error_alone() -> None:
    algorithm = replace(PLAIN, value_coefficient=0.5, value_clip=0.5, value_clip_pessimistic=False)
    value, gradient = value_gradient(algorithm)
    assert value == pytest.approx(0.5 * (1.125 + 3.125) / 2)
    assert gradient == [0.0, 0.0]


def test_the_kl_penalty_replaces_the_clip() -> None:
    """rho A - beta KL(old || new), with old uniform and new (1, e) / (1 + e)."""
    algorithm = PPO(normalize_advantage=False, clip=None, kl_coefficient=3.0)
    batch, evaluation, log_prob = steps([1.5, 0.5], [1.0, 2.0])
    loss = loss_of(algorithm, batch, evaluation)
    kl = -math.log(2.0) - 0.5 * (math.log(1 / (1 + math.e)) + math.log(math.e / (1 + math.e)))
    assert float(loss.value.detach()) == pytest.approx(-(1.5 + 1.0) / 2 + 3.0 * kl, abs=1e-12)
    assert float(loss.metrics["kl_exact"]) == pytest.approx(kl, abs=1e-12)
    loss.value.backward()
    assert log_prob.grad is not None
    assert log_prob.grad.tolist() == pytest.approx([-0.75, -0.5])


def test_the_penalty_uses_the_carried_coefficient() -> None:
    algorithm = PPO(normalize_advantage=False, kl_coefficient=3.0, kl_target=0.01)
    batch, evaluation, _ = steps([1.0], [0.0])
    losses = [
        float(loss_of(algorithm, batch, evaluation, Now(state={"kl_coefficient": beta})).value.detach())
        for beta in (3.0, 6.0)
    ]
    assert losses[1] == pytest.approx(2.0 * losses[0])


@pytest.mark.parametrize(
    ("kl", "expected"), [(0.0151, 2.0), (0.0149, 1.0), (0.01, 1.0), (0.0067, 1.0), (0.0066, 0.5), (0.0, 0.5)]
)
def test_beta_is_doubled_beyond_and_halved_below_its_target(kl: float, expected: float) -> None:
    algorithm = PPO(kl_coefficient=1.0, kl_target=0.01)
    assert algorithm.adapt({"kl_coefficient": 1.0}, {"kl_after": kl}) == {"kl_coefficient": expected}


def test_beta_stays_where_no_target_is_set() -> None:
    algorithm = PPO(kl_coefficient=1.0)
    assert algorithm.adapt({"kl_coefficient": 1.0}, {"kl_after": 9.0}) == {"kl_coefficient": 1.0}
    assert PPO().initial_state() == {}


def test_the_advantage_is_gae_and_the_target_the_lambda_return() -> None:
    policy = policy_with_values()
    trajectory = two_episodes(policy)
    batch = whole_batch(policy, PPO(gamma=0.5, gae_lambda=0.5, normalize_advantage=False), trajectory)
    assert chosen(trajectory, batch.advantage) == EXPECTED["advantage"]
    assert batch.value_target is not None
    assert chosen(trajectory, batch.value_target) == EXPECTED["action_value"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dual_clip": 3.0},
        {"value_clip": 0.2},
        {"kl_coefficient": 3.0},
        {"clip": None, "kl_coefficient": 3.0},
        {"normalize_advantage": True},
    ],
)
def test_at_ratio_1_the_gradient_is_that_of_a2c(options: dict[str, Any]) -> None:
    policy = policy_with_values()
    trajectory = two_episodes(policy)
    common = {"gamma": 0.5, "gae_lambda": 0.5, "value_coefficient": 0.3, "entropy_coefficient": 0.01}
    ppo = PPO(**{"normalize_advantage": False, **common, **options})
    a2c = A2C(**common, normalize_advantage=ppo.normalize_advantage)
    left = gradients(policy, ppo, whole_batch(policy, ppo, trajectory))
    right = gradients(policy, a2c, whole_batch(policy, a2c, trajectory))
    for one, two in zip(left, right, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


# --- passes over a batch -------------------------------------------------------------------------------------------


def update(
    algorithm: PPO, *, learning_rate: float, policy: TabularPolicy | None = None
) -> tuple[Learned, TabularPolicy]:
    """One update of 5 steps of two episodes with plain gradient descent."""
    policy = policy or policy_with_values()
    optimizer = FlatOptimizer(policy, OptimizerConfig(kind="sgd", max_gradient_norm=None))
    learned = learn(
        policy,
        algorithm,
        optimizer,
        two_episodes(policy),
        now=Now(state=algorithm.initial_state()),
        learning_rate=learning_rate,
        generator=np.random.default_rng(0),
    )
    return learned, policy


FIVE = PPO(gamma=0.5, epochs=5, minibatches=1, normalize_advantage=False, clip=0.9)


def kl_estimates(count: int, learning_rate: float) -> list[float]:
    """k3 estimates of KL(old || new) before each of the full-batch steps, from runs that never stop."""
    estimates: list[float] = []
    for epochs in range(2, count + 2):
        learned, _ = update(replace(FIVE, epochs=epochs), learning_rate=learning_rate)
        estimates.append(learned.metrics["kl"] * epochs - sum(estimates))
    return [0.0, *estimates]


def test_without_a_target_every_pass_is_taken() -> None:
    learned, _ = update(FIVE, learning_rate=0.05)
    assert learned.metrics["optimizer_steps"] == 5


def test_before_step_stops_before_the_first_step_beyond_one_and_a_half_targets() -> None:
    kl = kl_estimates(3, 0.05)
    assert 0.0 < kl[1] < kl[2] < kl[3]
    for steps_taken in (1, 2):
        beyond = replace(FIVE, target_kl=0.999 * kl[steps_taken] / 1.5)
        learned, stopped = update(beyond, learning_rate=0.05)
        assert learned.metrics["optimizer_steps"] == steps_taken
        _, expected = update(replace(FIVE, epochs=steps_taken), learning_rate=0.05)
        assert torch.equal(stopped.logits, expected.logits)
        within = replace(FIVE, target_kl=1.001 * kl[steps_taken] / 1.5)
        learned, _ = update(within, learning_rate=0.05)
        assert learned.metrics["optimizer_steps"] == steps_taken + 1


def test_after_epoch_takes_the_step_and_stops_beyond_one_target() -> None:
    kl = kl_estimates(3, 0.05)
    for epoch in (1, 2):
        beyond = replace(FIVE, target_kl=0.999 * kl[epoch], kl_stop="after_epoch")
        learned, _ = update(beyond, learning_rate=0.05)
        assert learned.metrics["optimizer_steps"] == epoch + 1
        within = replace(FIVE, target_kl=1.001 * kl[epoch], kl_stop="after_epoch")
        learned, _ = update(within, learning_rate=0.05)
        assert learned.metrics["optimizer_steps"] == epoch + 2


def test_before_step_ends_all_passes_and_after_epoch_looks_once_a_pass() -> None:
    """Five minibatches of one state each: nothing has moved where a pass looks first, everything in the second."""
    common = replace(FIVE, epochs=3, minibatches=5, target_kl=1e-12)
    learned, _ = update(common, learning_rate=1.0)
    assert learned.metrics["optimizer_steps"] == 5
    learned, _ = update(replace(common, kl_stop="after_epoch"), learning_rate=1.0)
    assert learned.metrics["optimizer_steps"] == 10


def test_the_kl_after_the_update_is_exact_and_adapts_beta() -> None:
    algorithm = replace(FIVE, kl_coefficient=1.0, kl_target=1e-9)
    before = Choice(policy_with_values().logits.detach()[:5])
    learned, policy = update(algorithm, learning_rate=0.05)
    expected = before.kl(Choice(policy.logits.detach()[:5])).mean()
    assert learned.metrics["kl_after"] == pytest.approx(float(expected), rel=1e-9)
    assert learned.state == {"kl_coefficient": 2.0}
    learned, _ = update(replace(algorithm, kl_target=1e9), learning_rate=0.05)
    assert learned.state == {"kl_coefficient": 0.5}


def test_advantages_are_computed_once_or_before_every_pass() -> None:
    policy = policy_with_values()
    update(FIVE, learning_rate=0.01, policy=policy)
    assert policy.critic_calls == 1
    policy = policy_with_values()
    update(replace(FIVE, recompute_advantage=True), learning_rate=0.01, policy=policy)
    assert policy.critic_calls == 5


def test_recomputed_advantages_use_the_critic_of_the_moment() -> None:
    """With a critic that learns fast, two passes with recomputation are two one-pass updates of the critic."""
    two = replace(FIVE, gamma=0.5, gae_lambda=0.0, epochs=2, value_coefficient=5.0)
    _, recomputed = update(replace(two, recompute_advantage=True), learning_rate=0.1)
    _, once = update(two, learning_rate=0.1)
    _, in_turn = update(replace(two, epochs=1), learning_rate=0.1)
    update(replace(two, epochs=1), learning_rate=0.1, policy=in_turn)
    torch.testing.assert_close(recomputed.value, in_turn.value, rtol=1e-12, atol=1e-12)
    assert (once.value - in_turn.value).abs().max() > 0.01


# --- what it refuses and what it tells -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"clip": None}, "something to hold it"),
        ({"clip": 0.0}, "between 0 and 1"),
        ({"clip": 1.0}, "between 0 and 1"),
        ({"dual_clip": 1.0}, "greater than 1"),
        ({"clip": None, "kl_coefficient": 1.0, "dual_clip": 3.0}, "set clip too"),
        ({"kl_target": 0.01}, "set kl_coefficient"),
        ({"kl_coefficient": -1.0}, "at least 0"),
        ({"kl_coefficient": 1.0, "kl_target": 0.0}, "kl_target must be positive"),
        ({"target_kl": 0.0}, "target_kl must be positive"),
        ({"value_clip": -0.2}, "value_clip must be positive"),
        ({"epochs": 0}, "at least 1"),
        ({"minibatches": 0}, "at least 1"),
    ],
)
def test_settings_without_meaning_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PPO(**options)


CHANGES: dict[str, tuple[PPO, Any]] = {
    "gamma": (PPO(), 0.5),
    "gae_lambda": (PPO(), 0.5),
    "epochs": (PPO(), 3),
    "minibatches": (PPO(), 3),
    "clip": (PPO(), 0.123),
    "clip_schedule": (PPO(), "linear"),
    "normalize_advantage": (PPO(), False),
    "value_coefficient": (PPO(), 0.123),
    "entropy_coefficient": (PPO(), 0.123),
    "entropy_schedule": (PPO(entropy_coefficient=0.1), "linear"),
    "dual_clip": (PPO(), 3.0),
    "value_clip": (PPO(), 0.123),
    "value_clip_pessimistic": (PPO(value_clip=0.2), False),
    "kl_coefficient": (PPO(), 0.123),
    "kl_target": (PPO(kl_coefficient=1.0), 0.123),
    "target_kl": (PPO(), 0.123),
    "kl_stop": (PPO(target_kl=0.01), "after_epoch"),
    "recompute_advantage": (PPO(), True),
    "reference_kl": (PPO(), ReferenceKL(coefficient=0.1)),
    "stale": (PPO(), StaleData(anchor="proximal")),
}


def test_describe_tells_every_setting() -> None:
    assert set(CHANGES) == {field.name for field in fields(PPO)}
    for name, (base, value) in CHANGES.items():
        assert replace(base, **{name: value}).describe() != base.describe(), name


def test_more_minibatches_than_steps_are_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"5 steps cannot be cut into 6 minibatches.*lower algorithm.minibatches"):
        update(replace(FIVE, minibatches=6), learning_rate=0.01)
