"""Several runs at once, each in a process of its own: the command line, started once per run.

A run that fails takes no other with it. What a run says goes to `output.log` in its directory; how far it is stands in
its metrics.jsonl. Where the process that started it ends, however that may be, the run saves itself and ends as well.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Self

from upslope.train.log import Value, read_records

OUTPUT = "output.log"
"""What a run says, in its directory."""
_PROGRAM = (
    "import sys; from upslope.train.many import follow; follow({parent}); "
    "from upslope.cli import main; sys.exit(main())"
)
_PAUSE = 0.1
"""Seconds between two looks at the jobs."""
_LOOK_EVERY = 0.5
"""Seconds after which a run looks whether the process that started it is still there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A command to be run.

    Attributes:
        name: what it is called, once among the jobs of a pool.
        arguments: of `upslope`: train, a recipe, settings.
        directory: where its output goes; it exists.
    """

    name: str
    arguments: tuple[str, ...]
    directory: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """A job that is over.

    Attributes:
        job: which.
        code: of the process; negative if a signal ended it.
        seconds: it took.
        asked: it was asked to stop.
    """

    job: Job
    code: int
    seconds: float
    asked: bool

    @property
    def finished(self) -> bool:
        """Whether it came to its end by itself and well."""
        return self.code == 0

    def last_words(self) -> str:
        """The last line that it said; empty if it said nothing."""
        return last_line(self.job.directory / OUTPUT)


@dataclass(slots=True)
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    begun: float
    asked: bool = False


class Pool:
    """Jobs that run side by side; a context manager, which leaves none behind.

    Args:
        most: how many at once.

    Raises:
        ValueError: if that is less than one.
    """

    def __init__(self, most: int) -> None:
        if most < 1:
            raise ValueError(f"at least one job runs at a time; got {most}")
        self._most = most
        self._running: dict[str, _Running] = {}

    @property
    def free(self) -> bool:
        """Whether another job may be started."""
        return len(self._running) < self._most

    @property
    def running(self) -> tuple[str, ...]:
        """Names of the jobs that run."""
        return tuple(self._running)

    def start(self, job: Job) -> None:
        """Start a job; it has no terminal and a process group of its own, so that Ctrl-C does not reach it."""
        program = _PROGRAM.format(parent=os.getpid())
        output = (job.directory / OUTPUT).open("ab")
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", program, *job.arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._running[job.name] = _Running(job, process, output, time.monotonic())

    def ended(self) -> list[Ended]:
        """Jobs that have come to an end since this was asked last."""
        over = [running for running in self._running.values() if running.process.poll() is not None]
        for running in over:
            running.output.close()
            del self._running[running.job.name]
        now = time.monotonic()
        return [
            Ended(job=one.job, code=one.process.returncode, seconds=now - one.begun, asked=one.asked) for one in over
        ]

    def stop(self, name: str) -> None:
        """Ask a job to save itself and end; asking again does nothing."""
        running = self._running[name]
        if not running.asked:
            running.asked = True
            running.process.send_signal(signal.SIGTERM)

    def stop_all(self) -> None:
        """Ask all of them."""
        for name in self.running:
            self.stop(name)

    def kill_all(self) -> None:
        """End all at once; each can be resumed from its newest checkpoint."""
        for running in self._running.values():
            running.asked = True
            running.process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop_all()
        for running in self._running.values():
            running.process.wait()
        self.ended()


class Watched:
    """Reads the metrics of a run as they are written.

    Args:
        path: its metrics.jsonl, which need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, 0
        self.step = 0
        self.latest: dict[str, Value] = {}
        """Every figure as it was written last."""

    def new(self) -> list[dict[str, Value]]:
        """Records written since this was asked last; all of them again where the file was cut back."""
        if not self._path.is_file():
            return []
        size = self._path.stat().st_size
        if size < self._read:
            self._read = 0
        if size == self._read:
            return []
        with self._path.open("rb") as file:
            file.seek(self._read)
            whole = file.read()
        whole = whole[: whole.rfind(b"\n") + 1]
        self._read += len(whole)
        records = read_records(whole, self._path)
        for record in records:
            self.latest.update(record)
            self.step = int(record["step"])
        return records


def side_by_side(threads: int) -> int:
    """How many processes of so many threads the cores of this machine have room for; one at least."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, cores // threads)


def last_line(path: Path) -> str:
    """The last line of a text file that is not empty; "" if there is none."""
    if not path.is_file():
        return ""
    lines = [line for line in path.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def follow(parent: int) -> None:
    """From now on, save and end where the process `parent` has started this one and is gone."""

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_EVERY)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=look, daemon=True).start()


@dataclass(slots=True)
class Stop:
    """What the user wants by now.

    Attributes:
        asked: no job is to be started any more, and those that run are to save themselves and end.
        at_once: they are not even to save themselves.
    """

    asked: bool = False
    at_once: bool = False


@contextmanager
def stoppable() -> Iterator[Stop]:
    """SIGINT and SIGTERM ask for an end; a second one asks for it at once."""
    stop = Stop()

    def ask(number: int, frame: FrameType | None) -> None:
        stop.at_once, stop.asked = stop.asked, True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def heed(pool: Pool, stop: Stop) -> None:
    """Do with the jobs of a pool what the user wants, and wait a moment."""
    if stop.at_once:
        pool.kill_all()
    elif stop.asked:
        pool.stop_all()
    if pool.running:
        time.sleep(_PAUSE)
