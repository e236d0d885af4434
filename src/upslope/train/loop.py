"""The loop: collect, learn, look, save; the same for every algorithm."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Generic, TypeVar

from upslope.train.checkpoint import CheckpointError, latest_checkpoint, save_checkpoint
from upslope.train.config_file import recorded_run
from upslope.train.log import MetricsLog
from upslope.train.progress import ProgressDisplay
from upslope.train.run_directory import RunDirectory
from upslope.train.session import Evaluator, Report, ResumeError, Session

_FAILED_SAVES = 3
_SHOW_CURSOR = b"\x1b[?25h"
_logger = logging.getLogger(__name__)

PolicyKind = TypeVar("PolicyKind")
ReportKind = TypeVar("ReportKind", bound=Report)


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot(Generic[PolicyKind, ReportKind]):
    """What a callback sees after every update. Read it, do not write on it.

    Attributes:
        update, steps, episodes: counted from the start of the run; of a language model, updates twice and sequences.
        metrics: of this update.
        policy: as it now stands.
        evaluation: if one was made after this update.
    """

    update: int
    steps: int
    episodes: int
    metrics: dict[str, float]
    policy: PolicyKind
    evaluation: ReportKind | None


Callback = Callable[[Snapshot[Any, Any]], bool | None]
"""Called after every update; returning True ends the run, which is then saved and evaluated as at its end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result(Generic[PolicyKind, ReportKind]):
    """What a run made.

    Attributes:
        directory: the run directory.
        policy: as it stands at the end.
        steps: how far the run came, in what its `steps` counts: environment steps, or updates of a language model.
        interrupted: a signal ended the run early; `upslope resume` goes on.
        evaluation: at the end, None if interrupted.
    """

    directory: Path
    policy: PolicyKind
    steps: int
    interrupted: bool
    evaluation: ReportKind | None


