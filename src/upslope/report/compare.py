"""Several runs side by side: runs that learn the same way from other seeds form a group, groups are compared.

Per group and step: the interquartile mean over seeds and its 95 % bootstrap interval.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, RenderableType
from rich.console import Group as RenderedTogether
from rich.table import Table

from upslope.errors import UsageError
from upslope.report.language import evaluations, evaluations_among
from upslope.report.statistics import bootstrap_interval, interquartile_mean
from upslope.train.config_file import differences, recorded_run
from upslope.train.language import LanguageRun
from upslope.train.log import Value, read_metrics

DEFAULT_METRIC = "deterministic_mean"
"""What agents are compared by."""
LANGUAGE_METRICS = ("greedy_accuracy", "greedy_score", "pair_accuracy", "nll")
"""What language models are compared by: the first of these that all of them have."""
BEHIND = {
    DEFAULT_METRIC: "episode_return",
    "stochastic_mean": "episode_return",
    "sampled_accuracy": "accuracy",
    "sampled_score": "score",
    "sampled_length": "length",
}
"""What training measures all the time, and evaluation now and then."""
LESS_IS_BETTER = ("nll",)
"""Metrics of which the smallest value is the best."""
_NOT_LEARNING = ("seed", "name", "directory", "log", "checkpoint", "evaluation", "rewards", "threads")
_OF_EACH_SEED = ("start_from", "reference")
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
        training_steps, training_values: [Q] the same as training measured it, where it does (returns, accuracy).
    """

    directory: Path
    settings: Mapping[str, Any]
    steps: np.ndarray
    values: np.ndarray
    training_steps: np.ndarray
    training_values: np.ndarray

    @property
    def seed(self) -> int:
        """Of the run."""
        return self.settings["seed"]

    @property
    def speaks(self) -> bool:
        """Whether it trains a language model, whose steps are updates."""
        return _speaks(self.settings)


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

    @property
    def speaks(self) -> bool:
        """Whether all runs train language models."""
        return all(run.speaks for group in self.groups for run in group.runs)

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
        form = ",.3f" if self.speaks else ",.1f"
        for heading in ("seeds", "updates" if self.speaks else "steps", "IQM", "95 % interval", "worst", "best"):
            table.add_column(heading, justify="right", no_wrap=True, style="bold" if heading == "IQM" else "")
        for name, group in zip(names, self.groups, strict=True):
            interval = "-" if math.isnan(group.final_low) else f"{group.final_low:{form}} to {group.final_high:{form}}"
            table.add_row(
                name,
                str(len(group.runs)),
                f"{max(int(run.steps[-1]) for run in group.runs):,}",
                f"{group.final_mean:{form}}",
                interval,
                f"{group.final.min():{form}}",
                f"{group.final.max():{form}}",
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


def compare(directories: Sequence[Path], *, metric: str | None = None) -> Comparison:
    """Read runs, group those that learn the same way, and take interquartile means over their seeds.

    Args:
        directories: of the runs; each at most once.
        metric: a name from the evaluation or the train records of metrics.jsonl; None for the mean evaluation return of
            agents with the most likely actions, the accuracy of language models with the likeliest completion (or what
            else all of them are judged by).

    Raises:
        UsageError: no runs, a directory that is no run, a run twice, or a metric that a run does not have.
    """
    if not directories:
        raise UsageError("there is nothing to compare: name one run directory or more")
    resolved = [directory.resolve() for directory in directories]
    twice = [str(d) for d, r in zip(directories, resolved, strict=True) if resolved.count(r) > 1]
    if twice:
        raise UsageError(f"the same run is named more than once: {', '.join(twice)}")
    metric = _usual_metric(directories) if metric is None else metric
    groups: dict[str, list[RunCurve]] = {}
    curves = [read_curve(directory, metric=metric) for directory in directories]
    for curve in curves:
        groups.setdefault(json.dumps(_alike(curve, curves), sort_keys=True), []).append(curve)
    labels = _labels([runs[0] for runs in groups.values()])
    made = [_group(label, runs) for label, runs in zip(labels, groups.values(), strict=True)]
    best_first = 1.0 if metric in LESS_IS_BETTER else -1.0
    return Comparison(metric=metric, groups=tuple(sorted(made, key=lambda group: best_first * group.final_mean)))


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
    judged = evaluations_among(records)
    training = [record for record in records if record.get("kind") == "train"]
    steps, values = _series(judged, metric)
    if not len(steps):
        steps, values = _series(training, metric)
    if not len(steps):
        raise UsageError(_no_such_metric(directory, metric, records))
    training_steps, training_values = _series(training, _measured_in_training(metric))
    return RunCurve(
        directory=directory,
        settings=settings,
        steps=steps,
        values=values,
        training_steps=training_steps,
        training_values=training_values,
    )


def _measured_in_training(metric: str) -> str:
    """The metric of training records that is nearest; a part of the reward has the same name."""
    if metric.startswith("sampled/"):
        return f"reward/{metric.removeprefix('sampled/')}"
    return BEHIND.get(metric, "")


def describe_metric(metric: str) -> str:
    """The metric in words."""
    words = {
        "deterministic_mean": "mean evaluation return (most likely actions)",
        "stochastic_mean": "mean evaluation return (sampled actions)",
        "episode_return": "mean training return",
        "greedy_accuracy": "accuracy on held-out prompts (likeliest completion)",
        "sampled_accuracy": "accuracy on held-out prompts (drawn completions)",
        "greedy_score": "score on held-out prompts (likeliest completion)",
        "sampled_score": "score on held-out prompts (drawn completions)",
        "pair_accuracy": "held-out pairs judged right",
        "nll": "negative log-likelihood per token of held-out answers",
        "accuracy": "accuracy in training",
        "greedy_length": "mean tokens (likeliest completion)",
        "sampled_length": "mean tokens (drawn completions)",
        "length": "mean tokens in training",
    }
    way, _, part = metric.partition("/")
    if part and way in ("greedy", "sampled"):
        return f"{part} ({'likeliest completion' if way == 'greedy' else 'drawn completions'})"
    return words.get(metric, metric.replace("_", " "))


def _speaks(settings: Mapping[str, Any]) -> bool:
    return settings.get("class") == LanguageRun.__name__


def _usual_metric(directories: Sequence[Path]) -> str:
    """What runs are compared by if nothing else is said.

    Raises:
        UsageError: they are agents and language models, or language models of which no two are judged alike.
    """
    models = [directory for directory in directories if _speaks(recorded_run(directory))]
    if not models:
        return DEFAULT_METRIC
    if len(models) < len(directories):
        raise UsageError(
            "agents and language models are not judged by the same figure: compare each kind for itself, or name a "
            "--metric that all of them have (gradient_norm, say)"
        )
    judged = [evaluations(directory) for directory in models]
    for metric in LANGUAGE_METRICS:
        if all(any(metric in record for record in records) for records in judged):
            return metric
    return LANGUAGE_METRICS[0]


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


def _alike(curve: RunCurve, curves: Sequence[RunCurve]) -> dict[str, Any]:
    """What is the same for runs of a group.

    What a seed alone begins with and names after itself, `start_from="runs/first-seed3"` of seed 3, stands for what the
    other seeds begin with.
    """
    kept = _learning(curve.settings)
    for name in _OF_EACH_SEED:
        place = kept.get(name)
        if isinstance(place, str) and sum(other.settings.get(name) == place for other in curves) == 1:
            kept[name] = re.sub(rf"-seed{curve.seed}(-\d+)?(?=/|$)", "-seed*", place)
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
