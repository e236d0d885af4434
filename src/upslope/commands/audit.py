"""`upslope audit`: an algorithm, or a loss of the user's own, against the exact gradient."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table as RichTable
from rich.text import Text
from tyro.conf import Positional

from upslope.commands.common import DONE, NOT_AS_DECLARED
from upslope.commands.named import algorithm_named, algorithm_names
from upslope.errors import UsageError, checking_usage
from upslope.options import parse_known, parse_over

if TYPE_CHECKING:
    from upslope.algorithms import Algorithm
    from upslope.auditing import AuditReport
    from upslope.auditing.audit import Progress as Progressing
    from upslope.auditing.setting import Unit

_ACCURACY = 0.1


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Hold an algorithm, or a loss function of yours, against the exact policy gradient of a small problem.

    The code under audit is the code that trains. Settings of the algorithm follow its name: `upslope audit reinforce
    --psi td_residual`. A recipe's name takes the recipe's algorithm, on whole episodes if it trains on those. `--all`
    measures the whole verification table.

    Exits with 1 if what is declared unbiased turns out biased. What is declared biased may turn out unbiased where its
    conditions are not needed: the report says so, and the exit code is 0.
    """

    subject: Annotated[Positional[str | None], tyro.conf.arg(metavar="ALGORITHM|RECIPE|FILE.py:FUNCTION")] = None
    """reinforce, one-step-actor-critic, a2c, ppo; a recipe; or a function of yours from trajectories to a loss."""
    problem: str | None = None
    """What to audit on; `--problems` lists them."""
    samples: int | None = None
    """Draw about this many trajectories instead of weighting every one there is."""
    gamma: float | None = None
    """Discount factor; the problem's own for an algorithm or a function, a recipe's own for a recipe."""
    critic: Literal["exact", "perturbed"] = "exact"
    """What the critic knows (algorithms)."""
    behaviour: Literal["on_policy", "stale"] = "on_policy"
    """Who acted: the policy that is differentiated, or another one (algorithms)."""
    limit: int | None = None
    """A time limit of the environment, in steps (algorithms)."""
    group_size: int | None = None
    """Completions in a group, 2 if not given (on completion problems, where groups are compared)."""
    accuracy: float = _ACCURACY
    """The report says how many trajectories it takes to know the gradient to this share of its length (algorithms)."""
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
    _check(command, rest)
    import torch

    torch.set_num_threads(1)
    console = Console()
    if command.problems:
        _list_problems(console)
        return DONE
    if command.all:
        return _all(command, console)
    if command.subject is None:
        raise UsageError("name an algorithm, for example `upslope audit reinforce --problem six-state`, or give --all")
    if ":" in command.subject:
        return _own_loss(command, command.subject, rest, console)
    report = _algorithm(command, command.subject, rest, console)
    console.print(Text(report.text(accuracy=command.accuracy)), soft_wrap=True)
    _write(command, report.tree())
    broken = report.declared == "unbiased" and report.verdict == "biased"
    return NOT_AS_DECLARED if broken else DONE


_OF_ALL = ("all", "write", "pictures")


def _check(command: Audit, rest: Sequence[str]) -> None:
    """Refuse what does not go together, and places that cannot be written to, before any work."""
    if command.all:
        if rest:
            raise UsageError(f"--all takes no settings of an algorithm; got {' '.join(rest)}")
        for field in dataclasses.fields(command):
            if field.name not in _OF_ALL and getattr(command, field.name) != field.default:
                name = "the name of a subject" if field.name == "subject" else "--" + field.name.replace("_", "-")
                raise UsageError(f"--all measures the table as it is, every row in its own setting: leave out {name}")
    else:
        for name, value in (("--write", command.write), ("--pictures", command.pictures)):
            if value is not None:
                raise UsageError(f"{name} goes with --all; the figures of one audit are written with --json")
    if not (math.isfinite(command.accuracy) and command.accuracy > 0.0):
        raise UsageError(f"--accuracy must be above 0, such as 0.1 for a tenth; got {command.accuracy}")
    if command.gamma is not None and not 0.0 <= command.gamma <= 1.0:
        raise UsageError(f"--gamma is a discount from 0 to 1, got {command.gamma}")
    for name, number, least in (
        ("--samples", command.samples, 1),
        ("--limit", command.limit, 1),
        ("--group-size", command.group_size, 1),
        ("--seed", command.seed, 0),
    ):
        if number is not None and number < least:
            raise UsageError(f"{name} must be at least {least}, got {number}")
    for name, file in (("--json", command.json), ("--write", command.write)):
        if file is not None:
            _check_place(name, file.parent)
            if file.is_dir() or (file.exists() and not os.access(file, os.W_OK)):
                raise UsageError(f"{name} {file}: this is no file that can be written; name another one")
    if command.pictures is not None:
        _check_place("--pictures", command.pictures)


