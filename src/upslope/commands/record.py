"""`upslope record`: episodes of a trained policy into a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from tyro.conf import Positional

from upslope.commands.common import DONE, say
from upslope.options import parse


@dataclass(frozen=True, kw_only=True)
class Record:
    """Record episodes of a trained agent, to be imitated or compared: the actions it samples, on raw rewards."""

    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
    """A run directory, or a policy folder."""
    out: Path
    """The file to write, episodes.safetensors say."""
    episodes: int = 100
    """How many."""
    seed: int = 0
    """Decides where episodes start and what is sampled."""
    best: bool = False
    """Take the policy that was best in evaluation during the run, not the last one."""
    environment: str | None = None
    """The environment; needed for a policy folder, and where the run's own is module:Name-v0."""


def act(arguments: Sequence[str]) -> int:
    """Run the command."""
    command = parse(Record, arguments, program="upslope record")
    from upslope.train.record import record_run

    recording = record_run(
        command.run,
        command.out,
        episodes=command.episodes,
        seed=command.seed,
        best=command.best,
        environments=command.environment,
    )
    trajectory = recording.trajectory
    mean = float((trajectory.reward * trajectory.mask).sum(-1).mean())
    rows, steps = trajectory.shape[0], int(trajectory.mask.sum())
    say(Console(), f"{command.out}: {rows} episodes, {steps:,} steps, mean return {mean:,.1f}")
    return DONE
