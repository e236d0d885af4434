"""What the audit makes of a problem, an algorithm and a policy, and what it says of those that do not go together."""

import importlib
from dataclasses import dataclass, replace

import pytest
import torch

from upslope.algorithms import A2C, PPO, OneStepActorCritic, Passes, Reinforce, Target
from upslope.auditing import Circumstances, audit
from upslope.auditing.declared import declaration
from upslope.auditing.setting import FiniteSetting
from upslope.auditing.source import AlgorithmSource
from upslope.errors import UsageError
from upslope.exact import FiniteMDP, TabularPolicy, problem
from upslope.policies import ActorCritic, ActorCriticConfig
from upslope.spaces import Discrete


def test_no_critic_is_exact_where_states_look_alike():
    report = audit(A2C(gamma=1.0), "short-corridor", row_steps=1)
    assert report.verdict == "biased"
    assert report.declared == "biased"
    assert report.reason == "states look alike, so that no critic of what is seen is exact"


def test_states_that_look_alike_are_found_where_their_values_differ():
    def aliased(name: str) -> bool:
        named = problem(name)
        return FiniteSetting.build(named, gamma=named.mdp.gamma, unit="episodes").aliased

    assert aliased("short-corridor")
    assert not aliased("six-state")


def test_equal_states_that_look_alike_do_no_harm():
    mdp = replace(problem("two-state").mdp, observation=torch.tensor([0, 0, 0]))
    twins = FiniteMDP.from_tables(
        [[[0, 0, 1.0], [0, 0, 1.0]]] * 3,
        [[1.0, 0.0]] * 3,
        start=[0.5, 0.5, 0.0],
        terminal=[2],
        observation=[0, 0, 0],
    )
    assert audit(A2C(gamma=1.0), twins, row_steps=1).declared == "unbiased"
    assert audit(A2C(gamma=0.9), mdp, row_steps=1).declared == "biased"


def test_looking_alike_breaks_both_conditions_on_the_critic():
    alike = Circumstances(aliased=True)
    assert not alike.meet("exact_critic")
    assert alike.meet("exact_critic_at_limit")
    assert not replace(alike, limit=3).meet("exact_critic_at_limit")
    target = Target(gradient="discounted", per="step", requires=("exact_critic", "on_policy"))
    assert declaration(target, alike)[0] == "biased"
    assert "states look alike" in str(alike)


@dataclass(frozen=True, kw_only=True)
class OverEpisodes(A2C):
    """The mean over the steps of whole episodes."""

    @property
    def passes(self) -> Passes:
        return replace(super().passes, whole_episodes=True)


def test_a_mean_over_steps_of_episodes_is_declared_as_that():
    report = audit(OverEpisodes(gamma=0.8))
    assert report.declared == "biased"
    assert "ratio" in report.reason
    assert report.verdict == "biased"


def test_another_discount_of_the_same_problem():
    assert audit(OneStepActorCritic(gamma=0.5), "two-state").verdict == "unbiased"


# --- drawn or weighted -----------------------------------------------------------------------------------------------


def test_what_cannot_be_listed_is_drawn(monkeypatch):
    monkeypatch.setattr(importlib.import_module("upslope.auditing.measuring"), "DEFAULT_SAMPLES", 2_000)
    report = audit(Reinforce(gamma=0.9), "loops")
    assert not report.moments.exact
    assert f"{-(-2_000 // 32)} batches drawn" in str(report)


def test_minibatches_are_drawn(monkeypatch):
    monkeypatch.setattr(importlib.import_module("upslope.auditing.audit"), "DEFAULT_SAMPLES", 2_000)
    report = audit(PPO(gamma=0.8, normalize_advantage=False))
    assert not report.moments.exact
    assert report.verdict == "unbiased"


def test_several_passes_over_the_whole_batch_are_weighted():
    report = audit(PPO(gamma=0.8, normalize_advantage=False, minibatches=1), row_steps=2)
    assert report.moments.exact
    assert report.verdict == "unbiased"


def test_progress_is_told_of_each_batch():
    seen: list[tuple[int, int]] = []
    audit(Reinforce(gamma=0.8), samples=640, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(batch, 20) for batch in range(1, 21)]


def test_every_batch_is_shuffled_anew_and_the_same_with_the_same_seed():
    setting = FiniteSetting.build(problem("six-state"), gamma=0.8, unit="fragments", rows=8)
    (batch,) = setting.drawn(1, 0)
    algorithm = PPO(gamma=0.8, epochs=1, minibatches=4)

    def ascents(seed: int) -> torch.Tensor:
        source = AlgorithmSource(algorithm, seed=seed)
        return torch.stack([source.ascent(setting.policy, setting.parameters, batch) for _ in range(3)])

    first = ascents(0)
    assert len(torch.unique(first, dim=0)) == 3
    torch.testing.assert_close(first, ascents(0), atol=0, rtol=0)
    assert not torch.equal(first, ascents(1))


