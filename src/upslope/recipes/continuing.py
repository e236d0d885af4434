"""Recipes of tasks without end, which are learnt and judged by their average reward.

On access control (Sutton & Barto, example 10.2) the best policy has an average reward of 2.7476, which
`upslope.exact.policy_iteration` finds; always accepting has 2.1814.
"""

from __future__ import annotations

from upslope.algorithms import PPO, ActorCriticLambda, AverageReward
from upslope.collect import EnvironmentConfig
from upslope.policies import ActorCriticConfig
from upslope.train import EvaluationConfig, OptimizerConfig, RolloutConfig, Run


def access_control_actor_critic() -> Run:
    """Actor-critic(lambda) with an average reward on access control, online, 64 queues.

    The critic and r_bar go ahead of the actor: while r_bar is still too low every action looks good, and a policy that
    has become sure of accepting everybody stays so.
    """
    return Run(
        recipe="access-control-actor-critic",
        environment=EnvironmentConfig(id="problem/access-control", count=64),
        policy=ActorCriticConfig(hidden=()),
        algorithm=ActorCriticLambda(
            gamma=1.0, actor_trace_decay=0.8, critic_trace_decay=0.8, value_ratio=2.5, average_reward_ratio=0.1
        ),
        rollout=RolloutConfig(steps=1),
        optimizer=OptimizerConfig(kind="sgd", learning_rate=0.4, schedule="linear", max_gradient_norm=None),
        evaluation=EvaluationConfig(times=5, episodes=10, final_episodes=20, horizon=1000),
        steps=800_000,
    )


def access_control_ppo() -> Run:
    """Average-reward PPO on access control, 16 queues: within 5% of the best average reward."""
    return Run(
        recipe="access-control-ppo",
        environment=EnvironmentConfig(id="problem/access-control", count=16),
        policy=ActorCriticConfig(hidden=()),
        algorithm=AverageReward(method=PPO(gamma=1.0, gae_lambda=0.95, epochs=4, minibatches=4)),
        rollout=RolloutConfig(steps=128),
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="linear"),
        evaluation=EvaluationConfig(times=5, episodes=10, final_episodes=20, horizon=1000),
        steps=400_000,
    )


def pendulum_continuing_ppo() -> Run:
    """Average-reward PPO on a Pendulum whose task never ends; judged over 500 steps from random starts.

    Every 500 steps it is started anew, which cuts the experience and does not end the task. Never started anew it stays
    upright, and the policy forgets the swing-up.
    """
    return Run(
        recipe="pendulum-continuing-ppo",
        environment=EnvironmentConfig(id="Pendulum-v1", count=8, time_limit=500),
        policy=ActorCriticConfig(normalize_observation=True),
        algorithm=AverageReward(method=PPO(gamma=1.0, gae_lambda=0.95, epochs=10, minibatches=16)),
        rollout=RolloutConfig(steps=256),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="linear", max_gradient_norm=None),
        evaluation=EvaluationConfig(times=5, episodes=10, final_episodes=10),
        steps=300_000,
    )
