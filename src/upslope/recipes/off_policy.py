"""Recipes that learn from the data of older policies: what acts is `rollout.lag` updates behind what learns.

To learn from a policy of one's own choice, give its folder: `--rollout.behaviour runs/NAME/policy --rollout.lag 0`.
"""

from __future__ import annotations

from upslope.algorithms import PPO, ImportanceSampled, StaleData, VTraceActorCritic
from upslope.collect import EnvironmentConfig
from upslope.policies import ActorCriticConfig
from upslope.train import OptimizerConfig, RolloutConfig, Run


def cartpole_vtrace() -> Run:
    """V-trace actor-critic on CartPole-v1, with a policy that acts 4 updates late."""
    return Run(
        recipe="cartpole-vtrace",
        environment=EnvironmentConfig(id="CartPole-v1", count=16),
        algorithm=VTraceActorCritic(gamma=0.98, gae_lambda=0.95, normalize_advantage=True),
        rollout=RolloutConfig(steps=32, lag=4),
        optimizer=OptimizerConfig(learning_rate=2e-3, schedule="linear", max_gradient_norm=None),
        steps=200_000,
    )


def cartpole_ppo_stale() -> Run:
    """PPO on CartPole-v1 from the last 4 rollouts together: clipped around the learner, weighted for who acted."""
    return Run(
        recipe="cartpole-ppo-stale",
        environment=EnvironmentConfig(id="CartPole-v1", count=8),
        algorithm=PPO(
            gamma=0.98,
            gae_lambda=0.8,
            epochs=20,
            minibatches=1,
            clip_schedule="linear",
            value_coefficient=1.0,
            stale=StaleData(anchor="proximal", importance_cap=2.0, advantage="vtrace"),
        ),
        rollout=RolloutConfig(steps=32, batches=4),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="linear"),
        steps=100_000,
    )


def six_state_importance_sampled() -> Run:
    """Importance-sampled policy gradient on the six-state problem, from whole episodes of the policy 4 updates ago."""
    return Run(
        recipe="six-state-importance-sampled",
        environment=EnvironmentConfig(id="problem/six-state", count=32),
        policy=ActorCriticConfig(hidden=(32,), critic=False),
        algorithm=ImportanceSampled(gamma=0.8),
        rollout=RolloutConfig(steps=None, episodes=64, lag=4),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        steps=100_000,
    )
