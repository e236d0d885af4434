"""Rows of Parquet and Arrow files, and of folders that `datasets` saved; read with pyarrow, memory mapped."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

from upslope.collect.tasks.records import LONGEST_LINE, Records, Row, Visit
from upslope.errors import UsageError

_CACHE_BYTES: Final = 256 * 2**20
_SCAN_ROWS: Final = 1024


def open_columnar(path: Path, visit: Visit) -> Records:
    """The rows of a Parquet file, an Arrow file or a folder that `Dataset.save_to_disk` wrote.

    Raises:
        UsageError: if it cannot be read as that.
        ModuleNotFoundError: without pyarrow.
    """
    arrow = _pyarrow()
    try:
        if path.suffix.lower() == ".parquet":
            records: ParquetRows | ArrowRows = ParquetRows(path)
        else:
            records = ArrowRows(_saved_files(path) if path.is_dir() else [path])
        _visit_all(records, visit, path)
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    return records


class ArrowRows:
    """Arrow files in the stream or the file format, one after the other; memory mapped, so that nothing is held.

    Args:
        paths: the files.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        arrow = _pyarrow()
        self._batches: list[Any] = []
        for path in paths:
            source = arrow.memory_map(str(path))
            with path.open("rb") as file:
                whole = file.read(6) == b"ARROW1"
            if whole:
                reader = arrow.ipc.open_file(source)
                self._batches.extend(reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                self._batches.extend(arrow.ipc.open_stream(source))
        self._ends = list(accumulate(batch.num_rows for batch in self._batches))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int, /) -> Row:
        return self.rows(index, index + 1)[0]

    def rows(self, start: int, stop: int) -> list[dict[str, Any]]:
        """Rows from `start` up to `stop`, as many as lie in one batch."""
        part, first = _part(self._ends, start)
        return self._batches[part].slice(start - first, stop - start).to_pylist()


class ParquetRows:
    """A Parquet file; the row groups read last stay in memory, up to 256 MiB of them and at least one.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        _pyarrow()
        import pyarrow.parquet as parquet

        self._path = path
        with parquet.ParquetFile(path) as file:
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        self._ends = list(accumulate(group.num_rows for group in groups))
        self._tables: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int, /) -> Row:
        return self.rows(index, index + 1)[0]

    def rows(self, start: int, stop: int) -> list[dict[str, Any]]:
        """Rows from `start` up to `stop`, as many as lie in one row group."""
        part, first = _part(self._ends, start)
        return self._table(part).slice(start - first, stop - start).to_pylist()

    def _table(self, part: int) -> Any:
        if part not in self._tables:
            import pyarrow.parquet as parquet

            with parquet.ParquetFile(self._path) as file:
                self._tables[part] = file.read_row_group(part)
            while len(self._tables) > 1 and sum(table.nbytes for table in self._tables.values()) > _CACHE_BYTES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(part)
        return self._tables[part]


def _visit_all(records: ParquetRows | ArrowRows, visit: Visit, path: Path) -> None:
    index = 0
    while index < len(records):
        for row in records.rows(index, index + _SCAN_ROWS):
            visit(row, f"{path}, row {index + 1}")
            index += 1


def _part(ends: list[int], index: int) -> tuple[int, int]:
    """Which part holds a row, and the number of that part's first row."""
    if not 0 <= index < (ends[-1] if ends else 0):
        raise IndexError(f"there are {ends[-1] if ends else 0} rows, got index {index}")
    part = bisect_right(ends, index)
    return part, ends[part - 1] if part else 0


def _saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a saved dataset, in order."""
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))
        raise UsageError(f"{folder} holds several splits: give the folder of one of them ({splits})")
    state = folder / "state.json"
    if not state.is_file():
        raise UsageError(f"{folder} is no folder that datasets saved: it has no state.json")
    if state.stat().st_size > LONGEST_LINE:
        raise UsageError(f"{state} is too large to be the state of a dataset")
    try:
        tree = json.loads(state.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{state} is not JSON: {error}") from error
    entries = tree.get("_data_files") if isinstance(tree, dict) else None
    if not isinstance(entries, list) or not entries or not all(map(_is_name, entries)):
        raise UsageError(f"{state} names no data files within its folder")
    if tree.get("_indices_data_files"):
        raise UsageError(f"{folder} was saved with rows chosen by an index: save it again after flatten_indices()")
    return [folder / entry["filename"] for entry in entries]


def _is_name(entry: Any) -> bool:
    """Whether it names a file that lies beside it."""
    name = entry.get("filename") if isinstance(entry, dict) else None
    return isinstance(name, str) and Path(name).name == name


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Parquet and Arrow files need the package pyarrow: pip install 'upslope[language]'"
        ) from error
    return pyarrow
