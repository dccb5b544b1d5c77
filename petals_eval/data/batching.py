"""Micro-batches: requests of similar length under a token budget, padded on the right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    import torch

__all__ = ["HasTokens", "MicroBatch", "Shared", "look_ahead", "micro_batches"]


class HasTokens(Protocol):
    """Anything with tokens to compute."""

    @property
    def input_ids(self) -> tuple[int, ...]: ...


R = TypeVar("R", bound=HasTokens)


@dataclass(frozen=True, eq=False)
class Shared:
    """What the rows of a micro-batch have in common with those of others.

    common: tokens with which the rows of all of them begin. context: tokens after these that each row has in common
        with the same row of every micro-batch that has this very object.
    rows, longest: rows that a micro-batch has at most, and tokens that a row has.
    """

    common: tuple[int, ...]
    context: int
    rows: int
    longest: int

    @property
    def length(self) -> int:
        """Tokens of each row that are shared."""
        return len(self.common) + self.context


@dataclass(frozen=True, eq=False)
class MicroBatch(Generic[R]):
    """Requests computed together.

    requests: (batch,) in the order of the rows of `input_ids`.
    input_ids: int64 (batch, seq), padded on the right: under a causal mask what is right of a token cannot change it.
    lengths: (batch,) real tokens of each row; whoever pools uses these, never a search for the padding.
    shared: what its rows begin with, if that is computed apart: its answers are those of the positions after it alone.
    """

    requests: tuple[R, ...]
    input_ids: torch.Tensor
    lengths: tuple[int, ...]
    shared: Shared | None = None

    @classmethod
    def of(cls, requests: Iterable[R], shared: Shared | None = None) -> MicroBatch[R]:
        """Pad `requests` on the right to the longest of them. There must be at least one."""
        import torch  # here, because it takes seconds to import and listing tasks needs none of it

        requests = tuple(requests)
        lengths = tuple(len(request.input_ids) for request in requests)
        longest = max(lengths)
        padded = [[*request.input_ids, *(0,) * (longest - len(request.input_ids))] for request in requests]
        return cls(requests, torch.tensor(padded, dtype=torch.int64, device="cpu"), lengths, shared)


def micro_batches(
    requests: Iterable[R],
    *,
    max_tokens: int | Callable[[], int],
    prefix: int = 0,
    boundary: int | None = None,
    max_rows: int = 128,
    lookahead: int = 2048,
    tokens_ahead: int = 1 << 18,
) -> Iterator[MicroBatch[R]]:
    """Group a stream of requests by length.

    max_tokens: a micro-batch holds at most this many positions, rows x (prefix + longest); a single row may exceed it.
        A function is asked for each micro-batch anew.
    prefix: tuned prompt tokens in front of every row; they travel with it.
    boundary: rows of up to so many positions, prefix included, never share a micro-batch with longer ones; None: all
        may.
    max_rows: rows per micro-batch at most.
    lookahead, tokens_ahead: as `look_ahead` has them.

    Yields the longest of each window first: a size no server takes shows at once, and the time left only gets better.
    """
    for window in look_ahead(requests, lookahead, tokens_ahead):
        yield from _by_length(window, max_tokens, prefix, boundary, max_rows)


def look_ahead(requests: Iterable[R], lookahead: int = 2048, tokens_ahead: int = 1 << 18) -> Iterator[list[R]]:
    """Yield requests some at a time, to be put together.

    lookahead: requests held back to find others that are alike, as long as they have no more than `tokens_ahead` tokens
        together; a tenth of both at first, so that the first need not wait for the rest to be made. Memory is bounded
        by them, not by the data set: a request with a target at every token takes some 130 bytes for each.
    """
    window: list[R] = []
    wanted, most_tokens, held = max(1, lookahead // 10), tokens_ahead // 10, 0
    for request in requests:
        window.append(request)
        held += len(request.input_ids)
        if len(window) >= wanted or held >= most_tokens:
            yield window
            window, wanted, most_tokens, held = [], lookahead, tokens_ahead, 0
    if window:
        yield window


def _by_length(
    window: list[R], max_tokens: int | Callable[[], int], prefix: int, boundary: int | None, max_rows: int
) -> Iterator[MicroBatch[R]]:
    ordered = sorted(window, key=lambda request: len(request.input_ids), reverse=True)
    beyond = 0 if boundary is None else sum(prefix + len(request.input_ids) > boundary for request in ordered)
    for alike in (ordered[:beyond], ordered[beyond:]):
        start = 0
        while start < len(alike):
            longest = prefix + len(alike[start].input_ids)
            budget = max_tokens if isinstance(max_tokens, int) else max_tokens()
            rows = max(1, min(max_rows, budget // longest))
            yield MicroBatch.of(alike[start : start + rows])
            start += rows
