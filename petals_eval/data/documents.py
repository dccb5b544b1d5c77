"""Documents of several rows: consecutive rows, joined into one."""

import hashlib
import json
from collections.abc import Iterator, Mapping

from petals_eval.data.rows import Rows

__all__ = ["joined_rows"]


def joined_rows(rows: Rows, count: int | None, separator: str) -> Rows:
    """Return rows each of which is `count` consecutive ones of `rows`, the last perhaps fewer; None: all in one.

    Their columns are the same. A value is the texts of its rows with `separator` between them; numbers, false and true
    are written as a template writes them. Where a row has nothing the joined one has nothing, and where one has a list
    or another thing that is no text, the joined value is the list of them. A joined row's line is that of its first.
    """
    table = _Joined(rows, len(rows) if count is None else count, separator)
    return Rows(table, name=rows.name, fingerprint=table.content_hash())


class _Joined:
    """Reads so many rows at a time from other rows, and none before they are asked for."""

    def __init__(self, rows: Rows, count: int, separator: str):
        self.columns = rows.columns
        self.class_names: Mapping[str, tuple[str, ...]] = {}  # of numbers that are a part of a text here
        self.truth_words = rows.truth_words
        self.notes = rows.notes
        self._rows = rows
        self._count = count
        self._separator = separator

    def __len__(self) -> int:
        return -(-len(self._rows) // self._count)

    def read(self, rows: range | list[int]) -> Iterator[tuple[Mapping[str, object], int | None]]:
        import numpy as np  # here, because listing tasks needs none of it

        for row in rows:
            positions = np.arange(row * self._count, min((row + 1) * self._count, len(self._rows)), dtype=np.int64)
            parts = list(self._rows.at(positions))
            values = {column: self._joined([part.columns[column] for part in parts]) for column in self.columns}
            yield values, parts[0].line

    def content_hash(self) -> str:
        """Return a SHA-256 of the rows and of how they are joined."""
        return hashlib.sha256(json.dumps([self._rows.fingerprint, self._count, self._separator]).encode()).hexdigest()

    def _joined(self, values: list[object]) -> object:
        if any(value is None or value != value for value in values):
            return None
        if not all(isinstance(value, str | int | float) for value in values):
            return values
        written = (self.truth_words[value] if isinstance(value, bool) else str(value) for value in values)
        return self._separator.join(written)
