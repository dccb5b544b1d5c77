"""Labelled rows, read lazily from a memory-mapped table."""

import hashlib
import json
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral, Rational, Real
from typing import TYPE_CHECKING, Any

from petals_eval.data.source import DataSource, is_local
from petals_eval.data.tables import Readable, Table, class_names_of
from petals_eval.environment import local_path
from petals_eval.errors import DataError
from petals_eval.text import listed
from petals_eval.validation import closest, shorten

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from pandas import DataFrame

__all__ = ["IN_MEMORY", "DataSource", "Row", "Rows", "is_missing", "load_rows", "name_of", "row_hash", "rows_of"]

IN_MEMORY = "rows in memory"  # what rows that come from no file are called
_CHUNK_ROWS = 500


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data set.

    index: its position in the source split, from 0, before any sampling.
    columns: its values by column name. A value of csv, tsv and plain lines is the text of the file. A value of JSON is
        what Python makes of it, but `str` shows a number as the file has it (4.50, 1e3). Every other value has the
        type that its source gives it.
    line: the line of the file where the row begins, from 1; None where the rows have no lines.
    """

    index: int
    columns: Mapping[str, object]
    line: int | None = None


class Rows:
    """The rows of one split, in the order of the source. Iterating reads a chunk at a time: memory does not grow.

    name: what to call them in reports; never a local path.
    columns: the names of the columns.
    class_names: for each column of class numbers whose source says what the numbers mean, these names in order.
    truth_words: how the source writes false and true.
    notes: what a person should know of how they were read.
    passed: checks that all of the rows have passed, so that nobody reads them for the same one again.
    """

    def __init__(
        self,
        table: Readable,
        *,
        name: str,
        fingerprint: str | None = None,
        positions: "np.ndarray | None" = None,
        passed: Iterable[Hashable] = (),
    ):
        """`positions`: ascending int64 rows of `table` to keep; None keeps all. `fingerprint` is that of `table`."""
        self.passed = set(passed)
        self.name = name
        self.columns: tuple[str, ...] = table.columns
        self.class_names: Mapping[str, tuple[str, ...]] = table.class_names
        self.truth_words = table.truth_words
        self.notes = table.notes
        self._table = table
        self._table_fingerprint = fingerprint
        self._positions = positions

    def __len__(self) -> int:
        return len(self._table) if self._positions is None else len(self._positions)

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), _CHUNK_ROWS):
            stop = min(start + _CHUNK_ROWS, len(self))
            indices = range(start, stop) if self._positions is None else self._positions[start:stop].tolist()
            for index, (columns, line) in zip(indices, self._table.read(indices), strict=True):
                yield Row(index, columns, line)

    @cached_property
    def fingerprint(self) -> str:
        """A SHA-256, the same on every machine and under every path for the same rows.

        Of a local file: its bytes and the settings that turn them into rows. Of everything else (hub, folder, rows in
        memory): the column names, class names and values. Of a sample: these and the positions that were drawn.
        """
        whole = self._table_fingerprint or self._table.content_hash()
        if self._positions is None:
            return whole
        return hashlib.sha256(whole.encode() + self._positions.astype("<i8").tobytes()).hexdigest()

    def where(self, row: Row, what: str = "row") -> str:
        """Return how a message names one of the rows: by its index, and by its line where it has one. what: it is."""
        line = "" if row.line is None else f" (line {row.line})"
        return f"{self.name}, {what} {row.index}{line}"

    def check_columns(self, names: Iterable[str], task: str) -> None:
        """Raise DataError for a column that a task reads and that is not there."""
        have = "the rows in memory have" if self.name == IN_MEMORY else f"{self.name} has"
        reader = "the task" if task == "task" else f"task {task}"  # so is one called that nobody gave a name
        for name in names:
            if name not in self.columns:
                raise DataError(
                    f"{have} no column {name}, which {reader} reads. "
                    f"Columns found: {', '.join(self.columns)}.{closest(name, self.columns)}"
                )

    def at(self, positions: "np.ndarray") -> "Rows":
        """Return the rows at these ascending positions (int64) of this object; each keeps its index in the source."""
        kept = positions if self._positions is None else self._positions[positions]
        return Rows(
            self._table, name=self.name, fingerprint=self._table_fingerprint, positions=kept, passed=self.passed
        )


def is_missing(value: object) -> bool:
    """Return whether there is nothing in a cell: None, or NaN, by which pandas marks what is missing.

    >>> [is_missing(value) for value in (None, float("nan"), "", 0, [])]
    [True, True, False, False, False]
    """
    return value is None or value != value


def row_hash(columns: Mapping[str, object], names: Iterable[str]) -> str:
    """Return the first 16 hexadecimal digits of a SHA-256 over what these columns of a row hold.

    The same row has the same, whichever file or sample it came in; a number that a file writes otherwise has another.

    >>> row_hash({"text": "how far", "label": 5, "index": 7}, ["text", "label"])
    '50ac1e4fd8fea556'
    """
    said = [[name, columns[name]] for name in sorted(set(names))]
    return hashlib.sha256(json.dumps(said, ensure_ascii=False, default=str).encode()).hexdigest()[:16]


def load_rows(source: DataSource) -> Rows:
    """Read a file, a folder or a data set of the hub. Raises DataError, which names it and says what to do.

    Local data leaves nothing in the cache of `datasets`; data of the hub is kept there.

    Of a file every value is what is written there, and so it is of csv and JSON files in a local folder. A data set of
    the hub has the types that `datasets` gives it: its own, and text for csv. Of JSON on the hub without types of its
    own `datasets` makes one type a column: 4 beside 4.5 becomes 4.0, and a date is no text.
    """
    if not is_local(source):
        from petals_eval.data.hub import load_hub

        return _not_empty(Rows(load_hub(source), name=name_of(source)), source)
    path = local_path(source.path)
    if path.is_dir():
        from petals_eval.data.hub import load_folder

        return _not_empty(Rows(load_folder(source), name=name_of(source)), source)
    from petals_eval.data.files import file_fingerprint, load_file

    return _not_empty(Rows(load_file(source), name=name_of(source), fingerprint=file_fingerprint(source)), source)


def rows_of(data: "Dataset | DataFrame | Iterable[Mapping[str, object]]", *, name: str = "data") -> Rows:
    """Return rows that are at hand already.

    data: a `datasets.Dataset` or `IterableDataset`, whose class names count; a pandas DataFrame, whose index does not;
        or any iterable of mappings with the same keys, which is read once. `Rows` stay as they are.

    The values keep their types: 4 stays a whole number beside 4.5. Numbers and arrays of NumPy, pandas and torch become
    Python's, and what these mark as missing (NaN, NaT, NA) becomes None.

    Raises DataError, which names the row, for rows that are no mappings, that differ in their keys or in the types of a
    column, and for no rows.
    """
    if isinstance(data, Rows):
        return data
    import datasets
    import pandas  # datasets needs it, too

    if isinstance(data, Mapping):  # also a DatasetDict
        raise DataError(_what_to_do_with(data, name))
    class_names: dict[str, tuple[str, ...]] = {}
    if isinstance(data, datasets.Dataset):
        table = Table(data.with_format(None))
    else:
        if isinstance(data, datasets.IterableDataset):
            class_names = class_names_of(data.features or {})
            data = data.with_format(None)
        records = _records(data, name) if not isinstance(data, pandas.DataFrame) else _records_of_frame(data, name)
        table = _table_of(records, name)
    if len(table) == 0:
        raise DataError(f"{name} is empty: expected at least one row.")
    if class_names:
        table.class_names = class_names
    return Rows(table, name=name)


def _what_to_do_with(data: Mapping[Any, Any], name: str) -> str:
    """Return what is wrong with a mapping where rows are expected: it holds several splits, or columns."""
    keys = [str(key) for key in data]
    first = keys[0] if keys else "..."
    if any(hasattr(part, "column_names") for part in data.values()):
        return f"{name}: expected the rows of one split, found several ({listed(keys)}): give one, as data[{first!r}]."
    return (
        f"{name}: expected rows, found one mapping ({listed(keys)}). Of columns make rows first, by "
        "datasets.Dataset.from_dict(...) or pandas.DataFrame(...); a single row goes into a list."
    )


def _records(data: object, name: str) -> list[dict[str, object]]:
    """Return rows as dictionaries of plain values. Raises DataError."""
    if isinstance(data, str | bytes) or not isinstance(data, Iterable):
        raise DataError(
            f"{name}: expected a list of mappings, a pandas DataFrame or a datasets.Dataset, found "
            f"{type(data).__name__}."
        )
    records: list[dict[str, object]] = []
    for index, row in enumerate(data):
        if not isinstance(row, Mapping):
            raise DataError(
                f"{name}, row {index}: expected a mapping of column names to values, found {type(row).__name__} "
                f"({shorten(row, 40)})."
            )
        odd = next((key for key in row if not isinstance(key, str)), None)
        if odd is not None:
            raise DataError(f"{name}, row {index}: expected text as names of columns, found {shorten(odd)}.")
        if records and row.keys() != records[0].keys():
            raise DataError(
                f"{name}, row {index} has the columns {', '.join(row)}, but row 0 has {', '.join(records[0])}. "
                "Give every row the same columns."
            )
        records.append({key: _plain(value) for key, value in row.items()})
    return records


def _records_of_frame(frame: "DataFrame", name: str) -> list[dict[str, object]]:
    """Return the rows of a DataFrame by position, whatever its index is. Raises DataError."""
    columns = list(frame.columns)
    odd = [column for column in columns if not isinstance(column, str)]
    if odd or len(set(columns)) < len(columns):
        found = f"{shorten(odd[0])}" if odd else "one name twice"
        raise DataError(
            f"{name}: expected text as names of a DataFrame's columns, each once, found {found} among "
            f"{listed(map(str, columns))}. Rename them."
        )
    cells = (map(_plain, frame[column].tolist()) for column in columns)
    return [dict(zip(columns, row, strict=True)) for row in zip(*cells, strict=True)]


def _table_of(records: list[dict[str, object]], name: str) -> Table:
    """Return the rows in a table of Arrow's. Raises DataError for values that it has no type for."""
    import datasets
    import pyarrow

    numbers = _numbers_without_a_type(records)
    stored = [{**row, **{key: _written(row[key]) for key in numbers}} for row in records] if numbers else records
    try:
        return Table(datasets.Dataset.from_list(stored), numbers=numbers)
    except (ValueError, TypeError, OverflowError, pyarrow.ArrowException) as error:  # values of mixed types
        raise DataError(f"{name}: every column needs values of one type ({str(error)[:120]}).") from error


