"""Parquet and Arrow files: rows whose values have types, and a column that nobody reads may have any."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petals_eval.data.first_bytes import ARROW
from petals_eval.data.scratch import mapped
from petals_eval.data.tables import FileTable
from petals_eval.errors import DataError
from petals_eval.validation import shorten

if TYPE_CHECKING:
    from pyarrow import RecordBatch, Schema

__all__ = ["ArrowTable", "load_arrow", "load_parquet"]

_BATCH_ROWS = 2000


class ArrowTable(FileTable):
    """Rows of values that have Arrow's types.

    class_names: for each column that `datasets` wrote as class numbers, their names in order.
    """

    def __init__(self, batches: "Sequence[RecordBatch]", schema: "Schema"):
        super().__init__(batches, schema.names)
        self.class_names = _class_names(schema.metadata or {})

    def _rows(self, batch: "RecordBatch") -> Iterator[tuple[Mapping[str, object], int | None]]:
        cells = _Cells(batch)
        for row in range(batch.num_rows):
            yield _Row(cells, row), None


class _Cells:
    """The cells of a batch by column, each read when it is asked for: Python has no value for some of Arrow's."""

    def __init__(self, batch: "RecordBatch"):
        self.columns: tuple[str, ...] = tuple(batch.schema.names)
        self._batch = batch
        self._read: dict[str, list[object]] = {}

    def __getitem__(self, column: str) -> list[object]:
        """Raises DataError for a column that cannot be read, KeyError for none."""
        import pyarrow as pa

        if column not in self._read:
            if column not in self.columns:
                raise KeyError(column)
            cells = self._batch.column(column)
            try:
                self._read[column] = cells.to_pylist()
            except (ValueError, TypeError, OverflowError, ArithmeticError, ImportError, pa.ArrowException) as error:
                raise DataError(
                    f"the values of column {column} ({cells.type}) cannot be read: {str(error)[:120]}. "
                    "Save them as text or as numbers."
                ) from error
        return self._read[column]


class _Row(Mapping[str, object]):
    """A row of a batch, by column."""

    __slots__ = ("_cells", "_row")

    def __init__(self, cells: _Cells, row: int):
        self._cells = cells
        self._row = row

    def __getitem__(self, column: str) -> object:
        return self._cells[column][self._row]

    def __iter__(self) -> Iterator[str]:
        return iter(self._cells.columns)

    def __len__(self) -> int:
        return len(self._cells.columns)


def load_parquet(path: Path) -> ArrowTable:
    """Return the rows of a parquet file. Raises DataError, OSError."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            return _table(path, file.schema_arrow, file.iter_batches(_BATCH_ROWS))
    except (ValueError, TypeError, pa.ArrowException) as error:
        raise _unreadable(path, "a parquet file", error) from error


def load_arrow(path: Path) -> ArrowTable:
    """Return the rows of an Arrow file (Feather's second version), or of the stream that `datasets` writes.

    Raises DataError, OSError.
    """
    import pyarrow as pa

    try:
        with pa.OSFile(str(path), "rb") as file:
            is_file = file.read(len(ARROW[0])) == ARROW[0]
            file.seek(0)
            if not is_file:
                with pa.ipc.open_stream(file) as stream:
                    return _table(path, stream.schema, map(_checked, stream))
            with pa.ipc.open_file(file) as batches:
                parts = map(batches.get_batch, range(batches.num_record_batches))
                return _table(path, batches.schema, map(_checked, parts))
    except (ValueError, TypeError, pa.ArrowException) as error:
        raise _unreadable(path, "an Arrow file or stream", error) from error


def _checked(batch: "RecordBatch") -> "RecordBatch":
    """Return the batch. Raises ArrowInvalid for offsets that lead out of it: Arrow trusts those of a file."""
    batch.validate(full=True)
    return batch


def _table(path: Path, schema: "Schema", batches: "Iterator[RecordBatch]") -> ArrowTable:
    names = schema.names
    if len(set(names)) < len(names):
        twice = next(name for at, name in enumerate(names) if name in names[:at])
        raise DataError(f"{path.name} has two columns of the name {shorten(twice)}: rename one.")
    return ArrowTable(mapped(schema, batches), schema)


def _unreadable(path: Path, expected: str, error: Exception) -> DataError:
    reason = f"{type(error).__name__}: {str(error)[:200]}"
    return DataError(f"{path.name} cannot be read: expected {expected}; {reason} Is it complete?")


def _class_names(metadata: Mapping[bytes, bytes]) -> dict[str, tuple[str, ...]]:
    """Return the names that `datasets` keeps in a schema, {"info": {"features": {COLUMN: {"names": [...]}}}}."""
    try:
        features: Any = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return {
            column: tuple(map(str, feature["names"]))
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, KeyError, TypeError, AttributeError):  # another program's, or nothing
        return {}
