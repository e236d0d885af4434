"""Metrics of a run: `metrics.jsonl` is the source, TensorBoard and Weights & Biases are views of it.

One JSON object per line, flushed as it is written. A checkpoint keeps the file's length; a resumed run cuts the file
back to it, so that a straight run and a resumed one leave the same file. A view that fails is dropped with one
warning, and training goes on.
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import math
import os
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeAlias

from upslope.diagnostics import Verdict, Watch, verdict_line
from upslope.errors import UsageError

Value: TypeAlias = float | int | str
Record: TypeAlias = Mapping[str, Value]

_logger = logging.getLogger(__name__)
_INFINITE = {math.inf: "Infinity", -math.inf: "-Infinity"}
_FROM_TEXT = {text: value for value, text in _INFINITE.items()}


class View(Protocol):
    """A place that shows metrics but is not where they are kept."""

    def write(self, record: Record, step: int) -> None:
        """Show one record."""
        ...

    def close(self) -> None:
        """Deliver what is pending."""
        ...


class MetricsLog:
    """Appends records to `metrics.jsonl` and mirrors them to views.

    Args:
        path: the file; its directory exists.
        tensorboard: directory for TensorBoard events, or None. Without the package a message says how to get it and
            the run goes on.
        wandb: the W&B project to mirror to, or None. The run has the name of its directory there, and the configuration
            of the `config.json` beside the metrics. Without the
            package it is dropped with a warning; `require_wandb` refuses beforehand.
        resume_at: what `cursor` said when the checkpoint was taken; None for a new run.

    Raises:
        FileExistsError: a new run finds metrics of another one.
    """

    def __init__(
        self,
        path: Path,
        *,
        tensorboard: Path | None = None,
        wandb: str | None = None,
        resume_at: int | None = None,
    ) -> None:
        if resume_at is None and path.exists() and path.stat().st_size > 0:
            raise FileExistsError(
                f"{path} already holds the metrics of a run: resume that run, or choose another name for this one"
            )
        kept = [] if resume_at is None else _cut_back(path, resume_at)
        last_step = int(kept[-1]["step"]) if kept else None
        self._watch = Watch()
        for record in kept:
            self._watch.add(record)
        self._file = io.BufferedWriter(io.FileIO(path, "ab"))
        self._views: dict[str, View] = {}
        self.dropped: list[str] = []
        """Names of the views that failed."""
        if tensorboard is not None:
            self._add("TensorBoard", lambda: _TensorBoard(tensorboard, last_step))
        if wandb is not None:
            self._add("Weights & Biases", lambda: _Wandb(wandb, path.parent))

    def write(self, record: Record, *, step: int) -> None:
        """Append one record and show it in the views.

        NaN is written as null and infinities as "Infinity" and "-Infinity", so that every line is strict JSON. A record
        of training after which something is wrong with the run says so under "verdict", in words.

        Args:
            record: names to numbers or text; "kind" says which kind of record it is.
            step: environment steps of the run so far; kept under "step".
        """
        whole: dict[str, Value] = {**record, "step": step}
        if record.get("kind") == "train":
            self._watch.add(record)
            if verdict := verdict_line(self.verdicts()):
                whole["verdict"] = verdict
        line = json.dumps({name: _to_json(name, value) for name, value in whole.items()}, allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        for name, view in list(self._views.items()):
            self._guard(name, lambda view=view: view.write(whole, step))

    def verdicts(self) -> list[Verdict]:
        """What is to be said about the run by its records so far, those before it was resumed included."""
        return self._watch.verdicts()

    def cursor(self) -> int:
        """The file's length in bytes, after everything before it has reached the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close the file and the views; closing twice is harmless."""
        self._file.close()
        for name, view in list(self._views.items()):
            self._guard(name, view.close)
        self._views.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _add(self, name: str, make: Callable[[], View]) -> None:
        def add() -> None:
            self._views[name] = make()

        self._guard(name, add)

    def _guard(self, name: str, action: Callable[[], None]) -> None:
        """Foreign code may fail in any way it likes; the run must not notice."""
        try:
            action()
        except Exception as error:
            _logger.debug("%s failed", name, exc_info=True)
            _logger.warning(
                "%s is off for the rest of this run (%s: %s); training and metrics.jsonl go on",
                name,
                type(error).__name__,
                error,
            )
            self._views.pop(name, None)
            self.dropped.append(name)


