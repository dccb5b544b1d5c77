"""What the journal holds, row by row and summed up."""

import struct
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from petals_eval.metrics.scored_rows import ScoredRows
from petals_eval.runs.manifest import ServerUsed
from petals_eval.tasks.requests import Label, Values

__all__ = ["Counts", "Failure", "KeyedRows", "Row", "packed", "unpacked"]


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
