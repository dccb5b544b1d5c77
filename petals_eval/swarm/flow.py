"""How much work one server should have in flight, found out from how it answers. Pure bookkeeping, no I/O.

A window that is too small leaves the link or the server idle between two calls; one that is too large only makes them
wait in a volunteer's queue. So, as TCP BBR does (Cardwell et al., "BBR: congestion-based congestion control", 2016):
what a server delivers at its best, times what a call takes when nothing is in its way, is what keeps it busy; a small
multiple of it is sent. Where more in flight delivers more, the rate grows and the window with it; where it only makes
answers come later, the rate stays, and so does the window.

Work is counted in tokens times blocks: a server may be asked for a part of its span.
"""

from collections import deque
from dataclasses import dataclass

__all__ = ["LEAST_CALLS", "MOST_TOKENS", "Flow", "Sent"]

MOST_TOKENS = 16_384
"""Tokens in flight at one server at most, whatever it could take: it is somebody's machine, and others use it too."""
LEAST_CALLS = 3
"""Calls in flight that a server always may have: one that it computes, one each on its way there and back."""
GAIN = 2.0
"""Times rate and quickest time: the second half covers what comes back in bunches, and lets the rate grow."""
MEMORY = 10.0
"""Seconds that the best rate and the quickest time are believed. Then a few calls go with nothing before them, to see
how quick it is now: with a queue of our own making in front, each seems to take longer, and asks for a longer queue."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A call on its way: what had come back, and since when, as it left."""

    work: float
    at: float
    delivered: float
    delivered_at: float
    alone: bool


class Flow:
    """One server's window. Times are seconds on one clock."""

    def __init__(self) -> None:
        self.in_flight = 0.0
        self._delivered = 0.0
        self._delivered_at = 0.0
        self._rates: deque[tuple[float, float]] = deque()  # (when, work per second), falling
        self._quickest: float | None = None
        self._quickest_at = 0.0
        self._probing = False
        self._largest = 0.0  # work of one call, fading

    @property
    def rate(self) -> float | None:
        """Work per second, the best of late; None before the first answer."""
        return self._rates[0][1] if self._rates else None

    @property
    def quickest(self) -> float:
        """Seconds of the quickest call of late: the way there and back, and its own work."""
        return self._quickest or 0.0

    def limit(self, blocks: int) -> float:
        """Work that may be in flight, for calls of so many blocks."""
        least = LEAST_CALLS * self._largest
        best = 0.0 if self.rate is None or self._probing else GAIN * self.rate * self.quickest
        return max(least, min(best, float(MOST_TOKENS * blocks)))

    def has_room(self, work: float, blocks: int) -> bool:
        """Whether to send this now. A server with nothing in flight takes anything."""
        return self.in_flight == 0 or self.in_flight + work <= max(self.limit(blocks), LEAST_CALLS * work)

    def seconds_for(self, work: float, unmeasured: float) -> float:
        """When the answer to this would come: after what is in flight, and as long as a call takes at least.

        unmeasured: seconds per work of a server that has not answered yet.
        """
        slowness = unmeasured if self.rate is None else 1 / self.rate
        return self.quickest + (self.in_flight + work) * slowness

    def send(self, work: float, now: float) -> Sent:
        """Count it as in flight; give what this returns to `came_back` or to `lost`."""
        if self.in_flight == 0:
            self._delivered_at = now  # an idle server delivers nothing, through no fault of its own
        self.in_flight += work
        alone = self.in_flight <= max(LEAST_CALLS * self._largest, work)
        return Sent(work, now, self._delivered, self._delivered_at, alone)

    def lost(self, sent: Sent) -> None:
        """It will not come back."""
        self.in_flight = max(0.0, self.in_flight - sent.work)

    def slowed_down(self) -> None:
        """What was measured holds no more: a call took far longer than it lets expect. Believe a third of the rate."""
        if self._rates:
            when, rate = self._rates[-1]
            self._rates.clear()
            self._rates.append((when, rate / 3))

    def came_back(self, sent: Sent, now: float, *, timed: bool = True) -> None:
        """timed: whether the time it took says how quick the server is, and not only how much it delivers."""
        self.lost(sent)
        self._delivered += sent.work
        self._delivered_at = now
        # Over the time this call was out: shorter ones would take a bunch of answers for a high rate.
        rate = (self._delivered - sent.delivered) / max(1e-6, now - min(sent.at, sent.delivered_at))
        _keep(self._rates, now, rate)
        took = now - sent.at
        if not timed:
            pass
        elif self._quickest is None or took <= self._quickest or (self._probing and sent.alone):
            self._quickest, self._quickest_at, self._probing = took, now, False
        elif now - self._quickest_at > MEMORY:
            self._probing = True
        self._largest = max(sent.work, 0.95 * self._largest)


def _keep(values: deque[tuple[float, float]], now: float, value: float) -> None:
    """Add to a sliding maximum: the first entry is the highest of the last `MEMORY` seconds."""
    while values and values[-1][1] <= value:
        values.pop()
    values.append((now, value))
    while values[0][0] < now - MEMORY:
        values.popleft()
