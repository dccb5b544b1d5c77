"""Rows in a memory-mapped table, and how its cells become values again."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from petals_eval.data.json_text import value_of

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["LINE", "JsonTable", "Readable", "Table", "TextTable", "class_names_of"]

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

    def __len__(self) -> int: ...

    def read(self, rows: range | list[int]) -> Iterator[tuple[Mapping[str, object], int | None]]: ...

    def content_hash(self) -> str: ...


class Table:
    """Rows of values whose types are those of the source: parquet, the hub, a folder, or a Python program.

    columns: their names, in the order of the source.
    class_names: for each column of class numbers whose source says what the numbers mean, these names in order.
    truth_words: how the source writes false and true.
    """

    truth_words: tuple[str, str] = ("False", "True")

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


class TextTable(Table):
    """Rows of texts, as csv, tsv and plain lines are."""

    def __init__(self, dataset: "Dataset", columns: Sequence[str]):
        super().__init__(dataset)
        self.columns = tuple(columns)

    def read(self, rows: range | list[int]) -> Iterator[tuple[Mapping[str, object], int | None]]:
        chunk = self._chunk(rows)
        values = [chunk[str(number)] for number in range(len(self.columns))]
        for line, *cells in zip(chunk[LINE], *values, strict=True):
            yield dict(zip(self.columns, cells, strict=True)), line


class JsonTable(Table):
    """Rows that are stored as the JSON objects that they were in the file.

    columns: all keys, in the order in which they first appear; an object without one of them has None there.
    """

    truth_words = ("false", "true")

    def __init__(self, dataset: "Dataset", columns: Sequence[str]):
        super().__init__(dataset)
        self.columns = tuple(columns)

    def read(self, rows: range | list[int]) -> Iterator[tuple[Mapping[str, object], int | None]]:
        chunk = self._chunk(rows)
        for line, text in zip(chunk[LINE], chunk[_OBJECT], strict=True):
            value = value_of(text)
            if len(value) < len(self.columns):
                value = {column: value.get(column) for column in self.columns}
            yield value, line

    def content_hash(self) -> str:
        """Return a SHA-256 over column names and objects, as they are written."""
        digest = hashlib.sha256(json.dumps(self.columns).encode())
        for start in range(0, len(self), _CHUNK_ROWS):
            for text in self._chunk(range(start, start + _CHUNK_ROWS))[_OBJECT]:
                digest.update(json.dumps(text).encode() + b"\n")
        return digest.hexdigest()


def _number(written: str) -> int | float:
    return int(written) if written.removeprefix("-").isdigit() else float(written)
