"""One worker process, seen from the parent: start it, talk with it, end it together with all that it started."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from upslope.errors import UsageError

PATIENCE = 1.0
"""Seconds that workers have to end by themselves when a pool is closed."""

_SIDE = {"worker": False}


def mark_as_worker() -> None:
    """From now on this process is a worker."""
    _SIDE["worker"] = True


def refuse_in_worker() -> None:
    """A worker that imports the user's main file must not start the whole program again.

    Raises:
        UsageError: in a worker process.
    """
    if _SIDE["worker"]:
        raise UsageError(
            "a worker process imported this file to find a reward function, and the file starts its work on import. "
            'Put that under `if __name__ == "__main__":`, or the reward function into a file of its own'
        )


class WorkerGoneError(Exception):
    """The process ended, or does not read or write any more; the text says how."""


class Worker:
    """A fresh interpreter with a connection to it. Nothing is shared with this process's memory or threads.

    What its functions print goes to standard error. It leads a process group of its own, so that what a function
    starts ends with it.

    Args:
        main_module: how `multiprocessing` finds the main module; empty if no function stands in it.

    Raises:
        UsageError: on Windows.
    """

    def __init__(self, main_module: Mapping[str, str]) -> None:
        if sys.platform == "win32":
            raise UsageError("reward functions in processes of their own need Linux or macOS; on Windows use WSL")
        self.loaded: set[str] = set()
        self.connection, theirs = Pipe()
        self._socket = socket.socket(fileno=os.dup(self.connection.fileno()))
        life, self._life = os.pipe()
        settings = {
            "path": [str(folder) for folder in sys.path],
            "connection": theirs.fileno(),
            "life": life,
            "parent": os.getpid(),
            "main": dict(main_module),
            "from_main_thread": threading.current_thread() is threading.main_thread(),
        }
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).with_name("worker.py")), json.dumps(settings)],
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=(theirs.fileno(), life),
                env={**os.environ, "PYTHONHASHSEED": "0"},
                start_new_session=True,
            )
        finally:
            theirs.close()
            os.close(life)

    def send(self, message: Mapping[str, Any], *, patience: float) -> None:
        """Ask for something.

        Args:
            message: what is asked.
            patience: seconds that it may take to read this, and later to write its answer once it has begun.

        Raises:
            WorkerGoneError: if it has ended, or did not read within the patience.
            Exception: whatever says that the message holds what cannot be sent.
        """
        limit = struct.pack("ll", int(patience), int(patience % 1 * 1e6) + 1)
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            self._socket.setsockopt(socket.SOL_SOCKET, option, limit)
        try:
            self.connection.send(message)
        except OSError as error:
            raise WorkerGoneError(self.kill()) from error

    def receive(self) -> dict[str, Any]:
        """What it answers; call this when the connection is ready.

        Raises:
            WorkerGoneError: if it has ended, or did not finish its answer within the patience.
        """
        try:
            return json.loads(self.connection.recv_bytes())
        except (EOFError, OSError, ValueError) as error:
            raise WorkerGoneError(self.kill()) from error

    def kill(self) -> str:
        """End it and all that it started, at once.

        Returns:
            How it ended.
        """
        if not self.connection.closed:
            _kill_group(self._process)
            self._process.wait()
            self.connection.close()
            self._socket.close()
            os.close(self._life)
        return _ending(self._process.returncode)

    def dismiss(self) -> None:
        """Ask it to end; it may still be there."""
        if not self.connection.closed:
            try:
                self._socket.shutdown(socket.SHUT_WR)
            except OSError:
                return


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """The process is not reaped yet, so its number still means its own group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()


def _ending(code: int) -> str:
    if code >= 0:
        return f"its process exited with status {code}"
    known = {number.value for number in signal.Signals}
    name = signal.Signals(-code).name if -code in known else "unknown"
    advice = {"SIGKILL": "; perhaps the memory was full", "SIGSEGV": "; native code crashed"}
    return f"its process was killed by signal {-code} ({name}){advice.get(name, '')}"


def end_workers(workers: list[Worker], patience: float = 0.0) -> None:
    """End all: politely for so many seconds, then by force. The list is empty afterwards."""
    limit = time.monotonic() + patience
    if patience:
        for worker in workers:
            worker.dismiss()
    waiting: list[Connection] = [worker.connection for worker in workers if not worker.connection.closed]
    while patience and waiting and time.monotonic() < limit:
        for connection in wait(waiting, timeout=max(0.0, limit - time.monotonic())):
            assert isinstance(connection, Connection)
            try:
                connection.recv_bytes()
            except (EOFError, OSError):
                waiting.remove(connection)
    while workers:
        workers.pop().kill()


def main_module_of(packed: Sequence[bytes]) -> dict[str, str]:
    """How a worker finds the main module, if any of these functions stands in it, else nothing.

    Raises:
        UsageError: if there is no file of it, as in an interactive session.
    """
    from multiprocessing import spawn

    if not any(b"__main__" in each for each in packed):
        return {}
    data = spawn.get_preparation_data("reward")
    found = {key: data[key] for key in ("init_main_from_name", "init_main_from_path") if key in data}
    if not found:
        raise UsageError(
            "a reward function of an interactive session cannot be sent to a worker process: put it into a file and "
            "give path/to/file.py:function"
        )
    return found
