"""Resident memory of a run does not grow with its updates."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_language import COMPLETIONS, some_task, tiny_language

from upslope.algorithms import GRPO
from upslope.train import train
from upslope.train.language import LanguageEvaluationConfig
from upslope.train.loop import Snapshot

STATUS = Path("/proc/self/status")
ALLOWED = 12.0
"""MiB. What one update of this run holds for a moment is about 1; all that 40 would leave behind is far more."""


def resident() -> float:
    """MiB of this process."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_memory_is_flat(tmp_path: Path) -> None:
    seen: list[float] = []

    def look(snapshot: Snapshot[Any, Any]) -> None:
        seen.append(resident())

    never = LanguageEvaluationConfig(times=0, prompts=4, samples=3, pass_at=(1,), limit=6)
    run = tiny_language(tmp_path, algorithm=GRPO(), experience=COMPLETIONS, evaluation=never, steps=60)
    train(run, task=some_task(), callbacks=[look])
    assert seen[-1] - seen[19] < ALLOWED, [round(number, 1) for number in seen]
