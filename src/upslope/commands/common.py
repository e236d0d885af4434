"""What several commands need: exit codes, a recipe with its settings, and the end of a run in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from upslope.errors import UsageError, checking_usage
from upslope.options import configure

if TYPE_CHECKING:
    from upslope.train import Result
    from upslope.train.session import AnyRun

DONE, NOT_AS_DECLARED, BAD_INPUT, INTERRUPTED, KILLED = 0, 1, 2, 75, 130
FAILED = 1
"""A run of several failed, the others did not."""


@dataclass(frozen=True, kw_only=True)
class Nothing:
    """Takes nothing more."""


def say(console: Console, text: str | Text, style: str = "") -> None:
    """Print as it is: no markup, no lines broken."""
    console.print(Text(text, style=style) if isinstance(text, str) else text, soft_wrap=True)


def configured(arguments: Sequence[str], command: str) -> tuple[str, AnyRun]:
    """A recipe's name and its configuration after the settings given behind it."""
    from upslope.recipes import load_recipe
    from upslope.report.terminal import default_settings

    if not arguments or arguments[0].startswith("-"):
        raise UsageError(
            f"name a recipe first, for example `upslope {command} cartpole-ppo`; `upslope recipes` lists them"
        )
    name, *settings = arguments
    run = load_recipe(name)
    if ":" in name and run.recipe == default_settings(run)["recipe"]:
        run = dataclasses.replace(run, recipe=name)
    with checking_usage():
        return name, configure(run, settings, program=f"upslope {command} {name}")


def conclude(
    result: Result[Any, Any],
    run: AnyRun,
    seconds: float,
    *,
    recipe: str | None,
    steps: int | None,
    resumed: bool,
    another: str | None,
) -> int:
    """Say what was made, where, and what to do next.

    Args:
        result: of the training.
        run: as it was trained.
        seconds: it took.
        recipe: the name it was asked for by, where that makes it.
        steps: a new total that was asked for.
        resumed: whether it went on from a checkpoint.
        another: the command that trains the same with another seed.

    Returns:
        The exit code.
    """
    from upslope.report.conclusion import finished, resume_command, stopped
    from upslope.train.config_file import read_evaluation
    from upslope.train.language import LanguageRun

    own = None if type(run.algorithm).__module__.startswith("upslope.") else recipe
    console = Console()
    if result.interrupted:
        rebuilt = not isinstance(run, LanguageRun) and read_evaluation(result.directory)[0].resume == "rebuild"
        command = resume_command(result, run, steps=steps, recipe=own)
        console.print(stopped(result, run, command, rebuilt=rebuilt), soft_wrap=True)
        return INTERRUPTED
    more = 2 * (run.steps if result.steps < 2 * run.steps else result.steps)
    longer = resume_command(result, run, steps=more, recipe=own)
    console.print(finished(result, run, seconds, longer=longer, another=another, resumed=resumed), soft_wrap=True)
    return DONE
