"""`upslope audit`: an algorithm, or a loss of the user's own, against the exact gradient."""

from __future__ import annotations

import difflib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table as RichTable
from rich.text import Text
from tyro.conf import Positional

from upslope.commands.common import DONE, NOT_AS_DECLARED
from upslope.errors import UsageError
from upslope.options import parse_known, parse_over

if TYPE_CHECKING:
    from upslope.algorithms import Algorithm
    from upslope.auditing import AuditReport


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Hold an algorithm, or a loss function of yours, against the exact policy gradient of a small problem.

    The code under audit is the code that trains. Settings of the algorithm follow its name: `upslope audit reinforce
    --psi td_residual`. A recipe's name takes the recipe's settings. `--all` measures the whole verification table.
    """

    subject: Annotated[Positional[str | None], tyro.conf.arg(metavar="ALGORITHM|RECIPE|FILE.py:FUNCTION")] = None
    """reinforce, one-step-actor-critic, a2c, ppo; a recipe; or a function of yours from trajectories to a loss."""
    problem: str | None = None
    """What to audit on; `--problems` lists them."""
    samples: int | None = None
    """Draw about this many trajectories instead of weighting every one there is."""
    critic: Literal["exact", "perturbed"] = "exact"
    """What the critic knows."""
    behaviour: Literal["on_policy", "stale"] = "on_policy"
    """Who acted: the policy that is differentiated, or another one."""
    limit: int | None = None
    """A time limit of the environment, in steps."""
    seed: int = 0
    """Of the policy's parameters and of what is drawn."""
    json: Path | None = None
    """Write the figures here."""
    problems: bool = False
    """List the problems."""
    all: bool = False
    """Measure every row of the verification table; exits with 1 unless all are as declared."""
    write: Path | None = None
    """With --all: write the table here, as Markdown."""
    pictures: Path | None = None
    """With --all: draw bias and variance into this directory."""


def act(arguments: Sequence[str]) -> int:
    """Run the command; 0 if everything is as declared, 1 if not."""
    command, rest = parse_known(Audit, arguments, program="upslope audit")
    import torch

    torch.set_num_threads(1)
    console = Console()
    if command.problems:
        _list_problems(console)
        return DONE
    if command.all:
        if rest:
            raise UsageError(f"--all takes no settings of an algorithm; got {' '.join(rest)}")
        return _all(command, console)
    if command.subject is None:
        raise UsageError("name an algorithm, for example `upslope audit reinforce --problem six-state`, or give --all")
    if ":" in command.subject:
        return _own_loss(command, rest, console)
    report = _algorithm(command, rest)
    console.print(Text(str(report)), soft_wrap=True)
    _write(command, report.tree())
    broken = report.declared == "unbiased" and report.verdict == "biased"
    return NOT_AS_DECLARED if broken else DONE


def _own_loss(command: Audit, rest: Sequence[str], console: Console) -> int:
    from upslope.auditing import audit_loss
    from upslope.auditing.loss import load_loss

    assert command.subject is not None
    if rest:
        raise UsageError(f"a function of your own has no settings here; got {' '.join(rest)}")
    if (command.critic, command.behaviour, command.limit) != ("exact", "on_policy", None):
        raise UsageError("critic, behaviour and limit are for algorithms: give a loss a setting of its own in Python")
    problem = command.problem or "tokens"
    found = audit_loss(load_loss(command.subject), problem, samples=command.samples, seed=command.seed)
    console.print(Text(str(found)), soft_wrap=True)
    _write(command, found.tree())
    return DONE


def _write(command: Audit, tree: object) -> None:
    if command.json is not None:
        command.json.parent.mkdir(parents=True, exist_ok=True)
        command.json.write_text(json.dumps(tree, indent=2) + "\n", "utf-8")


def _algorithm(command: Audit, settings: list[str]) -> AuditReport:
    from upslope.auditing import Circumstances, audit
    from upslope.exact import PROBLEMS, problem

    assert command.subject is not None
    name = command.problem or "six-state"
    gamma = problem(name).mdp.gamma if name in PROBLEMS else 1.0
    algorithm = parse_over(
        _named(command.subject, gamma=gamma),
        settings,
        program=f"upslope audit {command.subject}",
        description="Settings of the algorithm under audit.",
    )
    circumstances = Circumstances(critic=command.critic, behaviour=command.behaviour, limit=command.limit)
    return audit(algorithm, name, samples=command.samples, circumstances=circumstances, seed=command.seed)


def _named(name: str, *, gamma: float) -> Algorithm:
    """An algorithm by its own name, with the problem's discount, or that of a recipe as it is."""
    from upslope.recipes import RECIPES, load_recipe
    from upslope.train.config import AlgorithmConfig

    kinds = {_dashed(kind.__name__): kind for kind in get_args(AlgorithmConfig)}
    if name in kinds:
        return kinds[name](gamma=gamma)
    if name in RECIPES:
        return load_recipe(name).algorithm
    close = difflib.get_close_matches(name, [*kinds, *RECIPES], n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(kinds)}, and every recipe."
    raise UsageError(f"there is no algorithm {name!r}; {hint} A loss of your own is given as path/to/file.py:function")


def _dashed(name: str) -> str:
    """`OneStepActorCritic` as `one-step-actor-critic`; `A2C` and `PPO` as `a2c` and `ppo`."""
    letters = [
        f"-{letter}" if letter.isupper() and position and name[position - 1].islower() else letter
        for position, letter in enumerate(name)
    ]
    return "".join(letters).lower()


def _all(command: Audit, console: Console) -> int:
    from upslope.auditing.table import Measured, all_cases, markdown, measure

    rows: list[Measured] = []
    wrong: list[Measured] = []
    start = time.monotonic()
    cases = list(all_cases())
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("auditing", total=len(cases))
        for case in cases:
            progress.update(task, description=f"{case.subject}: {case.setting}"[:60])
            row = measure(case)
            rows.append(row)
            if not row.report.as_declared:
                wrong.append(row)
                console.print(Text(f"{row.case.setting}\n{row.report}", style="red"), soft_wrap=True)
            progress.advance(task)
    subjects = len({row.case.subject for row in rows})
    exact = sum(row.report.moments.exact for row in rows)
    console.print(
        f"{len(rows)} rows of {subjects} estimators and algorithms in {time.monotonic() - start:.0f} s, {exact} exact "
        f"and {len(rows) - exact} sampled: {len(rows) - len(wrong)} as declared, {len(wrong)} not",
        highlight=False,
        soft_wrap=True,
    )
    if command.write is not None:
        command.write.parent.mkdir(parents=True, exist_ok=True)
        command.write.write_text(markdown(rows), "utf-8")
        console.print(Text(f"table: {command.write}"), soft_wrap=True)
    if command.pictures is not None:
        from upslope.report.audit import draw_bias_and_variance

        for path in draw_bias_and_variance(command.pictures):
            console.print(Text(f"picture: {path}"), soft_wrap=True)
    return NOT_AS_DECLARED if wrong else DONE


def _list_problems(console: Console) -> None:
    from upslope.exact import PROBLEMS, TOKEN_PROBLEMS, problem

    table = RichTable.grid(padding=(0, 2))
    for name in PROBLEMS:
        table.add_row(Text(name, style="cyan"), problem(name).summary)
    for name in TOKEN_PROBLEMS:
        table.add_row(Text(name, style="cyan"), "completions of prompts, with end tokens, a length limit and rewards")
    console.print(table)
