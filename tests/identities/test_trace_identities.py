"""Eligibility traces and average rewards, written out a second time in plain loops."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from identity_strategies import PROPERTY, SEEDS

from upslope.algorithms import A2C, PPO, ActorCriticLambda, AverageReward, Now, TDLambda
from upslope.auditing.source import Recorder
from upslope.exact import TabularPolicy
from upslope.train.traces import TraceLearner
from upslope.trajectory import Trajectory

STATES, ACTIONS, COUNT, LENGTH = 4, 3, 3, 12
ALPHA, GAMMA, LAMBDA, CRITIC_LAMBDA, RATIO, ETA = 0.1, 0.9, 0.7, 0.4, 2.5, 0.6
EPISODIC = ActorCriticLambda(
    gamma=GAMMA, actor_trace_decay=LAMBDA, critic_trace_decay=CRITIC_LAMBDA, discounted_states=True, value_ratio=RATIO
)
CONTINUING = ActorCriticLambda(
    gamma=1.0, actor_trace_decay=LAMBDA, critic_trace_decay=CRITIC_LAMBDA, value_ratio=RATIO, average_reward_ratio=ETA
)
PREDICTION = TDLambda(gamma=GAMMA, trace_decay=CRITIC_LAMBDA)


class Descent(Recorder):
    """Plain gradient descent."""

    def step(self, learning_rate: float) -> float:
        norm = super().step(learning_rate)
        with torch.no_grad():
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter -= learning_rate * parameter.grad
        return norm


def experience(seed: int, *, ends: bool) -> Trajectory:
    """[COUNT, LENGTH] of environments that go on by themselves: some episodes end, some are cut by a limit."""
    generator = np.random.default_rng(seed)
    shape = (COUNT, LENGTH)
    luck = generator.random(shape)
    terminated, truncated = (luck < 0.2) & ends, luck > 0.85
    time = np.zeros(shape, dtype=np.int64)
    for position in range(1, LENGTH):
        before = terminated[:, position - 1] | truncated[:, position - 1]
        time[:, position] = np.where(before, 0, time[:, position - 1] + 1)
    observation = generator.integers(STATES, size=shape)
    truncated[:, -1] &= ~terminated[:, -1]
    open_ends = truncated.copy()
    open_ends[:, -1] |= ~terminated[:, -1]
    index = np.flatnonzero(open_ends)
    return Trajectory(
        observation=torch.from_numpy(observation),
        action=torch.from_numpy(generator.integers(ACTIONS, size=shape)),
        reward=torch.from_numpy(generator.normal(size=shape)),
        terminated=torch.from_numpy(terminated),
        truncated=torch.from_numpy(truncated),
        mask=torch.ones(shape, dtype=torch.bool),
        behaviour_log_prob=torch.zeros(shape, dtype=torch.float64),
        time=torch.from_numpy(time),
        final_observation=torch.from_numpy(generator.integers(STATES, size=len(index))),
        final_index=torch.from_numpy(index),
    )


def following(given: Trajectory) -> np.ndarray:
    """The state that really followed every step; -1 after an end."""
    seen = given.observation
    assert isinstance(seen, torch.Tensor)
    assert isinstance(given.final_observation, torch.Tensor)
    after = np.roll(seen.numpy(), -1, axis=1)
    after[given.terminated.numpy()] = -1
    after.reshape(-1)[given.final_index.numpy()] = given.final_observation.numpy()
    return after


def one_by_one(given: Trajectory) -> Iterator[Trajectory]:
    """The steps as a run collects them."""
    after = following(given)
    assert isinstance(given.observation, torch.Tensor)
    for position in range(LENGTH):
        open_rows = np.flatnonzero(after[:, position] >= 0)
        names = ("action", "reward", "terminated", "truncated", "mask", "behaviour_log_prob", "time")
        yield Trajectory(
            observation=given.observation[:, position : position + 1],
            **{name: getattr(given, name)[:, position : position + 1] for name in names},
            final_observation=torch.from_numpy(after[open_rows, position]),
            final_index=torch.from_numpy(open_rows),
        )


def by_the_book(
    algorithm: ActorCriticLambda | TDLambda, given: Trajectory, theta: np.ndarray, value: np.ndarray
) -> float:
    """Moves theta and value in place, environment by environment and number by number; returns r_bar."""
    continuing = algorithm is CONTINUING
    gamma = 1.0 if continuing else GAMMA
    traces = [(np.zeros_like(theta), np.zeros_like(value)) for _ in range(COUNT)]
    after, average = following(given), 0.0
    assert isinstance(given.observation, torch.Tensor)
    state, action, reward, time = (x.numpy() for x in (given.observation, given.action, given.reward, given.time))
    for t in range(LENGTH):
        moves, slopes, residuals = np.zeros_like(theta), np.zeros_like(value), 0.0
        for i in range(COUNT):
            s = state[i, t]
            following_value = 0.0 if after[i, t] < 0 else value[after[i, t]]
            delta = reward[i, t] - average + gamma * following_value - value[s]
            if time[i, t] == 0:
                traces[i] = (np.zeros_like(theta), np.zeros_like(value))
            actor, critic = traces[i]
            score = -np.exp(theta[s] - np.logaddexp.reduce(theta[s]))
            score[action[i, t]] += 1.0
            actor *= gamma * LAMBDA
            actor[s] += score * (GAMMA ** time[i, t] if algorithm is EPISODIC else 1.0)
            critic *= gamma * CRITIC_LAMBDA
            critic[s] += 1.0
            moves += delta * actor / COUNT
            slopes += delta * critic / COUNT
            residuals += delta / COUNT
        if algorithm is not PREDICTION:
            theta += ALPHA * moves
        value += ALPHA * (1.0 if algorithm is PREDICTION else RATIO) * slopes
        average += ALPHA * ETA * residuals if continuing else 0.0
    return average


@pytest.mark.parametrize("name", ["episodic", "continuing", "prediction"])
@PROPERTY
@given(SEEDS)
def test_an_online_step_is_its_formula(name: str, seed: int) -> None:
    """Several environments, parameters that move at every step, ends, limits: as the book's boxes have it."""
    algorithm = {"episodic": EPISODIC, "continuing": CONTINUING, "prediction": PREDICTION}[name]
    given, start = experience(seed, ends=name != "continuing"), torch.Generator().manual_seed(seed)
    policy = TabularPolicy(STATES, ACTIONS, torch.randn(STATES, ACTIONS, generator=start))
    with torch.no_grad():
        policy.value.copy_(torch.randn(STATES, generator=start))
    theta, value = policy.theta.detach().clone().numpy(), policy.value.detach().clone().numpy()
    average = by_the_book(algorithm, given, theta, value)
    optimizer = Descent((policy.theta, policy.value))
    learner = TraceLearner(policy, algorithm, optimizer, actor=[policy.theta], critic=[policy.value])
    state = algorithm.initial_state()
    for step in one_by_one(given):
        state = learner.learn(step, now=Now(state=state), learning_rate=ALPHA).state
    np.testing.assert_allclose(policy.theta.detach().numpy(), theta, atol=1e-12)
    np.testing.assert_allclose(policy.value.detach().numpy(), value, atol=1e-12)
    assert state == ({"average_reward": pytest.approx(average, abs=1e-12)} if name == "continuing" else {})