def _plain(value: object) -> object:
    """Return a value of NumPy, pandas or torch as Python's own; None for what is missing."""
    if value is None or type(value) in (str, int, bool):
        return value
    if isinstance(value, float):
        return float(value) if value == value else None
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if callable(to_list := getattr(value, "tolist", None)):  # NumPy's numbers and arrays, torch's tensors, a Series
        return _plain(to_list())
    return None if _is_nothing_of_pandas(value) else value


def _is_nothing_of_pandas(value: object) -> bool:
    """Return whether a value is pandas' NaT or NA."""
    import pandas

    return value is pandas.NaT or value is pandas.NA


def _numbers_without_a_type(records: list[dict[str, object]]) -> list[str]:
    """Return the columns of numbers for which Arrow has no type that keeps them: 4 would become 4.0 beside 4.5."""
    found = []
    for column in records[0] if records else ():
        values = [row[column] for row in records if row[column] is not None]
        if any(isinstance(value, bool) or not isinstance(value, Real) for value in values):
            continue
        whole = [int(value) for value in values if isinstance(value, Integral)]
        if any(isinstance(value, Rational) and not isinstance(value, Integral) for value in values):
            continue  # a Fraction, which is for Arrow to refuse
        if 0 < len(whole) < len(values) or any(not -(2**63) <= value < 2**63 for value in whole):
            found.append(column)
    return found


def _written(number: object) -> str | None:
    return None if number is None else str(number)


def _not_empty(rows: Rows, source: DataSource) -> Rows:
    if len(rows) == 0:
        what = f"split {source.split} of {source.path}" if source.split else source.path
        raise DataError(f"{what} is empty: expected at least one row.")
    return rows


def name_of(source: DataSource) -> str:
    """Return what the rows of a source are called: the hub's name, or the last part of a local path."""
    path = local_path(source.path)
    if is_local(source) and not path.is_dir():
        return path.name
    base = path.resolve().name if is_local(source) else source.path
    return " ".join(part for part in (base, source.subset, source.split) if part)
