"""Completion problems as a setting: all batches, their probabilities, exact gradients, algorithms and candidates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from upslope.algorithms import A2C, PPO, Algorithm, Reinforce
from upslope.algorithms.reinforce import Psi
from upslope.auditing.candidates import candidates_of
from upslope.auditing.declared import Claim
from upslope.auditing.loss import LossSource
from upslope.auditing.measuring import Drawing, measure, report
from upslope.auditing.source import AlgorithmSource
from upslope.auditing.tokens import Network, TokenCritic, TokenSetting
from upslope.errors import UsageError
from upslope.exact import enumerate_completions, sequence_kl, token_gradient, token_objective


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize(("size", "groups"), [(1, 1), (2, 1), (3, 1), (2, 2)])
def test_every_batch_there_is(size: int, groups: int, stale: bool) -> None:
    setting = TokenSetting.build("tokens-binary", size=size, groups=groups, stale=stale)
    total, length, count = 0.0, 0.0, 0
    for probability, trajectory in setting.every():
        assert trajectory.reward.shape[0] == size * groups
        if size == 1:
            assert trajectory.group is None
        else:
            assert trajectory.group is not None
            assert trajectory.group.tolist() == [number for number in range(groups) for _ in range(size)]
        total += probability
        length += probability * float(trajectory.mask.sum())
        count += 1
    assert count == (2 * 3**size) ** groups
    assert total == pytest.approx(1.0, abs=1e-12)
    assert length == pytest.approx(setting.steps_per_row, abs=1e-12)
    assert setting.trajectories_per_row == size * groups


def test_behaviour_is_the_policy_unless_it_is_stale() -> None:
    for stale in (False, True):
        setting = TokenSetting.build("tokens", size=1, stale=stale)
        rows = next(iter(setting.every()))[1]
        own = setting.policy.log_prob(rows.observation, rows.action)
        same = torch.allclose(own[rows.mask], rows.behaviour_log_prob[rows.mask])
        assert same is not stale
        assert ("another policy" in setting.name) is stale


def test_the_reference_is_frozen_and_another_policy() -> None:
    setting = TokenSetting.build("tokens")
    assert not any(parameter.requires_grad for parameter in setting.reference.parameters())
    assert float(sequence_kl(setting.tokens, setting.policy, setting.reference).detach()) > 0.05


def test_drawn_batches_have_the_mean_of_all_batches() -> None:
    setting = TokenSetting.build("tokens-binary", size=2, rows=8)

    def centred(log_prob, reward, mask):
        total = reward.sum(-1).view(-1, 2)
        advantage = (total - total.mean(-1, keepdim=True)).view(-1, 1)
        return -(log_prob * advantage * mask).sum(-1).mean()

    source = LossSource(centred)
    expected, _ = measure(setting, source)
    claim, drawing = Claim(target=expected.mean, target_name=""), Drawing(samples=6_400, seed=3)
    found = report(setting, source, claim, subject="", drawing=drawing)
    assert found.verdict == "unbiased"
    assert found.trajectories == 16
    assert found.variance_per_trajectory == pytest.approx(
        expected.variance * 2 / float(expected.mean @ expected.mean), rel=0.25
    )


@pytest.mark.parametrize(
    ("psi", "critic", "network"),
    [
        ("total_reward", "perturbed", "table"),
        ("reward_to_go", "perturbed", "table"),
        ("total_reward", "perturbed", "transformer"),
        ("reward_to_go", "perturbed", "transformer"),
        ("baselined", "exact", "table"),
        ("td_residual", "exact", "table"),
        ("advantage", "exact", "table"),
    ],
)
def test_reinforce_follows_grad_j_through_the_training_step(psi: Psi, critic: TokenCritic, network: Network) -> None:
    # A transformer shares weights with its critic, whose loss is left out to see the actor's gradient alone.
    algorithm = Reinforce(gamma=1.0, psi=psi, value_coefficient=0.0)
    setting = TokenSetting.build("tokens", size=1, critic=critic, network=network)
    moments, count = measure(setting, AlgorithmSource(algorithm))
    assert count == 30
    assert relative(moments.mean, setting.exact_gradient(algorithm.target)) < 1e-12


@pytest.mark.parametrize("psi", ["td_residual", "baselined"])
def test_a_wrong_critic_shows_where_it_is_bootstrapped_from(psi: str) -> None:
    """A completion cut by the length limit is truncated, so that a baseline's critic is asked what would follow."""
    setting = TokenSetting.build("tokens", size=1, critic="perturbed")
    moments, _ = measure(setting, AlgorithmSource(Reinforce(gamma=1.0, psi=psi)))
    assert relative(moments.mean, token_gradient(setting.tokens, setting.policy, setting.parameters)) > 0.05


