"""What the journal holds, row by row and summed up."""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from petals_eval.metrics.scored_rows import ScoredRows
from petals_eval.runs.manifest import ServerUsed
from petals_eval.tasks.requests import Label, Prediction, Values

__all__ = ["ComputedRows", "Counts", "Failure", "KeyedRows", "Row", "packed", "unpacked"]


@dataclass(frozen=True, slots=True)
class Counts:
    """Counts of one adapter's valid rows. truncated and n_tokens (text tokens) are those of the scored examples."""

    scored: int
    failed: int
    truncated: int
    n_tokens: int


@dataclass(frozen=True, slots=True)
class Failure:
    """An example that could not be computed. It is never counted as a wrong answer."""

    key: str
    label: Label
    reason: str
    row_hash: str = ""


@dataclass(frozen=True, eq=False)
class KeyedRows:
    """Scored rows with what tells them apart.

    keys: of the examples. hashes: of what their rows say; an empty text where nobody noted it. rows: in the same order.
    """

    keys: tuple[str, ...]
    hashes: tuple[str, ...]
    rows: ScoredRows

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def of(cls, predictions: Sequence[Prediction], columns: Sequence[str]) -> "KeyedRows":
        """Return predictions as rows. columns: of their values."""
        rows = ((each.label, each.prediction, packed(each.values)) for each in predictions)
        keys = tuple(each.key for each in predictions)
        return cls(keys, tuple(each.row_hash for each in predictions), ScoredRows.of(rows, columns))


@dataclass(frozen=True, eq=False)
class ComputedRows:
    """How n scored rows were computed, in source order.

    n_tokens: of their texts, int64 (n,). is_truncated: whether text was cut, (n,). servers: which rows each of them
    computed a part of, (n,).
    """

    n_tokens: NDArray[np.int64]
    is_truncated: NDArray[np.bool_]
    servers: Mapping[ServerUsed, NDArray[np.bool_]]


class Row(NamedTuple):
    """A row as it waits for its commit, by the names of its columns; adapter and servers have no number yet.

    Floats are little-endian float64: what comes back is what went in.
    """

    adapter: str
    server_set: tuple[ServerUsed, ...]
    key: str
    row_hash: str
    kind: str
    status: str
    label: Label
    prediction: float | None
    answer: bytes | None
    n_requests: int
    n_tokens: int
    truncated: bool
    reason: str | None
    time: float


def packed(values: Values) -> bytes:
    flat = [value for item in values for value in item]
    return struct.pack(f"<{len(flat)}d", *flat)


def unpacked(blob: bytes, columns: int) -> Values:
    """Return the values under so many columns."""
    return tuple(map(tuple, np.frombuffer(blob, dtype="<f8").reshape(-1, columns).tolist()))
