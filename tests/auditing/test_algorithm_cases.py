"""What algorithms declare, and a check that the audit can tell; test_verification_table.py runs every row."""

from dataclasses import dataclass, replace

import pytest
import torch

from upslope.algorithms import A2C, PPO, OneStepActorCritic, Reinforce, Target
from upslope.auditing import Circumstances, audit
from upslope.auditing.cases.algorithms import altered, cases, variants
from upslope.auditing.declared import declaration, put_to_the_test
from upslope.exact import FiniteMDP, NamedProblem, TabularPolicy


def test_both_kinds_of_declaration_are_put_to_the_test_for_each_algorithm():
    for _, algorithm in variants():
        declared = {declaration(algorithm.target, given)[0] for given in put_to_the_test(algorithm.target, limit=2)}
        assert declared == {"unbiased", "biased"}
    assert {type(algorithm) for _, algorithm in variants()} == {Reinforce, OneStepActorCritic, A2C, PPO}
    assert {type(algorithm) for _, algorithm, _ in altered()} == {Reinforce, OneStepActorCritic, A2C, PPO}


@dataclass(frozen=True, kw_only=True)
class Overstated(A2C):
    """Claims to be right with any critic."""

    @property
    def target(self) -> Target:
        return replace(A2C().target, requires=("on_policy",))


def test_an_overstated_declaration_is_caught():
    report = audit(Overstated(gamma=0.8), circumstances=Circumstances(critic="perturbed"), row_steps=2)
    assert report.declared == "unbiased"
    assert report.verdict == "biased"


@dataclass(frozen=True, kw_only=True)
class Understated(A2C):
    """Claims to be wrong where it is right."""

    @property
    def target(self) -> Target:
        return replace(A2C().target, biased_by=("nothing in truth",))


def test_an_understated_declaration_is_caught():
    report = audit(Understated(gamma=0.8), row_steps=2)
    assert report.declared == "biased"
    assert report.verdict == "unbiased"
    assert not report.as_declared


def test_variance_of_one_row_agrees_between_weighting_and_sampling():
    exact, drawn = audit(Reinforce(gamma=0.8)), audit(Reinforce(gamma=0.8), samples=20_000)
    assert drawn.variance_per_trajectory == pytest.approx(exact.variance_per_trajectory, rel=0.15)
    assert drawn.trajectories == 32
    assert exact.trajectories == 1


def test_a_problem_of_ones_own():
    """One state, two actions that pay 1 and 0: grad J = pi_0 pi_1 (1, -1)."""
    mdp = FiniteMDP.from_tables(
        transition=[[[0.0, 1.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]],
        reward=[[1.0, 0.0], [0.0, 0.0]],
        terminal=[1],
    )
    preferences = torch.tensor([[0.3, -0.1], [0.0, 0.0]])
    named = NamedProblem(
        name="coin", summary="", mdp=mdp, limit=None, policy=lambda seed: TabularPolicy(2, 2, preferences)
    )
    report = audit(Reinforce(gamma=1.0), named)
    left = float(torch.sigmoid(torch.tensor(0.4, dtype=torch.float64)))
    slope = left * (1 - left)
    torch.testing.assert_close(
        report.target, torch.tensor([slope, -slope, 0.0, 0.0], dtype=torch.float64), atol=1e-7, rtol=0
    )
    assert report.verdict == "unbiased"


def test_rows_on_completions_break_one_condition_at_most():
    """A mean over the steps of whole sequences is biased there as it is: nothing else can be seen to break."""
    settings = [
        case.setting
        for case in cases()
        if case.subject in ("A2C", "PPO") and case.setting.startswith("one completion a batch")
    ]
    assert settings == ["one completion a batch; exact critic, on-policy"] * 2


def test_a_network_follows_the_gradient_as_a_table_does():
    found = {case.setting: case.run() for case in cases() if "reward_to_go, a network" in case.setting}
    assert [report.verdict for report in found.values()] == ["unbiased", "biased"]
    assert all(report.as_declared for report in found.values())
    assert {len(report.target) for report in found.values()} == {(7 + 1) * 8 + (8 + 1) * 2}
