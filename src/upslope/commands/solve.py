"""`upslope solve`: the best policy of a named problem, exactly."""

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
from upslope.errors import UsageError, checking_usage
from upslope.options import parse


@dataclass(frozen=True, kw_only=True)
class Solve:
    """Solve a named problem: policy iteration, exact gradient ascent, the optimum and its policy.

    `upslope audit --problems` lists the problems.
    """

    problem: Annotated[Positional[str], tyro.conf.arg(metavar="PROBLEM")]
    """Its name."""
    iterations: int = 60
    """Most steps of gradient ascent."""
    step_size: float | None = None
    """Of each step; if not given, a line search finds one that raises J."""
    seed: int = 0
    """Of the policy that gradient ascent begins with."""
    restarts: int = 8
    """Local searches for the best policy where states look alike."""
    plot: Path | None = None
    """Draw it here (.png, .svg or .pdf)."""
    against: tuple[Path, ...] = ()
    """Runs on problem/PROBLEM, to be drawn beside it; several seeds make a mean with its interval."""
    json: Path | None = None
    """Write all iterations here."""


def act(arguments: Sequence[str]) -> int:
    """Run the command."""
    command = parse(Solve, arguments, program="upslope solve")
    if command.against and command.plot is None:
        raise UsageError("--against draws runs beside the exact solution: say where, with --plot FILE.png")
    from upslope.report.curve import check_format
    from upslope.report.optimum import solve_problem
    from upslope.report.solve import draw_solved, learner_curves, learner_in_words, solved_in_words, solved_tree
    from upslope.train.prepare import threads

    if command.plot is not None:
        check_format(command.plot)
    with checking_usage(), threads(1):
        solved = solve_problem(
            command.problem.removeprefix("problem/"),
            iterations=command.iterations,
            step_size=command.step_size,
            seed=command.seed,
            restarts=command.restarts,
        )
    comparison = learner_curves(solved, command.against) if command.against else None
    console = Console()
    for part in solved_in_words(solved):
        console.print(part, soft_wrap=True)
    if comparison is not None:
        console.print()
        console.print(learner_in_words(solved, comparison))
    if command.json is not None:
        command.json.parent.mkdir(parents=True, exist_ok=True)
        command.json.write_text(json.dumps(solved_tree(solved), indent=2) + "\n", "utf-8")
        say(console, f"figures: {command.json}")
    if command.plot is not None:
        say(console, f"picture: {draw_solved(solved, command.plot, comparison)}")
    return DONE
