"""`upslope recipes`: list the built-in recipes."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from upslope.commands.common import DONE, Nothing
from upslope.options import parse


def act(arguments: Sequence[str]) -> int:
    """Run the command."""
    parse(Nothing, arguments, program="upslope recipes")
    from upslope.recipes import RECIPES
    from upslope.report.terminal import recipes_table

    console = Console()
    rows = [(name, function(), (function.__doc__ or "").strip().split("\n")[0]) for name, function in RECIPES.items()]
    console.print(recipes_table(rows, wide=console.width >= 150))
    return DONE
