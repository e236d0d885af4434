"""That the recipes learn: few seeds, small budgets, and bars that are far from what an untrained policy gets (22)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from upslope import (
    PPO,
    ActorCriticConfig,
    CheckpointConfig,
    EnvironmentConfig,
    EvaluationConfig,
    LogConfig,
    OptimizerConfig,
    RolloutConfig,
    Run,
    Snapshot,
    train,
)
from upslope.recipes import cartpole_a2c, cartpole_baseline, cartpole_ppo


def quiet(run: Run, directory: Path, *, seed: int, steps: int, evaluations: int) -> Run:
    return replace(
        run,
        environment=replace(run.environment, vectorization="sync"),
        evaluation=EvaluationConfig(times=evaluations, episodes=20, final_episodes=20),
        checkpoint=CheckpointConfig(times=0),
        log=LogConfig(progress=False, tensorboard=False),
        seed=seed,
        steps=steps,
        name="run",
        directory=directory,
    )


@pytest.mark.parametrize("seed", [1, 2])
def test_ppo_balances_the_pole(seed: int, tmp_path: Path) -> None:
    """The recipe as it stands reaches a mean return of 475 well within its budget."""
    reached: list[float] = []

    def good_enough(snapshot: Snapshot) -> bool:
        if snapshot.evaluation is not None:
            reached.append(float(snapshot.evaluation.deterministic_returns.mean()))
        return bool(reached) and reached[-1] >= 475.0

    train(quiet(cartpole_ppo(), tmp_path, seed=seed, steps=250_000, evaluations=25), callbacks=[good_enough])
    assert reached[-1] >= 475.0, reached


def test_reinforce_with_a_baseline_improves_clearly(tmp_path: Path) -> None:
    result = train(quiet(cartpole_baseline(), tmp_path, seed=1, steps=40_000, evaluations=0))
    assert result.evaluation is not None
    assert result.evaluation.deterministic_returns.mean() >= 150.0
    assert result.evaluation.stochastic_returns.mean() >= 100.0


def test_a2c_improves_clearly(tmp_path: Path) -> None:
    result = train(quiet(cartpole_a2c(), tmp_path, seed=1, steps=60_000, evaluations=0))
    assert result.evaluation is not None
    assert result.evaluation.stochastic_returns.mean() >= 150.0


class BrightSide(gymnasium.Env[np.ndarray, np.int64]):
    """A picture with a bright half; reward 1 for naming it; 8 pictures an episode. Guessing earns 4."""

    observation_space = gymnasium.spaces.Box(0, 255, (40, 40, 1), np.uint8)
    action_space = gymnasium.spaces.Discrete(2)

    def _picture(self) -> np.ndarray:
        self.side = int(self.np_random.integers(2))
        picture = self.np_random.integers(0, 100, (40, 40, 1), dtype=np.uint8)
        picture[:, 20 * self.side : 20 * self.side + 20] += np.uint8(100)
        return picture

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.left = 8
        return self._picture(), {}

    def step(self, action: np.int64) -> Any:
        reward = float(action == self.side)
        self.left -= 1
        return self._picture(), reward, self.left == 0, False, {}


def test_ppo_learns_from_pixels(tmp_path: Path) -> None:
    """Through the Nature-CNN, shared by actor and critic."""
    run = Run(
        environment=EnvironmentConfig(count=8),
        policy=ActorCriticConfig(encoder="nature_cnn", shared=True, hidden=()),
        algorithm=PPO(gamma=0.5, epochs=2, minibatches=2),
        rollout=RolloutConfig(steps=16),
        optimizer=OptimizerConfig(learning_rate=5e-4),
    )
    result = train(quiet(run, tmp_path, seed=1, steps=2_000, evaluations=0), environments=BrightSide)
    assert result.evaluation is not None
    assert result.evaluation.deterministic_returns.mean() >= 7.5
