"""One measured run of upslope, metrics.jsonl included: `python upslope_side.py CASE SEED VECTORIZATION`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from cases import (
    BACKTRACK,
    CASES,
    CLIP,
    CONJUGATE_GRADIENT_ITERATIONS,
    DAMPING,
    EPSILON,
    GAE_LAMBDA,
    GAMMA,
    LINE_SEARCH_ATTEMPTS,
    MAX_NORM,
    TRUST_REGION,
    Meter,
)
from upslope.algorithms import A2C, PPO, TRPO
from upslope.collect import EnvironmentConfig
from upslope.policies import ActorCriticConfig, MemoryConfig
from upslope.train import (
    CheckpointConfig,
    EvaluationConfig,
    LogConfig,
    OptimizerConfig,
    RolloutConfig,
    Run,
    Snapshot,
    train,
)


def algorithm_of(settings: dict[str, Any]) -> PPO | A2C | TRPO:
    """The algorithm of a case."""
    if settings["algorithm"] == "a2c":
        return A2C(gamma=GAMMA, gae_lambda=1.0, value_coefficient=1.0)
    if settings["algorithm"] == "trpo":
        return TRPO(
            gamma=GAMMA,
            gae_lambda=GAE_LAMBDA,
            max_divergence=TRUST_REGION,
            damping=DAMPING,
            conjugate_gradient_iterations=CONJUGATE_GRADIENT_ITERATIONS,
            backtrack=BACKTRACK,
            line_search_attempts=LINE_SEARCH_ATTEMPTS,
            critic_epochs=settings["epochs"],
            critic_minibatches=settings["minibatches"],
        )
    return PPO(
        gamma=GAMMA,
        gae_lambda=GAE_LAMBDA,
        clip=CLIP,
        epochs=settings["epochs"],
        minibatches=settings["minibatches"],
        value_coefficient=1.0,
        entropy_coefficient=settings["entropy"],
    )


def optimizer_of(settings: dict[str, Any]) -> OptimizerConfig:
    """The optimiser of a case; that of TRPO fits the critic, whose gradient the peer does not clip."""
    return OptimizerConfig(
        kind="rmsprop" if settings["algorithm"] == "a2c" else "adam",
        learning_rate=settings["learning_rate"],
        epsilon=EPSILON,
        max_gradient_norm=None if settings["algorithm"] == "trpo" else MAX_NORM,
    )


def main(case: str, seed: int, vectorization: str) -> None:
    settings = CASES[case]
    normalize = settings["environment"] == "HalfCheetah-v5"
    memory = MemoryConfig(kind="lstm", size=settings["units"]) if "units" in settings else None
    meter, returns = Meter(), []

    def mark(snapshot: Snapshot) -> None:
        meter.mark(snapshot.steps)
        if "episode_return" in snapshot.metrics:
            returns.append(snapshot.metrics["episode_return"])

    with tempfile.TemporaryDirectory() as directory:
        run = Run(
            environment=EnvironmentConfig(
                id=settings["environment"], count=settings["count"], vectorization=vectorization
            ),
            policy=ActorCriticConfig(normalize_observation=normalize, normalize_reward=normalize, memory=memory),
            algorithm=algorithm_of(settings),
            rollout=RolloutConfig(steps=settings["steps"]),
            optimizer=optimizer_of(settings),
            evaluation=EvaluationConfig(times=0, final_episodes=1, environments=1),
            checkpoint=CheckpointConfig(times=0),
            log=LogConfig(tensorboard=False, progress=False),
            steps=settings["total"],
            seed=seed,
            directory=Path(directory),
        )
        train(run, callbacks=[mark])
    meter.report("upslope", case, seed, returns)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
