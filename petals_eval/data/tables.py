"""Rows in a memory-mapped table, and how its cells become values again."""

import hashlib
import json
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol

from petals_eval.data.json_text import value_of

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import Array, RecordBatch

__all__ = ["LINE", "JsonTable", "Readable", "Table", "TextTable", "class_names_of", "numbers_array", "texts_array"]

LINE = "line"
"""In the table of a file, the column of the lines where the rows begin. The file's own columns are called 0, 1, ...
there: Arrow would cut a name at a zero byte."""

_OBJECT = "0"  # of a JSON file, its only column

_CHUNK_ROWS = 500


class Readable(Protocol):
    """What rows are read from: a table, or what is made of others. The members are those of `Table`."""

    columns: tuple[str, ...]
    class_names: Mapping[str, tuple[str, ...]]
    truth_words: tuple[str, str]
    notes: tuple[str, ...]

    def __len__(self) -> int: ...

    def read(self, rows: range | list[int]) -> Iterator[tuple[Mapping[str, object], int | None]]: ...

    def content_hash(self) -> str: ...


class Table:
    """Rows of values whose types are those of the source: parquet, the hub, a folder, or a Python program.

    columns: their names, in the order of the source.
    class_names: for each column of class numbers whose source says what the numbers mean, these names in order.
    truth_words: how the source writes false and true.
    notes: what a person should know of how it was read.
    """

    truth_words: tuple[str, str] = ("False", "True")
    notes: tuple[str, ...] = ()

    def __init__(self, dataset: "Dataset", *, numbers: Sequence[str] = ()):
        """`numbers`: columns for which Arrow has no exact type; their numbers are stored as Python writes them."""
        self._dataset = dataset
        self._numbers = frozenset(numbers)
        self.columns: tuple[str, ...] = tuple(dataset.column_names)
        self.class_names: Mapping[str, tuple[str, ...]] = class_names_of(dataset.features)

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, rows: range | list[int]) -> Iterator[tuple[Mapping[str, object], int | None]]:
        """Yield each of these rows: its values by column, and the line of the file where it begins, if it has one."""
        chunk = self._chunk(rows)
        values = [self._values(column, chunk[column]) for column in self.columns]
        for cells in zip(*values, strict=True):
            yield dict(zip(self.columns, cells, strict=True)), None

    def content_hash(self) -> str:
        """Return a SHA-256 over column names, class names and values."""
        digest = hashlib.sha256(json.dumps([self.columns, dict(self.class_names)], sort_keys=True).encode())
        stored = self._dataset.with_format("arrow")  # stored values: an image or a sound is not decoded to be hashed
        for start in range(0, len(stored), _CHUNK_ROWS):
            chunk = stored[start : start + _CHUNK_ROWS].to_pydict()
            values = [self._values(column, chunk[column]) for column in self.columns]
            for cells in zip(*values, strict=True):
                digest.update(json.dumps(cells, default=str).encode())
                digest.update(b"\n")
        return digest.hexdigest()

    def _chunk(self, rows: range | list[int]) -> Mapping[str, list[Any]]:
        found: Mapping[str, list[Any]] = (
            self._dataset[rows.start : rows.stop] if isinstance(rows, range) else self._dataset[rows]
        )
        return found

    def _values(self, column: str, cells: list[Any]) -> list[Any]:
        return [None if cell is None else _number(cell) for cell in cells] if column in self._numbers else cells


def class_names_of(features: Mapping[str, object]) -> dict[str, tuple[str, ...]]:
    """Return the names of the classes, in order, of each column that has them."""
    from datasets import ClassLabel

    return {column: tuple(feature.names) for column, feature in features.items() if isinstance(feature, ClassLabel)}


