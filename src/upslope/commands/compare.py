"""`upslope compare`: runs over seeds, as a table and a picture."""

from __future__ import annotations

import json
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
class Compare:
    """Compare runs: those that learn alike from other seeds are a group, with interquartile mean and interval."""

    runs: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN...")]
    """Run directories."""
    metric: str | None = None
    """A name from metrics.jsonl; if not given, the mean evaluation return of agents with the most likely actions, the
    accuracy of language models with the likeliest completion."""
    out: Path | None = None
    """Draw the learning curves here (.png, .svg or .pdf); compare.png in the working directory if not given. Language
    models' runs that differ by their seed alone get two panels: accuracy with parts of the reward, and length."""
    json: Path | None = None
    """Write the figures here."""
    title: str | None = None
    """Above the picture."""


def act(arguments: Sequence[str]) -> int:
    """Run the command."""
    command = parse(Compare, arguments, program="upslope compare")
    from upslope.report import compare, draw, draw_language

    comparison = compare(command.runs, metric=command.metric)
    console = Console()
    console.print(comparison.table(width=console.width))
    if command.json is not None:
        command.json.parent.mkdir(parents=True, exist_ok=True)
        command.json.write_text(json.dumps(comparison.tree(), indent=2) + "\n", "utf-8")
        say(console, f"figures: {command.json}")
    picture = command.out or Path("compare.png")
    panels = comparison.metric == "greedy_accuracy" and command.metric is None and len(comparison.groups) == 1
    try:
        if panels:
            draw_language(command.runs, picture, title=command.title)
        else:
            draw(comparison, picture, title=command.title)
    except ModuleNotFoundError as error:
        if command.out is not None:
            raise
        say(console, f"no picture: {error}")
    else:
        say(console, f"picture: {picture}")
    return DONE