def _check_place(name: str, directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{name}: there can be no directory {directory} ({error.strerror}); name another") from error
    if not os.access(directory, os.W_OK):
        raise UsageError(f"{name}: nothing can be written to the directory {directory}; name another")


def _own_loss(command: Audit, place: str, rest: Sequence[str], console: Console) -> int:
    from upslope.auditing import audit_loss
    from upslope.auditing.loss import load_loss

    if rest:
        raise UsageError(f"a function of your own has no settings here; got {' '.join(rest)}")
    if (command.critic, command.behaviour, command.limit) != ("exact", "on_policy", None):
        raise UsageError("critic, behaviour and limit are for algorithms: give a loss a setting of its own in Python")
    if command.accuracy != _ACCURACY:
        raise UsageError("--accuracy is for algorithms: what a function follows comes without one")
    found = audit_loss(
        load_loss(place),
        command.problem or "tokens",
        samples=command.samples,
        size=2 if command.group_size is None else command.group_size,
        gamma=command.gamma,
        seed=command.seed,
    )
    console.print(Text(str(found)), soft_wrap=True)
    _write(command, found.tree())
    return DONE


def _write(command: Audit, tree: object) -> None:
    if command.json is not None:
        command.json.write_text(json.dumps(tree, indent=2) + "\n", "utf-8")


def _algorithm(command: Audit, name: str, settings: list[str], console: Console) -> AuditReport:
    from upslope.auditing import Circumstances, audit
    from upslope.exact import PROBLEMS, problem

    kind = algorithm_named(name)
    on = command.problem or ("six-state" if kind is None or _discounted(kind) else "tokens")
    gamma = problem(on).mdp.gamma if on in PROBLEMS else 1.0
    algorithm, unit = _named(name, gamma=gamma)
    if command.group_size is not None and not algorithm.passes.groups:
        raise UsageError(
            "--group-size is for functions and for what compares a group: this algorithm sees single completions"
        )
    with checking_usage():
        if command.gamma is not None:
            if not _discounted(type(algorithm)):
                raise UsageError(f"{name} has no discount: leave --gamma out")
            algorithm = dataclasses.replace(algorithm, gamma=command.gamma)
        algorithm = parse_over(
            algorithm,
            settings,
            program=f"upslope audit {name}",
            description="Settings of the algorithm under audit.",
        )
    circumstances = Circumstances(critic=command.critic, behaviour=command.behaviour, limit=command.limit, unit=unit)
    with _bar(console) as progress:
        return audit(
            algorithm,
            on,
            samples=command.samples,
            circumstances=circumstances,
            size=command.group_size,
            seed=command.seed,
            progress=progress,
        )


@contextmanager
def _bar(console: Console) -> Iterator[Progressing]:
    """A bar that is there while batches are drawn."""
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("drawing batches", total=None, visible=False)
        yield lambda done, of: bar.update(task, completed=done, total=of, visible=True)


def _named(name: str, *, gamma: float) -> tuple[Algorithm, Unit | None]:
    """An algorithm by its own name, with the problem's discount, or that of a recipe as it is; what it trains on."""
    from upslope.recipes import RECIPES, load_recipe
    from upslope.train import Run

    kind = algorithm_named(name)
    if kind is not None:
        return (kind(gamma=gamma) if _discounted(kind) else kind()), None
    if name.lower() in RECIPES:
        recipe = load_recipe(name.lower())
        whole = isinstance(recipe, Run) and recipe.rollout.episodes is not None
        return recipe.algorithm, "episodes" if whole else None
    names = list(algorithm_names())
    close = difflib.get_close_matches(name.lower(), [*names, *RECIPES], n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(names)}, and every recipe."
    raise UsageError(f"there is no algorithm {name!r}; {hint} A loss of your own is given as path/to/file.py:function")


def _discounted(kind: Callable[..., Algorithm]) -> bool:
    """Whether gamma is a setting of it."""
    assert isinstance(kind, type)
    return "gamma" in {field.name for field in dataclasses.fields(kind)}


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