def test_an_update_that_stops_before_its_first_step_moves_nothing():
    algorithm = PPO(gamma=0.8, normalize_advantage=False, epochs=1, minibatches=1, target_kl=1e-6)
    setting = FiniteSetting.build(problem("six-state"), gamma=0.8, unit="fragments", behaviour="stale")
    (batch,) = setting.drawn(1, 0)
    ascent = AlgorithmSource(algorithm).ascent(setting.policy, setting.parameters, batch)
    assert ascent.tolist() == [0.0] * sum(parameter.numel() for parameter in setting.parameters)


# --- policies and problems of one's own ------------------------------------------------------------------------------


def network(outputs: int = 2) -> ActorCritic:
    config = ActorCriticConfig(hidden=(4,), policy_gain=1.0)
    generator = torch.Generator().manual_seed(1)
    return ActorCritic(Discrete(7), Discrete(outputs), config, generator=generator).double()


def test_a_network_weighted_and_drawn_agree():
    policy = network()
    exact, drawn = (audit(Reinforce(gamma=0.8), policy=policy, samples=samples) for samples in (None, 10_000))
    assert exact.verdict == drawn.verdict == "unbiased"
    assert exact.moments.exact
    assert drawn.variance_per_trajectory == pytest.approx(exact.variance_per_trajectory, rel=0.15)


def test_a_baseline_may_be_an_untaught_network():
    assert audit(Reinforce(gamma=0.8, psi="baselined"), policy=network()).verdict == "unbiased"
    report = audit(A2C(gamma=0.8), policy=network(), row_steps=2)
    assert (report.declared, report.verdict, report.reason) == ("biased", "biased", "the critic is wrong")


def test_the_policy_given_is_left_alone():
    policy = TabularPolicy(7, 2, torch.linspace(-1, 1, 14).view(7, 2))
    report = audit(A2C(gamma=0.8), policy=policy, row_steps=2)
    assert report.verdict == "unbiased"
    assert policy.value.tolist() == [0.0] * 7
    assert policy.theta.grad is None


def test_a_finite_mdp_is_looked_at_with_a_random_table():
    mdp = problem("six-state").mdp
    one, other = (audit(Reinforce(gamma=0.8), mdp, seed=seed) for seed in (0, 1))
    assert one.problem == "a problem of your own"
    assert one.verdict == other.verdict == "unbiased"
    assert not torch.equal(one.target, other.target)


def constant() -> FiniteMDP:
    return FiniteMDP.from_tables([[[0.0, 1.0]] * 2] * 2, [[1.0, 1.0], [0.0, 0.0]], terminal=[1])


REINFORCE = Reinforce(gamma=0.8)


@pytest.mark.parametrize(
    ("arguments", "settings", "words"),
    [
        ((REINFORCE,), {"samples": 100}, "ask for at least 640 samples"),
        ((REINFORCE,), {"samples": -1}, "samples must be at least 1, got -1"),
        ((REINFORCE,), {"samples": 0}, "leave it out"),
        ((REINFORCE,), {"rows": 0}, "rows must be at least 1"),
        ((A2C(gamma=0.8),), {"row_steps": 0}, "row_steps must be at least 1"),
        ((REINFORCE,), {"seed": -1}, "seed must be at least 0"),
        ((REINFORCE,), {"circumstances": Circumstances(limit=0)}, "limit must be at least 1 step, got 0"),
        ((REINFORCE,), {"circumstances": Circumstances(unit="fragments")}, "learns from whole episodes"),
        ((Reinforce(gamma=1.5),), {}, "gamma is a discount from 0 to 1, got 1.5"),
        ((Reinforce(gamma=float("nan")),), {}, "gamma is a discount from 0 to 1"),
        ((Reinforce,), {}, "Reinforce is a class"),
        (("reinforce",), {}, "'reinforce' is a name"),
        ((test_progress_is_told_of_each_batch,), {}, "audit a loss with upslope.audit_loss"),
        ((3,), {}, "declares no target"),
        ((REINFORCE, "seven-state"), {}, "there is no problem 'seven-state'; there are: bandit"),
        ((REINFORCE, 7), {}, "no auditing on a int"),
        ((REINFORCE, "ring"), {}, "goes on without end"),
        ((REINFORCE, "tokens"), {}, "set gamma to 1"),
        ((Reinforce(gamma=1.0), "tokens"), {"policy": network()}, "leave policy out"),
        ((Reinforce(gamma=1.0), constant()), {}, "the exact gradient is 0 here: there is nothing to hold it against"),
        ((REINFORCE,), {"policy": network().float()}, "give policy.double()"),
        ((REINFORCE,), {"policy": "mlp"}, "policy must be an nn.Module"),
        (
            (A2C(gamma=0.8),),
            {"policy": network(), "circumstances": Circumstances()},
            r"circumstances=Circumstances\(critic='perturbed'\)",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(arguments, settings, words):
    with pytest.raises(UsageError, match=words):
        audit(*arguments, **settings)


def test_circumstances_nobody_knows_are_refused():
    with pytest.raises(UsageError, match="critic must be 'exact' or 'perturbed'"):
        audit(REINFORCE, circumstances=replace(Circumstances(), critic="perfect"))


def test_an_mdp_whose_states_are_no_numbers_needs_a_policy():
    mdp = replace(problem("two-state").mdp, observation=torch.eye(3, dtype=torch.float64))
    with pytest.raises(UsageError, match="say which policy sees them"):
        audit(REINFORCE, mdp)
