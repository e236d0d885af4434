"""The passes over one trajectory: which steps are used, how often, and that splitting changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from upslope.algorithms import A2C, PPO, Algorithm, Loss, Now, OneStepActorCritic, Passes, Reinforce
from upslope.diagnostics import Meter
from upslope.estimators import step_mean, trajectory_sum, weighted_sum
from upslope.train.config import OptimizerConfig
from upslope.train.optimizer import FlatOptimizer
from upslope.train.step import Learned, explained_variance, learn
from upslope.trajectory import AskedTwice, Batch, Evaluation, Signal, Steps, Trajectory


class Logits:
    def __init__(self, logits: Tensor) -> None:
        self.parameters = logits

    def select(self, index: Tensor | slice) -> Logits:
        return Logits(self.parameters[index])

    def detach(self) -> Logits:
        return Logits(self.parameters.detach())

    def kl(self, other: Any) -> Tensor:
        mine, theirs = self.parameters.log_softmax(-1), other.parameters.log_softmax(-1)
        return (mine.exp() * (mine - theirs)).sum(-1)


class Linear(AskedTwice, nn.Module):
    """A linear softmax policy with a linear critic, for observations [..., 3] and three actions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.actor, self.critic = nn.Linear(3, 3).double(), nn.Linear(3, 1).double()

    @property
    def sequential(self) -> bool:
        return False

    def sampler(self) -> Any:
        raise NotImplementedError

    def log_prob(self, observation: Any, action: Tensor) -> Tensor:
        return self.actor(observation).log_softmax(-1).gather(-1, action.unsqueeze(-1)).squeeze(-1)

    def evaluate(self, steps: Steps) -> Evaluation:
        logits = self.actor(steps.observation)
        log = logits.log_softmax(-1)
        return Evaluation(
            log_prob=log.gather(-1, steps.action.unsqueeze(-1)).squeeze(-1),
            entropy=-(log.exp() * log).sum(-1),
            distribution=Logits(logits),
            value=self.critic(steps.observation).squeeze(-1),
        )

    def values(self, trajectory: Trajectory) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            value = self.critic(trajectory.observation).squeeze(-1)
            return value, trajectory.next_value(value, self.critic(trajectory.final_observation).squeeze(-1))


def fragments(policy: Linear, *, holes: bool = False, rows: int = 3, length: int = 7) -> Trajectory:
    """Rows with an end in them; with holes, each step after an end only reset the environment."""
    generator = torch.Generator().manual_seed(3)
    observation = torch.randn(rows, length, 3, generator=generator, dtype=torch.float64)
    action = torch.randint(3, (rows, length), generator=generator)
    terminated = torch.zeros(rows, length, dtype=torch.bool)
    truncated, mask = terminated.clone(), ~terminated
    terminated[0, 2] = truncated[1, 3] = True
    if holes:
        mask[0, 3] = mask[1, 4] = False
    index = [length + 3, length - 1, 2 * length - 1, 3 * length - 1]
    return Trajectory(
        observation=observation,
        action=action,
        reward=torch.randn(rows, length, generator=generator, dtype=torch.float64).masked_fill(~mask, 0.0),
        terminated=terminated,
        truncated=truncated,
        mask=mask,
        behaviour_log_prob=policy.log_prob(observation, action).detach().masked_fill(~mask, 0.0),
        time=torch.arange(length).expand(rows, length).contiguous(),
        final_observation=torch.randn(4, 3, generator=generator, dtype=torch.float64),
        final_index=torch.tensor(sorted(index)),
    )


def episodes(policy: Linear) -> Trajectory:
    """Three episodes of 7, 3 and 5 steps, padded."""
    whole = fragments(policy)
    lengths = torch.tensor([7, 3, 5])
    mask = torch.arange(7).unsqueeze(0) < lengths.unsqueeze(1)
    terminated = torch.zeros_like(mask)
    terminated[range(3), lengths - 1] = True
    return replace(
        whole,
        observation=whole.observation.masked_fill(~mask.unsqueeze(-1), 0.0),
        action=whole.action.masked_fill(~mask, 0),
        reward=whole.reward.masked_fill(~mask, 0.0),
        terminated=terminated,
        truncated=torch.zeros_like(mask),
        mask=mask,
        behaviour_log_prob=whole.behaviour_log_prob.masked_fill(~mask, 0.0),
        final_observation=torch.zeros(0, 3, dtype=torch.float64),
        final_index=torch.zeros(0, dtype=torch.long),
    )


