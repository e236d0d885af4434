"""`upslope diagnose`: a table of the run's figures, verdicts, and what each figure means."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from upslope.cli import main
from upslope.report.diagnose import diagnose


def run_directory(path: Path, records: list[dict[str, Any]]) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    lines = [json.dumps({"kind": "train", "step": 100 * (k + 1), **record}) for k, record in enumerate(records)]
    (path / "metrics.jsonl").write_text("\n".join([*lines, json.dumps({"kind": "evaluation", "step": 1})]) + "\n")
    return path


def record(explained_variance: float | None, **changes: Any) -> dict[str, Any]:
    return {
        "progress": 0.5,
        "explained_variance": explained_variance,
        "variance/psi": 2.0,
        "variance/reward_to_go": 8.0,
        "noise_scale": "Infinity",
        **changes,
    }


def test_thirds_ratios_and_a_verdict(tmp_path: Path) -> None:
    records = [record(0.9)] * 3 + [record(None)] * 3 + [record(-0.5), record(-0.1), record(0.0)] * 3
    diagnosis = diagnose(run_directory(tmp_path / "run", records))
    assert diagnosis.records == 15
    assert diagnosis.figures["explained_variance"][0] == pytest.approx(0.9)
    assert diagnosis.figures["explained_variance"][2] == pytest.approx(-0.1)
    assert diagnosis.figures["variance/reward_to_go / psi"] == (4.0, 4.0, 4.0)
    assert [verdict.name for verdict in diagnosis.verdicts] == ["critic explains nothing"]
    assert "kl" not in diagnosis.figures


def test_the_command_prints_figures_meanings_and_verdicts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    path = run_directory(tmp_path / "run", [record(-0.02)] * 12)
    assert main(["diagnose", str(path), "--json", str(tmp_path / "out" / "figures.json")]) == 0
    shown = capsys.readouterr().out
    assert "warning: the critic explains nothing: explained variance -0.02;" in shown
    assert "0: no better than a constant" in shown
    assert "inf" in shown
    tree = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert tree["figures"]["noise_scale"] == dict.fromkeys(("first third", "middle third", "last third"), "Infinity")
    assert tree["verdicts"][0]["name"] == "critic explains nothing"


def test_a_warning_that_holds_no_longer_is_told_with_its_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_directory(tmp_path / "run", [record(0.9, kl=1.0)] * 10 + [record(0.9, kl=0.01)] * 20)
    assert main(["diagnose", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "nothing wrong in the last records" in shown
    assert "earlier, from step 500 to 1,500: policy jumps" in shown


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert main(["diagnose", str(run_directory(tmp_path / "new", []))]) == 2
    assert "has no training record in metrics.jsonl yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        ({"step": 700}, 'line 2, does not say its "kind"'),
        ({"kind": 3, "step": 700}, 'line 2, does not say its "kind"'),
        ({"kind": "train"}, "line 2: 'step' is None, not a whole number"),
        ({"kind": "train", "step": "700"}, "line 2: 'step' is '700', not a whole number"),
        ({"kind": "train", "step": None}, "line 2: 'step' is nan, not a whole number"),
        ({"kind": "train", "step": 700, "kl": "0.1"}, "line 2: 'kl' is '0.1', not a number"),
        ({"kind": "train", "step": 700, "variance/psi": [1.0]}, "line 2: 'variance/psi' is [1.0], not a number"),
        ({"kind": "train", "step": 700, "entropy": True}, "line 2: 'entropy' is True, not a number"),
    ],
)
def test_a_line_that_is_none_of_ours_is_named(
    damaged: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_directory(tmp_path / "run", [record(0.9)] * 3)
    lines = (path / "metrics.jsonl").read_text().splitlines()
    lines[1] = json.dumps(damaged)
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert main(["diagnose", str(path)]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert "metrics.jsonl" in shown
    assert message in shown


def test_a_record_need_not_have_every_figure(tmp_path: Path) -> None:
    partial = [{"variance/gae": 1.0}, {"reward_deviation": 0.0}, {"termination_share": 0.0}, {"kl": None}, {}]
    diagnosis = diagnose(run_directory(tmp_path / "run", partial * 6))
    assert diagnosis.records == 30
    assert all(math.isnan(value) for value in diagnosis.figures["variance/gae / psi"])
    assert not diagnosis.verdicts
