"""Which answers of a server are computed again. How likely that catches one that corrupts some says
`petals_eval.swarm.trust.audit.catch_probability`. No I/O."""

import random
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Sampler"]

T = TypeVar("T")


class Sampler(Generic[T]):
    """Chooses among the answers of one server, and keeps one of those it did not choose until two are chosen.

    A server cannot know which ones: the first choice is one of its first two, and the draws are ours.
    """

    MINIMUM = 2

    def __init__(self, share: float, draws: random.Random):
        self._share = share
        self._draws = draws
        self._first_at = draws.choice((1, 2))
        self._seen = self._chosen = self._left = 0  # left: while fewer than two were chosen
        self._kept: T | None = None

    @property
    def keeps(self) -> bool:
        """Whether it may keep an answer that it does not choose."""
        return self._chosen < self.MINIMUM

    def chooses(self, item: T, is_possible: Callable[[], bool] = lambda: True) -> bool:
        """Return whether to check this one. is_possible: whether anybody could; if not, the next one takes its turn."""
        self._seen += 1
        is_due = self._chosen == 0 and self._seen >= self._first_at
        if (is_due or self._draws.random() < self._share) and is_possible():
            self._chosen += 1
            if self._chosen >= self.MINIMUM:
                self._kept = None
            return True
        if self._chosen < self.MINIMUM:
            self._left += 1
            if self._draws.random() * self._left < 1:  # each of those left is the one kept with the same probability
                self._kept = item
        return False

    def on_failed(self) -> None:
        """Let another one take the place of a check that could not be done."""
        self._chosen -= 1

    def last_choice(self) -> T | None:
        """Return what is still to be checked at the end, so that it is two where there were two; None: nothing."""
        item, self._kept = self._kept, None
        if item is None or self._chosen >= self.MINIMUM:
            return None
        self._chosen += 1
        return item
