"""Bias and variance of the choices of Psi as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from upslope.auditing.comparison import Point, gae_over_lambda, six_psi
from upslope.report.style import COLOURS, STYLE, need_matplotlib

TRAJECTORIES = 1_000
"""The size of the batch whose error is drawn."""

_CRITICS = {"exact": "with the true critic", "perturbed": "with a wrong critic"}
_ERROR = f"mean squared error of {TRAJECTORIES:,} trajectories\n(of the gradient's squared length)"
_PSI, _LAMBDA = "six-psi.png", "gae-lambda.png"


def draw_bias_and_variance(directory: Path, *, problem: str = "six-state") -> tuple[Path, Path]:
    """Draw the mean squared error of the six Psi_t, and of GAE over lambda, split into squared bias and variance.

    Every figure is exact: all trajectories of the problem, weighted by their probability. The error is that of the mean
    over `TRAJECTORIES` trajectories, relative to the squared length of the gradient.

    Args:
        directory: where `six-psi.png` and `gae-lambda.png` go.
        problem: a named problem.

    Returns:
        The two pictures.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    need_matplotlib()
    directory.mkdir(parents=True, exist_ok=True)
    return (
        _draw(list(six_psi(problem)), directory / _PSI, "six choices of Psi", _bars),
        _draw(list(gae_over_lambda(problem)), directory / _LAMBDA, "GAE over lambda", _lines),
    )


def _draw(points: Sequence[Point], path: Path, what: str, fill: Any) -> Path:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with rc_context(STYLE):
        figure = Figure(figsize=(9.0, 3.8), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (critic, words) in zip(panels, _CRITICS.items(), strict=True):
            fill(axes, [point for point in points if point.critic == critic])
            axes.set_title(f"{what}, {words}")
            axes.xaxis.set_major_locator(MaxNLocator(6))
        (panels[0].set_xlabel if fill is _bars else panels[0].set_ylabel)(_ERROR)
        if fill is _bars:
            panels[0].invert_yaxis()
        else:
            panels[0].set_ylim(bottom=0.0)
        lines, labels = panels[1].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside lower left", ncols=4)
        figure.savefig(path)
    return path


def _bars(axes: Any, points: Sequence[Point]) -> None:
    labels = [point.label for point in points]
    variance = [point.variance / TRAJECTORIES for point in points]
    axes.barh(labels, variance, color=COLOURS[0], label="variance")
    axes.barh(labels, [point.squared_bias for point in points], left=variance, color=COLOURS[1], label="squared bias")
    axes.grid(visible=False, axis="y")


def _lines(axes: Any, points: Sequence[Point]) -> None:
    decay = [float(point.label) for point in points]
    variance = [point.variance / TRAJECTORIES for point in points]
    bias = [point.squared_bias for point in points]
    error = [noise + off for noise, off in zip(variance, bias, strict=True)]
    axes.plot(decay, variance, color=COLOURS[0], label="variance")
    axes.plot(decay, bias, color=COLOURS[1], label="squared bias")
    axes.plot(decay, error, color=COLOURS[6], linewidth=2.0, label="their sum")
    best = min(range(len(error)), key=error.__getitem__)
    axes.plot(decay[best], error[best], marker="o", color=COLOURS[6], linestyle="none", label="the least")
    axes.set_xlabel("lambda")