class FileTable(ABC):
    """Rows of a file as it writes them, in batches that are memory-mapped.

    columns: their names, in the order of the file.
    """

    class_names: Mapping[str, tuple[str, ...]] = {}
    truth_words: tuple[str, str] = ("False", "True")
    notes: tuple[str, ...] = ()

    def __init__(self, batches: "Sequence[RecordBatch]", columns: Sequence[str]):
        self.columns = tuple(columns)
        self._batches = batches
        self._ends = list(accumulate(batch.num_rows for batch in batches))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, rows: range | list[int]) -> Iterator[tuple[Mapping[str, object], int | None]]:
        """Yield each of these ascending rows: its values by column, and the line of the file where it begins."""
        for batch in self._parts(rows):
            yield from self._rows(batch)

    def content_hash(self) -> str:
        """Return a SHA-256 over column names and cells, as they are written."""
        digest = hashlib.sha256(json.dumps(self.columns).encode())
        for batch in self._batches:
            chunk = batch.to_pydict()
            for cells in zip(*(chunk[name] for name in chunk if name != LINE), strict=True):
                digest.update(json.dumps(cells[0] if len(cells) == 1 else cells).encode() + b"\n")
        return digest.hexdigest()

    @abstractmethod
    def _rows(self, batch: "RecordBatch") -> Iterator[tuple[Mapping[str, object], int | None]]:
        """Yield the rows of a part of a batch, as `read` does."""

    def _parts(self, rows: range | list[int]) -> "Iterator[RecordBatch]":
        """Yield these ascending rows, those of each batch by themselves."""
        at = 0
        while at < len(rows):
            number = bisect_right(self._ends, rows[at])
            batch, begin = self._batches[number], self._ends[number] - self._batches[number].num_rows
            stop = at
            while stop < len(rows) and rows[stop] < self._ends[number]:
                stop += 1
            inside = [row - begin for row in rows[at:stop]]
            is_run = inside[-1] - inside[0] == len(inside) - 1
            yield batch.slice(inside[0], len(inside)) if is_run else batch.take(numbers_array(inside))
            at = stop


class TextTable(FileTable):
    """Rows of texts, as csv, tsv and plain lines are."""

    def _rows(self, batch: "RecordBatch") -> Iterator[tuple[Mapping[str, object], int | None]]:
        chunk = batch.to_pydict()
        values = [chunk[str(number)] for number in range(len(self.columns))]
        for line, *cells in zip(chunk[LINE], *values, strict=True):
            yield dict(zip(self.columns, cells, strict=True)), line


class JsonTable(FileTable):
    """Rows that are stored as the JSON objects that they were in the file.

    columns: all keys, in the order in which they first appear; an object without one of them has None there.
    """

    truth_words = ("false", "true")

    def _rows(self, batch: "RecordBatch") -> Iterator[tuple[Mapping[str, object], int | None]]:
        chunk = batch.to_pydict()
        for line, text in zip(chunk[LINE], chunk[_OBJECT], strict=True):
            value = value_of(text)
            if len(value) < len(self.columns):
                value = {column: value.get(column) for column in self.columns}
            yield value, line


def numbers_array(values: Sequence[int | None]) -> "Array":
    """Return an Arrow array of int64, made of its parts: `pyarrow.array` would import pandas, to ask it whether it
    knows these values, and that takes longer than reading a small file."""
    import numpy as np
    import pyarrow as pa

    numbers = np.array([0 if value is None else value for value in values], dtype=np.int64)
    return pa.Array.from_buffers(pa.int64(), len(values), [_present(values), pa.py_buffer(numbers)])


def texts_array(values: Sequence[str | None]) -> "Array":
    """Return an Arrow array of texts of any length. Raises UnicodeEncodeError for half a surrogate pair."""
    import numpy as np
    import pyarrow as pa

    parts = [b"" if value is None else value.encode() for value in values]
    ends = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    buffers = [_present(values), pa.py_buffer(ends), pa.py_buffer(b"".join(parts))]
    return pa.Array.from_buffers(pa.large_string(), len(parts), buffers)


def _present(values: Sequence[object]) -> Any:
    """Return Arrow's bitmap of the values that are there; None, as Arrow has it, where all are."""
    import numpy as np
    import pyarrow as pa

    if None not in values:
        return None
    return pa.py_buffer(np.packbits([value is not None for value in values], bitorder="little"))


def _number(written: str) -> int | float:
    return int(written) if written.removeprefix("-").isdigit() else float(written)
