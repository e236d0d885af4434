"""Rows cut shorter than a rollout see what really followed: nothing of one step changes, whoever learns from them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from upslope import A2C, ActorCritic, ActorCriticConfig, EnvironmentConfig, OneStepActorCritic, VTraceActorCritic
from upslope.algorithms import AverageReward, Now
from upslope.collect import EnvironmentCollector, make_environments
from upslope.trajectory import Trajectory


def collected(identity: str, row_steps: int | None) -> tuple[ActorCritic, Trajectory]:
    environments = make_environments(EnvironmentConfig(id=identity, count=3, time_limit=7), seed=1)
    spaces = (environments.observation_space, environments.action_space)
    policy = ActorCritic(*spaces, ActorCriticConfig(hidden=(8,)), generator=torch.Generator().manual_seed(0))
    collector = EnvironmentCollector(environments, steps=24, seed=1, row_steps=row_steps)
    try:
        return policy, collector.collect(policy, 0)
    finally:
        collector.close()


@pytest.mark.parametrize(
    "algorithm",
    [
        A2C(gamma=0.9, gae_lambda=0.0),
        OneStepActorCritic(gamma=0.9),
        VTraceActorCritic(gamma=0.9, gae_lambda=0.0),
        AverageReward(method=A2C(gamma=1.0, gae_lambda=0.0)),
    ],
    ids=lambda algorithm: type(algorithm).__name__,
)
def test_what_follows_a_row_is_what_followed_the_step(algorithm: Any) -> None:
    identity = "Pendulum-v1" if isinstance(algorithm, AverageReward) else "CartPole-v1"
    found = list[Any]()
    for row_steps in (None, 8, 1):
        policy, trajectory = collected(identity, row_steps)
        trajectory = replace(trajectory, proximal_log_prob=trajectory.behaviour_log_prob)
        value, next_value = policy.values(trajectory)
        signal = algorithm.advantage(trajectory, value, next_value, Now())
        found.append((next_value.reshape(3, 24), signal.value_target.reshape(3, 24), signal.advantage.reshape(3, 24)))
    for cut in found[1:]:
        looks_further = isinstance(algorithm, VTraceActorCritic)  # its Psi_t has v_{t+1} in it
        for one, other in list(zip(cut, found[0], strict=True))[: 2 if looks_further else 3]:
            torch.testing.assert_close(one, other)
