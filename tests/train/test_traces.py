"""Eligibility traces as the learner follows them: by hand, in many environments, with wrong settings, resumed."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import bits, remains, tiny
from torch import Tensor

from upslope import ActorCriticConfig, EnvironmentConfig, EvaluationConfig, OptimizerConfig, RolloutConfig
from upslope.algorithms import PPO, ActorCriticLambda, Algorithm, Now, TDLambda
from upslope.auditing.source import Recorder
from upslope.errors import UsageError
from upslope.exact import TabularPolicy
from upslope.policies import ActorCritic
from upslope.spaces import Box, Discrete
from upslope.train import Snapshot, resume, train
from upslope.train.optimizer import FlatOptimizer
from upslope.train.traces import TraceLearner, actor_and_critic, gradients_by_row
from upslope.trajectory import Trajectory

HALF = torch.tensor([0.5, 0.5], dtype=torch.float64)
ONLINE = RolloutConfig(steps=1)
SGD = OptimizerConfig(kind="sgd", learning_rate=0.01, max_gradient_norm=None)


def step(
    state: Any, action: Any, reward: Any, following: Any, *, time: Any, terminated: Any = None, mask: Any = None
) -> Trajectory:
    """One step of each environment, [N, 1]."""
    count = len(state)
    ended = torch.zeros(count, dtype=torch.bool) if terminated is None else torch.tensor(terminated)
    open_rows = (~ended).nonzero().squeeze(-1)
    return Trajectory(
        observation=torch.as_tensor(state).unsqueeze(1),
        action=torch.tensor(action).unsqueeze(1),
        reward=torch.tensor(reward, dtype=torch.float64).unsqueeze(1),
        terminated=ended.unsqueeze(1),
        truncated=torch.zeros(count, 1, dtype=torch.bool),
        mask=torch.ones(count, 1, dtype=torch.bool) if mask is None else torch.tensor(mask).unsqueeze(1),
        behaviour_log_prob=torch.zeros(count, 1, dtype=torch.float64),
        time=torch.tensor(time).unsqueeze(1),
        final_observation=torch.as_tensor(following)[open_rows],
        final_index=open_rows,
    )


class Descent(Recorder):
    """Plain gradient descent."""

    def step(self, learning_rate: float) -> float:
        norm = super().step(learning_rate)
        with torch.no_grad():
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter -= learning_rate * parameter.grad
        return norm


def tabular(algorithm: Algorithm, *, states: int = 3) -> tuple[TabularPolicy, TraceLearner]:
    policy = TabularPolicy(states, 2)
    optimizer = Descent((policy.theta, policy.value))
    return policy, TraceLearner(policy, algorithm, optimizer, actor=[policy.theta], critic=[policy.value])


def test_two_steps_worked_out_by_hand() -> None:
    """gamma = 0.5, both lambdas 0.5, I = gamma^t, learning rate 0.1, the critic's twice that; all begins at 0.

    Step 0, state 0, action 1, reward 2, to state 1: delta = 2. z_w = e_0, z_theta = (-1/2, 1/2) in row 0.
        V(0) = 0.2 * 2 = 0.4, theta(0) = (-0.1, 0.1).
    Step 1, state 1, action 0, reward 1, ends: delta = 1. z_w = e_0 / 4 + e_1; z_theta: row 0 (-1/8, 1/8), row 1 has
        I = 1/2 of (1/2, -1/2): (1/4, -1/4). V = (0.4 + 0.05, 0.2), theta(0) = (-0.1125, 0.1125), theta(1) = (0.025,
        -0.025).
    A new episode in state 1, action 0, reward 0, to state 2: delta = -V(1) = -0.2. The trace is e_1 alone.
        V(1) = 0.2 - 0.04; V(0) stays.
    """
    algorithm = ActorCriticLambda(
        gamma=0.5, actor_trace_decay=0.5, critic_trace_decay=0.5, discounted_states=True, value_ratio=2.0
    )
    policy, learner = tabular(algorithm)
    now = Now(state=algorithm.initial_state())
    found = learner.learn(step([0], [1], [2.0], [1], time=[0]), now=now, learning_rate=0.1)
    assert found.metrics["td_error"] == 2.0
    assert policy.value.tolist() == pytest.approx([0.4, 0.0, 0.0])
    assert policy.theta[0].tolist() == pytest.approx([-0.1, 0.1])
    learner.learn(step([1], [0], [1.0], [2], time=[1], terminated=[True]), now=now, learning_rate=0.1)
    assert policy.value.tolist() == pytest.approx([0.45, 0.2, 0.0])
    assert policy.theta.flatten().tolist() == pytest.approx([-0.1125, 0.1125, 0.025, -0.025, 0.0, 0.0])
    learner.learn(step([1], [0], [0.0], [2], time=[0]), now=now, learning_rate=0.1)
    assert policy.value.tolist() == pytest.approx([0.45, 0.16, 0.0])


def test_the_average_reward_moves_with_the_residual_and_no_trace_restarts() -> None:
    """eta = 0.5, learning rate 0.1, lambda 0.5: r_bar = 0 -> 0.15 -> 0.15 + 0.05 (1 - 0.15 + 0.3 - 0)."""
    algorithm = ActorCriticLambda(gamma=1.0, actor_trace_decay=0.5, critic_trace_decay=0.5, average_reward_ratio=0.5)
    policy, learner = tabular(algorithm)
    state = algorithm.initial_state()
    first = learner.learn(step([0], [1], [3.0], [1], time=[0]), now=Now(state=state), learning_rate=0.1)
    assert first.state == {"average_reward": pytest.approx(0.15)}
    assert policy.value.tolist() == pytest.approx([0.3, 0.0, 0.0])
    second = learner.learn(step([1], [0], [1.0], [0], time=[1]), now=Now(state=first.state), learning_rate=0.1)
    assert second.state["average_reward"] == pytest.approx(0.15 + 0.05 * 1.15)
    assert policy.value.tolist() == pytest.approx([0.3 + 0.1 * 1.15 * 0.5, 0.1 * 1.15, 0.0])


def test_prediction_leaves_the_policy_alone() -> None:
    policy, learner = tabular(TDLambda(gamma=0.9, trace_decay=0.5))
    learner.learn(step([0], [1], [2.0], [1], time=[0]), now=Now(), learning_rate=0.1)
    assert bool((policy.theta == 0.0).all())
    assert policy.value.tolist() == pytest.approx([0.2, 0.0, 0.0])


def test_prediction_leaves_what_actor_and_critic_share_alone(tmp_path: Path) -> None:
    policy = ActorCriticConfig(hidden=(8,), shared=True, normalize_observation=True)
    seen: list[dict[str, Tensor]] = []

    def look(snapshot: Snapshot[Any, Any]) -> None:
        seen.append({name: tensor.clone() for name, tensor in snapshot.policy.state_dict().items()})

    train(tiny(tmp_path, TDLambda(), policy=policy, rollout=ONLINE, steps=64), callbacks=[look])
    for name, before in seen[0].items():
        assert (bits(before) == bits(seen[-1][name])) != name.startswith("critic."), name


def test_an_average_reward_is_not_that_of_episodes() -> None:
    algorithm = ActorCriticLambda(gamma=1.0, average_reward_ratio=0.5)
    _, learner = tabular(algorithm)
    ended = step([0], [1], [2.0], [1], time=[0], terminated=[True])
    with pytest.raises(UsageError, match="without end"):
        learner.learn(ended, now=Now(state=algorithm.initial_state()), learning_rate=0.1)


def network(space: Any = None, *, shared: bool = False, seed: int = 0, activation: Any = "tanh") -> ActorCritic:
    config = ActorCriticConfig(hidden=(5, 4), shared=shared, policy_gain=1.0, activation=activation)
    generator = torch.Generator().manual_seed(seed)
    actions = Discrete(3) if space is None else space
    return ActorCritic(Box((4,), -1.0, 1.0, "float32"), actions, config, generator=generator).double()


def some_steps(count: int, length: int, *, seed: int = 0) -> list[Trajectory]:
    generator = torch.Generator().manual_seed(seed)
    steps: list[Trajectory] = []
    time = [0] * count
    for _ in range(length):
        ended = (torch.rand(count, generator=generator) < 0.3).tolist()
        steps.append(
            step(
                torch.randn(count, 4, generator=generator, dtype=torch.float64),
                torch.randint(3, (count,), generator=generator).tolist(),
                torch.randn(count, generator=generator).tolist(),
                torch.randn(count, 4, generator=generator, dtype=torch.float64),
                time=list(time),
                terminated=ended,
            )
        )
        time = [0 if end else t + 1 for end, t in zip(ended, time, strict=True)]
    return steps


def one_of(whole: Trajectory, row: int) -> Trajectory:
    """The step of one environment."""
    assert isinstance(whole.observation, Tensor)
    assert isinstance(whole.final_observation, Tensor)
    here = slice(row, row + 1)
    last = whole.final_index == row
    names = ("observation", "action", "reward", "terminated", "truncated", "mask", "behaviour_log_prob", "time")
    return replace(
        whole,
        **{name: getattr(whole, name)[here] for name in names},
        final_observation=whole.final_observation[last],
        final_index=whole.final_index[last] - row,
    )


@pytest.mark.parametrize("shared", [False, True])
def test_many_environments_are_the_mean_of_each_alone(shared: bool) -> None:
    """At fixed parameters: each environment has a trace of its own, that restarts with its own episodes."""
    algorithm = ActorCriticLambda(gamma=0.9, actor_trace_decay=0.7, critic_trace_decay=0.4, discounted_states=True)
    policy, steps = network(shared=shared), some_steps(3, 6)

    def followed(trajectories: list[Trajectory]) -> Tensor:
        recorder = Recorder(tuple(policy.parameters()))
        learner = TraceLearner(policy, algorithm, recorder, **actor_and_critic(policy))
        for trajectory in trajectories:
            learner.learn(trajectory, now=Now(), learning_rate=0.0)
        return torch.stack(recorder.ascents)

    together = followed(steps)
    alone = torch.stack([followed([one_of(each, row) for each in steps]) for row in range(3)])
    torch.testing.assert_close(together, alone.mean(0))


def test_an_environment_that_takes_no_step_keeps_its_trace() -> None:
    algorithm = TDLambda(gamma=0.5, trace_decay=1.0)
    policy, learner = tabular(algorithm)
    learner.learn(step([0, 1], [0, 0], [0.0, 0.0], [1, 2], time=[0, 0]), now=Now(), learning_rate=0.1)
    idle = step([0, 1], [0, 0], [9.0, 0.0], [1, 2], time=[0, 1], mask=[False, True])
    learner.learn(idle, now=Now(), learning_rate=0.1)
    assert policy.value.tolist() == [0.0, 0.0, 0.0]
    traces = learner.state()["critic"]
    assert traces[0].tolist() == [1.0, 0.0, 0.0]
    assert traces[1].tolist() == [0.0, 1.5, 0.0]


@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu"])
@pytest.mark.parametrize("shared", [False, True])
def test_gradients_by_row_are_those_of_each_row(activation: str, shared: bool) -> None:
    """gelu goes row by row, the others by one backward pass."""
    policy, whole = network(shared=shared, activation=activation), some_steps(5, 1)[0]
    parameters = list(policy.parameters())
    evaluation = policy.evaluate(whole)
    assert evaluation.value is not None
    output = evaluation.log_prob[:, 0] + 2.0 * evaluation.value[:, 0]
    found = gradients_by_row(output, parameters, again=True)
    for row in range(5):
        parts = torch.autograd.grad(output[row], parameters, retain_graph=True, materialize_grads=True)
        torch.testing.assert_close(found[row], torch.cat([part.flatten() for part in parts]))


def test_rows_of_several_steps_are_refused() -> None:
    policy, learner = tabular(TDLambda())
    one = step([0], [1], [2.0], [1], time=[0])
    two = replace(one, reward=one.reward.expand(1, 2))
    with pytest.raises(ValueError, match="step by step"):
        learner.learn(two, now=Now(), learning_rate=0.1)
    learner.learn(one, now=Now(), learning_rate=0.1)
    with pytest.raises(ValueError, match="traces of 1 environments"):
        learner.learn(step([0, 0], [1, 1], [2.0, 0.0], [1, 1], time=[0, 0]), now=Now(), learning_rate=0.1)
    with pytest.raises(ValueError, match="no traces"):
        TraceLearner(policy, PPO(), Recorder(()), actor=[], critic=[])


@pytest.mark.parametrize(
    ("algorithm", "changes", "words"),
    [
        (ActorCriticLambda(), {"rollout": RolloutConfig(steps=8)}, "rollout.steps to 1"),
        (TDLambda(), {"rollout": RolloutConfig(steps=None, episodes=4)}, "rollout.steps to 1"),
        (TDLambda(), {"optimizer": OptimizerConfig(micro_batches=2)}, "micro_batches to 1"),
        (TDLambda(), {"policy": ActorCriticConfig(critic=False)}, "needs a critic"),
        (ActorCriticLambda(), {"rollout": RolloutConfig(steps=1, batches=2)}, "rollout.batches to 1"),
        (TDLambda(), {"optimizer": OptimizerConfig(kind="adamw", weight_decay=0.1)}, "weight_decay to 0"),
        (
            ActorCriticLambda(gamma=1.0, average_reward_ratio=0.1),
            {"policy": ActorCriticConfig(normalize_reward=True)},
            "normalize_reward",
        ),
    ],
    ids=["fragments", "episodes", "micro_batches", "no_critic", "batches", "weight_decay", "scaled_rewards"],
)
def test_runs_that_have_no_meaning(algorithm: Algorithm, changes: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        tiny(tmp_path, algorithm, **{"rollout": ONLINE, **changes})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"actor_trace_decay": 1.5}, "actor_trace_decay is a lambda"),
        ({"critic_trace_decay": -0.1}, "critic_trace_decay is a lambda"),
        ({"value_ratio": 0.0}, "value_ratio must be positive"),
        ({"average_reward_ratio": 0.1}, "set gamma to 1"),
        ({"gamma": 1.0, "average_reward_ratio": 0.1, "discounted_states": True}, "discounted_states to False"),
        ({"gamma": 1.0, "average_reward_ratio": 0.0}, "average_reward_ratio must be positive"),
    ],
)
def test_settings_that_have_no_meaning(settings: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ActorCriticLambda(**settings)


def test_the_step_sizes_are_those_of_the_run() -> None:
    """With sgd the actor moves by learning_rate, the critic by value_ratio times that."""
    steps = some_steps(2, 1)[0]
    moved: list[Tensor] = []
    for ratio in (1.0, 3.0):
        policy = network()
        before = copy.deepcopy(policy)
        optimizer = FlatOptimizer(policy, SGD)
        learner = TraceLearner(policy, ActorCriticLambda(value_ratio=ratio), optimizer, **actor_and_critic(policy))
        learner.learn(steps, now=Now(), learning_rate=0.01)
        assert policy.critic is not None
        assert before.critic is not None
        moved.append((policy.critic.tensors()[-1] - before.critic.tensors()[-1]).detach())
        assert not torch.equal(policy.actor.tensors()[-1], before.actor.tensors()[-1])
    torch.testing.assert_close(moved[1], 3.0 * moved[0])


CASES: dict[str, Any] = {
    "one": {"environment": EnvironmentConfig(id="CartPole-v1")},
    "several": {"environment": EnvironmentConfig(id="CartPole-v1", count=2, vectorization="sync")},
    "rebuilt": {"environment": EnvironmentConfig(id="CartPole-v1", count=2, vectorization="sync", resume="rebuild")},
    "continuing": {
        "environment": EnvironmentConfig(id="problem/ring", count=2),
        "algorithm": ActorCriticLambda(gamma=1.0, average_reward_ratio=0.1),
    },
    "adam": {"environment": EnvironmentConfig(id="CartPole-v1"), "optimizer": OptimizerConfig(learning_rate=1e-3)},
}


class PulledPlugError(RuntimeError):
    pass


@pytest.mark.parametrize("case", list(CASES))
def test_an_interrupted_run_goes_on_to_the_last_bit(case: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"algorithm": ActorCriticLambda(), "rollout": ONLINE, "optimizer": SGD, "steps": 160}
    settings = {**settings, **CASES[case]}

    def pull(snapshot: Snapshot) -> None:
        if snapshot.steps == 106:
            raise PulledPlugError

    train(tiny(tmp_path / "straight", **settings))
    with pytest.raises(PulledPlugError):
        train(tiny(tmp_path / "broken", **settings), callbacks=[pull])
    resume(tmp_path / "broken" / "run")
    straight, broken = remains(tmp_path / "straight" / "run"), remains(tmp_path / "broken" / "run")
    assert bits(straight["policy"]) == bits(broken["policy"])
    assert straight["metrics"] == broken["metrics"]


def test_the_values_of_a_random_walk_are_learnt(tmp_path: Path) -> None:
    """Exactly, state i of 19 is worth (i - 10) / 10 of +1 and -1 at the ends: values of 0 are off by 0.55 (RMS)."""
    run = tiny(
        tmp_path,
        TDLambda(gamma=1.0, trace_decay=0.8),
        environment=EnvironmentConfig(id="problem/random-walk-19", count=64),
        policy=ActorCriticConfig(hidden=(), policy_gain=0.0, value_gain=0.0),
        rollout=ONLINE,
        optimizer=OptimizerConfig(kind="sgd", learning_rate=1.0, schedule="linear", max_gradient_norm=None),
        evaluation=EvaluationConfig(times=0, final_episodes=0),
        steps=64_000,
    )
    policy, inside = train(run).policy, torch.arange(1, 20)
    with torch.no_grad():
        assert policy.critic is not None
        value = policy.critic(policy.encoder(inside)).view(-1)
        error = (value - (inside - 10) / 10).square().mean().sqrt()
        even = policy.log_prob(inside, torch.ones(19, dtype=torch.long)).exp()
    assert float(error) < 0.12
    assert bool((even == 0.5).all())
