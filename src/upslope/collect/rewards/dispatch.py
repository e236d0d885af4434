"""Calls of reward functions spread over worker processes, with deadlines; failed calls are divided and tried again."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any

from upslope.collect.rewards.calling import Accepted
from upslope.collect.rewards.http import is_address
from upslope.collect.rewards.processes import Worker, WorkerGoneError
from upslope.collect.rewards.protocol import NOT_APPLICABLE, Failed, Outcome, Reply
from upslope.collect.rewards.splitting import divide, given_up
from upslope.errors import UsageError

RETRIES = 10
"""How many calls that last as long as they may, each in a fresh worker, are spent on finding a batch's culprits."""

OF_THE_DEADLINE = 0.9
"""An HTTP reward gives up a little before its worker is killed, so that it can say why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What is to be scored: texts `[n]` and columns by name, `[n]` each."""

    prompts: Sequence[str]
    completions: Sequence[str]
    columns: Mapping[str, Sequence[Any]]


@dataclass(frozen=True, slots=True)
class Job:
    """Score these rows with this function; `reason` is why a larger part with them failed, None at first."""

    name: str
    rows: range
    reason: str | None = None


@dataclass(slots=True)
class _Running:
    job: Job
    loading: bool
    since: float
    limit: float


@dataclass(slots=True)
class _Known:
    """What the pool learnt of a function: its arguments, and the longest that loading it took."""

    accepted: Accepted
    seconds: float


