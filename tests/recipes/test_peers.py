"""The default GRPO of other libraries in our terms: the numbers each makes of one and the same group, by hand."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

import pytest
import torch

from upslope.algorithms import GRPO, Now
from upslope.recipes import RECIPES, load_recipe
from upslope.trajectory import Batch, Trajectory

PEERS = ("grpo-trl", "grpo-verl", "grpo-openrlhf", "grpo-nemo-rl", "grpo-prime-rl")
SUCCESS, FAILURE, TOKENS = 10, 40, 10 + 7 * 40
DEVIATION = sqrt(0.875 * 0.125 * 8 / 7)
OTHERS = sqrt((6 / 7**2 + (6 / 7) ** 2) / 6)


def a_lone_success() -> Trajectory:
    """Eight completions of one prompt with rewards 1, 0, ..., 0: the success 10 tokens long, the failures 40."""
    lengths = torch.tensor([SUCCESS] + [FAILURE] * 7)
    mask = torch.arange(FAILURE) < lengths.unsqueeze(-1)
    last = torch.arange(FAILURE) == lengths.unsqueeze(-1) - 1
    reward = torch.zeros(8, FAILURE)
    reward[0, SUCCESS - 1] = 1.0
    behaviour = torch.where(mask, -1.5, 0.0)
    return Trajectory(
        observation=torch.zeros(8, FAILURE, dtype=torch.int64),
        action=torch.zeros(8, FAILURE, dtype=torch.int64),
        reward=reward,
        terminated=last,
        truncated=torch.zeros_like(mask),
        mask=mask,
        behaviour_log_prob=behaviour,
        time=torch.arange(FAILURE).expand(8, -1),
        final_observation=torch.zeros(0, dtype=torch.int64),
        final_index=torch.zeros(0, dtype=torch.int64),
        group=torch.zeros(8, dtype=torch.int64),
        reference_log_prob=behaviour,
    )


def algorithm_of(name: str) -> GRPO:
    algorithm = load_recipe(name).algorithm
    assert isinstance(algorithm, GRPO)
    return algorithm


@pytest.mark.parametrize(
    ("name", "success", "failure", "of_success", "of_failure"),
    [
        ("grpo-trl", 0.875 / (DEVIATION + 1e-4), -0.125 / (DEVIATION + 1e-4), 0.00853, -0.00122),
        ("grpo-verl", 0.875 / (DEVIATION + 1e-6), -0.125 / (DEVIATION + 1e-6), 0.00853, -0.00122),
        ("grpo-openrlhf", 0.875 / (DEVIATION + 1e-9), -0.125 / (DEVIATION + 1e-9), 0.00853, -0.00122),
        ("grpo-nemo-rl", 1.0, -1 / 7 / (OTHERS + 1e-6), 0.00345, -0.00130),
        ("grpo-prime-rl", 0.875, -0.125, 0.00302, -0.00043),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_library_makes_of_one_group_what_it_is_known_to(
    name: str, success: float, failure: float, of_success: float, of_failure: float
) -> None:
    trajectory, algorithm = a_lone_success(), algorithm_of(name)
    advantage = algorithm.advantage(trajectory, None, None, Now()).advantage
    expected = torch.where(torch.arange(8).unsqueeze(-1) == 0, success, failure) * trajectory.mask
    torch.testing.assert_close(advantage, expected, rtol=1e-6, atol=1e-7)
    batch = Batch(
        observation=trajectory.observation,
        action=trajectory.action,
        mask=trajectory.mask,
        behaviour_log_prob=trajectory.behaviour_log_prob,
        advantage=advantage,
        value_target=None,
        behaviour_value=None,
        behaviour_distribution=None,
        weight=trajectory.behaviour_log_prob,
        reference_log_prob=trajectory.reference_log_prob,
    )
    weighed = algorithm.prepare(batch).weight * advantage
    assert float(weighed[0, 0]) == pytest.approx(success / TOKENS, rel=1e-6) == pytest.approx(of_success, abs=5e-6)
    assert float(weighed[1, 0]) == pytest.approx(failure / TOKENS, rel=1e-6) == pytest.approx(of_failure, abs=5e-6)


def test_what_is_known_of_these_libraries_beside_the_advantage_is_on() -> None:
    trl, verl, openrlhf, nemo, prime = (algorithm_of(name) for name in PEERS)
    assert not trl.reference_kl.on
    assert (trl.dual_clip, verl.dual_clip) == (None, 3.0)
    assert (openrlhf.reference_kl.place, openrlhf.reference_kl.estimate) == ("reward", "k1")
    assert (nemo.reference_kl.place, nemo.reference_kl.estimate) == ("loss", "k3")
    assert (prime.clip_low, prime.clip_high, prime.probability_low, prime.probability_high) == (None, None, 0.2, 0.2)
    assert len({tuple(sorted(algorithm_of(name).describe().items())) for name in PEERS}) == len(PEERS)


def test_openrlhf_adds_the_penalty_of_all_steps_that_follow_after_the_baseline() -> None:
    trajectory = a_lone_success()
    reference = torch.where(trajectory.mask, -2.0, 0.0)
    far = replace(trajectory, reference_log_prob=reference)
    algorithm = algorithm_of("grpo-openrlhf")
    moved = (
        algorithm.advantage(far, None, None, Now()).advantage
        - algorithm.advantage(trajectory, None, None, Now()).advantage
    )
    left = torch.tensor([SUCCESS] + [FAILURE] * 7).unsqueeze(-1) - torch.arange(FAILURE)
    torch.testing.assert_close(moved, -0.01 * 0.5 * left * trajectory.mask, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", PEERS)
def test_runs_of_other_libraries_differ_from_the_flagship_by_the_estimator_alone(name: str) -> None:
    run, flagship = load_recipe(name), load_recipe("arithmetic-grpo")
    assert run == replace(flagship, recipe=name, algorithm=run.algorithm, reference=run.reference)
    assert "Not expressed" in (RECIPES[name].__doc__ or "")
