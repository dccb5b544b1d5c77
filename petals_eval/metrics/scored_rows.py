"""What was scored of one kind of task, as arrays: what every metric is computed from."""

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from petals_eval.errors import DataError

__all__ = ["CLUSTER", "ScoredRows"]

CLUSTER = "cluster"
"""The column of values that says which rows may depend on each other, the same in all items of a row."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ScoredRows:
    """n examples that were scored, in source order.

    labels: float64 (n,), NaN where nobody says what is right. predictions: float64 (n,), NaN where the kind has none.
    values: float64 (items, columns), the items of one example after those of the one before: a score for each label, a
        likelihood for each choice, or one item.
    starts: int64 (n + 1,); example i has the items starts[i] to starts[i + 1], the latter excluded.
    columns: the names of the values' columns.
    """

    labels: Floats
    predictions: Floats
    values: Floats
    starts: NDArray[np.int64]
    columns: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def of(cls, rows: Iterable[tuple[float | None, float | None, bytes]], columns: Sequence[str]) -> "ScoredRows":
        """Return arrays of rows (label, prediction, little-endian float64 values as bytes).

        Raises DataError for values that are not whole items of the columns.
        """
        labels, predictions, stops = array("d"), array("d"), array("q", [0])
        blobs = bytearray()
        width = 8 * len(columns)
        for label, prediction, blob in rows:
            if not blob or len(blob) % width:
                raise DataError(
                    f"row {len(labels)} holds {len(blob)} bytes of values; expected a multiple of {width}, for the "
                    f"columns {', '.join(columns)}."
                )
            labels.append(math.nan if label is None else label)
            predictions.append(math.nan if prediction is None else prediction)
            blobs += blob
            stops.append(len(blobs) // width)
        return cls(
            labels=np.asarray(labels),
            predictions=np.asarray(predictions),
            values=np.frombuffer(blobs, dtype="<f8").reshape(-1, len(columns)),
            starts=np.asarray(stops),
            columns=tuple(columns),
        )

    @property
    def items(self) -> NDArray[np.int64]:
        """How many items each example has, int64 (n,)."""
        return np.diff(self.starts)

    @property
    def is_labelled(self) -> NDArray[np.bool_]:
        """Whether it is known of each example what is right, (n,)."""
        return ~np.isnan(self.labels)

    @property
    def clusters(self) -> NDArray[np.int64] | None:
        """Which cluster each example is of, int64 (n,) from 0; None where the task has none."""
        if CLUSTER not in self.columns:
            return None
        return np.unique(self.column(CLUSTER)[self.starts[:-1]], return_inverse=True)[1].reshape(-1)

    def column(self, name: str) -> Floats:
        """Return one column of all items, (items,). Raises DataError where there is none."""
        if name not in self.columns:
            raise DataError(f"these rows have no values for {name}; they have {', '.join(self.columns)}.")
        return self.values[:, self.columns.index(name)]

    def chosen(self, keep: NDArray[np.bool_]) -> "ScoredRows":
        """Return the examples that are marked, (n,)."""
        if keep.all():
            return self
        counts = self.items[keep]
        starts = np.concatenate([[0], np.cumsum(counts)])
        values = self.values[np.repeat(keep, self.items)]
        return ScoredRows(self.labels[keep], self.predictions[keep], values, starts, self.columns)

    def at(self, positions: NDArray[np.int64]) -> "ScoredRows":
        """Return the examples at these positions, in their order."""
        counts = self.items[positions]
        starts = np.concatenate([[0], np.cumsum(counts)])
        items = np.repeat(self.starts[positions] - starts[:-1], counts) + np.arange(starts[-1])
        return ScoredRows(self.labels[positions], self.predictions[positions], self.values[items], starts, self.columns)

    def labelled(self) -> "ScoredRows":
        """Return the examples of which it is known what is right."""
        return self.chosen(self.is_labelled)
