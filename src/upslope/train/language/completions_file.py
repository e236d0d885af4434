"""`completions.jsonl`: what the policy wrote in some logged updates, append-only and cut back when a run is resumed."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_logger = logging.getLogger(__name__)


class CompletionsFile:
    """Appends records to a file of one JSON object per line.

    Args:
        path: the file; its directory exists.
        resume_at: what `cursor` said when the checkpoint was taken; None for a new run.
    """

    def __init__(self, path: Path, *, resume_at: int | None) -> None:
        self._path = path
        if resume_at is not None and path.exists():
            with open(path, "r+b") as file:
                kept = file.read(resume_at)
                if len(kept) < resume_at:
                    _logger.warning("%s is shorter than at this checkpoint: completions before it are lost", path)
                file.truncate(kept.rfind(b"\n") + 1)
        self._file = io.BufferedWriter(io.FileIO(path, "ab"))

    def write(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append records."""
        for record in records:
            self._file.write(json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def cursor(self) -> int:
        """The file's length in bytes, after everything before it has reached the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        self._file.close()
