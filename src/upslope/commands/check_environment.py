"""`upslope check-env`: whether an environment keeps the promises that training relies on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from rich.console import Console
from tyro.conf import Positional

from upslope.commands.common import BAD_INPUT, DONE, say
from upslope.options import parse


@dataclass(frozen=True, kw_only=True)
class CheckEnvironment:
    """Check that an environment keeps the promises that training relies on."""

    id: Annotated[Positional[str], tyro.conf.arg(metavar="ID")]
    """A Gymnasium id, or problem/NAME."""
    action_mask: Literal["none", "info", "method", "observation"] = "none"
    """Where it says which actions are valid: info["action_mask"], a method, or a key of a Dict observation."""
    action_mask_name: str | None = None
    """What the mask is called there; None for action_mask, or for action_masks if it is a method."""


def act(arguments: Sequence[str]) -> int:
    """Run the command."""
    command = parse(CheckEnvironment, arguments, program="upslope check-env")
    from upslope.collect import EnvironmentConfig, check_environment
    from upslope.train.problems import named_problem

    config = EnvironmentConfig(
        id=command.id, action_mask=command.action_mask, action_mask_name=command.action_mask_name
    )
    tables = named_problem(config)
    report = check_environment(config if tables is None else tables)
    say(Console(), str(report if tables is None else dataclasses.replace(report, name=command.id)))
    return DONE if report.ok else BAD_INPUT
