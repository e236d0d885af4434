"""What live diagnostics cost, in CPU seconds: the same run with and without them, alternately, and their own time.

The pairs see everything but need a quiet machine. The time spent inside the diagnostics (and in the two clock readings
around each call, so that it is rather too much) is steady on a busy one; what autograd does to keep one more gradient
per piece is only in the pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

CASES = {
    "cartpole-ppo": 20_000,
    "cartpole-a2c": 60_000,
    "cartpole-actor-critic": 30_000,
    "cartpole-reinforce": 60_000,
    "halfcheetah-ppo": 12_288,
}
"""Recipes and the steps of one run."""


def one(recipe: str, steps: int, every: int, seed: int) -> dict[str, float]:
    """Train once in this process without evaluation; CPU seconds of all of it and of the diagnostics alone."""
    from upslope.diagnostics import Meter, Watch
    from upslope.recipes import load_recipe
    from upslope.train import train

    inside = [0.0]
    for kind, names in ((Meter, ("begin", "evaluated", "differentiated", "end")), (Watch, ("add", "verdicts"))):
        for name in names:
            setattr(kind, name, timed(getattr(kind, name), inside))
    run = load_recipe(recipe)
    with tempfile.TemporaryDirectory() as directory:
        run = replace(
            run,
            steps=steps,
            seed=seed,
            directory=Path(directory),
            log=replace(run.log, diagnose_every=every, tensorboard=False, progress=False),
            evaluation=replace(run.evaluation, times=0, final_episodes=0),
            checkpoint=replace(run.checkpoint, times=0),
        )
        start = time.process_time()
        train(run)
        return {"seconds": time.process_time() - start, "inside": inside[0]}


def timed(function: Callable[..., Any], inside: list[float]) -> Callable[..., Any]:
    """The same function, its CPU seconds added up."""

    def measured(*arguments: Any, **named: Any) -> Any:
        start = time.thread_time()
        result = function(*arguments, **named)
        inside[0] += time.thread_time() - start
        return result

    return measured


def measure(recipe: str, steps: int, every: int, seed: int, core: int) -> dict[str, float]:
    """The same in a fresh process on one core with one thread."""
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    done = subprocess.run(
        [sys.executable, __file__, "--one", recipe, str(steps), str(every), str(seed)],
        env={**os.environ, **single},
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=4, metavar=("RECIPE", "STEPS", "EVERY", "SEED"), help="a single run")
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--pairs", type=int, default=7, help="runs of each kind per case")
    parser.add_argument("--every", type=int, default=2000, help="log.diagnose_every of the runs with diagnostics")
    parser.add_argument("--core", type=int, default=0, help="which core to pin every run to")
    options = parser.parse_args()
    if options.one:
        recipe, *numbers = options.one
        print(json.dumps(one(recipe, *map(int, numbers))))
        return
    print(
        "| recipe | steps | without, CPU s | own time, median (range) | pairs, median (range) |\n|---|---|---|---|---|"
    )
    for recipe in options.cases:
        steps, before, own, pairs = CASES[recipe], [], [], []
        for pair in range(options.pairs):
            order = (0, options.every) if pair % 2 == 0 else (options.every, 0)
            taken = {every: measure(recipe, steps, every, 1, options.core) for every in order}
            plain, watched = taken[0]["seconds"], taken[options.every]
            before.append(plain)
            own.append(watched["inside"] / (watched["seconds"] - watched["inside"]))
            pairs.append(watched["seconds"] / plain - 1)
        print(
            f"| {recipe} | {steps:,} | {statistics.median(before):.2f} | {spread(own)} | {spread(pairs)} |", flush=True
        )


def spread(costs: list[float]) -> str:
    return f"{statistics.median(costs):+.1%} ({min(costs):+.1%} to {max(costs):+.1%})"


if __name__ == "__main__":
    main()
