"""Recipes on named problems: what they set, and what PPO finds where the best policy is known exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from upslope import CheckpointConfig, EvaluationConfig, LogConfig
from upslope.exact import FiniteMDP, problem, solve
from upslope.recipes import RECIPES, load_recipe, six_state_ppo
from upslope.train import train

CORRIDOR = ["short-corridor-reinforce", "short-corridor-baseline", "short-corridor-actor-critic"]


@pytest.mark.parametrize("name", CORRIDOR)
def test_nothing_in_the_corridor_recipes_moves_the_optimum(name: str) -> None:
    """No discount, no entropy bonus, no standardised advantages, no bootstrapping, no clipped gradient."""
    run = load_recipe(name)
    target = run.algorithm.target
    assert run.environment.id == "problem/short-corridor"
    assert run.algorithm.gamma == 1.0
    assert target.biased_by == ()
    assert not target.batchwise
    assert run.rollout.episodes is not None
    assert run.optimizer.max_gradient_norm is None
    assert run.optimizer.schedule == "linear"


def test_they_are_listed_under_their_names() -> None:
    for name in [*CORRIDOR, "six-state-ppo"]:
        assert RECIPES[name]().recipe == name


def best_objective(mdp: FiniteMDP) -> float:
    """J of the best policy, by value iteration."""
    value = torch.zeros(mdp.states, dtype=torch.float64)
    for _ in range(200):
        action_value = (mdp.transition * (mdp.reward + mdp.gamma * value)).sum(-1)
        value = action_value.max(-1).values * ~mdp.terminal
    return float(mdp.start @ value)


@pytest.mark.parametrize("seed", [1, 2])
def test_ppo_finds_the_best_policy_of_the_six_state_problem(seed: int, tmp_path: Path) -> None:
    run = replace(
        six_state_ppo(),
        evaluation=EvaluationConfig(times=0, final_episodes=0),
        checkpoint=CheckpointConfig(times=0),
        log=LogConfig(progress=False, tensorboard=False),
        seed=seed,
        steps=50_000,
        directory=tmp_path,
    )
    mdp = problem("six-state").mdp
    assert run.algorithm.gamma == mdp.gamma
    policy = train(run).policy
    with torch.no_grad():
        found = float(solve(mdp, policy).objective)
    assert found > best_objective(mdp) - 0.02
