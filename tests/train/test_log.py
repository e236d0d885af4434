"""metrics.jsonl is the source and survives; views may fail without anybody noticing but the log."""

import importlib.util
import json
import logging
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from upslope.train.log import MetricsLog, read_metrics, require_wandb


def test_one_strict_json_object_per_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write({"kind": "train", "kl": math.nan, "return": -math.inf, "count": 3}, step=10)
        log.write({"kind": "evaluation", "final": True, "mean": np.float32(0.5)}, step=20)
        lines = path.read_text().splitlines()  # readable while the run goes on
    assert [json.loads(line) for line in lines] == [
        {"kind": "train", "kl": None, "return": "-Infinity", "count": 3, "step": 10},
        {"kind": "evaluation", "final": True, "mean": 0.5, "step": 20},
    ]


def test_reading_gives_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write({"kind": "train", "a": math.nan, "b": math.inf, "c": 0.1}, step=1)
    (record,) = read_metrics(path)
    assert math.isnan(float(record.pop("a")))
    assert record == {"kind": "train", "b": math.inf, "c": 0.1, "step": 1}


def test_a_torn_last_line_is_left_out_and_a_torn_middle_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(path)
    path.write_text('{"step": 1}\n[3]\n')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(path)


def test_a_resumed_file_equals_a_straight_one(tmp_path: Path) -> None:
    straight, resumed = tmp_path / "straight.jsonl", tmp_path / "resumed.jsonl"
    with MetricsLog(straight) as log:
        for step in range(10):
            log.write({"kind": "train", "x": step / 3}, step=step)
    with MetricsLog(resumed) as log:
        for step in range(7):
            if step == 4:
                cursor = log.cursor()
            log.write({"kind": "train", "x": step / 3}, step=step)
    with open(resumed, "ab") as file:
        file.write(b'{"kind": "tr')
    with MetricsLog(resumed, resume_at=cursor) as log:
        for step in range(4, 10):
            log.write({"kind": "train", "x": step / 3}, step=step)
    assert resumed.read_bytes() == straight.read_bytes()


def test_resuming_with_a_short_or_missing_file_keeps_whole_lines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste')
    MetricsLog(path, resume_at=500).close()
    assert path.read_text() == '{"step": 1}\n'
    assert "shorter" in caplog.text
    path.unlink()
    MetricsLog(path, resume_at=500).close()
    assert path.read_text() == ""


def test_a_new_run_never_writes_over_another(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    with pytest.raises(FileExistsError, match="resume"):
        MetricsLog(path)
    assert path.read_text() == '{"step": 1}\n'


def test_what_is_no_number_is_refused_by_name(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl") as log, pytest.raises(TypeError, match="'returns'"):
        log.write({"returns": [1.0, 2.0]}, step=1)  # pyright: ignore[reportArgumentType]


def test_tensorboard_shows_what_the_file_holds_also_after_a_resume(tmp_path: Path) -> None:
    path, events = tmp_path / "metrics.jsonl", tmp_path / "events"
    with MetricsLog(path, tensorboard=events) as log:
        for step in range(6):
            if step == 4:
                cursor = log.cursor()
            log.write({"kind": "train", "kl": float(step), "note": "text"}, step=step)
    time.sleep(1.1)  # event files are read in the order of the seconds in their names, then of a number without padding
    with MetricsLog(path, tensorboard=events, resume_at=cursor) as log:
        for step in range(4, 8):
            log.write({"kind": "train", "kl": 10.0 * step}, step=step)
    shown = EventAccumulator(str(events)).Reload()
    assert shown.Tags()["scalars"] == ["train/kl"]
    scalars = [(event.step, event.value) for event in shown.Scalars("train/kl")]
    assert scalars == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60), (7, 70)]


def test_without_tensorboard_the_run_goes_on_and_is_told_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else found(name))
    with MetricsLog(tmp_path / "metrics.jsonl", tensorboard=tmp_path / "events") as log:
        log.write({"kind": "train"}, step=1)
        assert log.dropped == ["TensorBoard"]
    assert "upslope[report]" in caplog.text
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_wandb_asked_for_and_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    require_wandb()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"upslope\[wandb\]"):
        require_wandb()


class PretendWandb:
    """Answers like the wandb module and fails at the third record."""

    def __init__(self) -> None:
        self.identities: list[str] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def init(self, *, project: str, name: str, config: dict, dir: str, id: str, resume: str) -> SimpleNamespace:
        self.identities.append(id)
        self.told = (project, name, config)
        return SimpleNamespace(log=self.log, finish=self.finish)

    def log(self, record: dict[str, float], *, step: int) -> None:
        if len(self.logged) == 2:
            raise ConnectionError("the network is gone")
        self.logged.append((step, record))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> PretendWandb:
    module = PretendWandb()
    found = importlib.util.find_spec
    monkeypatch.setitem(sys.modules, "wandb", module)  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "wandb" else found(name))
    return module


def test_a_failing_view_is_dropped_with_one_warning(
    tmp_path: Path, pretend: PretendWandb, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, wandb="project") as log:
        for step in range(5):
            log.write({"kind": "train", "kl": step}, step=step)
        assert log.dropped == ["Weights & Biases"]
    assert pretend.logged == [(0, {"train/kl": 0.0}), (1, {"train/kl": 1.0})]
    assert len(read_metrics(path)) == 5
    assert [record.levelno for record in caplog.records].count(logging.WARNING) == 1
    assert "the network is gone" in caplog.text


def test_a_resumed_run_is_the_same_run_in_wandb(tmp_path: Path, pretend: PretendWandb) -> None:
    path = tmp_path / "metrics.jsonl"
    (tmp_path / "config.json").write_text('{"run": {"seed": 1}}')
    with MetricsLog(path, wandb="project") as log:
        log.write({"kind": "train"}, step=1)
        cursor = log.cursor()
    MetricsLog(path, wandb="project", resume_at=cursor).close()
    first, second = pretend.identities
    assert first == second
    assert pretend.told == ("project", tmp_path.name, {"run": {"seed": 1}})
    assert pretend.finished == 2
