"""What a natural step does to a policy in training: of agents, with memory, and of a language model."""

from __future__ import annotations

import copy
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_language_resume import StoppedError, stop_after
from tiny_language import MODEL, WITH_VALUE_HEAD, language_remains, some_task, tiny_language
from tiny_runs import NORMALISED, remains, tiny

from upslope import NPG, TRPO, ActorCritic, ActorCriticConfig, EnvironmentConfig, OptimizerConfig, RolloutConfig, Run
from upslope.algorithms import Algorithm, Now
from upslope.collect.experience import CompletionConfig
from upslope.policies import MemoryConfig
from upslope.spaces import Box, Discrete
from upslope.train import resume, train
from upslope.train.log import read_metrics
from upslope.train.optimizer import FlatOptimizer
from upslope.train.step import learn
from upslope.trajectory import Trajectory

natural = import_module("upslope.train.natural")

FEW = TRPO(critic_epochs=2, critic_minibatches=2)
PLAIN = OptimizerConfig(learning_rate=1e-3, max_gradient_norm=None)


def made(**changes: Any) -> tuple[ActorCritic, Trajectory]:
    """A policy of two real actions and fragments that it acted in."""
    generator = torch.Generator().manual_seed(0)
    config = ActorCriticConfig(**{"hidden": (8,), "policy_gain": 1.0, **changes})
    policy = ActorCritic(Box((3,), -9.0, 9.0), Box((2,), -1.0, 1.0), config, generator=generator)
    observation, action = torch.randn(4, 10, 3, generator=generator), torch.randn(4, 10, 2, generator=generator)
    ends = torch.zeros(4, 10, dtype=torch.bool)
    time = torch.arange(10).expand(4, -1)
    zeros = torch.zeros(4, 10)
    trajectory = Trajectory(
        observation=observation,
        action=action,
        reward=torch.randn(4, 10, generator=generator),
        terminated=ends,
        truncated=ends,
        mask=~ends,
        behaviour_log_prob=zeros,
        time=time,
        final_observation=observation[:, 0],
        final_index=torch.arange(4) * 10 + 9,
    )
    with torch.no_grad():
        return policy, replace(trajectory, behaviour_log_prob=policy.evaluate(trajectory).log_prob)


def update(policy: ActorCritic, algorithm: Algorithm, trajectory: Trajectory, **optimizer: Any) -> dict[str, float]:
    return learn(
        policy,
        algorithm,
        FlatOptimizer(policy, replace(PLAIN, **optimizer)),
        trajectory,
        now=Now(),
        learning_rate=1e-2,
        generator=np.random.default_rng(0),
    ).metrics


def actor_of(policy: ActorCritic) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in policy.named_parameters() if not name.startswith("critic")}


KINDS: dict[str, dict[str, Any]] = {
    "apart": {},
    "shared torso": {"shared": True},
    "gelu": {"activation": "gelu"},
    "memory": {"memory": MemoryConfig()},
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_divergence_it_reports_is_within_the_bound_and_true(kind: str) -> None:
    policy, trajectory = made(**KINDS[kind])
    before = copy.deepcopy(policy)
    metrics = update(policy, replace(FEW, max_divergence=0.05), trajectory)
    with torch.no_grad():
        old, new = before.evaluate(trajectory).distribution, policy.evaluate(trajectory).distribution
        true = float(old.kl(new).mean())
    assert metrics["accepted"] == 1.0
    assert 0.005 < metrics["kl"] <= 0.05
    assert true == pytest.approx(metrics["kl"], rel=1e-3)
    assert metrics["surrogate_improvement"] > 0.0
    moved = {name for name, value in actor_of(policy).items() if not torch.equal(value, actor_of(before)[name])}
    assert moved == set(actor_of(before)), "log_std moves, too"


class NeverBetter:
    """TRPO whose loss has its gradient and no step makes smaller."""

    def __init__(self, plain: TRPO) -> None:
        self.plain = plain

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)

    def loss(self, *arguments: Any) -> Any:
        found = self.plain.loss(*arguments)
        return replace(found, value=found.value - found.value.detach())