@dataclass(kw_only=True, slots=True)
class Dispatcher:
    """Keeps worker processes and gives them work.

    Attributes:
        functions: by name: a function that can be sent, or where to find it.
        count: most workers.
        deadline: seconds that a call may take.
        load_deadline: seconds that starting a worker and loading a function may take.
        outage: seconds more for a call of an address, for which one that does not serve is asked again.
        main_module: how workers find the main module; empty if they need not.
        replying: the name of the function that returns replies instead of scores; None for none.
        workers: those that live.
    """

    functions: Mapping[str, Any]
    count: int
    deadline: float
    load_deadline: float
    outage: float
    main_module: Mapping[str, str]
    replying: str | None
    workers: list[Worker] = field(default_factory=list[Worker])
    _known: dict[str, _Known] = field(default_factory=dict[str, _Known], init=False)
    _busy: dict[Worker, _Running] = field(default_factory=dict[Worker, "_Running"], init=False)
    _jobs: deque[Job] = field(default_factory=deque[Job], init=False)
    _spent: dict[str, float] = field(default_factory=dict[str, float], init=False)
    _found: dict[str, dict[int, Any]] = field(default_factory=dict[str, dict[int, Any]], init=False)

    def score(self, batch: Batch) -> dict[str, list[Outcome]]:
        """Outcomes by reward function, one per row.

        Raises:
            UsageError: if a function cannot be loaded, or needs a column that is missing, or one cannot be sent.
        """
        return self._ask(batch, [name for name in self.functions if name != self.replying])

    def reply(self, batch: Batch) -> list[Reply]:
        """What the function that replies says to each row.

        Raises:
            UsageError: as `score`.
        """
        assert self.replying is not None
        return self._ask(batch, [self.replying])[self.replying]

    def _ask(self, batch: Batch, names: Sequence[str]) -> dict[str, list[Any]]:
        rows = len(batch.completions)
        parts = min(self.count, rows)
        bounds = [rows * part // parts for part in range(parts + 1)] if parts else []
        self._found = {name: {} for name in names}
        self._spent = dict.fromkeys(names, 0.0)
        self._jobs.extend(Job(name, range(bounds[part], bounds[part + 1])) for name in names for part in range(parts))
        try:
            while self._jobs or self._busy:
                self._start_jobs(batch)
                self._collect(batch)
        finally:
            self._jobs.clear()
            for worker in tuple(self._busy):
                self._lose(worker)
        return {name: [found[row] for row in range(rows)] for name, found in self._found.items()}

    def _start_jobs(self, batch: Batch) -> None:
        while self._jobs and (len(self._busy) < self.count):
            job = self._jobs.popleft()
            if job.reason is not None and self._spent[job.name] >= self._budget(job.name):
                self._fail_rows(job, given_up(job.reason, job.rows, self._budget(job.name)))
                continue
            worker = self._worker_for(job.name)
            loaded, now = job.name in worker.loaded, time.monotonic()
            limit = now + (self._deadline_of(job.name) if loaded else self.load_deadline)
            self._busy[worker] = _Running(job, not loaded, now, limit)
            if loaded:
                self._call(worker, job, batch)
            else:
                self._load(worker, job)

    def _worker_for(self, name: str) -> Worker:
        idle = [worker for worker in self.workers if worker not in self._busy]
        for worker in idle:
            if name in worker.loaded:
                return worker
        if len(self.workers) < self.count:
            self.workers.append(Worker(self.main_module))
            return self.workers[-1]
        return idle[0]

    def _load(self, worker: Worker, job: Job) -> None:
        function, seconds = self.functions[job.name], OF_THE_DEADLINE * self.deadline
        try:
            message = {"kind": "load", "name": job.name, "function": function, "seconds": seconds}
            message["outage"] = self.outage
            worker.send(message, patience=self.load_deadline)
        except WorkerGoneError as error:
            self._lose(worker)
            self._fail_load(job, str(error))

    def _call(self, worker: Worker, job: Job, batch: Batch) -> None:
        rows = slice(job.rows.start, job.rows.stop)
        columns = self._known[job.name].accepted.choose(batch.columns)
        message = {
            "kind": "call",
            "name": job.name,
            "prompts": list(batch.prompts[rows]),
            "completions": list(batch.completions[rows]),
            "columns": {name: list(values[rows]) for name, values in columns.items()},
            "texts": job.name == self.replying,
        }
        fresh = self._busy[worker].loading
        try:
            worker.send(message, patience=self.deadline)
        except WorkerGoneError as error:
            self._lose(worker)
            if fresh:
                self._fail(job, str(error))
            else:
                self._jobs.appendleft(job)
        except Exception as error:
            raise UsageError(
                f"the columns for {self._called(job.name)} ({', '.join(columns) or 'none'}) cannot be sent to another "
                f"process: {error}; let them hold numbers, texts, lists and dictionaries"
            ) from error

    def _collect(self, batch: Batch) -> None:
        if not self._busy:
            return
        nearest = min(running.limit for running in self._busy.values())
        by_connection = {worker.connection: worker for worker in self._busy}
        ready = wait(list(by_connection), timeout=max(0.0, nearest - time.monotonic()))
        for connection in ready:
            self._receive(by_connection[connection], batch)  # type: ignore[index]
        for worker, running in tuple(self._busy.items()):
            if worker.connection not in ready and time.monotonic() >= running.limit:
                self._expire(worker, running)

    def _expire(self, worker: Worker, running: _Running) -> None:
        self._lose(worker)
        if running.loading:
            self._fail_load(running.job, f"it was not there within {self.load_deadline:g} s")
        else:
            self._fail(
                running.job, f"it did not return within {self._deadline_of(running.job.name):g} s and was killed"
            )

    def _receive(self, worker: Worker, batch: Batch) -> None:
        running = self._busy[worker]
        job = running.job
        try:
            message = worker.receive()
        except WorkerGoneError as error:
            self._lose(worker)
            if running.loading:
                self._fail_load(job, str(error))
            else:
                self._fail(job, str(error))
            return
        if message["kind"] == "loaded":
            self._learn(worker, running, message, batch)
            return
        self._release(worker)
        if message["kind"] == "scored":
            self._found[job.name].update(zip(job.rows, map(_decode, message["outcomes"]), strict=True))
        elif message["kind"] == "failed":
            self._fail(job, message["reason"], divisible=message["divisible"])
        elif running.loading:
            self._fail_load(job, message["reason"])
        else:
            raise UsageError(
                f"a worker process cannot read the columns for {self._called(job.name)}: {message['reason']}"
            )

    def _learn(self, worker: Worker, running: _Running, message: Mapping[str, Any], batch: Batch) -> None:
        """Loaded: see what it accepts, and let the call begin."""
        name, now = running.job.name, time.monotonic()
        names = None if message["names"] is None else frozenset(message["names"])
        accepted = Accepted(names=names, required=frozenset(message["required"]))
        check_columns(self._called(name), accepted, batch.columns)
        longest = max(now - running.since, self._known[name].seconds if name in self._known else 0.0)
        self._known[name] = _Known(accepted, longest)
        worker.loaded.add(name)
        self._call(worker, running.job, batch)
        if worker in self._busy:
            running.loading, running.limit = False, now + self._deadline_of(name)

    def _release(self, worker: Worker) -> None:
        running = self._busy.pop(worker)
        if running.job.reason is not None:
            self._spent[running.job.name] += time.monotonic() - running.since

    def _lose(self, worker: Worker) -> None:
        worker.kill()
        self.workers.remove(worker)
        self._release(worker)

    def _deadline_of(self, name: str) -> float:
        function = self.functions[name]
        return self.deadline + (self.outage if isinstance(function, str) and is_address(function) else 0.0)

    def _budget(self, name: str) -> float:
        return RETRIES * (self.deadline + self._known[name].seconds)

    def _fail(self, job: Job, reason: str, *, divisible: bool = True) -> None:
        if len(job.rows) == 1 or not divisible:
            self._fail_rows(job, Failed(reason))
        else:
            self._jobs.extend(Job(job.name, rows, reason) for rows in divide(job.rows))

    def _fail_load(self, job: Job, reason: str) -> None:
        if job.name not in self._known:
            raise UsageError(
                f"{self._called(job.name)} cannot be loaded in a worker process: {reason}. A function of your own is "
                "best put into a file and given as path/to/file.py:function"
            )
        self._fail_rows(job, Failed(f"it could not be loaded again after its worker was killed: {reason}"))

    def _fail_rows(self, job: Job, failed: Failed) -> None:
        self._found[job.name].update(dict.fromkeys(job.rows, failed))

    def _called(self, name: str) -> str:
        return "what answers the policy's turns" if name == self.replying else f"reward {name!r}"


def _decode(outcome: Any) -> Outcome | Reply:
    if outcome is None or isinstance(outcome, str):
        return NOT_APPLICABLE if outcome is None else outcome
    return Failed(outcome["reason"]) if isinstance(outcome, dict) else float(outcome)


def check_columns(name: str, accepted: Accepted, columns: Mapping[str, Sequence[Any]]) -> None:
    """Refuse a function that needs what the data does not have.

    Raises:
        UsageError: with the columns that there are.
    """
    missing = accepted.missing(columns)
    if missing:
        raise UsageError(
            f"{name} needs the column{'s' * (len(missing) > 1)} {', '.join(missing)}; the data has "
            f"{', '.join(columns) or 'none'}. Add the column, give such an argument a default, or leave "
            "the reward out"
        )
