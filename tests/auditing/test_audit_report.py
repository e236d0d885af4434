"""What figures are made of an audit, and what they are taken to mean."""

import math

import pytest
import torch

from upslope import Reinforce
from upslope.auditing import AuditReport, Moments, audit
from upslope.exact import FiniteMDP, NamedProblem, TabularPolicy


def report(mean: list[float], target: list[float], **given) -> AuditReport:
    spread = given.pop("spread", None)
    return AuditReport(
        subject="it",
        problem="here",
        target_name="g",
        target=torch.tensor(target, dtype=torch.float64),
        moments=Moments(mean=torch.tensor(mean, dtype=torch.float64), variance=8.0, spread=spread),
        **given,
    )


def test_figures_by_hand():
    found = report([3.0, 5.0], [3.0, 4.0], trajectories=2.0, steps=10.0)
    assert found.relative_bias == pytest.approx(0.2)
    assert found.interval == pytest.approx((0.2, 0.2))
    assert found.cosine == pytest.approx(29 / (5 * math.sqrt(34)))
    assert found.variance_per_trajectory == pytest.approx(8 * 2 / 25)
    assert found.variance_per_step == pytest.approx(8 * 10 / 25)
    assert found.mean_squared_error == pytest.approx(8 / 25 + 0.04)
    assert found.signal_to_noise == pytest.approx(34 / 16)
    assert found.trajectories_needed(0.1) == pytest.approx(64.0)
    assert found.z is None
    assert found.p_value is None
    assert found.verdict == "biased"


@pytest.mark.parametrize(
    ("error", "verdict"), [(0.0, "unbiased"), (1e-11, "unbiased"), (1e-6, "undecided"), (1e-2, "biased")]
)
def test_exact_verdicts(error, verdict):
    assert report([3.0, 4.0 + error], [3.0, 4.0]).verdict == verdict


def along_axes(*errors: float, draws: int) -> torch.Tensor:
    """A spread whose covariance is diagonal, with these standard errors."""
    generator = torch.Generator().manual_seed(1)
    white, _ = torch.linalg.qr(torch.randn(draws, len(errors), generator=generator, dtype=torch.float64))
    return white * torch.tensor(errors, dtype=torch.float64)


def test_p_value_of_one_direction_is_that_of_a_normal_variable():
    """Bias of 1.96 standard errors in the only direction that varies: p = 0.05 for many draws."""
    found = report([3.0 + 0.5 * 1.96, 4.0], [3.0, 4.0], spread=along_axes(0.5, 0.0, draws=1_000))
    assert found.p_value == pytest.approx(0.05, abs=3e-3)
    assert found.z == pytest.approx(1.96, abs=2e-2)
    assert found.verdict == "unbiased"


def test_where_nothing_was_drawn_nothing_is_known():
    """Off by 0.1 in a direction in which the draws do not vary: perhaps an event too rare to have been drawn."""
    found = report([3.0, 4.1], [3.0, 4.0], spread=along_axes(0.5, 0.0, draws=100))
    assert found.undrawn == pytest.approx(0.02)
    assert found.p_value == pytest.approx(1.0)
    assert found.verdict == "undecided"
    assert "never drawn" in str(found)


def test_a_rare_event_that_was_not_drawn_is_no_bias():
    """State 1 is reached with probability 1e-4 and decides almost all of the gradient."""
    rare = FiniteMDP.from_tables(
        [[[0, 1e-4, 1 - 1e-4]] * 2, [[0, 0, 1]] * 2, [[0, 0, 1]] * 2], [[1, 0], [50.0, -50.0], [0, 0]], terminal=[2]
    )
    named = NamedProblem(name="rare", summary="", mdp=rare, policy=lambda seed: TabularPolicy(3, 2))
    for seed in range(4):
        assert audit(Reinforce(gamma=1.0), named, samples=2_000, seed=seed).verdict != "biased"


@pytest.mark.parametrize(("size", "at_least"), [(3, 70), (80, 20)], ids=["few directions", "more than draws: cautious"])
def test_p_values_where_there_is_no_bias(size, at_least):
    """Of 1,000 audits of an unbiased mean in correlated directions, about a tenth have p < 0.1, and never more."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    low = 0
    for _ in range(1_000):
        blocks = torch.randn(60, size, generator=generator, dtype=torch.float64) @ mix
        spread = (blocks - blocks.mean(0)) / math.sqrt(60 * 59)
        mean = [float(entry) for entry in 1.0 + blocks.mean(0)]
        p = report(mean, [1.0] * size, spread=spread).p_value
        assert p is not None
        low += p < 0.1
    assert at_least < low < 130


@pytest.mark.parametrize(("draws", "size"), [(20, 4), (94, 23)])
def test_small_p_values_are_as_rare_as_they_say(draws, size):
    """Of 5,000 audits of an unbiased mean, p < 0.01 in about 50."""
    generator = torch.Generator().manual_seed(2)
    low = 0
    for _ in range(5_000):
        blocks = torch.randn(draws, size, generator=generator, dtype=torch.float64)
        spread = (blocks - blocks.mean(0)) / math.sqrt(draws * (draws - 1))
        low += Moments(mean=blocks.mean(0), variance=1.0, spread=spread).p_value(blocks.mean(0)) < 0.01
    assert 30 < low < 73


def test_a_gross_bias_in_samples_is_seen_and_held_against_the_declaration():
    found = report([3.5, 4.0], [3.0, 4.0], spread=along_axes(0.01, 0.01, draws=200), declared="unbiased")
    assert found.verdict == "biased"
    assert not found.as_declared
    assert "declared unbiased" in str(found)


def test_a_declared_bias_that_does_not_show_is_not_as_declared():
    assert not report([3.0, 4.0], [3.0, 4.0], declared="biased").as_declared
    assert report([3.0, 4.0], [3.0, 4.0], declared="unbiased").as_declared
    assert report([3.0, 4.0], [3.0, 4.0]).as_declared
