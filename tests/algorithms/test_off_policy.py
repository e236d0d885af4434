"""What learns from other policies' data, on two episodes worked out by hand."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from tabular_world import gradients, whole_batch
from torch import Tensor
from two_episodes import EXPECTED, chosen, policy_with_values, two_episodes

from upslope.algorithms import A2C, PPO, Algorithm, ImportanceSampled, Now, StaleData, VTraceActorCritic
from upslope.errors import OffPolicyError
from upslope.estimators import lambda_return
from upslope.trajectory import Signal, Trajectory

RATIOS = ((2.0, 0.5, 4.0), (0.5, 3.0))
"""e^{l-b} of the steps of the two episodes: their products are 2, 1, 4 and 0.5, 1.5."""


def stale(ratios: tuple[tuple[float, ...], ...] = RATIOS) -> Trajectory:
    """The two episodes, chosen by a policy under which they were otherwise likely; p_t is the learner's."""
    trajectory = two_episodes(policy_with_values())
    log_prob = trajectory.behaviour_log_prob
    shift = torch.zeros_like(log_prob)
    for row, of_row in enumerate(ratios):
        shift[row, : len(of_row)] = torch.tensor(of_row, dtype=log_prob.dtype).log()
    return replace(trajectory, behaviour_log_prob=log_prob - shift, proximal_log_prob=log_prob)


def signal(algorithm: Algorithm, trajectory: Trajectory) -> Signal:
    value = next_value = None
    if algorithm.passes.critic:
        value, next_value = policy_with_values().values(trajectory)
    return algorithm.advantage(trajectory, value, next_value, Now())


def rounded(trajectory: Trajectory, value: Tensor) -> tuple[list[float], list[float]]:
    first, second = chosen(trajectory, value)
    return [round(entry, 9) for entry in first], [round(entry, 9) for entry in second]


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        (ImportanceSampled(gamma=0.5), ([7.0, 10.0, 16.0], [5.5, 9.0])),
        (ImportanceSampled(gamma=0.5, discounted_states=True), ([7.0, 5.0, 4.0], [5.5, 4.5])),
        (ImportanceSampled(gamma=0.5, weights="trajectory"), ([12.0, 16.0, 16.0], [7.5, 9.0])),
        (ImportanceSampled(gamma=0.5, cap=1.5), ([4.0, 5.0, 6.0], [5.5, 9.0])),
        (ImportanceSampled(gamma=0.5, weights="trajectory", cap=3.0), ([9.0, 12.0, 12.0], [7.5, 9.0])),
        (ImportanceSampled(gamma=0.5, baseline="critic"), ([5.0, 8.0, 4.0], [8.25, 10.5])),
    ],
    ids=["per decision", "gamma^t", "trajectory", "capped", "trajectory capped", "baseline"],
)
def test_weighted_returns_by_hand(algorithm: ImportanceSampled, expected: tuple[list[float], list[float]]) -> None:
    """Rewards 1, 2, 4 and 2, 6; weights 2, 1, 4 and 0.5, 1.5. With the baseline 10 is bootstrapped with weight 1.5."""
    trajectory = stale()
    found = rounded(trajectory, signal(algorithm, trajectory).advantage)
    assert found == expected


def test_self_normalised_weights_have_the_mean_1() -> None:
    """Trajectory weights 4 and 1.5 over their mean, 2.75; returns 3, 4, 4 and 5, 6."""
    trajectory = stale()
    psi = signal(ImportanceSampled(gamma=0.5, weights="trajectory", self_normalised=True), trajectory).advantage
    first, second = chosen(trajectory, psi)
    assert first == pytest.approx([value * 4.0 / 2.75 for value in (3.0, 4.0, 4.0)])
    assert second == pytest.approx([value * 1.5 / 2.75 for value in (5.0, 6.0)])


