"""Rows of data files by number, without holding the file: JSON lines, CSV, Parquet and folders that `datasets` saved.

Every row is read once when a file is opened, so that a damaged one is named with its file and line before anything is
trained. What stays in memory is a dozen bytes per line of text, or the Parquet row groups read last.
"""

from __future__ import annotations

import csv
import io
import json
from array import array
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NoReturn, Protocol, TypeAlias

from upslope.errors import UsageError

LONGEST_LINE: Final = 16 * 2**20
"""Most bytes of a line (a CSV record); a longer one is refused without being read."""

_MARK: Final = "\ufeff"
"""What some programs begin a UTF-8 file with."""

Row: TypeAlias = Mapping[str, Any]
Visit: TypeAlias = Callable[[Row, str], None]
"""Called once with each row and its place ("data.jsonl, line 3") while a file is opened; may refuse it."""


class Records(Protocol):
    """Rows by number."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def __getitem__(self, index: int, /) -> Row:
        """The row at an index from 0 on."""
        ...


def open_records(path: Path, visit: Visit) -> Records:
    """The rows of a file, or of a folder saved by `datasets`; the kind is told by the suffix.

    Args:
        path: .jsonl, .ndjson or .json (one object per line), .csv (with a header), .parquet, .arrow, or a folder that
            `Dataset.save_to_disk` wrote.
        visit: called with every row.

    Raises:
        UsageError: naming file and line, if the file is missing, empty, of no known kind, or damaged.
        ModuleNotFoundError: if Parquet or Arrow is to be read without pyarrow.
    """
    if not path.exists():
        raise UsageError(
            f"there is no file {str(path)!r}: put the data there, or name where it is (task.training and task.held_out)"
        )
    suffix = path.suffix.lower()
    if path.is_dir() or suffix in (".parquet", ".arrow"):
        # Here alone: pyarrow is needed for no other kind, and takes a while to import.
        from upslope.collect.tasks.columnar import open_columnar

        records: Records = open_columnar(path, visit)
    elif suffix in (".jsonl", ".ndjson", ".json"):
        records = JsonLines(path, visit)
    elif suffix == ".csv":
        records = CommaSeparated(path, visit)
    else:
        raise UsageError(
            f"{str(path)!r} is of no known kind: give .jsonl, .ndjson, .json (one object per line), .csv, .parquet, "
            ".arrow or a folder saved by datasets"
        )
    if not len(records):
        raise UsageError(f"{str(path)!r} holds no rows")
    return records


class _Text:
    """A text file whose records are read at the offsets found when it was opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offsets = array("Q")
        self.lengths = array("I")
        self.identity = _identity(path)

    def __len__(self) -> int:
        return len(self.offsets)

    def read(self, index: int) -> str:
        if not 0 <= index < len(self.offsets):
            raise IndexError(f"{self.path} has rows 0 to {len(self.offsets) - 1}, got {index}")
        if _identity(self.path) != self.identity:
            raise RuntimeError(f"{self.path} has changed since it was opened: start again, and leave it alone")
        with self.path.open("rb") as file:
            file.seek(self.offsets[index])
            text = file.read(self.lengths[index]).decode()
        return text.removeprefix(_MARK) if self.offsets[index] == 0 else text

    def found(self, offset: int, end: int) -> None:
        self.offsets.append(offset)
        self.lengths.append(end - offset)


class JsonLines(_Text):
    """One JSON object per line; lines of nothing but white space are passed over.

    Args:
        path: the file.
        visit: called with every row.
    """

    def __init__(self, path: Path, visit: Visit) -> None:
        super().__init__(path)
        with path.open("rb") as file:
            offset = 0
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), start=1):
                text = _decoded(line, f"{path}, line {number}", first=number == 1)
                if text.strip():
                    visit(_object(text, f"{path}, line {number}"), f"{path}, line {number}")
                    self.found(offset, offset + len(line))
                offset += len(line)

    def __getitem__(self, index: int, /) -> Row:
        return _object(self.read(index), f"{self.path}, row {index}")


class CommaSeparated(_Text):
    """Comma-separated values with a header; every value is text. A field in quotes may hold commas and line ends.

    Args:
        path: the file.
        visit: called with every row.
    """

    def __init__(self, path: Path, visit: Visit) -> None:
        super().__init__(path)
        self._end = self._start = self._line = 0
        reader = csv.reader(self._lines(), strict=True)
        self.header: list[str] | None = None
        while True:
            where = f"{path}, line {self._line + 1}"
            try:
                values = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                _refuse(where, f"{error}; write such data as JSON lines")
            if self.header is None:
                self.header = _header(values, where)
            elif values:
                visit(self._row(values, where), where)
                self.found(self._start, self._end)
            self._start = self._end

    def __getitem__(self, index: int, /) -> Row:
        lines = io.StringIO(self.read(index), newline="\n")
        return self._row(next(csv.reader(lines, strict=True)), f"{self.path}, row {index}")

    def _lines(self) -> Iterator[str]:
        with self.path.open("rb") as file:
            for line in iter(lambda: file.readline(LONGEST_LINE + 1), b""):
                self._line += 1
                self._end += len(line)
                where = f"{self.path}, line {self._line}"
                if self._end - self._start > LONGEST_LINE:
                    _refuse(where, f"a record is longer than {LONGEST_LINE} bytes; is a quotation mark left open?")
                yield _decoded(line, where, first=self._line == 1)

    def _row(self, values: list[str], where: str) -> Row:
        assert self.header is not None
        if len(values) != len(self.header):
            _refuse(where, f"expected {len(self.header)} values as in the header, got {len(values)}")
        return dict(zip(self.header, values, strict=True))


def _header(names: list[str], where: str) -> list[str]:
    if not all(names) or len(set(names)) < len(names):
        _refuse(where, f"the header must name every column once, got {names}")
    return names


def _decoded(line: bytes, where: str, *, first: bool) -> str:
    if len(line) > LONGEST_LINE:
        _refuse(where, f"longer than {LONGEST_LINE} bytes; is it one JSON array, or no text file?")
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        _refuse(where, f"not UTF-8: byte {error.start} is {line[error.start : error.start + 1].hex()}")
    return text.removeprefix(_MARK) if first else text


def _object(text: str, where: str) -> Row:
    try:
        value = json.loads(text, parse_constant=_no_constant)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        _refuse(where, "holds half of a surrogate pair, which is no character")
    except (ValueError, RecursionError) as error:
        _refuse(where, f"not JSON: {error}")
    if not isinstance(value, dict):
        _refuse(where, f'expected one JSON object per line, {{"prompt": ...}}, got a {type(value).__name__}')
    return value


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _refuse(where: str, what: str) -> NoReturn:
    raise UsageError(f"{where}: {what}")


def _identity(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
