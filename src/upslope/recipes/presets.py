"""PPO as others define it, setting by setting, for any environment: `upslope train ppo-sb3 --environment.id ...`.

Same names elsewhere do not mean the same numbers: SB3's vf_coef multiplies (V - target)^2 and CleanRL's half of it;
SB3 stops before a step beyond 1.5 target_kl, CleanRL after a pass beyond 1.0. What is written here is what those
settings are in our terms. One difference is deliberate in all of them: time limits bootstrap.
"""

from __future__ import annotations

from upslope.algorithms import PPO
from upslope.collect import EnvironmentConfig
from upslope.policies import ActorCriticConfig
from upslope.train import OptimizerConfig, RolloutConfig, Run


def ppo_cleanrl() -> Run:
    """PPO as CleanRL's ppo.py sets it: clipped value loss, entropy bonus, linear annealing."""
    return Run(
        recipe="ppo-cleanrl",
        environment=EnvironmentConfig(id="CartPole-v1", count=4),
        policy=ActorCriticConfig(),
        algorithm=PPO(
            gamma=0.99,
            gae_lambda=0.95,
            epochs=4,
            minibatches=4,
            clip=0.2,
            normalize_advantage=True,
            value_coefficient=0.5,
            value_clip=0.2,
            entropy_coefficient=0.01,
            kl_stop="after_epoch",
        ),
        rollout=RolloutConfig(steps=128),
        optimizer=OptimizerConfig(learning_rate=2.5e-4, schedule="linear", epsilon=1e-5, max_gradient_norm=0.5),
        steps=500_000,
    )


def ppo_sb3() -> Run:
    """PPO as Stable-Baselines3 sets it: no annealing, no entropy bonus, batches of 64 from 2048 steps."""
    return Run(
        recipe="ppo-sb3",
        environment=EnvironmentConfig(id="CartPole-v1", count=1),
        policy=ActorCriticConfig(),
        algorithm=PPO(
            gamma=0.99,
            gae_lambda=0.95,
            epochs=10,
            minibatches=32,
            clip=0.2,
            normalize_advantage=True,
            value_coefficient=1.0,
            value_clip_pessimistic=False,
            entropy_coefficient=0.0,
            kl_stop="before_step",
        ),
        rollout=RolloutConfig(steps=2048),
        optimizer=OptimizerConfig(learning_rate=3e-4, epsilon=1e-5, max_gradient_norm=0.5),
        steps=100_000,
    )


def ppo_paper() -> Run:
    """PPO as the paper's continuous-control section sets it: horizon 2048, no entropy bonus, no gradient clipping."""
    return Run(
        recipe="ppo-paper",
        environment=EnvironmentConfig(id="Hopper-v5", count=1),
        policy=ActorCriticConfig(),
        algorithm=PPO(
            gamma=0.99,
            gae_lambda=0.95,
            epochs=10,
            minibatches=32,
            clip=0.2,
            normalize_advantage=False,
            value_coefficient=1.0,
            entropy_coefficient=0.0,
        ),
        rollout=RolloutConfig(steps=2048),
        optimizer=OptimizerConfig(learning_rate=3e-4, epsilon=1e-8, max_gradient_norm=None),
        steps=1_000_000,
    )