def test_on_policy_the_weights_change_nothing() -> None:
    trajectory = stale(((1.0, 1.0, 1.0), (1.0, 1.0)))
    for algorithm in (
        ImportanceSampled(gamma=0.5),
        ImportanceSampled(gamma=0.5, weights="trajectory", cap=1.0, self_normalised=True),
    ):
        found = signal(algorithm, trajectory)
        assert rounded(trajectory, found.advantage) == EXPECTED["reward_to_go"]
        assert float(found.metrics["effective_sample_size"]) == pytest.approx(1.0)
        assert float(found.metrics["effective_trajectories"]) == pytest.approx(2.0)


def test_the_effective_sample_size_is_reported_and_refused() -> None:
    """Of trajectory weights 4 and 1.5: 5.5^2 / (2 x 18.25)."""
    trajectory, share = stale(), 5.5**2 / (2 * 18.25)
    plain = ImportanceSampled(gamma=0.5, weights="trajectory")
    metrics = signal(plain, trajectory).metrics
    assert float(metrics["effective_sample_size"]) == pytest.approx(share)
    assert float(metrics["largest_weight"]) == pytest.approx(4.0)
    signal(replace(plain, fewest_effective=share - 0.01), trajectory)
    with pytest.raises(OffPolicyError, match=r"82.88% of the 2 episodes.*fewest_effective = 84.00%"):
        signal(replace(plain, fewest_effective=0.84), trajectory)
    signal(replace(plain, fewest_effective=0.84, cap=1.5), trajectory)


def test_a_weight_that_is_no_number_is_refused() -> None:
    trajectory = stale(((1e300, 1e300, 1.0), (1e300, 1e300)))
    algorithm = ImportanceSampled(gamma=0.5)
    with pytest.raises(OffPolicyError, match="too large to be a number"):
        signal(algorithm, trajectory)
    assert bool(signal(replace(algorithm, self_normalised=True), trajectory).advantage.isfinite().all())


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 1.0])
def test_v_trace_teaches_the_lambda_return_on_policy(gae_lambda: float) -> None:
    """And at lambda = 1 its update is that of A2C."""
    trajectory = stale(((1.0, 1.0, 1.0), (1.0, 1.0)))
    policy = policy_with_values()
    algorithm = VTraceActorCritic(gamma=0.5, gae_lambda=gae_lambda, value_coefficient=0.3, entropy_coefficient=0.01)
    found = signal(algorithm, trajectory)
    assert found.value_target is not None
    _, next_value = policy.values(trajectory)
    expected = lambda_return(
        trajectory.reward,
        trajectory.discount(0.5),
        next_value,
        trajectory.cut,
        trace_decay=gae_lambda,
        mask=trajectory.mask,
    )
    torch.testing.assert_close(found.value_target[trajectory.mask], expected[trajectory.mask], rtol=1e-12, atol=1e-12)
    if gae_lambda == 1.0:
        a2c = A2C(gamma=0.5, value_coefficient=0.3, entropy_coefficient=0.01)
        ours, theirs = (gradients(policy, each, whole_batch(policy, each, trajectory)) for each in (algorithm, a2c))
        for one, two in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


def test_v_trace_by_hand() -> None:
    """gamma = 0.5, V' = 2, 3, 0 and 4, 10: residuals 1, 1.5, 1 and 2, 7; rho and c are 1, 0.5, 1 and 0.5, 1."""
    trajectory = stale()
    found = signal(VTraceActorCritic(gamma=0.5), trajectory)
    assert found.value_target is not None
    assert rounded(trajectory, found.value_target) == ([2.5, 3.0, 4.0], [4.75, 11.0])
    assert rounded(trajectory, found.advantage) == ([1.5, 1.0, 1.0], [2.75, 7.0])
    assert float(found.metrics["importance_weight"]) == pytest.approx(0.8)


def test_v_trace_standardises_before_it_weights() -> None:
    trajectory = stale()
    psi = signal(VTraceActorCritic(gamma=0.5, normalize_advantage=True), trajectory).advantage[trajectory.mask]
    weight = torch.tensor([1.0, 0.5, 1.0, 0.5, 1.0], dtype=torch.float64)
    plain = torch.tensor([1.5, 2.0, 1.0, 5.5, 7.0], dtype=torch.float64)
    torch.testing.assert_close(psi, weight * (plain - plain.mean()) / plain.std(), rtol=1e-6, atol=1e-9)


