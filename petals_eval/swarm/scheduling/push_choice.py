"""Whether to let servers push, found out from what comes back. Pure bookkeeping, no I/O.

Pushing saves the client's uplink: every hidden state leaves home once and not once a hop. It costs sessions, one a hop
and micro-batch, and room in the servers' caches. So it pays where the uplink is what everything waits for, which no
single server's answers show. Hence trials, as with the size of micro-batches (`petals_eval.swarm.scheduling.tuning`):
the other way is tried for an epoch now and then, and kept where it brings clearly more.
"""

from collections import Counter
from typing import Literal

__all__ = ["PushChoice"]

BETTER = 1.15
"""The other way must be so many times as fast."""
EPOCH_SECONDS, EPOCH_MICRO_BATCHES = 3.0, 10
"""What one way is measured over."""
LONGEST_EPOCH = 10.0
"""Seconds after which a trial is judged however few have come back, and that it waits at most for those that were on
their way when it began: these still take the uplink from it."""
FIRST_REST, LONGEST_REST = 3, 64
"""Epochs before a trial: what short runs never come to. Twice as many after each trial that brought nothing."""


class PushChoice:
    """is_on: whether to push now. is_on_trial: whether that is only being tried."""

    def __init__(self, setting: Literal["auto", "always", "never"] = "auto"):
        self.is_on = setting == "always"
        self.is_on_trial = False
        self._is_fixed = setting != "auto"
        self._rate = 0.0  # positions per second of the way in use
        self._rest, self._next_rest = FIRST_REST, 2 * FIRST_REST
        self._since: float | None = None
        self._changed_at: float | None = None
        self._positions = self._micro_batches = 0
        self._in_flight: Counter[bool] = Counter()  # by whether they were to be pushed

    def sent(self) -> bool:
        """Count a micro-batch that could go either way; returns whether to push it. `ended` when it is on no way."""
        self._in_flight[self.is_on] += 1
        return self.is_on

    def ended(self, pushed: bool) -> None:
        self._in_flight[pushed] -= 1

    def came_back(self, pushed: bool, positions: int, now: float) -> None:
        """A micro-batch with so many positions, on a route that could have gone either way, is back.

        pushed: whether it was to be pushed, even where that failed.
        """
        if self._is_fixed or pushed != self.is_on:
            return  # sent before the change
        if self._since is None:
            self._changed_at = now if self._changed_at is None else self._changed_at
            if not self._in_flight[not pushed] or now - self._changed_at >= LONGEST_EPOCH:
                self._since = now  # what came before it was not of this way alone
            return
        self._positions += positions
        self._micro_batches += 1
        took = now - self._since
        is_over = took >= EPOCH_SECONDS and self._micro_batches >= EPOCH_MICRO_BATCHES
        if is_over or (self.is_on_trial and took >= LONGEST_EPOCH):
            self._judge(self._positions / took)

    def failed(self) -> None:
        """The route did not push. Not again for a while, and longer each time."""
        if not self._is_fixed and self.is_on:
            self._go(False, self._next_rest)

    def pause(self) -> None:
        """What comes back from now on is not to be compared with what came before."""
        self._since = self._changed_at = None
        self._positions = self._micro_batches = 0

    def _judge(self, rate: float) -> None:
        if not self.is_on_trial:
            self._rate = rate
            self._rest -= 1
            self.pause()
            if self._rest <= 0:
                self.is_on, self.is_on_trial = not self.is_on, True
        elif rate > BETTER * self._rate:
            self._rate, self._next_rest = rate, 2 * FIRST_REST
            self._go(self.is_on, self._next_rest)
        else:
            self._go(not self.is_on, self._next_rest)

    def _go(self, on: bool, rest: int) -> None:
        """This way from now on, and no trial for `rest` epochs."""
        self.is_on, self.is_on_trial = on, False
        self._rest, self._next_rest = rest, min(2 * rest, LONGEST_REST)
        self.pause()
