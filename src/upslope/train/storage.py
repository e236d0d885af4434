"""Folders that are on disk whole or not at all, and are read only when every byte is as it was written.

A sealed folder holds a few files with fixed names and a `MANIFEST.json` that lists the size and the SHA-256 of
each. It is written beside its place, forced to disk and renamed into it, so that a crash at any moment leaves
the old folder or the new one. A folder that is being replaced stands by as `.previous-NAME` between the two
renames; readers find it there, and the next writer puts it back.
"""

import contextlib
import errno
import glob
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from upslope.train.manifest import (
    MANIFEST,
    MANIFEST_LIMIT,
    CheckpointError,
    FolderKind,
    damaged,
    read_manifest,
    write_manifest,
)

_CHUNK = 16 * 2**20
_TEMPORARY = re.compile(r"\.tmp-(?P<name>.+)-(?P<pid>[0-9]+)")
_PREVIOUS = re.compile(r"\.previous-(?P<name>.+)")


@dataclass(frozen=True, kw_only=True)
class SealedFolder:
    """The verified content of a sealed folder."""

    path: Path
    step: int | None
    files: dict[str, bytes]


# Writing


def write_file_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a crash at any moment leaves the old file or the new one, whole.

    Raises:
        CheckpointError: the file system refused (disk full, read-only, ...); the old file is untouched.
    """
    temporary = path.parent / f".tmp-{path.name}-{os.getpid()}"
    with _reporting(path), contextlib.ExitStack() as undo:
        for entry in path.parent.glob(f".tmp-{glob.escape(path.name)}-*"):
            stale = _TEMPORARY.fullmatch(entry.name)
            if stale and not _is_another_living_process(int(stale["pid"])):
                _unlink_if_present(entry)
        undo.callback(_forget, temporary)
        _write_file(temporary, data)
        os.replace(temporary, path)
        undo.pop_all()
        fsync_directory(path.parent)


def publish_folder(path: Path, kind: FolderKind, files: Mapping[str, bytes], *, step: int | None) -> None:
    """Write a sealed folder at `path`, replacing one of the same kind; `prepare` comes first.

    Raises:
        CheckpointError: the file system refused, or `path` holds something that is not ours to replace. What
            was there is untouched and nothing half-written is left.
    """
    assert kind.holds(files)
    parent = path.parent
    temporary = parent / f".tmp-{path.name}-{os.getpid()}"
    previous = _previous(path)
    with _reporting(path), contextlib.ExitStack() as undo:
        _refuse_to_replace_foreign(path, kind)
        undo.callback(_discard, temporary, kind)
        os.mkdir(temporary)
        for name, data in files.items():
            _write_file(temporary / name, data)
        _write_file(temporary / MANIFEST, write_manifest(kind, files, step))
        fsync_directory(temporary)
        if path.exists():
            undo.callback(_put_back, previous, path)
            os.rename(path, previous)
        os.rename(temporary, path)
        undo.pop_all()
        fsync_directory(parent)
        _remove_folder(previous, kind)


def prepare(parent: Path, kind: FolderKind, owns: Callable[[str], bool]) -> None:
    """Make `parent` ready: put a folder that stood by back in its place, drop what killed writers left.

    Only folders whose name `owns` accepts and that hold nothing but files of `kind` are touched, and no
    temporary folder of another living process.

    Raises:
        CheckpointError: the file system refused.
    """
    with _reporting(parent):
        _make_directories(parent)
        _tidy(parent, kind, owns)


def _tidy(parent: Path, kind: FolderKind, owns: Callable[[str], bool]) -> None:
    for entry in sorted(parent.iterdir()):
        standing_by = _PREVIOUS.fullmatch(entry.name)
        temporary = _TEMPORARY.fullmatch(entry.name)
        if standing_by and owns(standing_by["name"]) and _holds_only(entry, kind):
            place = parent / standing_by["name"]
            if os.path.lexists(place):
                _remove_folder(entry, kind)
            else:
                os.rename(entry, place)
        elif temporary and owns(temporary["name"]) and not _is_another_living_process(int(temporary["pid"])):
            _remove_folder(entry, kind)


def retire_folder(path: Path, kind: FolderKind) -> None:
    """Delete a sealed folder: out of sight by one rename, then its own files by name.

    A folder that holds anything we did not write is left alone.
    """
    if not _holds_only(path, kind):
        return
    temporary = path.parent / f".tmp-{path.name}-{os.getpid()}"
    with _reporting(path):
        os.rename(path, temporary)
        _remove_folder(temporary, kind)


def fsync_directory(path: Path) -> None:
    """Force the names in a directory to disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _reporting(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as fault:
        raise CheckpointError(
            f"{path} could not be written: {_reason(fault)}"
            f"{f' ({fault.filename})' if fault.filename else ''}. What was saved before is untouched: free "
            f"space or repair the file system, then save again"
        ) from fault


def _reason(fault: OSError) -> str:
    return fault.strerror or str(fault)


def _write_file(path: Path, data: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    try:
        rest = memoryview(data)
        while len(rest):
            rest = rest[os.write(descriptor, rest[:_CHUNK]) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_directories(path: Path) -> None:
    if path.is_dir():
        return
    _make_directories(path.parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path)
    fsync_directory(path.parent)


def _previous(path: Path) -> Path:
    return path.parent / f".previous-{path.name}"


def _holds_only(path: Path, kind: FolderKind) -> bool:
    if path.is_symlink() or not path.is_dir():
        return False
    with os.scandir(path) as entries:
        return all(kind.may_hold(entry.name) and entry.is_file(follow_symlinks=False) for entry in entries)


def _refuse_to_replace_foreign(path: Path, kind: FolderKind) -> None:
    if not os.path.lexists(path):
        return
    if not _holds_only(path, kind):
        fault = "is not a plain folder, or holds files that were not written here"
    elif any(path.iterdir()) and not (path / MANIFEST).exists():
        fault = f"carries no {MANIFEST}, so it was not written here"
    else:
        return
    raise CheckpointError(f"{path} {fault}; it will not be replaced. Move it (or the strange files) elsewhere")


def _is_another_living_process(pid: int) -> bool:
    if pid == os.getpid() or pid < 1:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _remove_folder(path: Path, kind: FolderKind) -> None:
    if not _holds_only(path, kind):
        return
    for name in sorted(os.listdir(path)):
        _unlink_if_present(path / name)
    os.rmdir(path)


def _unlink_if_present(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _forget(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _discard(path: Path, kind: FolderKind) -> None:
    with contextlib.suppress(OSError):
        _remove_folder(path, kind)


def _put_back(previous: Path, path: Path) -> None:
    if not os.path.lexists(path):
        with contextlib.suppress(OSError):
            os.rename(previous, path)


# Reading


def carries_manifest(path: Path, kind: FolderKind, step: int) -> bool:
    """Whether `path` is a folder with an intact manifest of ours for `step` (its files are not read)."""
    try:
        with _opened(path) as folder:
            raw = _read_file(folder, path / MANIFEST, None)
            return read_manifest(raw, path / MANIFEST, kind)["step"] == step
    except CheckpointError:
        return False


def read_folder(path: Path, kind: FolderKind) -> SealedFolder:
    """Read a sealed folder after checking its names, sizes and SHA-256; symbolic links are refused.

    Raises:
        CheckpointError: anything differs from what was written; it names the file and what to do.
    """
    with _opened(path) as folder:
        manifest = read_manifest(_read_file(folder, path / MANIFEST, None), path / MANIFEST, kind)
        files: dict[str, bytes] = {}
        for name in sorted(manifest["files"]):
            size, digest = manifest["files"][name]
            files[name] = _read_file(folder, path / name, size)
            if hashlib.sha256(files[name]).hexdigest() != digest:
                raise damaged(path / name, "does not have the SHA-256 that its manifest gives")
    return SealedFolder(path=path, step=manifest["step"], files=files)


def read_current_folder(path: Path, kind: FolderKind) -> SealedFolder:
    """Like `read_folder`, for a folder that may be replaced meanwhile or whose writer was stopped doing so."""
    while True:
        place, identity = _find_current(path)
        try:
            return read_folder(place, kind)
        except CheckpointError:
            if _find_current(path) == (place, identity):
                raise


def _find_current(path: Path) -> tuple[Path, tuple[int, int, int] | None]:
    for place in (path, _previous(path)):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            status = place.stat()
            return place, (status.st_dev, status.st_ino, status.st_ctime_ns)
    return path, None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as fault:
        if path.is_symlink():
            raise damaged(path, "is a symbolic link, which is not followed") from fault
        raise CheckpointError(f"{path} cannot be opened as a folder: {_reason(fault)}. Check the path") from fault
    try:
        yield folder
    finally:
        os.close(folder)


def _read_file(folder: int, path: Path, expected: int | None) -> bytes:
    """Read a regular file of `expected` bytes (a manifest: of at most its limit), never more than memory."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path.name, flags, dir_fd=folder)
        with os.fdopen(descriptor, "rb") as stream:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise damaged(path, "is not a regular file")
            _check_size(path, status.st_size, expected)
            data = stream.read(status.st_size + 1)
    except FileNotFoundError as fault:
        raise damaged(path, "is missing") from fault
    except OSError as fault:
        link = fault.errno == errno.ELOOP
        reason = "is a symbolic link, which is not followed" if link else f"cannot be read: {_reason(fault)}"
        raise damaged(path, reason) from fault
    if len(data) != status.st_size:
        raise damaged(path, "changed while it was read")
    return data


def _check_size(path: Path, size: int, expected: int | None) -> None:
    if expected is None and size > MANIFEST_LIMIT:
        raise damaged(path, f"has {size} bytes, more than the limit of {MANIFEST_LIMIT}")
    if expected is not None and size != expected:
        raise damaged(path, f"has {size} bytes where its manifest gives {expected}")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise damaged(path, f"has {size} bytes, more than the memory of this machine ({memory})")
