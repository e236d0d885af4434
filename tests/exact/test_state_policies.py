"""Tables and linear preferences as policies: what they say, sample and value."""

import numpy as np
import pytest
import torch

from upslope.exact import LinearPolicy, StatePolicy, TabularPolicy, enumerate_fragments, problem
from upslope.trajectory import Policy


def linear() -> LinearPolicy:
    generator = torch.Generator().manual_seed(0)
    return LinearPolicy(torch.randn(4, 3, 2, generator=generator), torch.tensor([0.5, -1.0]))


def tabular() -> TabularPolicy:
    return TabularPolicy(4, 3, torch.randn(4, 3, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("policy", [linear(), tabular()])
def test_what_is_evaluated_is_the_softmax_of_preferences(policy: StatePolicy) -> None:
    rows = enumerate_fragments(problem("loops").mdp, problem("loops").policy(0), steps=2, limit=2).select([0, 5, 9])
    probability = policy.preferences().softmax(-1)
    state = rows.observation
    assert isinstance(state, torch.Tensor)
    evaluation = policy.evaluate(rows)
    torch.testing.assert_close(evaluation.log_prob, probability[state, rows.action].log(), rtol=0, atol=1e-14)
    torch.testing.assert_close(evaluation.log_prob, policy.log_prob(state, rows.action), rtol=0, atol=1e-14)
    entropy = -(probability * probability.log()).sum(-1)
    torch.testing.assert_close(evaluation.entropy, entropy[state], rtol=0, atol=1e-14)
    assert evaluation.log_prob.dtype == torch.float64


def test_linear_preferences_are_products_with_the_features() -> None:
    policy = linear()
    assert float(policy.preferences()[2, 1].detach()) == pytest.approx(
        float(0.5 * policy.features[2, 1, 0] - policy.features[2, 1, 1])
    )


@pytest.mark.parametrize("policy", [linear(), tabular()])
def test_samples_have_the_probabilities(policy: StatePolicy) -> None:
    sampler, count = policy.sampler(), 40_000
    noise = sampler.noise(np.random.default_rng(0), 1, count)
    drawn = sampler.sample(np.full(count, 2), noise[0])
    share = np.bincount(drawn, minlength=3) / count
    expected = policy.preferences()[2].softmax(-1).detach().numpy()
    assert np.abs(share - expected).max() < 4 * 0.5 / np.sqrt(count)
    assert sampler.mode(np.array([2]))[0] == expected.argmax()


def test_the_critic_is_read_where_the_state_is_and_where_the_row_is_cut() -> None:
    named = problem("time-limit")
    policy = named.policy(0)
    policy.value.data = torch.tensor([1.0, 2.0, 3.0, 100.0], dtype=torch.float64)
    rows = enumerate_fragments(named.mdp, policy, steps=3, limit=4)
    value, following = policy.values(rows.trajectory)
    assert torch.equal(value, policy.value[rows.state])
    assert not following[rows.trajectory.terminated].any()
    going = ~rows.trajectory.terminated & ~rows.trajectory.truncated
    assert torch.equal(following[:, :-1][going[:, :-1]], value[:, 1:][going[:, :-1]])
    assert following.max() <= 3.0


def test_they_are_policies() -> None:
    policies: list[Policy] = [linear(), tabular()]
    assert not any(policy.sequential for policy in policies)


def test_tables_of_the_wrong_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"preferences must have shape \(4, 3\), got \(3, 4\)"):
        TabularPolicy(4, 3, torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"features must have shape \[S, A, D\], got \(4, 3\)"):
        LinearPolicy(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"theta must have shape \(2,\), got \(3,\)"):
        LinearPolicy(torch.zeros(4, 3, 2), torch.zeros(3))