@pytest.mark.parametrize("kind", ["apart", "shared torso"])
def test_a_refused_step_leaves_the_actor_bit_for_bit_and_the_critic_learns_all_the_same(kind: str) -> None:
    policy, trajectory = made(**KINDS[kind])
    before, critic = actor_of(policy), copy.deepcopy(policy.critic)
    algorithm: Any = NeverBetter(FEW)
    metrics = update(policy, algorithm, trajectory)
    assert (metrics["accepted"], metrics["kl"], metrics["step_fraction"]) == (0.0, 0.0, 0.0)
    assert all(torch.equal(value, before[name]) for name, value in actor_of(policy).items())
    assert critic is not None
    assert policy.critic is not None
    assert not torch.equal(critic.layers[0].weight, policy.critic.layers[0].weight)  # pyright: ignore


@pytest.mark.parametrize("step_size", [1e38, 1e39], ids=["divergence", "parameters"])
def test_a_whole_step_to_where_nothing_is_finite_is_refused_bit_for_bit(step_size: float) -> None:
    policy, trajectory = made()
    before = actor_of(policy)
    metrics = update(policy, NPG(step_size=step_size, max_divergence=None, critic_epochs=1), trajectory)
    refused = ("accepted", "kl", "step_fraction", "surrogate_improvement")
    assert [metrics[name] for name in refused] == [0.0] * 4
    assert all(torch.equal(value, before[name]) for name, value in actor_of(policy).items())


def test_micro_batches_change_nothing_but_rounding() -> None:
    ends: list[torch.Tensor] = []
    for pieces in (1, 3):
        policy, trajectory = made()
        update(policy.double(), FEW, _double(trajectory), micro_batches=pieces)
        ends.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-7, atol=1e-9)


def _double(trajectory: Trajectory) -> Trajectory:
    real = {name: getattr(trajectory, name).double() for name in ("observation", "action", "reward")}
    policy, _ = made()
    with torch.no_grad():
        log_prob = policy.double().log_prob(real["observation"], real["action"])
    return replace(trajectory, **real, behaviour_log_prob=log_prob, final_observation=real["observation"][:, 0])


def test_the_closed_form_and_differentiating_twice_take_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[torch.Tensor] = []
    for closed in (True, False):
        if not closed:
            monkeypatch.setattr(natural, "closed_form_product", lambda *_, **__: None)
        policy, trajectory = made()
        update(policy.double(), FEW, _double(trajectory))
        ends.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-11)


def test_without_any_advantage_nothing_moves() -> None:
    policy, trajectory = made()
    before = actor_of(policy)
    metrics = update(policy, TRPO(psi="reward_to_go"), replace(trajectory, reward=torch.zeros(4, 10)))
    assert metrics["accepted"] == 0.0
    assert all(torch.equal(value, before[name]) for name, value in actor_of(policy).items())


def test_every_update_of_a_run_stays_within_the_bound(tmp_path: Path) -> None:
    bound = 0.004
    environment = EnvironmentConfig(id="Pendulum-v1", count=2, vectorization="sync", time_limit=60)
    algorithm = replace(FEW, max_divergence=bound, entropy_coefficient=0.01, entropy_schedule="linear")
    train(tiny(tmp_path, algorithm, policy=NORMALISED, environment=environment, optimizer=PLAIN, steps=1024))
    records = [record for record in read_metrics(tmp_path / "run/metrics.jsonl") if record["kind"] == "train"]
    assert len(records) > 5
    assert all(0.0 <= record["kl"] <= bound for record in records)
    assert sum(record["accepted"] for record in records) > 0.5 * len(records)


