"""One measured run of upslope, metrics.jsonl included: `python upslope_side.py CASE SEED VECTORIZATION`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from cases import CASES, CLIP, EPSILON, GAE_LAMBDA, GAMMA, MAX_NORM, Meter
from upslope.algorithms import A2C, PPO
from upslope.collect import EnvironmentConfig
from upslope.policies import ActorCriticConfig
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


def main(case: str, seed: int, vectorization: str) -> None:
    settings = CASES[case]
    normalize = settings["environment"] == "HalfCheetah-v5"
    if settings["algorithm"] == "ppo":
        algorithm = PPO(
            gamma=GAMMA,
            gae_lambda=GAE_LAMBDA,
            clip=CLIP,
            epochs=settings["epochs"],
            minibatches=settings["minibatches"],
            value_coefficient=1.0,
            entropy_coefficient=settings["entropy"],
        )
        optimizer = OptimizerConfig(
            learning_rate=settings["learning_rate"], epsilon=EPSILON, max_gradient_norm=MAX_NORM
        )
    else:
        algorithm = A2C(gamma=GAMMA, gae_lambda=1.0, value_coefficient=1.0)
        optimizer = OptimizerConfig(
            kind="rmsprop", learning_rate=settings["learning_rate"], epsilon=EPSILON, max_gradient_norm=MAX_NORM
        )
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
            policy=ActorCriticConfig(normalize_observation=normalize, normalize_reward=normalize),
            algorithm=algorithm,
            rollout=RolloutConfig(steps=settings["steps"]),
            optimizer=optimizer,
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
