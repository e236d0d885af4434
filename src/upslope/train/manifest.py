"""The list of sizes and hashes that seals a folder, and the reading of JSON that nobody vouches for."""

import functools
import hashlib
import json
import platform
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

MANIFEST = "MANIFEST.json"
MANIFEST_LIMIT = 64 * 2**10
FORMAT_VERSION = 1
JSON_LIMIT = 16 * 2**20


class CheckpointError(RuntimeError):
    """A checkpoint or a policy folder cannot be written, or what is on disk cannot be trusted."""


@dataclass(frozen=True, kw_only=True)
class FolderKind:
    """What a sealed folder is called in its manifest, and the names of the files it holds.

    Attributes:
        format: its name.
        files: what it always holds.
        more: what all other names look like that it may hold; None for none.
    """

    format: str
    files: frozenset[str]
    more: re.Pattern[str] | None = None

    def may_hold(self, name: str) -> bool:
        """Whether a file of this name may stand in the folder."""
        return name == MANIFEST or name in self.files or (self.more is not None and bool(self.more.fullmatch(name)))

    def holds(self, names: Collection[str]) -> bool:
        """Whether these are the names of such a folder's files, without its manifest."""
        return MANIFEST not in names and self.files <= set(names) and all(map(self.may_hold, names))


def damaged(path: Path, fault: str) -> CheckpointError:
    """The error for content that cannot be trusted: which file, what is wrong with it, what to do."""
    return CheckpointError(
        f"{path} {fault}. Nothing was loaded from it: move {path.parent} out of the way (or delete it) "
        f"and use another checkpoint or a fresh copy"
    )


def parse_json(raw: bytes, path: Path, *, limit: int = JSON_LIMIT) -> Any:
    """Read JSON of at most `limit` bytes, without duplicate keys and without NaN or infinity."""
    if len(raw) > limit:
        raise damaged(path, f"holds {len(raw)} bytes of JSON, more than the limit of {limit}")
    try:
        return json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_object_without_duplicates,
            parse_float=_finite_float,
            parse_constant=_finite_float,
        )
    except ValueError as fault:
        raise damaged(path, f"is not the JSON that was written ({fault})") from fault
    except RecursionError as fault:
        raise damaged(path, "is JSON nested too deeply to read") from fault


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("the same key stands twice in one object")
    return found


def _finite_float(text: str) -> float:
    value = float(text)
    if value - value != 0.0:
        raise ValueError(f"{text} is not a finite number")
    return value


def write_manifest(kind: FolderKind, files: Mapping[str, bytes], step: int | None) -> bytes:
    """The bytes of the manifest of these files; every byte of it is covered by its own digest."""
    return _seal(
        {
            "format": kind.format,
            "format_version": FORMAT_VERSION,
            "step": step,
            "versions": {
                "python": platform.python_version(),
                **{name: _version(name) for name in ("upslope", "torch", "numpy", "safetensors")},
            },
            "files": {name: [len(data), hashlib.sha256(data).hexdigest()] for name, data in files.items()},
        }
    )


@functools.cache
def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _seal(content: dict[str, Any]) -> bytes:
    digest = hashlib.sha256(_canonical(content)).hexdigest()
    return _canonical({**content, "digest": digest})


def _canonical(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode("ascii")


def read_manifest(raw: bytes, path: Path, kind: FolderKind) -> dict[str, Any]:
    """The content of a manifest, after every field and the digest are found to be right."""
    content = parse_json(raw, path, limit=MANIFEST_LIMIT)
    if not isinstance(content, dict) or content.get("format") != kind.format:
        raise damaged(path, f"is not the manifest of an {kind.format}")
    version = content.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {version} and this upslope reads up to {FORMAT_VERSION}: upgrade upslope"
        )
    sealed = {key: value for key, value in content.items() if key != "digest"}
    if set(sealed) != {"format", "format_version", "step", "versions", "files"} or _seal(sealed) != raw:
        raise damaged(path, "was changed after it was written")
    step, files = content["step"], content["files"]
    if version != FORMAT_VERSION or not (step is None or (type(step) is int and step >= 0)):
        raise damaged(path, f"has format {version!r} and step {step!r}, which no upslope writes")
    if not isinstance(files, dict) or not kind.holds(files):
        raise damaged(
            path, f"lists other files than {', '.join(sorted(kind.files))}{'' if kind.more is None else ' ...'}"
        )
    for name, entry in files.items():
        if not (isinstance(entry, list) and [type(part) for part in entry] == [int, str] and entry[0] >= 0):
            raise damaged(path, f"does not give the size and the SHA-256 of {name}")
    return content
