"""A search for better settings as a picture: how good each trial was, and which settings made the difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from upslope.report.curve import check_format
from upslope.report.style import COLOURS, STYLE, need_matplotlib

_LONGEST = 34


def draw_search(
    values: Sequence[tuple[int, float]],
    pruned: Sequence[tuple[int, float]],
    importances: Mapping[str, float],
    path: Path,
    *,
    metric: str,
    title: str,
    less_is_better: bool,
) -> Path:
    """Draw the trials of a search, the best so far, and the importance of each setting.

    Args:
        values: number and value of each trial that came to its end, in order.
        pruned: the same of trials that were given up, with the last value they had.
        importances: setting -> share, which sum to 1; may be empty.
        path: where to save; its ending says how: .png, .svg or .pdf.
        metric: in words.
        title: above the picture.
        less_is_better: whether the best value is the smallest.

    Raises:
        UsageError: another ending.
        ModuleNotFoundError: matplotlib is not installed.
    """
    check_format(path)
    need_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 2.4 + 0.25 * max(4, len(importances))), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.2, 1.0))
        numbers, heights = [number for number, _ in values], np.array([value for _, value in values])
        running = np.minimum.accumulate(heights) if less_is_better else np.maximum.accumulate(heights)
        left.scatter(numbers, heights, color=COLOURS[0], s=18, label="trial", zorder=3)
        left.step(numbers, running, where="post", color=COLOURS[0], linewidth=1.6, label="best so far")
        if pruned:
            places = [number for number, _ in pruned], [value for _, value in pruned]
            left.scatter(*places, color=COLOURS[1], marker="x", s=18, label="given up")
        left.set_xlabel("trial")
        left.set_ylabel(metric)
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        left.set_title(title)
        left.legend(loc="best", fontsize=8)
        names = sorted(importances, key=lambda name: importances[name])
        shown = [name if len(name) <= _LONGEST else "..." + name[3 - _LONGEST :] for name in names]
        right.barh(shown, [importances[name] for name in names], color=COLOURS[2])
        right.set_xlabel("importance (PED-ANOVA)")
        right.set_xlim(0.0, 1.0)
        right.tick_params(axis="y", labelsize=8)
        right.grid(visible=False, axis="y")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix.lower() == ".svg" else {})
    return path
