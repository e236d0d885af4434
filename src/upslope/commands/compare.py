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
    """A name from metrics.jsonl; the mean evaluation return with the most likely actions if not given."""
    out: Path | None = None
    """Draw the learning curves here (.png, .svg or .pdf); compare.png in the working directory if not given."""
    json: Path | None = None
    """Write the figures here."""
    title: str | None = None
    """Above the picture."""


def act(arguments: Sequence[str]) -> int:
    """Run the command."""
    command = parse(Compare, arguments, program="upslope compare")
    from upslope.report import DEFAULT_METRIC, compare, draw

    comparison = compare(command.runs, metric=command.metric or DEFAULT_METRIC)
    console = Console()
    console.print(comparison.table(width=console.width))
    if command.json is not None:
        command.json.parent.mkdir(parents=True, exist_ok=True)
        command.json.write_text(json.dumps(comparison.tree(), indent=2) + "\n", "utf-8")
        say(console, f"figures: {command.json}")
    try:
        say(console, f"picture: {draw(comparison, command.out or Path('compare.png'), title=command.title)}")
    except ModuleNotFoundError as error:
        if command.out is not None:
            raise
        say(console, f"no picture: {error}")
    return DONE