class Training:
    """One run being trained: its session, directory, log, evaluator and checkpoints."""

    def __init__(
        self,
        session: Session,
        directory: RunDirectory,
        evaluator: Evaluator,
        callbacks: Sequence[Callback],
        *,
        resumed: bool = False,
        notes: Sequence[str] = (),
    ) -> None:
        run = session.run
        self.session = session
        self.directory = directory
        self.callbacks = callbacks
        self.best = float("-inf")
        self.failed_saves = 0
        self.damaged: set[Path] = set()
        self.evaluator = evaluator
        self.display = ProgressDisplay(
            run.steps, figures=session.figures, enabled=run.log.progress, title=directory.name
        )
        for note in notes:
            self.display.message(note)
        cursor = self._restore() if resumed else None
        self.log = MetricsLog(
            directory.metrics_path,
            tensorboard=directory.tensorboard if run.log.tensorboard else None,
            wandb=run.log.wandb_project if run.log.wandb else None,
            resume_at=cursor,
        )
        session.open(directory, self.display.message, resumed=resumed)
        self.fresh = not cursor
        self.pending: list[dict[str, float]] = []
        self.logged_steps = session.steps

    def _restore(self) -> int:
        damaged: dict[Path, str] = {}
        found = latest_checkpoint(
            self.directory.checkpoints, on_damaged=lambda path, error: damaged.update({path: f"{path.name}: {error}"})
        )
        self.damaged = set(damaged)
        if found is None and damaged:
            raise ResumeError(
                f"no checkpoint of {self.directory.path} is whole: {'; '.join(damaged.values())}. Bring back one "
                "of them from a copy, or start a new run"
            )
        for text in damaged.values():
            self._tell(f"damaged checkpoint skipped: {text}")
        if found is None:
            self._tell("no checkpoint yet: starting from the beginning")
            return 0
        try:
            self.session.load_state(found.state["session"])
        except KeyError as error:
            raise ResumeError(
                f"the checkpoint has no {error}: it is of an earlier version of upslope, which this one cannot go on "
                "from. Resume it with the version named in its config.json, or start a new run"
            ) from error
        taken, total = self.session.steps, self.session.run.steps
        if taken > total != recorded_run(self.directory.path)["steps"]:
            raise ResumeError(
                f"this run has already taken {taken:,} steps, which {total:,} in all does not reach: give a larger "
                "total, or leave it out"
            )
        self.best = found.state["best"]
        return found.state["log"]

    def _resume_command(self) -> str:
        return shlex.join(self.session.resume_command(self.directory.path))

    def _tell(self, text: str) -> None:
        """Say what must not go unnoticed, display or not."""
        if self.session.run.log.progress:
            self.display.message(text)
        else:
            _logger.warning("%s", text)

    def finish(self) -> Result[Any, Any]:
        """Train until the end, a callback's wish or a signal; save; evaluate."""
        session, run = self.session, self.session.run
        with self.log, self.display, _signals() as stop:
            try:
                wished, complete = False, session.steps >= run.steps
                if self.evaluator.first and self.fresh:
                    self._evaluate(final=False)
                while session.steps < run.steps and not stop.is_set() and not wished:
                    wished = self._update()
                interrupted = stop.is_set() and session.steps < run.steps and not wished
                evaluation = None
                if not interrupted and self.evaluator.last:
                    evaluation = self._evaluate(final=True, known=complete)
                self._save(scheduled=False)
            finally:
                self.evaluator.close()
        return Result(
            directory=self.directory.path,
            policy=session.policy,
            steps=session.steps,
            interrupted=interrupted,
            evaluation=evaluation,
        )

    def _update(self) -> bool:
        session, run = self.session, self.session.run
        before = session.steps
        try:
            metrics = session.advance()
        except session.failures as error:
            self._rescue(error, collector=False)
            raise
        self.pending.append(metrics)
        if session.steps - self.logged_steps >= run.log.every_steps:
            self._log_training()
        self.display.update(session.steps, metrics)
        evaluation = None
        if _crossed(before, session.steps, run.steps, self.evaluator.times) and session.steps < run.steps:
            evaluation = self._evaluate(final=False)
        wished = self._call_back(metrics, evaluation)
        if _crossed(before, session.steps, run.steps, run.checkpoint.times) and session.steps < run.steps:
            self._save(scheduled=True)
        return wished

    def _call_back(self, metrics: dict[str, float], evaluation: Report | None) -> bool:
        session = self.session
        snapshot = Snapshot(
            update=session.update,
            steps=session.steps,
            episodes=session.episodes,
            metrics=metrics,
            policy=session.policy,
            evaluation=evaluation,
        )
        answers = [callback(snapshot) for callback in self.callbacks]
        return True in answers

    def _log_training(self) -> None:
        if not self.pending:
            return
        session = self.session
        names = dict.fromkeys(name for metrics in self.pending for name in metrics)
        record: dict[str, Any] = {"kind": "train", "update": session.update, "episodes": session.episodes}
        for name in names:
            values = [metrics[name] for metrics in self.pending if name in metrics]
            record[name] = sum(values) / len(values)
        last = self.pending[-1]
        record.update({name: last[name] for name in ("episode_return", "episode_length") if name in last})
        seconds = sum(metrics["collect_seconds"] + metrics["learn_seconds"] for metrics in self.pending)
        record["steps_per_second"] = (session.steps - self.logged_steps) / max(seconds, 1e-9)
        self._write_record(record)
        session.logged()
        self.display.judge(self.log.verdicts())
        self.pending, self.logged_steps = [], session.steps

    def _evaluate(self, *, final: bool, known: bool = False) -> Report:
        """Evaluate and record it, unless it is known since the run had come to its end before it was resumed."""
        session = self.session
        try:
            report = self.evaluator.evaluate(session.policy, index=session.update, final=final)
        except session.failures as error:
            self._rescue(error, collector=True)
            raise
        if known:
            return report
        self._log_training()
        record = {"kind": "evaluation", "update": session.update, **report.record(), "final": final}
        self._write_record(record)
        if report.score >= self.best:
            try:
                session.save_policy(self.directory.best)
            except CheckpointError as error:
                self._tell(f"the best policy so far was not saved, training goes on: {error}")
            else:
                self.best = report.score
        return report

    def _write_record(self, record: dict[str, Any]) -> None:
        try:
            self.log.write(record, step=self.session.steps)
        except OSError as error:
            self._tell(f"metrics are kept back until they can be written, training goes on: {error}")

    def _save(self, *, scheduled: bool) -> None:
        self._log_training()
        try:
            self._write(collector=True)
        except (CheckpointError, OSError) as error:
            self.failed_saves += 1
            if not scheduled or self.failed_saves >= _FAILED_SAVES:
                error.add_note(f"Older checkpoints are as they were; then go on: {self._resume_command()}")
                raise
            self._tell(f"checkpoint not saved, training goes on: {error}")
        else:
            self.failed_saves = 0

    def _write(self, *, collector: bool) -> None:
        session = self.session
        tree = {
            "session": session.state(collector=collector),
            "best": self.best,
            "log": self.log.cursor(),
        }
        keep = session.run.checkpoint.keep
        written = save_checkpoint(self.directory.checkpoints, session.steps, tree, keep=keep, uncounted=self.damaged)
        self.damaged.discard(written)
        session.save_policy(self.directory.policy)

    def _rescue(self, error: Exception, *, collector: bool) -> None:
        """An environment failed: what was learnt is saved; those it was learnt in, if they failed, are made anew."""
        try:
            self._log_training()
            self._write(collector=collector)
        except (CheckpointError, OSError) as failure:
            error.add_note(f"What was learnt since the last checkpoint could not be saved: {failure}")
        else:
            error.add_note(f"Everything learnt is saved; once it is mended: {self._resume_command()}")


def _crossed(before: int, after: int, total: int, times: int) -> bool:
    """Whether one of `times` evenly spread marks lies in (before, after]."""
    return times > 0 and before * times // total != after * times // total


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """SIGINT and SIGTERM ask for an end after the current update; a second one ends at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            if sys.stderr.isatty():
                os.write(sys.stderr.fileno(), _SHOW_CURSOR)
            os._exit(128 + number)
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