def update(
    algorithm: Algorithm,
    trajectory: Trajectory | None = None,
    *,
    micro_batches: int = 1,
    seed: int = 0,
    learning_rate: float = 0.1,
    watched: bool = False,
) -> tuple[Learned, Tensor]:
    policy = Linear()
    config = OptimizerConfig(kind="sgd", max_gradient_norm=None, micro_batches=micro_batches)
    optimizer = FlatOptimizer(policy, config)
    meter = Meter(optimizer.gradient) if watched else None
    if meter is not None:
        meter.look(closely=True)
    learned = learn(
        policy,
        algorithm,
        optimizer,
        fragments(policy) if trajectory is None else trajectory,
        now=Now(state=algorithm.initial_state()),
        learning_rate=learning_rate,
        generator=np.random.default_rng(seed),
        meter=meter,
    )
    return learned, optimizer.flat.detach().clone()


ALGORITHMS = [
    pytest.param(PPO(epochs=2, minibatches=2, value_clip=0.1, kl_coefficient=0.3, entropy_coefficient=0.01), id="ppo"),
    pytest.param(A2C(normalize_advantage=True, entropy_coefficient=0.01), id="a2c"),
    pytest.param(OneStepActorCritic(discounted_states=True), id="one_step"),
    pytest.param(Reinforce(psi="baselined", normalize_advantage=True, entropy_coefficient=0.01), id="baseline"),
    pytest.param(Reinforce(discounted_states=True), id="reinforce"),
]


