"""The directory of one run: where its files are, and the lock that keeps a second run out of it."""

import errno
import fcntl
import json
import os
import re
import socket
import weakref
from pathlib import Path
from types import TracebackType

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=@-]{0,199}")
_LOCK = ".lock"
_held: "weakref.WeakSet[RunDirectory]" = weakref.WeakSet()
_fork_hook: list[int] = []


class RunDirectoryError(RuntimeError):
    """A run directory is in use, missing, taken, or badly named."""


class RunDirectory:
    """The directory `runs/NAME/` of one run.

    `create` and `open` take its lock, so that two processes never write to one run; the kernel frees the lock
    when the process ends, however it ends. `view` takes no lock and is for reading. Close it, or use it as a
    context manager.

    | path                | what                                                        |
    |---------------------|-------------------------------------------------------------|
    | `config_path`       | `config.json`, the resolved configuration; makes it a run   |
    | `metrics_path`      | `metrics.jsonl`, append-only                                |
    | `checkpoints`       | directory of checkpoints                                    |
    | `policy`, `best`    | policy folders: the latest, and the best in evaluation      |
    | `tensorboard`       | event files                                                 |

    and of a language model:

    | path                | what                                                        |
    |---------------------|-------------------------------------------------------------|
    | `start`             | folder of the policy the run began with                     |
    | `reference`         | folder of the frozen reference, if it is another one        |
    | `behaviour`         | folder of another policy that acts throughout               |
    | `pairs(name)`       | `NAME.jsonl`, pairs that were drawn, to learn from or judge |
    | `completions_path`  | `completions.jsonl`, append-only                            |
    | `samples_path`      | `samples.json`, completions of the first and last evaluation |
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self._lock: int | None = None

    @classmethod
    def create(cls, root: Path, name: str) -> "RunDirectory":
        """Make and lock `root/name` for a new run.

        Raises:
            RunDirectoryError: the name is no plain name, the directory already holds a run, or it is in use.
        """
        _check_name(name)
        path = root / name
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as fault:
            raise RunDirectoryError(
                f"{path} cannot be made: {_reason(fault)}. Choose another --name or directory for runs"
            ) from fault
        return cls(path)._acquire_for_new_run()

    @classmethod
    def create_numbered(cls, root: Path, name: str) -> "RunDirectory":
        """Make and lock the first of `root/name`, `root/name-2`, `root/name-3`, ... that does not exist yet.

        Raises:
            RunDirectoryError: the name is no plain name, or the directory cannot be made.
        """
        _check_name(name)
        number = 1
        while True:
            path = root / (name if number == 1 else f"{name}-{number}")
            try:
                root.mkdir(parents=True, exist_ok=True)
                path.mkdir()
            except FileExistsError:
                if not root.is_dir():
                    raise RunDirectoryError(f"{root} is a file: choose another directory for runs") from None
                number += 1
            except OSError as fault:
                raise RunDirectoryError(
                    f"{path} cannot be made: {_reason(fault)}. Choose another directory for runs"
                ) from fault
            else:
                return cls(path)._acquire_for_new_run()

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """Lock the directory of an existing run, to go on with it.

        Raises:
            RunDirectoryError: there is no run at `path`, or it is in use.
        """
        run = cls.view(path)
        run._acquire()
        return run

    @classmethod
    def view(cls, path: Path) -> "RunDirectory":
        """The directory of an existing run, for reading and without its lock.

        Raises:
            RunDirectoryError: there is no run at `path`.
        """
        run = cls(path)
        if not run.config_path.is_file():
            raise RunDirectoryError(
                f"{path} holds no run ({run.config_path.name} is missing there): check the path, or start a run "
                f"with `upslope train`"
            )
        return run

    @property
    def name(self) -> str:
        """The name of the run."""
        return self.path.name

    @property
    def config_path(self) -> Path:
        """Where the resolved configuration is."""
        return self.path / "config.json"

    @property
    def metrics_path(self) -> Path:
        """Where the metrics are, one JSON object per line."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The directory of checkpoints."""
        return self.path / "checkpoints"

    @property
    def policy(self) -> Path:
        """The folder of the latest policy."""
        return self.path / "policy"

    @property
    def best(self) -> Path:
        """The folder of the policy that was best in evaluation."""
        return self.path / "best"

    @property
    def tensorboard(self) -> Path:
        """The directory of TensorBoard event files."""
        return self.path / "tensorboard"

    @property
    def start(self) -> Path:
        """The folder of the policy that a run began with."""
        return self.path / "start"

    @property
    def reference(self) -> Path:
        """The folder of the frozen reference, where it is not the start."""
        return self.path / "reference"

    @property
    def behaviour(self) -> Path:
        """The folder of another policy that acts throughout."""
        return self.path / "behaviour"

    @property
    def potential(self) -> Path:
        """The folder of the policy whose value shapes the rewards."""
        return self.path / "potential"

    @property
    def completions_path(self) -> Path:
        """Where completions are, one JSON object per line."""
        return self.path / "completions.jsonl"

    @property
    def samples_path(self) -> Path:
        """Where a few completions of the first and the last evaluation are."""
        return self.path / "samples.json"

    def pairs(self, name: str) -> Path:
        """Where pairs that were drawn are, one JSON object per line."""
        return self.path / f"{name}.jsonl"

    def holds_run(self) -> bool:
        """Whether anything of a run is there already."""
        traces = (self.config_path, self.metrics_path, self.checkpoints, self.policy, self.best, self.start)
        return any(os.path.lexists(path) for path in traces)

    def holds_results(self) -> bool:
        """Whether anything lies there that training made: more than what a run began with and empty files."""
        begun = (self.config_path, self.path / _LOCK, self.tensorboard)
        begun += (self.start, self.reference, self.behaviour, self.potential)
        made = [path for path in self.path.iterdir() if path not in begun]
        return any(any(path.iterdir()) if path.is_dir() else path.stat().st_size > 0 for path in made)

    def close(self) -> None:
        """Give the lock back; once is enough, more does no harm."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        _held.discard(self)

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _acquire_for_new_run(self) -> "RunDirectory":
        self._acquire()
        if self.holds_run():
            self.close()
            raise RunDirectoryError(
                f"{self.path} already holds a run: go on with it by `upslope resume {self.path}`, or choose "
                f"another --name"
            )
        return self

    def _acquire(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            lock = os.open(self.path / _LOCK, flags, 0o644)
        except OSError as fault:
            raise RunDirectoryError(
                f"{self.path / _LOCK} cannot be opened: {_reason(fault)}. Check the permissions of the directory"
            ) from fault
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(lock, 0)
            os.write(lock, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        except OSError as fault:
            holder = os.pread(lock, 4096, 0)
            os.close(lock)
            raise self._refusal(fault, holder) from fault
        self._lock = lock
        _close_in_forked_children()
        _held.add(self)

    def _refusal(self, fault: OSError, holder: bytes) -> RunDirectoryError:
        if fault.errno not in (errno.EAGAIN, errno.EACCES):
            return RunDirectoryError(
                f"{self.path / _LOCK} cannot be locked: {_reason(fault)}. Put the run on a file system with "
                f"space left that supports locks (flock)"
            )
        try:
            owner = json.loads(holder)
            who = f"process {int(owner['pid'])} on host {str(owner['host'])!r}"
        except (ValueError, KeyError, TypeError, RecursionError):
            who = "another process that has just started"
        return RunDirectoryError(
            f"{self.path} is in use by {who}: wait until it ends, stop it, or choose another --name"
        )


def run_name(recipe: str, seed: int) -> str:
    """The name a run gets when the user gives none: `cartpole-ppo-seed1`.

    A recipe from a file, `path/to/my_recipe.py:function`, gives `my_recipe-function-seed1`.
    """
    file, colon, function = recipe.rpartition(":")
    stem = f"{Path(file).stem}-{function}" if colon else recipe
    plain = re.sub(r"[^A-Za-z0-9._+=@-]+", "-", stem).strip("-.") or "run"
    return f"{plain[:150]}-seed{seed}"


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise RunDirectoryError(
            f"{name!r} is no name for a run: use letters, digits and . _ + = @ - only, with a letter, digit or _ "
            f"first and at most 200 of them"
        )


def _reason(fault: OSError) -> str:
    return fault.strerror or str(fault)


def _close_in_forked_children() -> None:
    """Keep forked workers from holding a lock on after its owner was killed."""
    if not _fork_hook:
        os.register_at_fork(after_in_child=_close_held)
        _fork_hook.append(os.getpid())


def _close_held() -> None:
    for run in list(_held):
        run.close()
