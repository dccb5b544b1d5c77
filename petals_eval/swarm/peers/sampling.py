"""Which answers of a server are computed again, and how likely that catches one that corrupts some. No I/O."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Sampler", "catch_probability"]

T = TypeVar("T")


def catch_probability(p: float, n: int, share: float) -> float:
    """Return the probability that a server is caught that corrupts each of its n micro-batches with probability p.

    share: of its micro-batches that is checked, as `SwarmSettings.verify`.

    One of the first two micro-batches is checked, each of the others with probability `share`, and where that comes to
    none, one of them at the end of the run. A corrupted one that is checked is caught. With s = share, m = n - 1:

        not caught = (1 - p) ((1 - s p)^m - p (1 - s)^m)     for n > 1;    1 - p for n = 1

    A server that is also asked to check others can be caught there, too; that comes on top.

    >>> round(catch_probability(1.0, 2, 0.02), 3), round(catch_probability(0.01, 1, 0.02), 3)
    (1.0, 0.01)
    >>> [round(catch_probability(0.1, n, 0.02), 2) for n in (2, 10, 100, 1000, 3000)]
    [0.19, 0.19, 0.27, 0.88, 1.0]
    """
    if n < 1:
        return 0.0
    others = n - 1
    missed = 1 - p if not others else (1 - p) * ((1 - share * p) ** others - p * (1 - share) ** others)
    return 1 - missed


@dataclass(slots=True)
class _Counts:
    """Answers seen, chosen, and left while fewer than two were chosen."""

    seen: int = 0
    chosen: int = 0
    left: int = 0


class Sampler(Generic[T]):
    """Chooses among the answers of one server, and keeps one of those it did not choose until two are chosen.

    A server cannot know which ones: the first choice is one of its first two, and the draws are ours.
    """

    MINIMUM = 2

    def __init__(self, share: float, draws: random.Random):
        self._share = share
        self._draws = draws
        self._first_at = draws.choice((1, 2))
        self._counts = _Counts()
        self._kept: T | None = None

    def chooses(self, item: T, is_possible: Callable[[], bool] = lambda: True) -> bool:
        """Return whether to check this one. is_possible: whether anybody could; if not, the next one takes its turn."""
        counts = self._counts
        counts.seen += 1
        is_due = counts.chosen == 0 and counts.seen >= self._first_at
        if (is_due or self._draws.random() < self._share) and is_possible():
            counts.chosen += 1
            if counts.chosen >= self.MINIMUM:
                self._kept = None
            return True
        if counts.chosen < self.MINIMUM:
            counts.left += 1
            if self._draws.random() * counts.left < 1:  # each of those left is the one kept with the same probability
                self._kept = item
        return False

    def on_failed(self) -> None:
        """Let another one take the place of a check that could not be done."""
        self._counts.chosen -= 1

    def last_choice(self) -> T | None:
        """Return what is still to be checked at the end, so that it is two where there were two; None: nothing."""
        item, self._kept = self._kept, None
        if item is None or self._counts.chosen >= self.MINIMUM:
            return None
        self._counts.chosen += 1
        return item