CASES: dict[str, tuple[Algorithm, dict[str, Any]]] = {
    "trpo": (FEW, {}),
    "npg": (NPG(step_size=0.1, max_divergence=None, critic_epochs=1, critic_minibatches=2), {}),
    "memory": (FEW, {"policy": ActorCriticConfig(hidden=(8,), memory=MemoryConfig())}),
    "episodes": (
        TRPO(psi="reward_to_go"),
        {"policy": ActorCriticConfig(critic=False), "rollout": RolloutConfig(steps=None, episodes=3)},
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_an_interrupted_run_and_a_straight_one_are_the_same_bit_for_bit(case: str, tmp_path: Path) -> None:
    algorithm, changes = CASES[case]
    settings = {"policy": NORMALISED, "optimizer": PLAIN, "steps": 384, **changes}
    if case == "episodes":
        settings["steps"] = 300
    train(tiny(tmp_path / "straight", algorithm, **settings))
    with pytest.raises(StoppedError):
        train(tiny(tmp_path / "broken", algorithm, **settings), callbacks=[stop_after(3)])
    resume(tmp_path / "broken/run")
    assert remains(tmp_path / "broken/run") == remains(tmp_path / "straight/run")


LANGUAGE: dict[str, Any] = {
    "critic": (TRPO(gamma=1.0, critic_epochs=1, critic_minibatches=2), WITH_VALUE_HEAD, 1),
    "group": (TRPO(gamma=1.0, psi="group", normalize_advantage=False), MODEL, 4),
}


@pytest.mark.parametrize("case", list(LANGUAGE))
def test_a_language_model_learns_by_trpo_within_the_bound_and_can_be_gone_on_with(case: str, tmp_path: Path) -> None:
    algorithm, model, group = LANGUAGE[case]
    settings = {
        "algorithm": algorithm,
        "model": model,
        "experience": CompletionConfig(prompts=12 // group, group=group, limit=6),
        "optimizer": PLAIN,
        "steps": 5,
    }
    train(tiny_language(tmp_path / "straight", **settings), task=some_task())
    records = [r for r in read_metrics(tmp_path / "straight/run/metrics.jsonl") if r["kind"] == "train"]
    assert len(records) == 5
    assert all(0.0 <= record["kl"] <= algorithm.max_divergence for record in records)
    assert any(record["kl"] > 0.1 * algorithm.max_divergence for record in records)
    with pytest.raises(StoppedError):
        train(tiny_language(tmp_path / "broken", **settings), task=some_task(), callbacks=[stop_after(3)])
    resume(tmp_path / "broken/run", task=some_task())
    left, right = language_remains(tmp_path / "straight/run"), language_remains(tmp_path / "broken/run")
    assert left["session"] == right["session"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: TRPO(max_divergence=0.0), "max_divergence bounds a KL and is positive"),
        (lambda: TRPO(damping=-0.1), "damping must be at least 0"),
        (lambda: TRPO(conjugate_gradient_iterations=0), "conjugate_gradient_iterations must be at least 1"),
        (lambda: TRPO(backtrack=1.0), "backtrack lies strictly between 0 and 1"),
        (lambda: TRPO(line_search_attempts=0), "without a line search is NPG"),
        (lambda: TRPO(critic_epochs=0), "critic_epochs and critic_minibatches must be at least 1"),
        (lambda: TRPO(psi="group"), "set gamma to 1"),
        (lambda: NPG(step_size=0.1), "set one, the other None"),
        (lambda: NPG(max_divergence=None), "set one, the other None"),
        (lambda: NPG(max_divergence=None, step_size=-1.0), "are positive"),
        (lambda: _run(optimizer=OptimizerConfig(kind="adamw", weight_decay=0.1)), "weight_decay would move the actor"),
        (lambda: _run(policy=ActorCriticConfig(critic=False)), "TRPO needs a critic"),
        (lambda: _run(algorithm=TRPO(psi="reward_to_go")), "needs whole episodes"),
    ],
    ids=range(13),
)
def test_settings_that_mean_nothing_are_refused(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def _run(**changes: Any) -> Run:
    return Run(**{"environment": EnvironmentConfig(id="CartPole-v1"), "algorithm": TRPO(), **changes})


def test_a_discrete_policy_of_one_state_follows_the_natural_gradient_of_its_table() -> None:
    """Each action as often as its probability says: F^-1 grad J of a softmax is the advantage, less a constant."""
    policy = ActorCritic(
        Box((1,), -1.0, 1.0),
        Discrete(3),
        ActorCriticConfig(hidden=(), critic=False, policy_gain=0.0),
        generator=torch.Generator().manual_seed(0),
    ).double()
    gain = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)
    action = torch.arange(3).unsqueeze(-1)
    zeros = torch.zeros(3, 1, 1, dtype=torch.float64)
    with torch.no_grad():
        log_prob = policy.log_prob(zeros, action)
    ends = torch.ones(3, 1, dtype=torch.bool)
    trajectory = Trajectory(
        observation=zeros,
        action=action,
        reward=gain.unsqueeze(-1),
        terminated=ends,
        truncated=~ends,
        mask=ends,
        behaviour_log_prob=log_prob,
        time=torch.zeros(3, 1, dtype=torch.int64),
        final_observation=zeros[:0, 0],
        final_index=torch.zeros(0, dtype=torch.int64),
    )
    fixed = NPG(psi="reward_to_go", normalize_advantage=False, max_divergence=None, step_size=0.5, damping=0.0)
    update(policy, fixed, trajectory)
    bias = policy.actor.layers[0].bias.detach()  # pyright: ignore
    torch.testing.assert_close(bias - bias.mean(), 0.5 * (gain - gain.mean()))  # pyright: ignore
