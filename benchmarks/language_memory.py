"""Resident memory of a language model's run over 200 updates: GRPO on generated sums, with every part in use.

    python benchmarks/language_memory.py

Prints what the process holds after every 20th update. Fails where it grows by more than the bar between the 40th and
the last, by when caches and allocators have seen batches of every length.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from upslope.algorithms import GRPO, ReferenceKL
from upslope.collect.experience import CompletionConfig
from upslope.collect.tasks.arithmetic import ThinkOrBlurt
from upslope.policies.language.config import LanguageModelConfig, ModelShape
from upslope.train import train
from upslope.train.language import LanguageEvaluationConfig, LanguageLogConfig, LanguageRun
from upslope.train.loop import Snapshot

UPDATES, SETTLED, BAR = 200, 40, 16.0


def resident() -> float:
    """MiB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def main() -> None:
    held: list[float] = []

    def look(snapshot: Snapshot[Any, Any]) -> None:
        held.append(resident())
        if snapshot.update % 20 == 0:
            print(f"update {snapshot.update:3d}: {held[-1]:.1f} MiB", flush=True)

    with TemporaryDirectory() as directory:
        run = LanguageRun(
            task=ThinkOrBlurt(digits=2, held_out=64),
            algorithm=GRPO(reference_kl=ReferenceKL(coefficient=0.01)),
            reference="start",
            experience=CompletionConfig(prompts=8, group=8, limit=32),
            model=LanguageModelConfig(shape=ModelShape(width=32, layers=2, heads=4, inner=64, positions=96)),
            evaluation=LanguageEvaluationConfig(times=4, prompts=16, samples=4, limit=32),
            log=LanguageLogConfig(tensorboard=False, progress=False),
            steps=UPDATES,
            threads=1,
            name="memory",
            directory=Path(directory),
        )
        train(run, callbacks=[look])
    growth = held[-1] - held[SETTLED - 1]
    print(
        f"grown by {growth:.1f} MiB between updates {SETTLED} and {UPDATES} (bar {BAR} MiB), most {max(held):.1f} MiB"
    )
    if growth > BAR:
        raise SystemExit(f"the bar of {BAR} MiB is passed")


if __name__ == "__main__":
    main()
