"""Verdicts where a user sees them: the progress display and metrics.jsonl."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from upslope.diagnostics import Verdict
from upslope.train.control import FIGURES
from upslope.train.log import MetricsLog, read_metrics
from upslope.train.progress import ProgressDisplay

CRITIC = Verdict(level="warning", name="critic explains nothing", text="the critic explains nothing: " + "why " * 40)
JUMPS = Verdict(level="warning", name="policy jumps", text="the policy jumps: so far")
HINT = Verdict(level="hint", name="batch too small", text="the batch is too small")


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_elsewhere_than_on_a_terminal_a_warning_is_said_once() -> None:
    console = Console(file=io.StringIO(), width=120)
    with ProgressDisplay(100, figures=FIGURES, enabled=True, title="t", console=console) as display:
        for found in ([HINT], [JUMPS], [JUMPS], [JUMPS, CRITIC], [], [CRITIC, JUMPS]):
            display.judge(found)
    lines = written(console).splitlines()
    assert len(lines) == 2
    assert lines[0] == "t: warning: the policy jumps: so far"
    assert lines[1].startswith("t: warning: the critic explains nothing")
    assert lines[1].endswith("(and 1 more: upslope diagnose)")


@pytest.mark.parametrize("width", [40, 100])
def test_on_a_terminal_the_warning_is_one_line_that_goes_again(width: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=width)
    now = [0.0]
    with ProgressDisplay(
        100, figures=FIGURES, enabled=True, title="t", console=console, clock=lambda: now[0]
    ) as display:
        display.judge([CRITIC])
        display.update(10, {})
        shown = written(console)
        now[0] += 1.0
        display.judge([])
        display.update(20, {})
        later = written(console)[len(shown) :]
    assert sum("warning: the critic" in line for line in shown.splitlines()) == 1
    assert all(len(line.replace("\x1b[2K", "")) <= width + 30 for line in shown.splitlines())
    assert "warning" not in later


def test_the_record_says_the_verdict_and_a_resumed_log_goes_on_where_it_was(tmp_path: Path) -> None:
    straight, stopped = tmp_path / "straight.jsonl", tmp_path / "stopped.jsonl"
    records = [{"kind": "train", "kl": 1.0} for _ in range(8)]
    with MetricsLog(straight) as log:
        for step, record in enumerate(records):
            log.write(record, step=step)
            log.write({"kind": "evaluation"}, step=step)
    with MetricsLog(stopped) as log:
        for step, record in enumerate(records[:3]):
            log.write(record, step=step)
            log.write({"kind": "evaluation"}, step=step)
        cursor = log.cursor()
        log.write({"kind": "train", "kl": 0.0}, step=3)
    with MetricsLog(stopped, resume_at=cursor) as log:
        for step, record in enumerate(records[3:], start=3):
            log.write(record, step=step)
            log.write({"kind": "evaluation"}, step=step)
        assert [verdict.name for verdict in log.verdicts()] == ["policy jumps"]
    assert stopped.read_bytes() == straight.read_bytes()
    said = ["verdict" in record for record in read_metrics(straight) if record["kind"] == "train"]
    assert said == [False] * 4 + [True] * 4
