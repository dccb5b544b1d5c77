"""Rows as a function makes them out of other rows, one by one as they are read."""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from petals_eval.data.rows import Row, Rows
from petals_eval.errors import DataError
from petals_eval.validation import shorten

if TYPE_CHECKING:
    import numpy as np

__all__ = ["PreparedRows", "RowFunction"]

RowFunction = Callable[[dict[str, object]], Mapping[str, object]]
"""Makes the columns of a row out of those that its source has. It is called more than once for a row."""


class PreparedRows(Rows):
    """What a function makes of rows. Each keeps its place in the source; the columns are those of the first one.

    What the source knows of a column, such as the names of its classes, holds for a column of that name here.
    The fingerprint is that of the rows before: whoever compares runs compares the function, too.
    """

    def __init__(self, rows: Rows, function: RowFunction, function_name: str, columns: tuple[str, ...] | None = None):
        """`columns`: None reads the first row. Raises DataError as iterating does."""
        self._rows = rows
        self._function = function
        self._function_name = function_name
        self.name = rows.name
        self.class_names = rows.class_names
        self.truth_words = rows.truth_words
        self.notes = rows.notes
        self.passed = set()
        self.columns = columns if columns is not None else tuple(self._made(next(iter(rows))).columns)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        """Yield the rows. Raises DataError where the function fails on one, or returns something else than a row with
        the columns of the first one."""
        for row in self._rows:
            made = self._made(row)
            if set(made.columns) != set(self.columns):
                raise DataError(
                    f"{self.where(row)}: {self._function_name} made the columns {', '.join(made.columns)}, but of the "
                    f"first row {', '.join(self.columns)}. Let it give every row the same columns."
                )
            yield made

    @cached_property
    def fingerprint(self) -> str:
        return self._rows.fingerprint

    def at(self, positions: "np.ndarray") -> "PreparedRows":
        chosen = PreparedRows(self._rows.at(positions), self._function, self._function_name, self.columns)
        chosen.passed |= self.passed
        return chosen

    def _made(self, row: Row) -> Row:
        try:
            made = self._function(dict(row.columns))
        except Exception as error:
            if isinstance(error, KeyError) and error.args and error.args[0] not in row.columns:
                raise DataError(
                    f"{self.where(row)} has no column {error.args[0]}, which {self._function_name} reads. "
                    f"Columns found: {', '.join(row.columns)}."
                ) from error
            raise DataError(
                f"{self.where(row)}: {self._function_name} fails on it: {type(error).__name__}: {error}. "
                "Mend the function, or remove the row."
            ) from error
        if not isinstance(made, Mapping) or not made or not all(isinstance(name, str) for name in made):
            raise DataError(
                f"{self.where(row)}: {self._function_name} should return a mapping of column names to values, found "
                f"{shorten(made)}."
            )
        return Row(row.index, dict(made), row.line)