@pytest.mark.parametrize("method", [A2C(gamma=1.0, gae_lambda=LAMBDA), PPO(gamma=1.0, gae_lambda=LAMBDA)])
@pytest.mark.parametrize("known", [True, False])
@PROPERTY
@given(SEEDS)
def test_a_differential_update_is_its_formula(method: A2C | PPO, known: bool, seed: int) -> None:
    """delta = r - r_bar + V' - V; A and targets from behind; r_bar moved by the mean residual, or found at first."""
    given, generator = experience(seed, ends=False), np.random.default_rng(seed)
    table = generator.normal(size=STATES)
    assert isinstance(given.observation, torch.Tensor)
    value, after = table[given.observation.numpy()], table[following(given)]
    reward, cut = given.reward.numpy(), given.cut.numpy()
    average = 0.7 if known else float(reward.mean())
    residual = reward - average + after - value
    advantage = np.zeros_like(residual)
    for t in reversed(range(LENGTH)):
        ahead = 0.0 if t == LENGTH - 1 else np.where(cut[:, t], 0.0, advantage[:, t + 1])
        advantage[:, t] = residual[:, t] + LAMBDA * ahead
    algorithm = AverageReward(method=method, average_reward_rate=0.3, value_centring=0.2)
    now = Now(state={"average_reward": 0.7} if known else {})
    signal = algorithm.advantage(given, torch.from_numpy(value), torch.from_numpy(after), now)
    target = advantage + value
    assert signal.value_target is not None
    np.testing.assert_allclose(signal.advantage.numpy(), advantage, atol=1e-12)
    np.testing.assert_allclose(signal.value_target.numpy(), target - 0.2 * target.mean(), atol=1e-12)
    moved = average + 0.3 * residual.mean() if known else average
    assert float(signal.metrics["average_reward"]) == pytest.approx(moved, abs=1e-12)
    assert algorithm.adapt({}, {"average_reward": 1.5}) == {"average_reward": 1.5}
