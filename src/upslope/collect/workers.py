"""Environments in worker processes: the same loop as in this process, over a share of them each.

Steps travel through shared memory; a pipe per worker carries the word to go. A worker that raises, dies or does not
answer in time ends all of them, with an error that says which environment it was. No worker outlives this process.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn, cast

import numpy as np

from upslope.collect.convert import ObservationLayout, action_dtype, convert_action_space
from upslope.collect.errors import EnvironmentFailureError
from upslope.collect.vector import Factory, Resume, Step, StepArrays, SyncEnvironments, write_observation
from upslope.spaces import Leaf, Space
from upslope.trajectory import ObservationArrays, Tree, map_observation

_PARENT_DEATH_SIGNAL = 1


@dataclass(frozen=True, slots=True)
class _Block:
    """One array that parent and workers share."""

    memory: Any
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @classmethod
    def allocate(cls, context: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> _Block:
        size = int(np.prod(shape)) * dtype.itemsize
        return cls(context.RawArray(ctypes.c_byte, max(size, 1)), shape, dtype)

    def array(self) -> np.ndarray:
        return np.ndarray(self.shape, self.dtype, buffer=self.memory)


@dataclass(frozen=True, slots=True)
class _Memory:
    """All that is shared: one block per array of a step, and the actions."""

    observation: dict[str, _Block]
    final: dict[str, _Block]
    reward: _Block
    terminated: _Block
    truncated: _Block
    action: _Block
    current: _Block

    def arrays(self, composite: bool, rows: slice, worker: int) -> StepArrays:
        def view(blocks: dict[str, _Block]) -> ObservationArrays:
            views = {name: block.array()[rows] for name, block in blocks.items()}
            return views if composite else views[""]

        return StepArrays(
            view(self.observation),
            view(self.final),
            self.reward.array()[rows],
            self.terminated.array()[rows],
            self.truncated.array()[rows],
            self.current.array()[worker : worker + 1],
        )


def available_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


class AsyncEnvironments:
    """Environments in worker processes, each worker stepping a contiguous share of them.

    Steps are the same to the last bit as those of `upslope.collect.vector.SyncEnvironments`.

    Args:
        factories: one per environment; called in the workers (the first also here, once, to learn the spaces).
        deadline: seconds that one step, reset or making of all environments may take.
        processes: how many workers; one per core, and no more than there are environments, if None.
        resume: whether snapshots are to be used.

    Raises:
        UnsupportedSpaceError: if no policy of ours can see or act in it.
        ValueError: if the deadline is not positive.
    """

    vectorization = "async"

    def __init__(
        self,
        factories: Sequence[Factory],
        *,
        deadline: float = 60.0,
        processes: int | None = None,
        resume: Resume = "rebuild",
    ) -> None:
        if not deadline > 0:
            raise ValueError(f"the deadline is a positive number of seconds, got {deadline}")
        self.num_envs = len(factories)
        self.resume: Resume = resume
        self._deadline = deadline
        first = factories[0]()
        layout = ObservationLayout(first.observation_space)
        self.observation_space: Space = layout.space
        self.action_space: Leaf = convert_action_space(first.action_space)
        methods = multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context("fork" if "fork" in methods else "spawn")
        count = max(1, min(processes or available_cores(), self.num_envs))
        action_shape = (self.num_envs, *(first.action_space.shape or ()))
        memory = _share(context, layout, action_shape, action_dtype(first.action_space), count)
        first.close()
        self._action = memory.action.array()
        self._arrays = memory.arrays(layout.composite, slice(None), 0)
        self._current = memory.current.array()
        bounds = np.linspace(0, self.num_envs, count + 1).astype(int)
        self._shares = [slice(int(a), int(b)) for a, b in pairwise(bounds)]
        self._connections: list[Connection] = []
        self._processes: list[BaseProcess] = []
        self._finalizer = multiprocessing.util.Finalize(self, _kill, args=(self._processes,), exitpriority=100)
        for worker, share in enumerate(self._shares):
            ours, theirs = context.Pipe()
            main = threading.current_thread() is threading.main_thread()
            job = (theirs, factories[share], memory, layout.composite, share, worker, resume, main)
            process = context.Process(target=_work, args=job, daemon=True, name=f"environments-{worker}")
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
                process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)
        self._answers()

    def reset(self, seeds: Sequence[int] | None) -> ObservationArrays:
        """Begin new episodes everywhere."""
        self._ask("reset", [None if seeds is None else list(seeds[share]) for share in self._shares])
        return self._arrays.observation

    def step(self, action: np.ndarray) -> Step:
        """Take one action in each environment; where an episode ends, the next one begins at once."""
        self._action[...] = action
        finished = self._ask("step", [None] * len(self._shares))
        arrays = self._arrays
        which = np.array(
            [share.start + index for share, each in zip(self._shares, finished, strict=True) for index in each]
        )
        if not len(which):
            return Step(arrays.observation, arrays.reward, arrays.terminated, arrays.truncated, None, None, None)
        final = map_observation(lambda array: array[which], arrays.final)
        return Step(arrays.observation, arrays.reward, arrays.terminated, arrays.truncated, which, final, None)

    def snapshot(self) -> Tree:
        """The state of all environments and the observation to act on."""
        parts = self._ask("snapshot", [None] * len(self._shares))
        return {
            "observation": map_observation(np.copy, self._arrays.observation),
            "environments": [state for part in parts for state in part],
        }

    def restore(self, tree: Tree) -> ObservationArrays:
        """Put that state back.

        Raises:
            ValueError: if the snapshot is of another number or kind of environments.
        """
        states = tree["environments"]
        if len(states) != self.num_envs:
            raise ValueError(
                f"the checkpoint holds the states of {len(states)} environments, this run has {self.num_envs}; "
                f"resume with count={len(states)}"
            )
        self._ask("restore", [states[share] for share in self._shares])
        write_observation(self._arrays.observation, tree["observation"])
        return self._arrays.observation

    def rebuild(self, seeds: Sequence[int]) -> ObservationArrays:
        """Make all environments anew and reset them with these seeds."""
        self._ask("rebuild", [list(seeds[share]) for share in self._shares])
        return self._arrays.observation

    def close(self) -> None:
        """End the workers: politely for a second, then by force."""
        for connection in self._connections:
            try:
                connection.send(("close", None))
            except OSError:
                continue
        patience = time.monotonic() + 1.0
        for process in self._processes:
            process.join(max(0.0, patience - time.monotonic()))
        self._give_up()

    def _give_up(self) -> None:
        _kill(self._processes)
        while self._connections:
            self._connections.pop().close()

    def _ask(self, command: str, arguments: Sequence[Any]) -> list[Any]:
        if not self._connections:
            raise EnvironmentFailureError("the worker processes have ended; make the environments again", -1)
        for worker, (connection, argument) in enumerate(zip(self._connections, arguments, strict=True)):
            try:
                connection.send((command, argument))
            except OSError:
                self._fail_dead(worker)
        return self._answers()

    def _answers(self) -> list[Any]:
        results: list[Any] = [None] * len(self._connections)
        waiting = dict(enumerate(self._connections))
        limit = time.monotonic() + self._deadline
        while waiting:
            ready = wait(list(waiting.values()), timeout=max(0.0, limit - time.monotonic()))
            if not ready:
                self._fail_hung(min(waiting))
            for worker in [worker for worker, connection in waiting.items() if connection in ready]:
                try:
                    kind, result = waiting.pop(worker).recv()
                except (EOFError, OSError):
                    self._fail_dead(worker)
                if kind == "failed":
                    self._give_up()
                    index, message, trace = result
                    raise EnvironmentFailureError(f"{message}\n\nIn the worker process:\n{trace}", index)
                if kind == "refused":
                    self._give_up()
                    raise ValueError(result)
                results[worker] = result
        return results

    def _where(self, worker: int) -> tuple[int, str]:
        share = self._shares[worker]
        index = share.start + int(self._current[worker])
        return index, f"environment {index} (worker process {worker}, environments {share.start} to {share.stop - 1})"

    def _fail_hung(self, worker: int) -> NoReturn:
        index, where = self._where(worker)
        self._give_up()
        raise EnvironmentFailureError(
            f"{where} did not answer within {self._deadline:g} s; all workers were ended. If it is only slow, raise "
            "the deadline (EnvironmentConfig.deadline); if it hangs, `upslope check-env` tries it on its own",
            index,
        )

    def _fail_dead(self, worker: int) -> NoReturn:
        index, where = self._where(worker)
        process = self._processes[worker]
        process.join(1.0)
        code = process.exitcode
        if code is None:
            cause = "closed its pipe"
        elif code < 0:
            cause = f"was killed by signal {-code} ({signal.Signals(-code).name})"
        else:
            cause = f"exited with status {code}"
        advice = {
            -int(signal.SIGSEGV): "Its native code crashed: update or rebuild the environment's package",
            -int(signal.SIGKILL): "The system was probably out of memory: make fewer environments",
        }.get(code or 0, "What it printed last may tell more")
        self._give_up()
        raise EnvironmentFailureError(f"the process of {where} {cause}; all workers were ended. {advice}", index)


def _share(
    context: Any, layout: ObservationLayout, action_shape: tuple[int, ...], action: np.dtype[Any], workers: int
) -> _Memory:
    count = action_shape[0]
    flag, real, integer = np.dtype(bool), np.dtype(np.float64), np.dtype(np.int64)

    def observation() -> dict[str, _Block]:
        return {name: _Block.allocate(context, (count, *shape), dtype) for name, shape, dtype in layout.sizes()}

    return _Memory(
        observation=observation(),
        final=observation(),
        reward=_Block.allocate(context, (count,), real),
        terminated=_Block.allocate(context, (count,), flag),
        truncated=_Block.allocate(context, (count,), flag),
        action=_Block.allocate(context, action_shape, action),
        current=_Block.allocate(context, (workers,), integer),
    )


def _kill(processes: list[BaseProcess]) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()
    for process in processes:
        process.join()


def _die_with_parent(from_main_thread: bool) -> None:
    """No orphans: a thread watches the parent, and the kernel does for a worker too busy to run threads.

    The kernel means the parent's thread that made this process, so it is asked only if that was the main one.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def watch() -> None:
        wait([sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    if sys.platform == "linux" and from_main_thread:
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent.pid:
            os.kill(os.getpid(), signal.SIGKILL)


def _work(
    connection: Connection,
    factories: Sequence[Factory],
    memory: _Memory,
    composite: bool,
    share: slice,
    worker: int,
    resume: Resume,
    from_main_thread: bool,
) -> None:
    """A worker's life: it leaves stop signals to its parent, which finishes its update first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _die_with_parent(from_main_thread)
    action = memory.action.array()[share]
    arrays = memory.arrays(composite, share, worker)
    environments: SyncEnvironments | None = None
    command, argument = "make", cast("Any", None)
    while command != "close":
        try:
            if environments is None:
                environments = SyncEnvironments(factories, resume=resume, arrays=arrays, first_index=share.start)
            connection.send(("done", _do(environments, command, argument, action)))
        except EnvironmentFailureError as failure:
            connection.send(("failed", (failure.index, str(failure), traceback.format_exc())))
        except ValueError as error:
            connection.send(("refused", str(error)))
        try:
            command, argument = connection.recv()
        except EOFError:
            return
    if environments is not None:
        environments.close()


def _do(environments: SyncEnvironments, command: str, argument: Any, action: np.ndarray) -> Any:
    match command:
        case "step":
            finished = environments.step(action).finished
            return () if finished is None else tuple(finished.tolist())
        case "reset":
            environments.reset(argument)
        case "snapshot":
            return environments.snapshot_states()
        case "restore":
            environments.restore_states(argument)
        case "rebuild":
            environments.rebuild(argument)
        case _:
            assert command == "make"
    return None
