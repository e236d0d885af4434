"""Learning finds the answer printed in the book: in the short corridor, right with probability 2 - sqrt(2).

J is flat there: after 2 million steps, with a learning rate that falls to 0, p still comes out 0.01 off. The bar is
0.02, which costs 0.02 of a mean return of -11.66.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from upslope import CheckpointConfig, EvaluationConfig, LogConfig, OptimizerConfig, Run
from upslope.algorithms import Now, OneStepActorCritic, scheduled
from upslope.collect import EnvironmentCollector, FiniteVectorEnvironment
from upslope.exact import LinearPolicy, action_probabilities, problem, solve
from upslope.recipes import short_corridor_actor_critic, short_corridor_baseline, short_corridor_reinforce
from upslope.streams import Purpose, stream
from upslope.train import train
from upslope.train.optimizer import FlatOptimizer
from upslope.train.step import learn

BEST = problem("short-corridor").published["best probability of right"]
RIGHT = 1


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("recipe", [short_corridor_reinforce, short_corridor_baseline, short_corridor_actor_critic])
def test_the_recipes_learn_the_best_probability(recipe: Callable[[], Run], seed: int, tmp_path: Path) -> None:
    """In half their budget."""
    run = replace(
        recipe(),
        evaluation=EvaluationConfig(times=0, final_episodes=0),
        checkpoint=CheckpointConfig(times=0),
        log=LogConfig(progress=False, tensorboard=False),
        seed=seed,
        steps=2_000_000,
        directory=tmp_path,
    )
    policy = train(run).policy
    mdp = problem("short-corridor").mdp
    with torch.no_grad():
        right = action_probabilities(mdp, policy)[:, RIGHT]
        objective = float(solve(mdp, policy).objective)
    assert float(right.max() - right.min()) == 0.0
    assert abs(float(right[0]) - BEST) < 0.02
    assert objective == pytest.approx(-(6.0 + 4.0 * math.sqrt(2.0)), abs=0.03)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_one_step_actor_critic_whose_critic_sees_the_states(seed: int) -> None:
    """Actor on the book's features, which are the same everywhere; a table of the true states as the critic."""
    policy = one_step_actor_critic(seed, critic_sees_states=True)
    assert abs(float(policy.preferences().softmax(-1)[0, RIGHT]) - BEST) < 0.02
    hindsight = solve(replace(problem("short-corridor").mdp, observation=torch.arange(4)), policy)
    assert float((policy.value[:3] - hindsight.value[:3]).abs().max()) < 1.0


def test_a_one_step_actor_critic_whose_critic_sees_no_more_than_the_actor_learns_something_else() -> None:
    """Its TD residual is -1 everywhere but in the last step, which right always takes: it goes right ever more."""
    policy = one_step_actor_critic(1, critic_sees_states=False)
    assert float(policy.preferences().softmax(-1)[0, RIGHT]) > BEST + 0.1


def one_step_actor_critic(seed: int, *, critic_sees_states: bool) -> LinearPolicy:
    """The library's own learning step on fragments of 4 steps of 256 environments."""
    mdp, states, updates, learning_rate = problem("short-corridor").mdp, 1, 600, 0.08
    if critic_sees_states:
        mdp, states = replace(mdp, observation=torch.arange(4)), 4
    policy = LinearPolicy(torch.eye(2, dtype=torch.float64).expand(states, 2, 2))
    algorithm = OneStepActorCritic(gamma=1.0, value_coefficient=1.0)
    optimizer = FlatOptimizer(policy, OptimizerConfig(learning_rate=learning_rate, max_gradient_norm=None))
    collector = EnvironmentCollector(FiniteVectorEnvironment(mdp, 256, time_limit=200), steps=4, seed=seed)
    for update in range(updates):
        progress = update / updates
        learn(
            policy,
            algorithm,
            optimizer,
            collector.collect(policy, update),
            now=Now(progress=progress),
            learning_rate=scheduled("linear", learning_rate, progress),
            generator=stream(seed, Purpose.SHUFFLE, 0, update),
        )
    return policy.requires_grad_(False)
