"""`upslope evaluate`: judge the policy of a run."""

from __future__ import annotations

import dataclasses
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
class Evaluate:
    """Play episodes with the policy a run saved: most likely actions, then sampled ones, on raw rewards."""

    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Its directory."""
    episodes: int = 100
    """Episodes for each of the two ways to act."""
    seed: int = 0
    """Decides where episodes start and what is sampled."""
    best: bool = False
    """Take the policy that was best in evaluation during the run, not the last one."""
    environment: str | None = None
    """Another environment; needed only where the run's own is module:Name-v0, since making it imports the module."""
    render: bool = False
    """Watch an episode in a window."""
    video: bool = False
    """Record an episode into the run directory (needs `pip install 'upslope[video]'`)."""


def act(arguments: Sequence[str]) -> int:
    """Run the command."""
    command = parse(Evaluate, arguments, program="upslope evaluate")
    from upslope.report.terminal import evaluation_table
    from upslope.train import evaluate_run

    report = evaluate_run(
        command.run,
        episodes=command.episodes,
        seed=command.seed,
        best=command.best,
        environments=command.environment,
    )
    console = Console()
    console.print(evaluation_table(report))
    if command.render or command.video:
        from upslope.report.video import record_video, watch
        from upslope.train import load
        from upslope.train.config_file import read_evaluation

        policy = load(command.run / ("best" if command.best else "policy"))
        environment, _ = read_evaluation(command.run)
        if command.environment is not None:
            environment = dataclasses.replace(environment, id=command.environment)
        if command.render:
            say(console, f"shown: an episode with a return of {watch(policy, environment, seed=command.seed):,.1f}")
        if command.video:
            path = command.run / "videos" / f"{'best' if command.best else 'policy'}-seed{command.seed}.mp4"
            total = record_video(policy, environment, path, seed=command.seed)
            say(console, f"video: {path}, an episode with a return of {total:,.1f}")
    return DONE