def gae_token_mean(log_prob, value, next_value, reward, mask, cut):
    residual = (reward + next_value - value.detach()) * mask
    advantage = residual.flip(-1).cumsum(-1).flip(-1)
    return -(log_prob * advantage * mask).sum() / mask.sum()


@pytest.mark.parametrize(
    "algorithm",
    [
        A2C(gamma=1.0, gae_lambda=1.0),
        PPO(gamma=1.0, gae_lambda=1.0, epochs=1, minibatches=1, normalize_advantage=False),
    ],
    ids=["a2c", "ppo"],
)
def test_a2c_and_ppo_are_the_token_mean_written_by_hand(algorithm: Algorithm) -> None:
    setting = TokenSetting.build("tokens-binary", size=2)
    through_training, _ = measure(setting, AlgorithmSource(algorithm))
    by_hand, _ = measure(setting, LossSource(gae_token_mean))
    assert relative(through_training.mean, by_hand.mean) < 1e-12
    assert through_training.variance == pytest.approx(by_hand.variance, rel=1e-9)


def test_importance_weights_correct_completions_of_another_policy() -> None:
    setting = TokenSetting.build("tokens", size=1, stale=True)

    def corrected(log_prob, behaviour_log_prob, reward, mask):
        ratio = ((log_prob - behaviour_log_prob) * mask).sum(-1).exp()
        return -(ratio * reward.sum(-1)).mean()

    def not_corrected(log_prob, reward, mask):
        return -((log_prob * mask).sum(-1) * reward.sum(-1)).mean()

    expected = token_gradient(setting.tokens, setting.policy, setting.parameters)
    assert relative(measure(setting, LossSource(corrected))[0].mean, expected) < 1e-12
    assert relative(measure(setting, LossSource(not_corrected))[0].mean, expected) > 0.05


@pytest.mark.parametrize("network", ["table", "transformer"])
def test_candidates_are_the_gradients_they_are_called(network: str) -> None:
    setting = TokenSetting.build("tokens", network=network)
    tokens, policy, parameters = setting.tokens, setting.policy, setting.parameters
    found = {c.terms[0]: c.basis[0] for c in candidates_of(setting) if len(c.terms) == 1}
    assert found["grad J"].shape == (sum(parameter.numel() for parameter in parameters),)

    def gradient(objective: Tensor) -> Tensor:
        return torch.cat([part.flatten() for part in torch.autograd.grad(objective, parameters)])

    assert relative(found["grad J"], gradient(token_objective(tokens, policy))) < 1e-12
    assert relative(found["-grad KL(pi || ref)"], -gradient(sequence_kl(tokens, policy, setting.reference))) < 1e-12
    assert relative(found["-grad KL(ref || pi)"], -gradient(sequence_kl(tokens, setting.reference, policy))) < 1e-12

    rows = enumerate_completions(tokens, policy)
    log_prob = policy.log_prob(rows.trajectory.observation, rows.trajectory.action)
    length = rows.trajectory.mask.sum(-1)
    mean = (rows.behaviour_probability * rows.trajectory.reward.sum(-1)).view(len(tokens.prompts), -1).sum(-1)
    value = (mean / torch.tensor(tokens.chance, dtype=torch.float64)).repeat_interleave(len(tokens.completions))
    worth = (rows.trajectory.reward.sum(-1) - value) / length
    assert relative(found["grad E[(r - V) / length]"], gradient((rows.probability(log_prob) * worth).sum())) < 1e-12


def test_prompts_re_weighted_add_up_to_grad_j() -> None:
    setting = TokenSetting.build("tokens")
    gradient = token_gradient(setting.tokens, setting.policy, setting.parameters)
    (by_prompt,) = [c for c in candidates_of(setting) if c.name == "grad J with prompts re-weighted"]
    torch.testing.assert_close(by_prompt.factors(gradient), torch.ones(2, dtype=torch.float64))
    assert relative(by_prompt.nearest(gradient), gradient) < 1e-12
    assert by_prompt.terms == ("prompt (1,)", "prompt (2, 1)")


@pytest.mark.parametrize("wrong", [{"size": 0}, {"groups": 0}, {"rows": 0}])
def test_numbers_must_be_positive(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="must be at least 1"):
        TokenSetting.build("tokens", **wrong)
