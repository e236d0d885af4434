"""What is said of a mean ascent direction beside exact gradients."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from upslope.auditing.candidates import Candidate, candidates_of, single
from upslope.auditing.following import Following, audit_loss, what_it_follows
from upslope.auditing.moments import Moments, sampled_moments
from upslope.auditing.setting import FiniteSetting
from upslope.errors import UsageError
from upslope.exact import policy_gradient, problem, time_limited


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


def test_control_candidates_are_the_gradients_they_are_called() -> None:
    setting = FiniteSetting.build(problem("time-limit"), gamma=0.9, unit="episodes")
    found = {candidate.terms[0]: candidate.basis[0] for candidate in candidates_of(setting)}
    bootstrapped, ended = "grad J of episodes cut at 4 steps and bootstrapped there", "grad J of episodes that end at 4"
    for name, mdp, limit in (
        (bootstrapped, setting.mdp, 4),
        (f"{ended} steps for good", time_limited(setting.mdp, 4), None),
    ):
        for gradient, suffix in (("discounted", ""), ("undiscounted_states", " with gamma^t dropped")):
            expected = policy_gradient(
                mdp, setting.policy, gradient=gradient, limit=limit, parameters=setting.parameters
            )
            torch.testing.assert_close(found[name + suffix], expected)
            torch.testing.assert_close(found[f"{name}{suffix} / mean length"], expected / setting.mean_length)
    assert len(found) == 8


def test_without_discount_there_is_no_gamma_to_drop() -> None:
    setting = FiniteSetting.build(problem("six-state"), gamma=1.0, unit="episodes")
    assert [candidate.terms[0] for candidate in candidates_of(setting)] == ["grad J", "grad J / mean length"]


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
    drawn = audit_loss(score, "two-state", gamma=0.9, samples=6_400)
    assert drawn.following.kind == "unbiased"
    assert not drawn.report.moments.exact
    assert drawn.report.trajectories == 32
    assert drawn.report.variance_per_trajectory == pytest.approx(exact.report.variance_per_trajectory, rel=0.2)


@pytest.mark.parametrize(
    ("name", "text"), [("tokenz", "there is no problem 'tokenz'; there are: .*tokens"), ("ring", "goes on without end")]
)
def test_problems_that_cannot_be(name: str, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        audit_loss(score, name)
