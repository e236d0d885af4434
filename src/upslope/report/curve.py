"""Learning curves as pictures."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from upslope.errors import UsageError
from upslope.report.compare import BEHIND, Comparison, Group, RunCurve, compare, describe_metric
from upslope.report.language import evaluations, part_of_accuracy
from upslope.report.optimum import best_return
from upslope.report.style import COLOURS, STYLE, need_matplotlib

_FORMATS = (".png", ".svg", ".pdf")
_LINE, _HANDLE = 90, 6
"""Characters that fit below the axes, and those that a label's sample of its line takes."""
_LINE_HEIGHT = 0.2
"""Inches of one line of the legend."""


def learning_curve(
    directories: Sequence[Path], path: Path, *, metric: str | None = None, title: str | None = None
) -> Path:
    """Draw the learning curves of some runs; see `draw`."""
    return draw(compare(directories, metric=metric), path, title=title)


def draw(comparison: Comparison, path: Path, *, title: str | None = None) -> Path:
    """Draw one line per group: the interquartile mean over seeds, its 95 % interval, and the single runs thinly.

    One run alone gets what training measured behind its evaluations. Runs on one named problem get a line at the return
    of its best policy.

    Args:
        comparison: what to draw.
        path: where to save; its ending says how: .png, .svg or .pdf.
        title: above the picture.

    Returns:
        `path`.

    Raises:
        UsageError: another ending.
        ModuleNotFoundError: matplotlib is not installed.
    """
    with _picture(path, rows=1) as (figure, panels):
        axes = panels[0]
        for index, group in enumerate(comparison.groups):
            draw_group(axes, group, COLOURS[index % len(COLOURS)])
        runs = [run for group in comparison.groups for run in group.runs]
        if len(runs) == 1 and len(runs[0].training_steps):
            _draw_training(axes, runs[0], COLOURS[0], describe_metric(BEHIND[comparison.metric]))
        best = best_return([run.settings for run in runs], comparison.metric)
        if best is not None:
            axes.axhline(best, color="black", linestyle="--", linewidth=1.2, label="the best policy, exactly")
        axes.set_xlabel("updates" if comparison.speaks else "environment steps")
        axes.set_ylabel(describe_metric(comparison.metric))
        if title is not None:
            axes.set_title(title)
        _place_legend(figure, [axes])
    return path


def draw_language(directories: Sequence[Path], path: Path, *, title: str | None = None) -> Path:
    """Draw what a language model's run learnt, in two panels over its updates: shares, and tokens.

    Above: accuracy of the likeliest completion and of drawn ones, and each other part of the reward, a share of
    scratchpads for instance. Below: the mean length. Several seeds give interquartile means with their interval, one
    alone what training measured behind it.

    Args:
        directories: runs that differ by their seed alone.
        path: as for `draw`.
        title: above the picture.

    Raises:
        UsageError: another ending, runs that differ by more, or runs that write nothing.
        ModuleNotFoundError: matplotlib is not installed.
    """
    shares, lengths = list[tuple[str, Group]](), list[tuple[str, Group]]()
    for metric in _metrics(directories):
        first, *others = compare(directories, metric=metric).groups
        if others:
            raise UsageError("these runs differ by more than their seed: compare them by one --metric")
        panel = lengths if metric.endswith("_length") else shares
        panel.append((describe_metric(metric), first))
    with _picture(path, rows=2) as (figure, panels):
        colours = iter(COLOURS)
        for axes, curves in zip(panels, (shares, lengths), strict=True):
            for label, group in curves:
                colour = next(colours)
                draw_group(axes, group, colour, label=label)
                if len(group.runs) == 1 and len(group.runs[0].training_steps):
                    _draw_training(axes, group.runs[0], colour, None)
        panels[0].set_ylabel("share")
        panels[0].set_ylim(-0.02, 1.02)
        panels[1].set_ylabel("mean tokens")
        panels[1].set_ylim(bottom=0)
        panels[1].set_xlabel("updates")
        panels[0].set_title(compare(directories).groups[0].label if title is None else title)
        _place_legend(figure, panels)
    return path


def _metrics(directories: Sequence[Path]) -> list[str]:
    """What the picture of a language model's run shows: accuracy, other parts of the reward, and length."""
    records = [record for directory in directories for record in evaluations(directory)]
    names = dict.fromkeys(name for record in records for name in record)
    if "greedy_accuracy" not in names:
        raise UsageError("these runs have no accuracy: name a --metric (greedy_score, pair_accuracy, nll)")
    again = f"sampled/{part_of_accuracy(records)}"
    parts = [name for name in names if name.startswith("sampled/") and name != again]
    return ["greedy_accuracy", "sampled_accuracy", *parts, "sampled_length"]


def check_format(path: Path) -> None:
    """Refuse a picture of a kind that is not drawn.

    Raises:
        UsageError: another ending than .png, .svg or .pdf.
    """
    if path.suffix.lower() not in _FORMATS:
        raise UsageError(f"a picture ends in {', '.join(_FORMATS)}, got {path.name!r}")


@contextmanager
def _picture(path: Path, *, rows: int) -> Iterator[tuple[Any, list[Any]]]:
    """A figure and its axes, one below the other; saved in the end."""
    check_format(path)
    need_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.2 if rows == 1 else 5.6), layout="constrained")
        panels = list(figure.subplots(rows, sharex=True, squeeze=False)[:, 0])
        yield figure, panels
        for axes in panels:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.set_xlim(left=0)
            axes.margins(x=0.02)
        path.parent.mkdir(parents=True, exist_ok=True)
        undated = {"Date": None} if path.suffix.lower() == ".svg" else {}
        figure.savefig(path, metadata=undated)


def _draw_training(axes: Any, run: RunCurve, colour: str, label: str | None) -> None:
    """What training measured, thinly."""
    axes.plot(run.training_steps, run.training_values, color=colour, alpha=0.4, linewidth=1.2, label=label)


def _place_legend(figure: Any, panels: Sequence[Any]) -> None:
    """Below the axes, where it hides no curve, in as many columns as its labels leave room for."""
    entries = [entry for axes in panels for entry in zip(*axes.get_legend_handles_labels(), strict=True)]
    lines = [line for line, _ in entries]
    labels = [textwrap.fill(label, _LINE, break_long_words=False) for _, label in entries]
    longest = max(len(line) for label in labels for line in label.split("\n"))
    columns = max(1, min(len(labels), _LINE // (longest + _HANDLE)))
    rows = sum(label.count("\n") + 1 for label in labels) / columns
    figure.set_figheight(figure.get_figheight() + _LINE_HEIGHT * rows)
    figure.legend(lines, labels, loc="outside lower left", ncols=columns)


def draw_group(axes: Any, group: Group, colour: str, *, label: str | None = None) -> None:
    """One group: its mean in bold, its interval as a band, its runs as thin lines.

    Args:
        axes: of matplotlib.
        group: of runs.
        colour: of all of it.
        label: in the legend; that of the group if None.
    """
    single = len(group.runs) == 1
    name = group.label if label is None else label
    name = name if single else f"{name}, {len(group.runs)} seeds"
    marker = {"marker": "o", "markersize": 3.5} if len(group.steps) <= 40 else {}
    if not single:
        for run in group.runs:
            axes.plot(run.steps, run.values, color=colour, alpha=0.25, linewidth=0.8)
        axes.fill_between(group.steps, group.low, group.high, color=colour, alpha=0.18, linewidth=0)
    axes.plot(group.steps, np.asarray(group.mean), color=colour, linewidth=2.0, label=name, **marker)
