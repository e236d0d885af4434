"""Complete, vetted configurations of agents that go on learning from a policy that is there. Each function is a recipe.

`upslope train cartpole-fine-tune --start-from PATH` takes any policy folder or run directory instead of the recipe that
is named here.
"""

from __future__ import annotations

from dataclasses import replace

from upslope.algorithms import PPO, ReferenceKL
from upslope.recipes.control import cartpole_ppo
from upslope.train import Run


def cartpole_novice() -> Run:
    """The first 15,000 steps of PPO on CartPole-v1: a policy that has begun to learn, to start from."""
    return replace(cartpole_ppo(), recipe="cartpole-novice", steps=15_000)


def cartpole_fine_tune() -> Run:
    """PPO on CartPole-v1 from what cartpole-novice made: KL to that policy, and an entropy bonus that falls to 0."""
    return replace(
        cartpole_ppo(),
        recipe="cartpole-fine-tune",
        start_from="cartpole-novice",
        algorithm=PPO(
            gamma=0.98,
            gae_lambda=0.8,
            epochs=10,
            minibatches=1,
            value_coefficient=1.0,
            entropy_coefficient=0.01,
            entropy_schedule="linear",
            reference_kl=ReferenceKL(coefficient=0.2, place="loss", estimator="exact"),
        ),
        steps=60_000,
    )
