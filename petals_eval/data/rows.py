"""Labelled rows, read lazily from a memory-mapped table."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from petals_eval.data.source import DataSource, is_local
from petals_eval.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

__all__ = ["DataSource", "Row", "Rows", "load_rows", "rows_of"]

_CHUNK_ROWS = 500


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data set.

    index: its position in the source split, from 0, before any sampling.
    columns: its values by column name.
    """

    index: int
    columns: Mapping[str, object]


class Rows:
    """The rows of one split, in the order of the source. Iterating reads a chunk at a time: memory does not grow.

    name: what to call them in reports; never a local path.
    class_names: for each column of class numbers whose source says what the numbers mean, these names in order.
    """

    def __init__(
        self,
        table: "Dataset",
        *,
        name: str,
        fingerprint: str | None = None,
        positions: "np.ndarray | None" = None,
    ):
        """`positions`: ascending int64 rows of `table` to keep; None keeps all. `fingerprint` is that of `table`."""
        from datasets import ClassLabel

        self.name = name
        self.columns: tuple[str, ...] = tuple(table.column_names)
        self.class_names: Mapping[str, tuple[str, ...]] = {
            column: tuple(feature.names)
            for column, feature in table.features.items()
            if isinstance(feature, ClassLabel)
        }
        self._table = table
        self._table_fingerprint = fingerprint
        self._positions = positions

    def __len__(self) -> int:
        return len(self._table) if self._positions is None else len(self._positions)

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), _CHUNK_ROWS):
            stop = min(start + _CHUNK_ROWS, len(self))
            indices = range(start, stop) if self._positions is None else self._positions[start:stop].tolist()
            chunk = self._table[start:stop] if self._positions is None else self._table[indices]
            values = [chunk[column] for column in self.columns]
            for index, row in zip(indices, zip(*values, strict=True), strict=True):
                yield Row(index, dict(zip(self.columns, row, strict=True)))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, the same on every machine and under every path for the same rows.

        Of a local file: its bytes and the settings that turn them into rows. Of everything else (hub, folder, rows in
        memory): the column names, class names and values. Of a sample: these and the positions that were drawn.
        """
        whole = self._table_fingerprint or self._content_hash()
        if self._positions is None:
            return whole
        return hashlib.sha256(whole.encode() + self._positions.astype("<i8").tobytes()).hexdigest()

    def at(self, positions: "np.ndarray") -> "Rows":
        """The rows at these ascending positions (int64) of this object; each keeps its index in the source."""
        kept = positions if self._positions is None else self._positions[positions]
        return Rows(self._table, name=self.name, fingerprint=self._table_fingerprint, positions=kept)

    def _content_hash(self) -> str:
        digest = hashlib.sha256(json.dumps([self.columns, dict(self.class_names)], sort_keys=True).encode())
        table = self._table.with_format("arrow")  # stored values: an image or a sound is not decoded to be hashed
        for start in range(0, len(table), _CHUNK_ROWS):
            for row in table[start : start + _CHUNK_ROWS].to_pylist():
                digest.update(json.dumps([row[column] for column in self.columns], default=str).encode())
                digest.update(b"\n")
        return digest.hexdigest()


def load_rows(source: DataSource) -> Rows:
    """Read a file, a folder or a data set of the hub. Raises DataError, which names it and says what to do.

    Local data leaves nothing in the cache of `datasets`; data of the hub is kept there.
    """
    if not is_local(source):
        from petals_eval.data.hub import load_hub

        return _not_empty(Rows(load_hub(source), name=_name(source)), source)
    path = Path(source.path).expanduser()
    if path.is_dir():
        from petals_eval.data.hub import load_folder

        return _not_empty(Rows(load_folder(source), name=_name(source, path.resolve().name)), source)
    from petals_eval.data.files import file_fingerprint, load_file

    table = load_file(source)
    return _not_empty(Rows(table, name=path.name, fingerprint=file_fingerprint(source)), source)


def rows_of(data: "Dataset | Iterable[Mapping[str, object]]", *, name: str = "data") -> Rows:
    """Rows that are at hand already: a `datasets.Dataset`, or dictionaries with the same keys. Raises DataError."""
    import datasets

    if isinstance(data, datasets.Dataset):
        table = data.with_format(None)
    else:
        records = [dict(row) for row in data]
        odd = next((index for index, row in enumerate(records) if row.keys() != records[0].keys()), None)
        if odd is not None:
            raise DataError(
                f"row {odd} has the columns {', '.join(records[odd])}, but row 0 has {', '.join(records[0])}. "
                "Give every row the same columns."
            )
        try:
            table = datasets.Dataset.from_list(records)
        except (ValueError, TypeError, OverflowError) as error:  # what pyarrow raises for values of mixed types
            raise DataError(f"{name}: every column needs values of one type ({error}).") from error
    if len(table) == 0:
        raise DataError(f"{name} is empty: expected at least one row.")
    return Rows(table, name=name)


def _not_empty(rows: Rows, source: DataSource) -> Rows:
    if len(rows) == 0:
        what = f"split {source.split} of {source.path}" if source.split else source.path
        raise DataError(f"{what} is empty: expected at least one row.")
    return rows


def _name(source: DataSource, base: str | None = None) -> str:
    return " ".join(part for part in (base or source.path, source.subset, source.split) if part)