class Summed(A2C):
    """A2C whose weights go by the shape of the batch: all steps of a row together, or each on its own."""

    def prepare(self, batch: Batch) -> Batch:
        return replace(batch, weight=trajectory_sum(batch.mask, dtype=torch.float64))


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, pytest.param(Summed(), id="summed")])
@pytest.mark.parametrize("micro_batches", [3, 100])
@pytest.mark.parametrize("holes", [False, True])
def test_micro_batches_add_up_to_the_same_step_and_the_same_metrics(
    algorithm: Algorithm, micro_batches: int, holes: bool
) -> None:
    """Also where there are more parts than steps, and where one look at the policy serves Psi and the loss."""
    trajectory = episodes(Linear()) if algorithm.passes.whole_episodes else fragments(Linear(), holes=holes)
    whole, expected = update(algorithm, trajectory)
    parts, found = update(algorithm, trajectory, micro_batches=micro_batches)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    assert whole.metrics.keys() == parts.metrics.keys()
    for name, value in whole.metrics.items():
        assert parts.metrics[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name


class WholeRows(A2C):
    """A2C whose loss looks at whole rows."""

    @property
    def passes(self) -> Passes:
        return Passes(behaviour_log_prob=False, whole_rows=True)

    def loss(self, batch: Batch, evaluation: Evaluation, now: Now) -> Loss:
        assert batch.mask.shape == evaluation.log_prob.shape == (3, 7)
        return A2C.loss(self, batch, evaluation, now)


def test_a_loss_of_whole_rows_sees_rows_in_the_only_step_too() -> None:
    torch.testing.assert_close(update(WholeRows())[1], update(A2C())[1])


def garbled(trajectory: Trajectory) -> Trajectory:
    """The same experience with nonsense wherever the policy did not choose."""
    hidden = ~trajectory.mask
    assert isinstance(trajectory.observation, Tensor)
    return replace(
        trajectory,
        observation=trajectory.observation.masked_fill(hidden.unsqueeze(-1), 1e30),
        action=trajectory.action.masked_fill(hidden, 2),
        reward=trajectory.reward.masked_fill(hidden, 1e30),
        behaviour_log_prob=trajectory.behaviour_log_prob.masked_fill(hidden, torch.nan),
        time=trajectory.time.masked_fill(hidden, 12345),
    )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_steps_that_were_not_chosen_never_matter(algorithm: Algorithm) -> None:
    trajectory = episodes(Linear()) if algorithm.passes.whole_episodes else fragments(Linear(), holes=True)
    assert not bool(trajectory.mask.all())
    left, expected = update(algorithm, trajectory)
    right, found = update(algorithm, garbled(trajectory))
    assert bool(torch.isfinite(found).all())
    assert torch.equal(found, expected)
    assert left.metrics == right.metrics


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_whoever_says_so_never_reads_the_log_probs_of_who_acted(algorithm: Algorithm) -> None:
    trajectory = episodes(Linear()) if algorithm.passes.whole_episodes else fragments(Linear(), holes=True)
    unknown = torch.full_like(trajectory.behaviour_log_prob, torch.nan)
    _, expected = update(algorithm, trajectory)
    if not algorithm.passes.behaviour_log_prob:
        assert torch.equal(update(algorithm, replace(trajectory, behaviour_log_prob=unknown))[1], expected)
    assert algorithm.passes.behaviour_log_prob == isinstance(algorithm, PPO | Reinforce)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorder:
    """An algorithm that notes which steps reach it. Observations' first entries serve as their names."""

    epochs: int
    minibatches: int
    seen: list[list[float]] = field(default_factory=list[list[float]])
    progress: list[float] = field(default_factory=list[float])

    @property
    def gamma(self) -> float:
        return 0.9

    @property
    def passes(self) -> Passes:
        return Passes(epochs=self.epochs, minibatches=self.minibatches, critic=False)

    def initial_state(self) -> Mapping[str, float]:
        return {}

    def advantage(self, trajectory: Trajectory, value: Tensor | None, next_value: Tensor | None, now: Now) -> Signal:
        assert value is None
        assert next_value is None
        return Signal(advantage=trajectory.reward)

    def prepare(self, batch: Batch) -> Batch:
        assert isinstance(batch.observation, Tensor)
        self.seen.append(batch.observation[:, 0].tolist())
        assert torch.equal(batch.advantage, batch.observation[:, 1])
        return replace(batch, weight=step_mean(batch.mask, dtype=torch.float64))

    def loss(self, batch: Batch, evaluation: Evaluation, now: Now) -> Loss:
        self.progress.append(now.progress)
        value = weighted_sum(-evaluation.log_prob, batch.weight)
        return Loss(value=value, metrics={"loss": value.detach()})

    def adapt(self, state: Mapping[str, float], metrics: Mapping[str, float]) -> Mapping[str, float]:
        return {**state, "updates": state.get("updates", 0.0) + 1.0}

    def describe(self) -> Mapping[str, str]:
        return {}


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 1), (1, 4), (3, 1), (3, 4), (2, 19)])
def test_every_pass_takes_every_chosen_step_once(epochs: int, minibatches: int, holes: bool) -> None:
    trajectory = fragments(Linear(), holes=holes)
    assert isinstance(trajectory.observation, Tensor)
    trajectory = replace(trajectory, reward=trajectory.observation[..., 1].clone())
    recorder = Recorder(epochs=epochs, minibatches=minibatches)
    learned, _ = update(recorder, trajectory)
    chosen = sorted(trajectory.observation[..., 0][trajectory.mask].tolist())
    assert len(recorder.seen) == epochs * minibatches == learned.metrics["optimizer_steps"]
    for epoch in range(epochs):
        parts = recorder.seen[epoch * minibatches : (epoch + 1) * minibatches]
        assert sorted(name for part in parts for name in part) == chosen
        sizes = {len(part) for part in parts}
        assert max(sizes) - min(sizes) <= 1
    if epochs > 1 and minibatches == 4:
        assert recorder.seen[:4] != recorder.seen[4:8]
    assert learned.state == {"updates": 1.0}


def test_the_shuffle_comes_from_the_given_generator() -> None:
    algorithm = PPO(epochs=2, minibatches=3, normalize_advantage=False)
    assert torch.equal(update(algorithm, seed=4)[1], update(algorithm, seed=4)[1])
    assert not torch.equal(update(algorithm, seed=4)[1], update(algorithm, seed=5)[1])


def test_whole_episodes_are_weighed_as_rows_and_only_their_chosen_steps_reach_the_loss() -> None:
    weighed: list[tuple[int, ...]] = []
    lost: list[tuple[int, ...]] = []

    @dataclass(frozen=True, kw_only=True)
    class Noting(Reinforce):
        def prepare(self, batch: Batch) -> Batch:
            weighed.append(tuple(batch.mask.shape))
            return Reinforce.prepare(self, batch)

        def loss(self, batch: Batch, evaluation: Evaluation, now: Now) -> Loss:
            assert bool(batch.mask.all())
            lost.append(tuple(evaluation.log_prob.shape))
            return Reinforce.loss(self, batch, evaluation, now)

    trajectory = episodes(Linear())
    update(Noting(), trajectory)
    assert weighed == [(3, 7)]
    assert lost == [(int(trajectory.mask.sum()),)]


def test_metrics_of_an_update() -> None:
    learned, _ = update(PPO(epochs=2, minibatches=2))
    names = {"policy_loss", "value_loss", "entropy", "kl", "clip_fraction"}
    assert learned.metrics.keys() == names | {"gradient_norm", "optimizer_steps", "explained_variance"}
    assert 0.0 < learned.metrics["entropy"] <= np.log(3.0)


