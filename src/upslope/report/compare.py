"""Several runs side by side: runs that learn the same way from other seeds form a group, groups are compared.

Per group and step: the interquartile mean over seeds and its 95 % bootstrap interval.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, RenderableType
from rich.console import Group as RenderedTogether
from rich.table import Table

from upslope.errors import UsageError
from upslope.report.statistics import bootstrap_interval, interquartile_mean
from upslope.train.config_file import differences, recorded_run
from upslope.train.log import Value, read_metrics

DEFAULT_METRIC = "deterministic_mean"
_NOT_LEARNING = ("seed", "name", "directory", "log", "checkpoint", "evaluation", "threads")
_NOT_LEARNING_OF_ENVIRONMENTS = ("deadline", "processes")
_POINTS = 100
_LABELLED = 3
_WIDE = 10_000
"""Columns that everything fits in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunCurve:
    """One metric of one run.

    Attributes:
        directory: the run.
        settings: its configuration as a tree.
        steps, values: [P] where the metric was measured, and what it was; NaN left out.
        training_steps, training_returns: [Q] the mean return of training episodes.
    """

    directory: Path
    settings: Mapping[str, Any]
    steps: np.ndarray
    values: np.ndarray
    training_steps: np.ndarray
    training_returns: np.ndarray

    @property
    def seed(self) -> int:
        """Of the run."""
        return self.settings["seed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Runs that learn the same way, each from its seed.

    Attributes:
        label: recipe, and the settings in which it differs from the other groups of that recipe.
        runs: sorted by seed.
        steps: [P] over which all the runs have values.
        values: [runs, P], interpolated where the runs measured at different steps.
        mean, low, high: [P] interquartile mean over the runs and its interval, NaN for a single run.
        final: [runs] the last value of each run.
        final_mean, final_low, final_high: of `final`.
    """

    label: str
    runs: tuple[RunCurve, ...]
    steps: np.ndarray
    values: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    final: np.ndarray
    final_mean: float
    final_low: float
    final_high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Groups of runs and the metric they are compared by; best final mean first."""

    metric: str
    groups: tuple[Group, ...]

    def table(self, *, width: int) -> RenderableType:
        """For a terminal of `width` columns; labels that do not fit beside the figures stand below."""
        labels = [group.label for group in self.groups]
        beside = self._figures(labels)
        if Console(width=_WIDE).measure(beside).minimum <= width:
            return beside
        numbers = [str(number) for number in range(1, len(labels) + 1)]
        below = Table.grid(padding=(0, 2))
        for number, label in zip(numbers, labels, strict=True):
            below.add_row(number, label)
        return RenderedTogether(self._figures(numbers), "", below)

    def _figures(self, names: Sequence[str]) -> Table:
        """One row per group under these names; only a name may be broken between its words."""
        title = f"{describe_metric(self.metric)}, at the end of each run"
        table = Table(box=None, pad_edge=False, header_style="dim", title=title, title_justify="left")
        table.add_column("runs")
        for heading in ("seeds", "steps", "IQM", "95 % interval", "worst", "best"):
            table.add_column(heading, justify="right", no_wrap=True, style="bold" if heading == "IQM" else "")
        for name, group in zip(names, self.groups, strict=True):
            interval = "-" if math.isnan(group.final_low) else f"{group.final_low:,.1f} to {group.final_high:,.1f}"
            table.add_row(
                name,
                str(len(group.runs)),
                f"{max(int(run.steps[-1]) for run in group.runs):,}",
                f"{group.final_mean:,.1f}",
                interval,
                f"{group.final.min():,.1f}",
                f"{group.final.max():,.1f}",
            )
        return table

    def tree(self) -> dict[str, Any]:
        """For a JSON file; NaN is null."""
        return {
            "metric": self.metric,
            "groups": [
                {
                    "label": group.label,
                    "runs": [
                        {"directory": str(run.directory), "seed": run.seed, "final": float(final)}
                        for run, final in zip(group.runs, group.final, strict=True)
                    ],
                    "final": {
                        "interquartile_mean": group.final_mean,
                        "low": _plain(group.final_low),
                        "high": _plain(group.final_high),
                    },
                    "steps": [int(step) for step in group.steps],
                    "interquartile_mean": [_plain(value) for value in group.mean],
                    "low": [_plain(value) for value in group.low],
                    "high": [_plain(value) for value in group.high],
                }
                for group in self.groups
            ],
        }


def compare(directories: Sequence[Path], *, metric: str = DEFAULT_METRIC) -> Comparison:
    """Read runs, group those that learn the same way, and take interquartile means over their seeds.

    Args:
        directories: of the runs; each at most once.
        metric: a name from the evaluation or the train records of metrics.jsonl.

    Raises:
        UsageError: no runs, a directory that is no run, a run twice, or a metric that a run does not have.
    """
    if not directories:
        raise UsageError("there is nothing to compare: name one run directory or more")
    resolved = [directory.resolve() for directory in directories]
    twice = [str(d) for d, r in zip(directories, resolved, strict=True) if resolved.count(r) > 1]
    if twice:
        raise UsageError(f"the same run is named more than once: {', '.join(twice)}")
    groups: dict[str, list[RunCurve]] = {}
    for directory in directories:
        curve = read_curve(directory, metric=metric)
        groups.setdefault(json.dumps(_learning(curve.settings), sort_keys=True), []).append(curve)
    labels = _labels([runs[0] for runs in groups.values()])
    made = [_group(label, runs) for label, runs in zip(labels, groups.values(), strict=True)]
    return Comparison(metric=metric, groups=tuple(sorted(made, key=lambda group: -group.final_mean)))


def read_curve(directory: Path, *, metric: str = DEFAULT_METRIC) -> RunCurve:
    """One metric of one run directory; evaluation records come first, then train records.

    Raises:
        ConfigError: it is no run directory.
        UsageError: it holds no records yet, or has no such metric.
    """
    settings, metrics = recorded_run(directory), directory / "metrics.jsonl"
    if not metrics.is_file():
        raise UsageError(f"{directory} holds no metrics: it has no {metrics.name}; give what `upslope train` made")
    records = read_metrics(metrics)
    evaluations = [record for record in records if record.get("kind") == "evaluation"]
    training = [record for record in records if record.get("kind") == "train"]
    steps, values = _series(evaluations, metric)
    if not len(steps):
        steps, values = _series(training, metric)
    if not len(steps):
        raise UsageError(_no_such_metric(directory, metric, records))
    training_steps, training_returns = _series(training, "episode_return")
    return RunCurve(
        directory=directory,
        settings=settings,
        steps=steps,
        values=values,
        training_steps=training_steps,
        training_returns=training_returns,
    )


def describe_metric(metric: str) -> str:
    """The metric in words."""
    words = {
        "deterministic_mean": "mean evaluation return (most likely actions)",
        "stochastic_mean": "mean evaluation return (sampled actions)",
        "episode_return": "mean training return",
    }
    return words.get(metric, metric.replace("_", " "))


def _series(records: Sequence[Mapping[str, Value]], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values; of several values at one step the last counts."""
    found = {
        int(record["step"]): float(value)
        for record in records
        if not isinstance(value := record.get(metric, math.nan), str) and not math.isnan(value)
    }
    steps = sorted(found)
    return np.array(steps, dtype=np.int64), np.array([found[step] for step in steps])


def _no_such_metric(directory: Path, metric: str, records: Sequence[Mapping[str, Value]]) -> str:
    names = sorted({name for record in records for name, value in record.items() if not isinstance(value, str)})
    if not names:
        return f"{directory} has no metrics yet: let it train longer"
    close = difflib.get_close_matches(metric, names, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"it has: {', '.join(names)}"
    return f"{directory} has no values of {metric!r}: {hint}"


def _learning(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide what is learnt, the seed apart.

    Environments do the same in this process as in worker processes; a vectorisation of their own has random numbers
    of its own.
    """
    kept = {name: value for name, value in settings.items() if name not in _NOT_LEARNING}
    environment = kept.get("environment")
    if isinstance(environment, Mapping):
        plain = {name: value for name, value in environment.items() if name not in _NOT_LEARNING_OF_ENVIRONMENTS}
        if plain.get("vectorization") in ("sync", "async"):
            del plain["vectorization"]
        kept["environment"] = plain
    return kept


def _labels(runs: Sequence[RunCurve]) -> list[str]:
    """The recipe; where several groups share it, the settings in which they differ from the first of them too."""
    recipes = [str(run.settings["recipe"]) for run in runs]
    labels: list[str] = []
    for index, run in enumerate(runs):
        same = [other for other, recipe in zip(runs, recipes, strict=True) if recipe == recipes[index]]
        mine = _learning(run.settings)
        changed = {
            name: pair[1]
            for other in same
            for name, pair in differences(_learning(other.settings), mine).items()
            if not name.endswith("class")
        }
        shown = [f"{name}={value}" for name, value in sorted(changed.items())[:_LABELLED]]
        more = ", ..." if len(changed) > _LABELLED else ""
        labels.append(f"{recipes[index]} ({', '.join(shown)}{more})" if shown else recipes[index])
    return labels


def _group(label: str, runs: Sequence[RunCurve]) -> Group:
    runs = sorted(runs, key=lambda run: (run.seed, str(run.directory)))
    steps = _common_steps(runs)
    values = np.stack([np.interp(steps, run.steps, run.values) for run in runs])
    final = np.array([run.values[-1] for run in runs])
    low, high = bootstrap_interval(values)
    final_low, final_high = bootstrap_interval(final)
    return Group(
        label=label,
        runs=tuple(runs),
        steps=steps,
        values=values,
        mean=interquartile_mean(values),
        low=low,
        high=high,
        final=final,
        final_mean=float(interquartile_mean(final)),
        final_low=float(final_low),
        final_high=float(final_high),
    )


def _common_steps(runs: Sequence[RunCurve]) -> np.ndarray:
    """Where all runs measured; evenly spread over what they share where they measured at different steps."""
    first = runs[0].steps
    if all(np.array_equal(run.steps, first) for run in runs):
        return first
    start, end = max(run.steps[0] for run in runs), min(run.steps[-1] for run in runs)
    if start > end:
        names = ", ".join(str(run.directory) for run in runs)
        raise UsageError(f"these runs have no steps in common, so no mean can be taken over them: {names}")
    points = min(_POINTS, max(len(run.steps) for run in runs))
    return np.unique(np.linspace(start, end, points).round().astype(np.int64))


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
