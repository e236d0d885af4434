"""What is said of a mean ascent direction beside exact gradients."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from upslope.auditing import loss_audit as module
from upslope.auditing.candidates import Candidate, candidates_of, single
from upslope.auditing.following import Following, what_it_follows
from upslope.auditing.loss_audit import audit_loss
from upslope.auditing.moments import Moments, sampled_moments
from upslope.auditing.setting import FiniteSetting
from upslope.auditing.tokens import TokenSetting
from upslope.errors import UsageError
from upslope.exact import (
    FiniteMDP,
    NamedProblem,
    TabularPolicy,
    TokenMDP,
    policy_gradient,
    problem,
    time_limited,
    token_problem,
)
from upslope.exact.gradient import Gradient


def vector(*entries: float) -> Tensor:
    return torch.tensor(entries, dtype=torch.float64)


CANDIDATES = (
    single("grad A", vector(3, 4, 0, 0)),
    single("grad B", vector(0, 0, 2, 0)),
    Candidate(terms=("grad A", "grad B"), basis=torch.stack([vector(3, 4, 0, 0), vector(0, 0, 2, 0)])),
)


def follows(*mean: float, variance: float = 1.0, directions: int = 4) -> Following:
    return what_it_follows(Moments(mean=vector(*mean), variance=variance), CANDIDATES, directions=directions)


def test_in_words() -> None:
    assert str(follows(3, 4, 0, 0)) == "unbiased for grad A"
    assert str(follows(0, 0, 2, 0)) == "unbiased for grad B"
    assert str(follows(1.5, 2, 0, 0)) == "proportional to grad A (factor 0.5)"
    assert str(follows(0, 0, -3, 0)) == "points downhill: proportional to grad B (factor -1.5)"
    assert str(follows(3, 4, -1, 0)) == "follows 1 x grad A - 0.5 x grad B"
    assert str(follows(0, 0, 0, 0)).startswith("follows nothing: its mean gradient is 0")
    assert str(follows(3, 4, 0, 5)) == "follows none of these: closest grad A, cosine 0.7071, angle 45 degrees"
    assert str(follows(-3, -4, 0, 5)).startswith("points downhill: follows none of these: closest grad A")


def test_float32_rounding_is_no_bias_and_a_ten_thousandth_is() -> None:
    assert follows(3 + 1e-6, 4, 0, 0).kind == "unbiased"
    assert follows(3 + 1e-4, 4, 0, 0).kind == "none"
    assert follows(1e-9, 0, 0, 0).kind == "nothing"
    assert follows(1e-9, 0, 0, 0, variance=1e-20).kind == "none"


def test_in_one_direction_everything_is_proportional_to_everything() -> None:
    assert follows(1.5, 2, 0, 0, directions=1).kind == "undetermined"
    assert follows(3, 4, 0, 0, directions=1).kind == "unbiased"
    assert follows(3, 4, -1, 0, directions=2).kind == "none"


def test_at_right_angles_nothing_points_downhill() -> None:
    found = follows(-0.03, 0, -0.02, 5)
    assert found.kind == "none"
    assert not found.downhill
    assert str(found) == "follows none of these: closest grad B, cosine -0.0040, angle 90.2 degrees"
    assert found.target_name == "grad B"
    torch.testing.assert_close(found.target, vector(0, 0, 2, 0))


def test_no_direction_in_any_batch_is_not_noise() -> None:
    found = follows(0, 0, 0, 0, variance=0.0, directions=0)
    assert found.kind == "constant"
    assert str(found).startswith("follows nothing: the loss does not depend on the policy's log-probabilities")


def test_a_downhill_loss_is_reported_as_biased() -> None:
    found = follows(-3, -4, 0, 0)
    torch.testing.assert_close(found.target, vector(3, 4, 0, 0))


def test_comparisons() -> None:
    found = follows(3, 4, 2, 0)
    assert found.comparison("grad B").cosine == pytest.approx(2 / math.sqrt(29))
    assert found.comparison("grad A").factor == pytest.approx(1.0)
    assert found.closest.name == "grad A"
    with pytest.raises(KeyError, match=r"no candidate is called 'grad C'; there are .*grad B"):
        found.comparison("grad C")


def test_drawn_batches_leave_doubt() -> None:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(400, 4, generator=generator, dtype=torch.float64)
    found = what_it_follows(sampled_moments(noise + vector(3, 4, 0, 0)), CANDIDATES, directions=4)
    assert str(found) == "unbiased for grad A (as far as the drawn batches show)"
    found = what_it_follows(sampled_moments(noise + vector(3, 4, 0, 3)), CANDIDATES, directions=4)
    assert found.kind == "none"
    found = what_it_follows(sampled_moments(noise), CANDIDATES, directions=4)
    assert found.kind == "nothing"


def test_drawn_batches_name_what_they_cannot_tell_apart() -> None:
    near = (*CANDIDATES, single("grad A'", vector(3, 4, 0.01, 0)), single("half", vector(1.5, 2, 0, 0)))
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(400, 4, generator=generator, dtype=torch.float64)
    found = what_it_follows(sampled_moments(noise + vector(3, 4, 0, 0)), near, directions=4)
    assert sorted([found.target_name, *found.alike]) == ["grad A", "grad A'"]
    found = what_it_follows(sampled_moments(noise + vector(6, 8, 0, 0)), near, directions=4)
    assert found.kind == "proportional"
    assert len(found.alike) == 1
    assert "; so would grad A" in str(found)


def test_control_candidates_are_the_gradients_they_are_called() -> None:
    setting = FiniteSetting.build(problem("time-limit"), gamma=0.9, unit="episodes")
    found = {candidate.terms[0]: candidate.basis[0] for candidate in candidates_of(setting)}
    undiscounted = replace(setting.mdp, gamma=1.0)
    bootstrapped, ended = (
        " of episodes cut at 4 steps and bootstrapped there",
        " of episodes that end at 4 steps for good",
    )
    for name, mdp, one, limit in (
        (bootstrapped, setting.mdp, undiscounted, 4),
        (ended, time_limited(setting.mdp, 4), time_limited(undiscounted, 4), None),
    ):

        def exact(mdp: FiniteMDP, gradient: Gradient = "discounted", limit: int | None = limit) -> Tensor:
            return policy_gradient(mdp, setting.policy, gradient=gradient, limit=limit, parameters=setting.parameters)

        for expected, words in (
            (exact(mdp), f"grad J{name}"),
            (exact(mdp, "undiscounted_states"), f"grad J{name} with gamma^t dropped"),
            (exact(one), f"grad J of the undiscounted return{name}"),
        ):
            torch.testing.assert_close(found[words], expected)
            torch.testing.assert_close(found[f"{words} / mean length"], expected / setting.mean_length)
    assert len(found) == 12


def test_without_discount_there_is_no_gamma_to_drop() -> None:
    setting = FiniteSetting.build(problem("six-state"), gamma=1.0, unit="episodes")
    assert [candidate.terms[0] for candidate in candidates_of(setting)] == ["grad J", "grad J / mean length"]


def going_on() -> FiniteMDP:
    """Two states and no end: the second is worth going to, and more so staying in."""
    transition = torch.eye(2, dtype=torch.float64).expand(2, 2, 2)
    reward = torch.tensor([[[0.0, 1.0]], [[2.0, 5.0]]], dtype=torch.float64).expand(2, 2, 2)
    return FiniteMDP(
        transition=transition,
        reward=reward,
        start=torch.tensor([1.0, 0.0], dtype=torch.float64),
        terminal=torch.zeros(2, dtype=torch.bool),
        gamma=0.8,
    )


def named(mdp: FiniteMDP, limit: int | None = None) -> NamedProblem:
    return NamedProblem(
        name="mine", summary="", mdp=mdp, policy=lambda seed: TabularPolicy(mdp.states, mdp.actions), limit=limit
    )


def test_where_episodes_need_not_end_only_those_cut_for_good_have_an_undiscounted_return() -> None:
    setting = FiniteSetting.build(named(going_on(), limit=3), gamma=0.8, unit="episodes")
    names = [candidate.terms[0] for candidate in candidates_of(setting)]
    assert "grad J of the undiscounted return of episodes that end at 3 steps for good" in names
    assert "grad J of the undiscounted return of episodes cut at 3 steps and bootstrapped there" not in names
    with pytest.raises(UsageError, match="episodes of mine need not end: give them a time limit"):
        audit_loss(score, named(going_on()))


def score(log_prob, reward, mask, time, gamma):
    worth = (reward * gamma**time * mask).sum(-1, keepdim=True)
    return -(log_prob * worth * mask).sum(-1).mean()


@pytest.mark.parametrize("name", ["tokens", "tokens-binary", "bandit", "two-state", "six-state", "noisy-rewards"])
def test_the_score_times_the_return_follows_grad_j_on_named_problems(name: str) -> None:
    found = audit_loss(score, name, size=1)
    assert str(found.following) == "unbiased for grad J"
    assert found.report.verdict != "biased"
    assert str(found).splitlines()[0] == "score: unbiased for grad J"
    assert str(found).splitlines()[-1].split()[0] == "grad" if "token" in name else True


def test_a_tree_for_machines() -> None:
    found = audit_loss(score, "two-state", gamma=0.9).tree()
    assert found["follows"] == "unbiased for grad J"
    assert found["kind"] == "unbiased"
    assert found["subject"] == "score"
    assert json.loads(json.dumps(found)) == found


def test_samples_and_weighting_agree() -> None:
    exact = audit_loss(score, "two-state", gamma=0.9)
    drawn = audit_loss(score, "two-state", gamma=0.9, samples=32_000)
    assert drawn.following.kind == "unbiased"
    assert not drawn.report.moments.exact
    assert drawn.report.trajectories == 32
    assert drawn.report.variance_per_trajectory == pytest.approx(exact.report.variance_per_trajectory, rel=0.2)


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("tokenz", "there is no problem 'tokenz'; there are: .*tokens"),
        ("ring", "goes on without end"),
        (problem("ring").mdp, "goes on without end"),
        (3, "3 is no problem: give a name, a FiniteMDP, a TokenMDP, a NamedProblem, a FiniteSetting or a TokenSetting"),
        ([], r"\[\] is no problem"),
    ],
)
def test_problems_that_cannot_be(where: module.Problem, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        audit_loss(score, where)


def without_gamma(log_prob, reward, mask):
    return -(log_prob * (reward * mask).sum(-1, keepdim=True) * mask).sum(-1).mean()


def to_go(log_prob, reward, mask):
    gain = (reward * mask).flip(-1).cumsum(-1).flip(-1)
    return -(log_prob * gain * mask).sum(-1).mean()


@pytest.mark.parametrize("loss", [without_gamma, to_go])
def test_a_loss_that_knows_no_gamma_follows_the_undiscounted_return(loss: module.LossFunction) -> None:
    found = audit_loss(loss, problem="six-state", gamma=0.9)
    assert str(found.following) == "unbiased for grad J of the undiscounted return"
    assert found.report.verdict == "unbiased"
    limited = audit_loss(loss, "time-limit", gamma=0.9).following
    assert str(limited) == "unbiased for grad J of the undiscounted return of episodes that end at 4 steps for good"


def choice(reward: float = 1.0) -> FiniteMDP:
    """One choice of two: the second is worth something."""
    transition = torch.zeros(2, 2, 2, dtype=torch.float64)
    transition[:, :, 1] = 1.0
    table = torch.zeros(2, 2, 2, dtype=torch.float64)
    table[0, 1, 1] = reward
    start, terminal = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([False, True])
    return FiniteMDP(transition=transition, reward=table, start=start, terminal=terminal)


def test_a_problem_of_your_own_gets_a_random_policy() -> None:
    tokens = TokenMDP(vocabulary=2, end=0, limit=2, prompts=((1,),), reward=lambda _, said: float(len(said)))
    for where in (choice(), named(choice()), tokens, problem("six-state"), problem("two-state").mdp):
        assert audit_loss(score, where).following.kind == "unbiased"
    assert audit_loss(score, choice()).report.problem == "your problem"
    aliased = problem("short-corridor").mdp
    assert module.setting_of(aliased, 2, None, 0).policy.evaluate is not None


def test_a_setting_is_taken_as_it_is() -> None:
    found = audit_loss(score, FiniteSetting.build(problem("two-state"), gamma=0.7, unit="episodes"))
    assert str(found.following) == "unbiased for grad J"
    assert audit_loss(score, TokenSetting.build("tokens-binary", size=1)).following.kind == "unbiased"
    with pytest.raises(UsageError, match="a setting has its own discount"):
        audit_loss(score, FiniteSetting.build(problem("two-state"), gamma=0.7, unit="episodes"), gamma=0.9)
    with pytest.raises(UsageError, match="completions have no discount"):
        audit_loss(score, "tokens", gamma=0.9)


def test_without_a_gradient_there_is_nothing_to_hold_a_loss_against() -> None:
    for where in (choice(0.0), FiniteSetting.build(named(choice(0.0)), gamma=1.0, unit="episodes")):
        with pytest.raises(UsageError, match=r"the exact gradient is 0 on .*: nothing to hold a loss against"):
            audit_loss(score, where)


def test_a_gradient_of_rounding_is_0() -> None:
    alike = replace(choice(), reward=torch.full((2, 2, 2), 0.1, dtype=torch.float64))
    with pytest.raises(UsageError, match="the exact gradient is 0"):
        audit_loss(score, alike)


@pytest.mark.parametrize("samples", [None, 6_400])
@pytest.mark.parametrize(
    "loss",
    [lambda value, mask: (value * mask).square().mean(), lambda log_prob: 0.0 * log_prob.sum() + 1.0],
    ids=["of the critic", "constant"],
)
def test_a_loss_that_leaves_the_policy_alone_is_not_called_noise(
    loss: module.LossFunction, samples: int | None
) -> None:
    found = audit_loss(loss, "two-state", gamma=0.9, samples=samples)
    assert found.following.kind == "constant"
    assert "does not depend on the policy's log-probabilities" in str(found)
    assert json.loads(json.dumps(found.tree(), allow_nan=False))["kind"] == "constant"


def test_too_many_batches_are_drawn_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DEFAULT_SAMPLES", 2_000)
    found = audit_loss(score, "loops")
    assert not found.report.moments.exact
    assert "There are more than 20,000 batches to weight: about 20,000 trajectories were drawn" in str(found)
    assert found.report.batches == math.ceil(2_000 / 32)
    assert audit_loss(score, "tokens", size=5).report.batches == 2_000 // 20
    longer = audit_loss(score, token_problem("tokens-longer"))
    assert longer.following.kind == "unbiased"
    assert longer.report.batches == 2_000 // 8
    assert not longer.report.moments.exact
    assert "There are more" not in str(audit_loss(score, "two-state", samples=6_400))
    assert audit_loss(score, "tokens-longer", size=1).report.moments.exact


def without_first(log_prob, reward, mask, time):
    return -(log_prob * (mask & (time > 0)) * reward.sum(-1, keepdim=True)).sum(-1).mean()


def test_what_is_never_drawn_hides_no_missing_part() -> None:
    found = audit_loss(without_first, "tokens-longer", samples=4_000).following
    assert found.kind == "none"


@pytest.mark.parametrize(("where", "samples", "needed"), [("six-state", 500, 640), ("tokens", 0, 160)])
def test_too_few_samples(where: str, samples: int, needed: int) -> None:
    with pytest.raises(UsageError, match=f"{samples} samples are too few .* Ask for {needed} samples or more"):
        audit_loss(score, where, samples=samples)
    assert audit_loss(score, where, samples=needed).report.batches == 20


def test_a_callable_without_a_hash_and_a_caller_without_gradients() -> None:
    @dataclass
    class Scaled:
        factor: float

        def __call__(self, log_prob, reward, mask):
            return self.factor * without_gamma(log_prob, reward, mask)

    with torch.no_grad():
        found = audit_loss(Scaled(2.0), "two-state", gamma=1.0)
        assert not torch.is_grad_enabled()
    assert str(found.following) == "proportional to grad J (factor 2)"
    assert found.name == "Scaled"


@pytest.mark.parametrize("wrong", ["mine.py:loss", 3, None])
def test_what_is_no_function(wrong: object) -> None:
    with pytest.raises(UsageError, match=r"a loss is a function, and this is .*give the function itself; .*load_loss"):
        audit_loss(wrong)  # pyright: ignore[reportArgumentType]
