"""That the recipes learn: few seeds, small budgets, and bars that are far from what an untrained policy gets (22)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from upslope import CheckpointConfig, EvaluationConfig, LogConfig, Run, Snapshot, train
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
