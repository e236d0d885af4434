"""Recipes of eligibility traces: online, one update per step, on tables and on CartPole."""

from __future__ import annotations

from upslope.algorithms import ActorCriticLambda, TDLambda
from upslope.collect import EnvironmentConfig
from upslope.policies import ActorCriticConfig
from upslope.train import EvaluationConfig, OptimizerConfig, RolloutConfig, Run

_ONLINE = RolloutConfig(steps=1)


def short_corridor_traces() -> Run:
    """Actor-critic(lambda) on the short corridor, online, 64 environments with a trace each.

    With lambda = 1 nothing is bootstrapped, which the critic, to which all states look alike, could not do right.
    """
    return Run(
        recipe="short-corridor-traces",
        environment=EnvironmentConfig(id="problem/short-corridor", count=64),
        policy=ActorCriticConfig(hidden=()),
        algorithm=ActorCriticLambda(
            gamma=1.0, actor_trace_decay=1.0, critic_trace_decay=1.0, discounted_states=True, value_ratio=5.0
        ),
        rollout=_ONLINE,
        optimizer=OptimizerConfig(kind="sgd", learning_rate=1.6e-2, schedule="linear", max_gradient_norm=None),
        evaluation=EvaluationConfig(times=5, episodes=200, final_episodes=200, environments=200),
        steps=400_000,
    )


def cartpole_traces() -> Run:
    """Actor-critic(lambda) on CartPole-v1: one environment, an update at each of its steps, plain gradient steps."""
    return Run(
        recipe="cartpole-traces",
        environment=EnvironmentConfig(id="CartPole-v1", count=1),
        policy=ActorCriticConfig(hidden=(64,), normalize_observation=True),
        algorithm=ActorCriticLambda(gamma=0.99, actor_trace_decay=0.9, critic_trace_decay=0.9),
        rollout=_ONLINE,
        optimizer=OptimizerConfig(kind="sgd", learning_rate=5e-4, schedule="linear", max_gradient_norm=None),
        steps=120_000,
    )


def random_walk_prediction() -> Run:
    """TD(lambda) prediction on the random walk of 19 states, 64 walks: the values of the even policy."""
    return Run(
        recipe="random-walk-prediction",
        environment=EnvironmentConfig(id="problem/random-walk-19", count=64),
        policy=ActorCriticConfig(hidden=(), policy_gain=0.0, value_gain=0.0),
        algorithm=TDLambda(gamma=1.0, trace_decay=0.8),
        rollout=_ONLINE,
        optimizer=OptimizerConfig(kind="sgd", learning_rate=1.0, schedule="linear", max_gradient_norm=None),
        evaluation=EvaluationConfig(times=0, final_episodes=64),
        steps=128_000,
    )
