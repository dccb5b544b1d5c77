"""What rows have in common at their beginning, found in their tokens, and micro-batches that go by it.

All rows of a run may begin with the same text (few-shot examples, an instruction), and the requests of one example with
the same context (its choices come after it). Servers can keep both (`petals_eval.swarm.lanes`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

from petals_eval.data.batching import MicroBatch, Shared, look_ahead, micro_batches

__all__ = ["HasKey", "prefixed_batches"]


class HasKey(Protocol):
    """Tokens to compute, of an example that may have others."""

    @property
    def input_ids(self) -> tuple[int, ...]: ...

    @property
    def key(self) -> str: ...


R = TypeVar("R", bound=HasKey)


def prefixed_batches(
    requests: Iterable[R],
    *,
    max_tokens: int | Callable[[], int],
    lane_rows: Callable[[int], int],
    asked_from: Callable[[R], int],
    prefix: int = 0,
    boundary: int | None = None,
) -> Iterator[MicroBatch[R]]:
    """Group a stream of requests by what they have in common, and where that is nothing, by length.

    max_tokens, prefix, boundary: as `micro_batches` has them. lane_rows: rows of a micro-batch whose longest row has so
    many positions, prefix included. asked_from: the first position of a request whose answer is wanted: what is shared
    ends before it.
    """
    common: tuple[int, ...] = ()
    for window in look_ahead(requests):
        alike = [each for each in window if boundary is None or prefix + len(each.input_ids) <= boundary]
        common = _common(alike, asked_from, common)
        shorter = [each for each in alike if asked_from(each) >= len(common) and _begins(each, common)]
        if prefix or common or len({each.key for each in shorter}) < len(shorter):
            kept = {id(each) for each in shorter}
            yield from _sharing(shorter, common, lane_rows, asked_from, prefix)
            window = [each for each in window if id(each) not in kept]
        yield from micro_batches(window, max_tokens=max_tokens, prefix=prefix, boundary=boundary)


def _begins(request: HasKey, tokens: Sequence[int]) -> bool:
    return request.input_ids[: len(tokens)] == tuple(tokens)


def _common(requests: Sequence[R], asked_from: Callable[[R], int], before: tuple[int, ...]) -> tuple[int, ...]:
    """Return the tokens that are worth most as the beginning of all: how many they are, times the rows that begin so,
    which must be a quarter of all.

    before: those of the rows before these, which servers hold already; another beginning must be worth more by half.
    """
    if not requests:
        return before
    ordered = sorted(each.input_ids for each in requests)
    middle = ordered[len(ordered) // 2]  # where most rows begin alike, this one does
    lengths = sorted((min(_alike(each.input_ids, middle), asked_from(each)) for each in requests), reverse=True)
    least = max(2, len(requests) // 4)
    worths = [(length * rows, length) for rows, length in enumerate(lengths, 1) if rows >= least]
    worth, length = max(worths, default=(0, 0))
    of_before = sum(_begins(each, before) and asked_from(each) >= len(before) for each in requests) * len(before)
    return before if 1.5 * of_before > worth else middle[:length]


def _alike(first: Sequence[int], second: Sequence[int]) -> int:
    """Return with how many tokens both begin."""
    length = min(len(first), len(second))
    return next((at for at in range(length) if first[at] != second[at]), length)


def _sharing(
    requests: Sequence[R],
    common: tuple[int, ...],
    lane_rows: Callable[[int], int],
    asked_from: Callable[[R], int],
    prefix: int,
) -> Iterator[MicroBatch[R]]:
    """Yield micro-batches of requests that all begin with the common tokens."""
    if not requests:
        return
    longest = max(len(each.input_ids) for each in requests)
    rows = lane_rows(prefix + longest)
    by_key: dict[str, list[R]] = {}
    for request in requests:
        by_key.setdefault(request.key, []).append(request)
    families: dict[int, list[tuple[int, list[R]]]] = {}  # by how many requests they have
    alone: list[R] = []
    for family in by_key.values():
        first = family[0].input_ids
        context = min(min(_alike(each.input_ids, first), asked_from(each)) for each in family) - len(common)
        if len(family) > 1 and context > 0:
            families.setdefault(len(family), []).append((context, family))
        else:
            alone.extend(family)
    for count, several in families.items():
        several.sort(key=lambda each: each[0], reverse=True)  # rows whose contexts are of like length
        for start in range(0, len(several), rows):
            together = several[start : start + rows]
            context = min(length for length, _ in together)
            shared = Shared(common, context, rows, longest)
            for part in range(count):
                yield MicroBatch.of([family[part] for _, family in together], shared)
    alone.sort(key=lambda each: len(each.input_ids), reverse=True)
    of_all = Shared(common, 0, rows, longest)
    for start in range(0, len(alone), rows):
        yield MicroBatch.of(alone[start : start + rows], of_all)
