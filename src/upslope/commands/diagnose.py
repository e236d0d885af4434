"""`upslope diagnose`: what the metrics of a run say about its learning."""

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
class Diagnose:
    """Say how good the gradients of a run are, and what is wrong with it if something is; works while it runs."""

    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Its directory."""
    json: Path | None = None
    """Write the figures here."""


def act(arguments: Sequence[str]) -> int:
    """Run the command."""
    command = parse(Diagnose, arguments, program="upslope diagnose")
    from upslope.report.diagnose import diagnose, diagnosis_page

    diagnosis = diagnose(command.run)
    console = Console()
    console.print(diagnosis_page(diagnosis))
    if command.json is not None:
        command.json.parent.mkdir(parents=True, exist_ok=True)
        command.json.write_text(json.dumps(diagnosis.tree(), indent=2) + "\n", "utf-8")
        say(console, f"figures: {command.json}")
    return DONE
