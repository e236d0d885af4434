"""Learning curves as pictures."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from upslope.errors import UsageError
from upslope.report.compare import DEFAULT_METRIC, Comparison, Group, compare, describe_metric
from upslope.report.style import COLOURS, STYLE, need_matplotlib

_FORMATS = (".png", ".svg", ".pdf")
_LINE, _HANDLE = 90, 6
"""Characters that fit below the axes, and those that a label's sample of its line takes."""
_LINE_HEIGHT = 0.2
"""Inches of one line of the legend."""


def learning_curve(
    directories: Sequence[Path], path: Path, *, metric: str = DEFAULT_METRIC, title: str | None = None
) -> Path:
    """Draw the learning curves of some runs; see `draw`."""
    return draw(compare(directories, metric=metric), path, title=title)


def draw(comparison: Comparison, path: Path, *, title: str | None = None) -> Path:
    """Draw one line per group: the interquartile mean over seeds, its 95 % interval, and the single runs thinly.

    One run alone gets its training return behind its evaluations.

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
    if path.suffix.lower() not in _FORMATS:
        raise UsageError(f"a picture ends in {', '.join(_FORMATS)}, got {path.name!r}")
    need_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.add_subplot()
        for index, group in enumerate(comparison.groups):
            _draw_group(axes, group, COLOURS[index % len(COLOURS)])
        runs = [run for group in comparison.groups for run in group.runs]
        if len(runs) == 1 and comparison.metric.endswith("_mean"):
            axes.plot(
                runs[0].training_steps,
                runs[0].training_returns,
                color=COLOURS[0],
                alpha=0.4,
                linewidth=1.2,
                label=describe_metric("episode_return"),
            )
        axes.set_xlabel("environment steps")
        axes.set_ylabel(describe_metric(comparison.metric))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlim(left=0)
        axes.margins(x=0.02)
        if title is not None:
            axes.set_title(title)
        _place_legend(figure, axes)
        path.parent.mkdir(parents=True, exist_ok=True)
        undated = {"Date": None} if path.suffix.lower() == ".svg" else {}
        figure.savefig(path, metadata=undated)
    return path


def _place_legend(figure: Any, axes: Any) -> None:
    """Below the axes, where it hides no curve, in as many columns as its labels leave room for."""
    lines, labels = axes.get_legend_handles_labels()
    labels = [textwrap.fill(label, _LINE, break_long_words=False) for label in labels]
    longest = max(len(line) for label in labels for line in label.split("\n"))
    columns = max(1, min(len(labels), _LINE // (longest + _HANDLE)))
    rows = sum(label.count("\n") + 1 for label in labels) / columns
    figure.set_figheight(figure.get_figheight() + _LINE_HEIGHT * rows)
    figure.legend(lines, labels, loc="outside lower left", ncols=columns)


def _draw_group(axes: Any, group: Group, colour: str) -> None:
    """One group: its mean in bold, its interval as a band, its runs as thin lines."""
    single = len(group.runs) == 1
    label = group.label if single else f"{group.label}, {len(group.runs)} seeds"
    marker = {"marker": "o", "markersize": 3.5} if len(group.steps) <= 40 else {}
    if not single:
        for run in group.runs:
            axes.plot(run.steps, run.values, color=colour, alpha=0.25, linewidth=0.8)
        axes.fill_between(group.steps, group.low, group.high, color=colour, alpha=0.18, linewidth=0)
    axes.plot(group.steps, np.asarray(group.mean), color=colour, linewidth=2.0, label=label, **marker)
