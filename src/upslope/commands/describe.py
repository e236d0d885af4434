"""`upslope describe`: the exact estimator and every setting of a recipe or of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from upslope.commands.common import DONE, Nothing, configured
from upslope.options import parse

_HELP = """usage: upslope describe RECIPE [--setting value ...]
       upslope describe RUN

Show the exact estimator and every resolved setting of a recipe or of a run directory; what differs from its default
is highlighted."""


def act(arguments: Sequence[str]) -> int:
    """Run the command."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(_HELP)
        return DONE
    from upslope.report.terminal import default_settings, estimator_table, settings_table
    from upslope.train.config_file import config_to_tree, recorded_estimator, recorded_run
    from upslope.train.describe import describe_run

    if arguments and Path(arguments[0]).is_dir():
        directory = Path(arguments[0])
        parse(Nothing, arguments[1:], program=f"upslope describe {arguments[0]}")
        tree, estimator = recorded_run(directory), recorded_estimator(directory)
        defaults = _recorded_defaults(directory)
    else:
        _, run = configured(arguments, "describe")
        tree, estimator, defaults = config_to_tree(run), describe_run(run), default_settings(run)
    console = Console()
    console.print(Text(tree["recipe"], style="bold cyan"), "on", Text(tree["environment"]["id"]), highlight=False)
    console.print()
    console.print(estimator_table(estimator))
    console.print()
    console.print(settings_table(tree, defaults))
    return DONE


def _recorded_defaults(directory: Path) -> dict[str, Any]:
    """The defaults of a run's classes, where all of them are ours."""
    from upslope.report.terminal import default_settings
    from upslope.train.config_file import ConfigError, read_run

    try:
        return default_settings(read_run(directory))
    except ConfigError:
        return {}
