"""Micro-batches: requests of similar length under a token budget, padded on the right."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    import torch

__all__ = ["HasTokens", "MicroBatch", "micro_batches"]


class HasTokens(Protocol):
    """Anything with tokens to compute."""

    @property
    def input_ids(self) -> tuple[int, ...]: ...


R = TypeVar("R", bound=HasTokens)


@dataclass(frozen=True, eq=False)
class MicroBatch(Generic[R]):
    """Requests computed together.

    requests: (batch,) in the order of the rows of `input_ids`.
    input_ids: int64 (batch, seq), padded on the right: under a causal mask what is right of a token cannot change it.
    lengths: (batch,) real tokens of each row; whoever pools uses these, never a search for the padding.
    """

    requests: tuple[R, ...]
    input_ids: torch.Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, requests: Iterable[R]) -> MicroBatch[R]:
        """Pad `requests` on the right to the longest of them. There must be at least one."""
        import torch  # here, because it takes seconds to import and listing tasks needs none of it

        requests = tuple(requests)
        lengths = tuple(len(request.input_ids) for request in requests)
        input_ids = torch.zeros(len(requests), max(lengths), dtype=torch.int64)
        for row, request in enumerate(requests):
            input_ids[row, : lengths[row]] = torch.tensor(request.input_ids, dtype=torch.int64)
        return cls(requests, input_ids, lengths)


def micro_batches(
    requests: Iterable[R], *, max_tokens: int, prefix: int = 0, max_rows: int = 64, lookahead: int = 2048
) -> Iterator[MicroBatch[R]]:
    """Group a stream of requests by length.

    max_tokens: a micro-batch holds at most this many positions, rows x (prefix + longest); a single row may exceed it.
    prefix: tuned prompt tokens in front of every row; they travel with it.
    max_rows: rows per micro-batch at most.
    lookahead: requests held back to find others of similar length. Memory is bounded by it, not by the data set.

    Yields the longest of each window first: a size no server takes shows at once, and the time left only gets better.
    """
    window: list[R] = []
    for request in requests:
        window.append(request)
        if len(window) >= lookahead:
            yield from _by_length(window, max_tokens, prefix, max_rows)
            window = []
    yield from _by_length(window, max_tokens, prefix, max_rows)


def _by_length(window: list[R], max_tokens: int, prefix: int, max_rows: int) -> Iterator[MicroBatch[R]]:
    ordered = sorted(window, key=lambda request: len(request.input_ids), reverse=True)
    start = 0
    while start < len(ordered):
        longest = prefix + len(ordered[start].input_ids)
        rows = max(1, min(max_rows, max_tokens // longest))
        yield MicroBatch.of(ordered[start : start + rows])
        start += rows
