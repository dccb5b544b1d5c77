"""What the journal holds, row by row and summed up."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from petals_eval.runs.manifest import ServerUsed

__all__ = ["Counts", "Failure", "Row", "ScoredArrays", "packed", "unpacked"]


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
    label: int
    reason: str


@dataclass(frozen=True, eq=False)
class ScoredArrays:
    """One adapter's scored examples in source order.

    labels, predictions: int64 (n,). probabilities: float64 (n, labels).
    """

    labels: NDArray[np.int64]
    predictions: NDArray[np.int64]
    probabilities: NDArray[np.float64]


class Row(NamedTuple):
    """A row as it waits for its commit, by the names of its columns; adapter and servers have no number yet.

    Floats are little-endian float64: what comes back is what went in.
    """

    adapter: str
    server_set: tuple[ServerUsed, ...]
    key: str
    status: str
    label: int
    prediction: int | None
    scores: bytes | None
    probabilities: bytes | None
    n_tokens: int
    truncated: bool
    reason: str | None
    time: float


def packed(values: Sequence[float]) -> bytes:
    return struct.pack(f"<{len(values)}d", *values)


def unpacked(blob: bytes) -> tuple[float, ...]:
    return tuple(np.frombuffer(blob, dtype="<f8").tolist())