def test_the_decoupled_objective_weighs_by_the_proximal_policy_and_clips_around_it() -> None:
    """At l = p: the gradient is that of sum of min(cap, e^{p-b}) A_t l_t."""
    policy, trajectory = policy_with_values(), stale()
    algorithm = PPO(
        gamma=0.5,
        gae_lambda=0.5,
        normalize_advantage=False,
        clip=0.01,
        epochs=1,
        minibatches=1,
        value_coefficient=0.0,
        stale=StaleData(anchor="proximal", importance_cap=1.5),
    )
    actor, _ = gradients(policy, algorithm, whole_batch(policy, algorithm, trajectory))
    psi = torch.zeros(7, dtype=torch.float64)
    weight = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.5], dtype=torch.float64)
    psi[:5] = torch.tensor([*EXPECTED["advantage"][0], *EXPECTED["advantage"][1]]) * weight
    taken = torch.zeros(7, 2, dtype=torch.float64)
    taken[range(5), [0, 1, 0, 1, 1]] = 1.0
    score = taken - policy.logits.detach().softmax(-1)
    torch.testing.assert_close(actor, -psi.unsqueeze(-1) * score / 5, rtol=1e-12, atol=1e-14)


CHANGES: dict[type[Any], dict[str, Any]] = {
    VTraceActorCritic: {
        "gamma": 0.5,
        "gae_lambda": 0.5,
        "rho_bar": 2.0,
        "c_bar": 2.0,
        "normalize_advantage": True,
        "value_coefficient": 0.123,
        "entropy_coefficient": 0.123,
        "entropy_schedule": "linear",
    },
    ImportanceSampled: {
        "gamma": 0.5,
        "weights": "trajectory",
        "cap": 2.0,
        "self_normalised": True,
        "baseline": "critic",
        "discounted_states": True,
        "fewest_effective": 0.5,
        "value_coefficient": 0.123,
        "entropy_coefficient": 0.123,
        "entropy_schedule": "linear",
    },
    StaleData: {"anchor": "proximal", "importance_cap": 2.0, "advantage": "vtrace"},
}


def test_describe_tells_every_setting() -> None:
    for kind, changes in CHANGES.items():
        assert set(changes) == {field.name for field in fields(kind)}
    for algorithm in (
        VTraceActorCritic(entropy_coefficient=0.1),
        ImportanceSampled(entropy_coefficient=0.1, baseline="critic"),
    ):
        for name, value in CHANGES[type(algorithm)].items():
            changed = replace(algorithm, **{name: "none" if (name, value) == ("baseline", "critic") else value})
            assert changed.describe() != algorithm.describe(), name
    before = StaleData(anchor="proximal")
    for name, value in (("anchor", "behaviour"), ("importance_cap", 2.0), ("advantage", "vtrace")):
        assert PPO(stale=replace(before, **{name: value})).describe() != PPO(stale=before).describe()


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (VTraceActorCritic, {"rho_bar": 0.0}, "rho_bar is the largest weight"),
        (VTraceActorCritic, {"c_bar": -1.0}, "c_bar is the largest weight"),
        (ImportanceSampled, {"cap": 0.5}, "cap is the largest weight, at least 1"),
        (ImportanceSampled, {"fewest_effective": 1.5}, "fewest_effective is a share"),
        (StaleData, {"importance_cap": 2.0}, 'set anchor to "proximal"'),
        (StaleData, {"anchor": "proximal", "importance_cap": 0.0}, "above 0, or None"),
        (StaleData, {"anchor": "proximl"}, "stale.anchor must be one of"),
        (StaleData, {"importance_cap": math.nan, "anchor": "proximal"}, "above 0, or None"),
    ],
    ids=["rho", "c", "cap", "share", "anchor", "importance", "word", "nan"],
)
def test_settings_without_meaning_are_refused(kind: type[Any], settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kind(**settings)
