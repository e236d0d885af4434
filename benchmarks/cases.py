"""The settings both sides share, and the meter both sides use."""

from __future__ import annotations

import json
import time

CASES: dict[str, dict] = {
    "a": {
        "algorithm": "ppo",
        "environment": "CartPole-v1",
        "count": 4,
        "steps": 128,
        "epochs": 4,
        "minibatches": 4,
        "learning_rate": 2.5e-4,
        "entropy": 0.01,
        "total": 40_000,
    },
    "b": {
        "algorithm": "ppo",
        "environment": "CartPole-v1",
        "count": 64,
        "steps": 128,
        "epochs": 4,
        "minibatches": 4,
        "learning_rate": 2.5e-4,
        "entropy": 0.01,
        "total": 164_000,
    },
    "c": {
        "algorithm": "ppo",
        "environment": "HalfCheetah-v5",
        "count": 1,
        "steps": 2048,
        "epochs": 10,
        "minibatches": 32,
        "learning_rate": 3e-4,
        "entropy": 0.0,
        "total": 16_384,
    },
    "d": {
        "algorithm": "a2c",
        "environment": "CartPole-v1",
        "count": 8,
        "steps": 5,
        "epochs": 1,
        "minibatches": 1,
        "learning_rate": 7e-4,
        "entropy": 0.0,
        "total": 30_000,
    },
    "e": {
        "algorithm": "trpo",
        "environment": "CartPole-v1",
        "count": 1,
        "steps": 2048,
        "epochs": 10,
        "minibatches": 16,
        "learning_rate": 1e-3,
        "entropy": 0.0,
        "total": 20_480,
    },
    "e2": {
        "algorithm": "trpo",
        "environment": "HalfCheetah-v5",
        "count": 1,
        "steps": 2048,
        "epochs": 10,
        "minibatches": 16,
        "learning_rate": 1e-3,
        "entropy": 0.0,
        "total": 20_480,
    },
    "r": {
        "algorithm": "recurrent ppo",
        "environment": "CartPole-v1",
        "count": 8,
        "steps": 128,
        "epochs": 4,
        "minibatches": 4,
        "learning_rate": 2.5e-4,
        "entropy": 0.0,
        "total": 5_120,
        "units": 256,
    },
}
TRUST_REGION, DAMPING, CONJUGATE_GRADIENT_ITERATIONS, BACKTRACK, LINE_SEARCH_ATTEMPTS = 0.01, 0.1, 15, 0.8, 10
GAMMA, GAE_LAMBDA, CLIP, MAX_NORM, EPSILON = 0.99, 0.95, 0.2, 0.5, 1e-5


class Meter:
    """Marks (environment steps, CPU seconds) after every update; the rate leaves out the first fifth of the steps."""

    def __init__(self) -> None:
        self.marks = [(0, time.process_time())]

    def mark(self, steps: int) -> None:
        self.marks.append((steps, time.process_time()))

    def report(self, side: str, case: str, seed: int, returns: list[float]) -> None:
        total = self.marks[-1][0]
        first = next(index for index, (steps, _) in enumerate(self.marks) if steps >= 0.2 * total)
        (steps0, cpu0), (steps1, cpu1) = self.marks[first], self.marks[-1]
        last = returns[-20:]
        record = {
            "side": side,
            "case": case,
            "seed": seed,
            "steps": total,
            "steps_per_cpu_second": (steps1 - steps0) / (cpu1 - cpu0),
            "mean_of_last_20_returns": sum(last) / len(last) if last else None,
        }
        print("RESULT " + json.dumps(record), flush=True)
