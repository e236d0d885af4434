"""What a run says when it ends: what it made, where, how good it is, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from upslope.report.language import made_by_language, of_language, use_of_language
from upslope.report.terminal import evaluation_table
from upslope.train import EvaluationReport, Result
from upslope.train.given import environment_again
from upslope.train.language import LanguageRun
from upslope.train.session import AnyRun
from upslope.train.shaping import named_potential


def resume_command(
    result: Result[Any, Any], run: AnyRun, *, steps: int | None = None, recipe: str | None = None
) -> str:
    """The command that goes on with a run.

    Args:
        result: of the run.
        run: its configuration.
        steps: a new total of environment steps or updates, if it is not the recorded one.
        recipe: the recipe, if it has classes of the user's own.
    """
    words = ["upslope", "resume", str(as_seen_from_here(result.directory))]
    words += [] if steps is None else ["--steps", str(steps)]
    words += [] if recipe is None else ["--recipe", recipe]
    return shlex.join(words + _again(run))


def stopped(result: Result[Any, Any], run: AnyRun, command: str, *, rebuilt: bool) -> RenderableType:
    """After a signal: where the run stands, and the command that goes on with it.

    Args:
        result: of the run.
        run: its configuration.
        command: goes on with it.
        rebuilt: the environments are made anew at every checkpoint, hence at this one too.
    """
    once_more = (
        " Its environments cannot be saved: they are made anew and open episodes cut here, so the run will differ from "
        "one that was not stopped."
    )
    return Group(
        Text(
            f"Stopped at {'update' if isinstance(run, LanguageRun) else 'step'} {result.steps:,} of {run.steps:,}; "
            f"everything is saved.{once_more if rebuilt else ''}"
        ),
        Text("To go on:"),
        Text(f"  {command}", style="bold"),
    )


def finished(
    result: Result[Any, Any], run: AnyRun, seconds: float, *, longer: str, another: str | None, resumed: bool
) -> RenderableType:
    """After the last step: how good the policy is, what lies where, and what to do with it.

    Args:
        result: of the run.
        run: its configuration.
        seconds: it took, since it was resumed if it was.
        longer: the command that trains on.
        another: the command that trains another seed, if there is one to name.
        resumed: the run went on from a checkpoint.
    """
    directory = as_seen_from_here(result.directory)
    speaks = isinstance(run, LanguageRun)
    taken = f"{result.steps:,} {'updates' if speaks else 'steps'} on {world(run)}"
    since = "since it was resumed" if resumed else ""
    parts: list[RenderableType] = [
        Text.assemble((run.recipe, "bold green"), f" has taken {taken}, in {duration(seconds)} {since}")
    ]
    if speaks:
        parts += of_language(result.directory)
        made = made_by_language(directory)
        used = use_of_language(result.directory, run, directory)
    else:
        if isinstance(result.evaluation, EvaluationReport):
            parts.append(Padding(evaluation_table(result.evaluation), (1, 0, 0, 2)))
        made = [
            (str(directory), "settings, metrics, checkpoints, TensorBoard events"),
            (str(directory / "policy"), "the policy at the end"),
            (str(directory / "best"), "the policy that was best in evaluation"),
        ]
        used = [
            ("use it in Python", f'policy = upslope.load("{directory / "policy"}"); action = policy.act(observation)')
        ]
    following = [*_following(run, directory, longer=longer, another=another), *used]
    parts += _section("made", made, styles=("cyan", "")) + _section("next", following, styles=("", "cyan"))
    return Group(*parts)


def world(run: AnyRun) -> str:
    """Where a policy is trained: an environment, or a task."""
    return type(run.task).__name__ if isinstance(run, LanguageRun) else run.environment.id


def _following(run: AnyRun, directory: Path, *, longer: str, another: str | None) -> list[tuple[str, str]]:
    quoted = shlex.quote(str(directory))
    alike = quoted.removesuffix(str(run.seed)) + "*" if quoted.endswith(f"-seed{run.seed}") else f"{quoted} OTHER_RUN"
    more = ["--prompts", "1024"] if isinstance(run, LanguageRun) else ["--episodes", "100"]
    return [
        ("judge it", shlex.join(["upslope", "evaluate", str(directory), *more, *_again(run)])),
        ("train on", longer),
        *([] if another is None else [("train another seed", another)]),
        ("compare seeds", f"upslope compare {alike} --out curves.png"),
    ]


def _again(run: AnyRun) -> list[str]:
    """Options that name what a run directory alone may not."""
    if isinstance(run, LanguageRun):
        return []
    return [*environment_again(run.environment), *named_potential(run)]


def as_seen_from_here(path: Path) -> Path:
    """The path relative to the working directory, if it lies below it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def duration(seconds: float) -> str:
    """`7.2 s`, `3 min 20 s`, `1 h 02 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    return (
        f"{whole // 60} min {whole % 60:02d} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    )


def _section(heading: str, rows: Sequence[tuple[str, str]], *, styles: tuple[str, str]) -> list[RenderableType]:
    """A heading and two columns; lines are never broken, so that they can be copied."""
    longest = max(len(first) for first, _ in rows)
    lines = [Text.assemble((f"  {first:{longest}}", styles[0]), (f"   {second}", styles[1])) for first, second in rows]
    return [Text(""), Text(heading, style="bold"), *lines]