def require_wandb() -> None:
    """W&B was asked for, so a run without it is refused before anything of it is made.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    if importlib.util.find_spec("wandb") is None:
        raise ModuleNotFoundError(
            "log.wandb is on but wandb is not installed: pip install 'upslope[wandb]', or set log.wandb to False"
        )


def read_metrics(path: Path) -> list[dict[str, Value]]:
    """All records of a metrics file, oldest first, with NaN and infinities as floats again.

    The last line may be torn (a run was killed while writing it, or is writing now): it is left out.

    Raises:
        FileNotFoundError: there is no such file.
        UsageError: another line is not a JSON object; the message names it.
    """
    return read_records(path.read_bytes(), path)


def read_records(written: bytes, path: Path) -> list[dict[str, Value]]:
    """The records of whole lines; what follows the last line's end is left out.

    Args:
        written: lines of a metrics file.
        path: of that file, for messages.

    Raises:
        UsageError: a line is not a JSON object; the message names it.
    """
    lines = written.split(b"\n")
    records: list[dict[str, Value]] = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            parsed: object = json.loads(line)
        except ValueError as error:
            raise UsageError(
                f"{path}, line {number}, is not JSON ({error}): the file is damaged; delete that line"
            ) from error
        if not isinstance(parsed, dict):
            raise UsageError(f"{path}, line {number}, is not a JSON object: the file is damaged; delete that line")
        records.append({name: _from_json(value) for name, value in parsed.items()})
    return records


def _to_json(name: str, value: Value) -> float | int | str | None:
    if isinstance(value, str | int):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"the metric {name!r} must be a number or text, got {type(value).__name__}") from error
    if math.isnan(number):
        return None
    return _INFINITE.get(number, number)


def _from_json(value: Any) -> Value:
    if value is None:
        return math.nan
    return _FROM_TEXT.get(value, value) if isinstance(value, str) else value


def _cut_back(path: Path, length: int) -> list[dict[str, Value]]:
    """Shorten the file to whole lines within `length` bytes; the records kept."""
    if not path.exists():
        _logger.warning("%s is missing: the metrics start anew at this checkpoint", path)
        return []
    with open(path, "r+b") as file:
        kept = file.read(length)
        if len(kept) < length:
            _logger.warning("%s is shorter than at this checkpoint: metrics before it are lost", path)
        end = kept.rfind(b"\n") + 1
        file.truncate(end)
        os.fsync(file.fileno())
    return read_metrics(path)


class _TensorBoard:
    """Scalars named `kind/name`, through TensorBoard's own writer; a resumed run hides what it writes again."""

    def __init__(self, directory: Path, last_step: int | None) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise ModuleNotFoundError("tensorboard is not installed: pip install 'upslope[report]'")
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._events = importlib.import_module("tensorboard.compat.proto.event_pb2")
        self._summaries = importlib.import_module("tensorboard.compat.proto.summary_pb2")
        self._writer = EventFileWriter(str(directory), flush_secs=20)
        if last_step is not None:
            start = self._events.SessionLog(status=self._events.SessionLog.START)
            self._writer.add_event(self._events.Event(wall_time=time.time(), step=last_step + 1, session_log=start))

    def write(self, record: Record, step: int) -> None:
        values = [self._summaries.Summary.Value(tag=tag, simple_value=value) for tag, value in _numbers(record).items()]
        summary = self._summaries.Summary(value=values)
        self._writer.add_event(self._events.Event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """The same names as in TensorBoard; the run's identifier is kept beside the metrics so that resuming continues."""

    def __init__(self, project: str, directory: Path) -> None:
        import wandb

        config = directory / "config.json"

        identity = directory / "wandb_id.txt"
        if not identity.exists():
            identity.write_text(uuid.uuid4().hex[:16])
        self._run = wandb.init(
            project=project,
            name=directory.resolve().name,
            config=json.loads(config.read_text("utf-8")) if config.exists() else {},
            dir=str(directory),
            id=identity.read_text().strip(),
            resume="allow",
        )

    def write(self, record: Record, step: int) -> None:
        self._run.log(_numbers(record), step=step)

    def close(self) -> None:
        self._run.finish()


def _numbers(record: Record) -> dict[str, float]:
    kind = record.get("kind", "run")
    return {
        f"{kind}/{name}": float(value)
        for name, value in record.items()
        if name != "step" and not isinstance(value, str)
    }
