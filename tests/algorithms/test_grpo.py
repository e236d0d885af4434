"""GRPO's advantages as peers have them, its metrics, and groups of control trajectories."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sequence_rows import learned, rows_for
from two_episodes import policy_with_values, two_episodes

from upslope.algorithms import GRPO, RLOO, Algorithm, Now, ReferenceKL
from upslope.auditing.source import Recorder
from upslope.errors import UsageError
from upslope.train.step import learn


@pytest.mark.parametrize(
    ("algorithm", "success", "failure"),
    [
        (GRPO(), 2.4749, -0.35355),
        (GRPO(scale="none"), 0.875, -0.125),
        (GRPO(baseline="leave_one_out", scale="leave_one_out"), 1.0, -0.37796),
        (RLOO(), 1.0, -1.0 / 7.0),
    ],
    ids=["grpo", "centred", "nemo", "rloo"],
)
def test_one_success_in_eight(algorithm: Algorithm, success: float, failure: float) -> None:
    trajectory = rows_for(algorithm)
    rows = trajectory.shape[0]
    last = (trajectory.mask * torch.arange(trajectory.shape[1])).amax(-1, keepdim=True)
    reward = torch.zeros_like(trajectory.reward)
    reward[0, last[0]] = 1.0
    groups = torch.arange(rows) // 8
    found = algorithm.advantage(replace(trajectory, reward=reward, group=groups), None, None, Now()).advantage
    assert found[0][trajectory.mask[0]].tolist() == pytest.approx([success] * int(trajectory.mask[0].sum()), abs=1e-4)
    assert float(found[1][trajectory.mask[1]][0]) == pytest.approx(failure, abs=1e-4)
    assert (found[8:] == 0.0).all()
    assert (found[~trajectory.mask] == 0.0).all()


def test_metrics_tell_what_lives_and_what_is_clipped() -> None:
    trajectory = rows_for(GRPO())
    alike = replace(trajectory, reward=torch.zeros_like(trajectory.reward))
    assert learned(GRPO(), alike)[1]["live_share"] == 0.0
    metrics = learned(GRPO(clip_low=1e-6, clip_high=1e-6, reference_kl=ReferenceKL(coefficient=0.1)), trajectory)[1]
    assert metrics["live_share"] > 0.0
    assert metrics["clip_fraction_positive"] > 0.0
    assert metrics["clip_fraction_negative"] > 0.0
    assert metrics["reference_kl"] > 0.0
    assert metrics["kl"] > 0.0


def test_rows_without_groups_are_refused() -> None:
    trajectory = replace(rows_for(GRPO()), group=None)
    with pytest.raises(UsageError, match="these have no group"):
        learned(GRPO(), trajectory)


@pytest.mark.parametrize("ratio", ["step", "sequence"])
def test_control_trajectories_have_groups_too(ratio: str) -> None:
    policy = policy_with_values()
    trajectory = replace(two_episodes(policy), group=torch.zeros(2, dtype=torch.long))
    algorithm = GRPO(scale="none", reduction="trajectory_sum", ratio=ratio)  # pyright: ignore[reportArgumentType]
    recorder = Recorder(tuple(policy.parameters()))
    learn(policy, algorithm, recorder, trajectory, now=Now(), learning_rate=0.0, generator=np.random.default_rng(0))
    total = trajectory.reward.masked_fill(~trajectory.mask, 0.0).sum(-1)
    log_prob = policy.evaluate(trajectory).log_prob.masked_fill(~trajectory.mask, 0.0).sum(-1)
    parameters = list(policy.parameters())
    expected = torch.autograd.grad(((total - total.mean()) * log_prob).mean(), parameters, allow_unused=True)
    flat = torch.cat(
        [torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(parameters, expected, strict=True)]
    )
    torch.testing.assert_close(recorder.ascents[0], flat, check_dtype=False)