def test_at_the_first_step_the_ratio_is_exactly_one() -> None:
    learned, _ = update(PPO(epochs=1, minibatches=1))
    assert learned.metrics["kl"] == 0.0
    assert learned.metrics["clip_fraction"] == 0.0


def test_explained_variance() -> None:
    target = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert explained_variance(target, target) == 1.0
    assert explained_variance(torch.full((4,), 3.0), target) == 0.0
    assert explained_variance(target + 5.0, target) == 1.0
    assert explained_variance(-target, target) == pytest.approx(-3.0)
    assert np.isnan(explained_variance(target, torch.ones(4)))


@dataclass(frozen=True, kw_only=True)
class Reporting(PPO):
    """PPO that reports what it is told to."""

    names: tuple[str, ...] = ()

    def loss(self, batch: Batch, evaluation: Evaluation, now: Now) -> Loss:
        loss = PPO.loss(self, batch, evaluation, now)
        return Loss(value=loss.value, metrics={name: loss.metrics[name] for name in self.names})


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_loss_need_not_report_anything(micro_batches: int) -> None:
    learned, moved = update(Reporting(epochs=2, minibatches=2), micro_batches=micro_batches)
    assert learned.metrics.keys() == {"gradient_norm", "optimizer_steps", "explained_variance"}
    torch.testing.assert_close(moved, update(PPO(epochs=2, minibatches=2))[1], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_stop_at_a_kl_that_the_loss_does_not_report(micro_batches: int) -> None:
    known = update(PPO(epochs=3, minibatches=2, target_kl=1e-9), micro_batches=micro_batches)
    silent = update(Reporting(epochs=3, minibatches=2, target_kl=1e-9), micro_batches=micro_batches)
    assert torch.equal(silent[1], known[1])
    assert silent[0].metrics["optimizer_steps"] == known[0].metrics["optimizer_steps"] < 6.0
    assert silent[0].metrics["kl"] == pytest.approx(known[0].metrics["kl"], rel=1e-12)


def test_a_stop_before_the_first_step() -> None:
    trajectory = fragments(Linear())
    acted_otherwise = replace(trajectory, behaviour_log_prob=trajectory.behaviour_log_prob - 2.0)
    learned, moved = update(Reporting(target_kl=1e-3), acted_otherwise)
    assert learned.metrics["optimizer_steps"] == learned.metrics["gradient_norm"] == 0.0
    assert learned.metrics["kl"] == pytest.approx(np.exp(2.0) - 3.0)
    assert torch.equal(moved, update(PPO(), learning_rate=0.0)[1])


def test_a_metric_of_some_steps_alone_is_their_mean() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Seldom(PPO):
        def loss(self, batch: Batch, evaluation: Evaluation, now: Now) -> Loss:
            loss = PPO.loss(self, batch, evaluation, now)
            calls.append(0)
            seldom = {"seldom": torch.tensor(float(len(calls)))} if len(calls) in (2, 4) else {}
            return Loss(value=loss.value, metrics={"always": loss.metrics["entropy"], **seldom})

    calls: list[int] = []
    learned, _ = update(Seldom(epochs=2, minibatches=2))
    assert learned.metrics["seldom"] == 3.0
    assert learned.metrics["always"] == pytest.approx(update(PPO(epochs=2, minibatches=2))[0].metrics["entropy"])


@pytest.mark.parametrize("algorithm", [A2C(), Reinforce()], ids=["a2c", "reinforce"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_the_kl_of_a_close_look_is_that_after_the_last_step(algorithm: Algorithm, micro_batches: int) -> None:
    policy = Linear()
    trajectory = episodes(policy) if algorithm.passes.whole_episodes else fragments(policy, holes=True)
    learned, moved = update(algorithm, trajectory, micro_batches=micro_batches, watched=True)
    assert torch.equal(moved, update(algorithm, trajectory, micro_batches=micro_batches)[1])
    torch.nn.utils.vector_to_parameters(moved, policy.parameters())
    with torch.no_grad():
        log_ratio = policy.log_prob(trajectory.observation, trajectory.action) - trajectory.behaviour_log_prob
    expected = float((log_ratio.exp() - 1.0 - log_ratio)[trajectory.mask].mean())
    assert learned.metrics["kl"] == pytest.approx(expected, rel=1e-8)
    assert expected > 1e-6
