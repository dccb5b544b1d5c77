"""A span: consecutive blocks of a model, as servers are started with them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Span", "common_spans", "joined", "spans_text"]


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Blocks start to stop of a model, counted from 0; stop is exclusive, as in a slice.

    >>> str(Span(2, 5)), len(Span(2, 5)), 4 in Span(2, 5), 5 in Span(2, 5)
    ('2:5', 3, True, False)
    """

    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}"

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __contains__(self, block: int) -> bool:
        return self.start <= block < self.stop

    def within(self, other: "Span") -> bool:
        """Whether `other` has all of these blocks."""
        return other.start <= self.start and self.stop <= other.stop

    def overlaps(self, other: "Span") -> bool:
        """Whether both have a block."""
        return self.start < other.stop and other.start < self.stop

    def common(self, other: "Span") -> "Span | None":
        """The blocks that both have, or None where there are none.

        >>> str(Span(0, 3).common(Span(2, 5))), Span(0, 2).common(Span(2, 5))
        ('2:3', None)
        """
        start, stop = max(self.start, other.start), min(self.stop, other.stop)
        return Span(start, stop) if start < stop else None

    @classmethod
    def parse(cls, text: str) -> "Span":
        """Read START:STOP as people write it. Raises ValueError for anything else, and for a span without blocks.

        >>> Span.parse("0:3")
        Span(start=0, stop=3)
        """
        found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
        if found is None or not int(found[1]) < int(found[2]):
            raise ValueError("expected blocks START:STOP such as 0:3, the last one not among them")
        return cls(int(found[1]), int(found[2]))


def joined(blocks: Iterable[int]) -> tuple[Span, ...]:
    """Blocks, in ascending order, as the fewest spans.

    >>> [str(span) for span in joined([0, 1, 4, 5, 6])]
    ['0:2', '4:7']
    """
    spans: list[Span] = []
    for block in blocks:
        if spans and spans[-1].stop == block:
            spans[-1] = Span(spans[-1].start, block + 1)
        else:
            spans.append(Span(block, block + 1))
    return tuple(spans)


def spans_text(spans: Iterable[Span]) -> str:
    """Spans for a person.

    >>> spans_text([Span(0, 2), Span(4, 7)])
    '0:2 4:7'
    """
    return " ".join(map(str, spans))


def common_spans(spans: Iterable[Span], span: Span) -> tuple[Span, ...]:
    """Return what of the spans lies within another one.

    >>> [str(each) for each in common_spans([Span(0, 2), Span(5, 8)], Span(1, 6))]
    ['1:2', '5:6']
    """
    return tuple(common for each in spans if (common := each.common(span)) is not None)
