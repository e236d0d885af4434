"""Runs of both worlds in one table: where they learn, by which estimator, how good they were before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from upslope.report.conclusion import as_seen_from_here, duration, world
from upslope.report.language import evaluations_among
from upslope.train.config_file import recorded_estimator
from upslope.train.language import LanguageRun
from upslope.train.log import Value, read_metrics
from upslope.train.session import AnyRun

_ESTIMATOR = ("Psi", "baseline", "advantage scale", "ratio", "clip", "reduction", "loss")
"""The rows of `describe` that say most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunInWords:
    """A run as one row.

    Attributes:
        world: where it learns.
        recipe: its name.
        algorithm: the class of it.
        estimator: in words.
        before, after: how good the policy was.
        unit: what that is measured by.
        seconds: the training took.
        directory: of the run.
    """

    world: str
    recipe: str
    algorithm: str
    estimator: str
    before: str
    after: str
    unit: str
    seconds: float
    directory: Path

    @classmethod
    def of(cls, run: AnyRun, directory: Path, seconds: float) -> RunInWords:
        """The row of a run that has come to its end.

        Args:
            run: its configuration.
            directory: of the run.
            seconds: it took.
        """
        before, after, unit = _judged(run, read_metrics(directory / "metrics.jsonl"))
        described = recorded_estimator(directory)
        words = [
            f"{name}: {described[name]}"
            for name in _ESTIMATOR
            if name in described and not described[name].startswith("none")
        ]
        return cls(
            world=world(run),
            recipe=run.recipe,
            algorithm=type(run.algorithm).__name__,
            estimator="; ".join(words),
            before=before,
            after=after,
            unit=unit,
            seconds=seconds,
            directory=directory,
        )


def summary(rows: Sequence[RunInWords], *, wide: bool) -> RenderableType:
    """One table; the estimators stand below where it is not `wide`."""
    table = Table(box=None, pad_edge=False, header_style="dim", title="one library", title_justify="left")
    table.title_style = "bold"
    for heading in ("world", "recipe", "algorithm"):
        table.add_column(heading, no_wrap=True, style="cyan" if heading == "recipe" else "")
    if wide:
        table.add_column("estimator")
    for heading in ("before", "after"):
        table.add_column(heading, justify="right", no_wrap=True, style="bold" if heading == "after" else "")
    table.add_column("of", style="dim")
    table.add_column("time", justify="right", no_wrap=True)
    for row in rows:
        estimator = [row.estimator] if wide else []
        table.add_row(
            row.world, row.recipe, row.algorithm, *estimator, row.before, row.after, row.unit, duration(row.seconds)
        )
    lines: list[RenderableType] = [table]
    if not wide:
        for row in rows:
            lines += [Text(""), Text(row.recipe, style="cyan"), Padding(Text(row.estimator), (0, 0, 0, 2))]
    shown = [str(as_seen_from_here(row.directory)) for row in rows]
    lines += [Text(""), Text(f"side by side: upslope describe {shown[0]} --against {shown[-1]}", style="dim")]
    return Group(*lines)


def _judged(run: AnyRun, records: Sequence[dict[str, Value]]) -> tuple[str, str, str]:
    """Before, after, and the measure; "-" for what was not measured.

    An agent is not judged before its first update: the returns of its first episodes in training stand for that.
    """
    judged = evaluations_among(records)
    if isinstance(run, LanguageRun):
        for name, words in (
            ("greedy_accuracy", "accuracy of the likeliest completion"),
            ("greedy_score", "score of the likeliest completion"),
            ("pair_accuracy", "pairs judged right"),
            ("nll", "negative log-likelihood per token"),
        ):
            found = [record[name] for record in judged if name in record]
            if found:
                return f"{found[0]:.3f}", f"{found[-1]:.3f}", words
        return "-", "-", "nothing was judged"
    first = [record["episode_return"] for record in records if record["kind"] == "train" and "episode_return" in record]
    last = [record["deterministic_mean"] for record in judged]
    before = f"{first[0]:,.1f}" if first else "-"
    return before, f"{last[-1]:,.1f}" if last else "-", "return (before: first episodes in training)"
