"""Live progress of a run: a display on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from upslope.diagnostics import Verdict
from upslope.train.session import Figures

_DRAW_EVERY = 0.2
"""Seconds between two pictures on a terminal."""
_SPEAK_EVERY = 10.0
"""Seconds between two lines elsewhere."""
_SPEED_OVER = 5.0
"""Seconds over which the speed is taken."""


class ProgressDisplay:
    """Shows how far a run is and how it goes; a context manager.

    `update` is made to be called thousands of times a second: most calls do no more than look at the clock. No thread
    draws: what is shown changes only inside `update`, `message` and at the end.

    Args:
        total_steps: of the whole run, in `figures.unit`.
        figures: what is shown of an update.
        enabled: False shows nothing at all, messages included.
        title: what runs.
        console: where to show it; standard error unless given.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        figures: Figures,
        enabled: bool,
        title: str,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = max(total_steps, 1)
        self._figures = figures
        self._title = title
        self._enabled = enabled
        self._console = Console(stderr=True) if console is None else console
        self._clock = clock
        self._live: Live | None = None
        self._steps = 0
        self._metrics: Mapping[str, float] = {}
        self._wrong: list[Verdict] = []
        self._past: list[tuple[float, int]] = []
        self._looked = -math.inf
        self._spoken = self._started = clock()

    def __enter__(self) -> Self:
        if self._enabled and self._console.is_terminal:
            self._live = Live(
                console=self._console,
                get_renderable=self._render,
                auto_refresh=False,
                redirect_stdout=sys.stdout.isatty(),
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._past:
            self._look(self._clock())
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._enabled and self._past:
            self._speak()

    def update(self, steps: int, metrics: Mapping[str, float]) -> None:
        """Say where the run is.

        Args:
            steps: so far, those of an earlier session included.
            metrics: the newest figures under the names of metrics.jsonl; any may be missing.
        """
        if not self._enabled:
            return
        self._steps, self._metrics = steps, metrics
        now = self._clock()
        if now - self._looked < _DRAW_EVERY:
            return
        self._look(now)
        if self._live is not None:
            self._live.refresh()
        elif now - self._spoken >= _SPEAK_EVERY:
            self._spoken = now
            self._speak()

    def judge(self, found: Sequence[Verdict]) -> None:
        """Show what is wrong with the run: its first warning; where lines are printed, one line when that changes."""
        before = [verdict.name for verdict in self._wrong[:1]]
        self._wrong = [verdict for verdict in found if verdict.level == "warning"]
        if self._live is None and self._wrong and [self._wrong[0].name] != before:
            self.message(f"{self._title}: {self._warning}")

    @property
    def _warning(self) -> str:
        more = f" (and {len(self._wrong) - 1} more: upslope diagnose)" if len(self._wrong) > 1 else ""
        return f"warning: {self._wrong[0].text}{more}"

    def message(self, text: str) -> None:
        """Print one line above the display."""
        if self._enabled:
            self._console.print(Text(text), soft_wrap=True)

    def _look(self, now: float) -> None:
        """Remember where the run was, for the speed over the last seconds."""
        self._looked = now
        self._past.append((now, self._steps))
        while len(self._past) > 2 and now - self._past[1][0] > _SPEED_OVER:
            del self._past[0]

    @property
    def _speed(self) -> float | None:
        """Steps per second over the last seconds; what the loop measured until there are any."""
        if len(self._past) > 1:
            (then, before), (now, steps) = self._past[0], self._past[-1]
            if now > then and steps > before:
                return (steps - before) / (now - then)
        return self._metrics.get("steps_per_second")

    @property
    def _left(self) -> str:
        """Time left, in words."""
        speed = self._speed
        return "-" if not speed else _duration(max(self._total - self._steps, 0) / speed)

    def _figure(self, name: str, form: str) -> str:
        value = self._metrics.get(name)
        return "-" if value is None or value != value else form.format(value)

    @property
    def _pace(self) -> str:
        speed = self._speed
        text = "-" if speed is None else f"{speed:,.0f}" if speed >= 10.0 else f"{speed:.2g}"
        return f"{text} {self._figures.unit}/s"

    @property
    def _share(self) -> float:
        return min(self._steps / self._total, 1.0)

    def _speak(self) -> None:
        """One line of plain text."""
        shown, spoken = self._figures.shown, self._figures.spoken
        figures = [f"{heading} {self._figure(name, form)}" for heading, name, form in shown if name in spoken]
        where = f"{self._title}: {self._steps:,} of {self._total:,} {self._figures.unit} ({self._share:.0%})"
        line = "  ".join([where, self._pace, *figures, self._times()])
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _times(self) -> str:
        gone = _duration(self._clock() - self._started)
        return f"done in {gone}" if self._steps >= self._total else f"{gone} so far, {self._left} left"

    def _render(self) -> RenderableType:
        """Title, bar and speed; the figures; the time."""
        width = self._console.width
        count = f"{self._steps:,} of {self._total:,} {self._figures.unit}"
        taken = len(self._title) + len(count) + len(self._pace) + len("100%") + 4
        head = Table.grid(padding=(0, 1))
        head.add_row(
            Text(self._title, style="bold"),
            ProgressBar(
                total=self._total,
                completed=min(self._steps, self._total),
                width=max(8, min(40, width - taken)),
                complete_style="cyan",
            ),
            Text(f"{self._share:4.0%}", style="bold"),
            Text(count),
            Text(self._pace, style="cyan"),
        )
        columns = 3 if width >= 80 else 2
        figures = Table.grid(padding=(0, 2))
        for _ in range(columns):
            figures.add_column(style="dim", no_wrap=True)
            figures.add_column(justify="right", min_width=8, no_wrap=True)
        cells = [(heading, self._figure(name, form)) for heading, name, form in self._figures.shown]
        for start in range(0, len(cells), columns):
            figures.add_row(*[text for cell in cells[start : start + columns] for text in cell])
        lines: list[RenderableType] = [head, figures, Text(self._times(), style="dim")]
        if self._wrong:
            lines.append(Text(self._warning, style="yellow", no_wrap=True, overflow="ellipsis"))
        return Group(*lines)


def _duration(seconds: float) -> str:
    """`1 h 02 min`, `3 min 20 s`, `7 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"
