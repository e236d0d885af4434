"""Recipes on named problems (`problem/NAME`), small enough that the answer is known exactly.

The short corridor (Sutton & Barto, example 13.1) has three states that look alike, so that a policy is one number, the
probability p of going right. The best is p = 2 - sqrt(2) = 0.586 with a mean return of -11.66; learned p is within 0.02
of it. J is flat around its maximum (0.02 off costs 0.02 in return), hence large batches and a learning rate that falls
to 0. The most likely action is the worst policy there: judge by the sampled returns of an evaluation.
"""

from __future__ import annotations

from upslope.algorithms import A2C, PPO, Reinforce
from upslope.collect import EnvironmentConfig
from upslope.policies import ActorCriticConfig
from upslope.train import EvaluationConfig, OptimizerConfig, RolloutConfig, Run


def short_corridor_reinforce() -> Run:
    """REINFORCE with reward to go on the short corridor: p = 0.586 to within 0.02."""
    return _short_corridor("short-corridor-reinforce", Reinforce(gamma=1.0))


def short_corridor_baseline() -> Run:
    """REINFORCE with a learned baseline on the short corridor: p = 0.586 to within 0.02."""
    return _short_corridor("short-corridor-baseline", Reinforce(gamma=1.0, psi="baselined"))


def short_corridor_actor_critic() -> Run:
    """Advantage actor-critic with a Monte Carlo critic on the short corridor: p = 0.586 to within 0.02.

    The critic, too, sees all states as one. Its TD residual r + V' - V is then -1 wherever the episode goes on and
    -1 - V at its end, whatever the actions did to the state: a one-step actor-critic follows another gradient. With
    lambda = 1 on whole episodes nothing is bootstrapped and the critic is a mere baseline: whichever it is, the sum
    over steps has the right mean. A2C's mean over steps divides it by however many steps the N episodes took, and such
    a ratio is off by a term of order 1/N; N is 2048 here.
    """
    return _short_corridor("short-corridor-actor-critic", A2C(gamma=1.0, gae_lambda=1.0))


def six_state_ppo() -> Run:
    """PPO on the six-state problem: finds the best policy, checked against the exact solution."""
    return Run(
        recipe="six-state-ppo",
        environment=EnvironmentConfig(id="problem/six-state", count=64),
        policy=ActorCriticConfig(hidden=(32,)),
        algorithm=PPO(gamma=0.8, epochs=4, minibatches=4),
        rollout=RolloutConfig(steps=16),
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="linear"),
        steps=100_000,
    )


def _short_corridor(recipe: str, algorithm: Reinforce | A2C) -> Run:
    return Run(
        recipe=recipe,
        environment=EnvironmentConfig(id="problem/short-corridor", count=128),
        policy=ActorCriticConfig(hidden=(), critic=algorithm.passes.critic),
        algorithm=algorithm,
        rollout=RolloutConfig(steps=None, episodes=2048),
        optimizer=OptimizerConfig(learning_rate=0.03, schedule="linear", max_gradient_norm=None),
        evaluation=EvaluationConfig(episodes=200, final_episodes=200, environments=200),
        steps=4_000_000,
    )
