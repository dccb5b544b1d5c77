"""How much work one server should have in flight, found out from how it answers. Pure bookkeeping, no I/O.

A window that is too small leaves the link or the server idle between two calls; one that is too large only makes them
wait in a volunteer's queue, and holds up all that share the link. So, as TCP BBR does (Cardwell et al., "BBR:
congestion-based congestion control", 2016): what a server delivers at its best, times how far away it is, is what is on
its way there and back; a small multiple of it is sent, and a few calls that it computes and unpacks meanwhile. Where
more in flight delivers more, the rate grows and the window with it; where it only makes answers come later, the rate
stays, and so does the window.

How far away it is cannot be told from these calls alone: each has others before it on the link and in the server, and
a window made from what they take asks for a longer one. A small question tells, asked before anything else is on its
way.

Work is counted in tokens times blocks: a server may be asked for a part of its span.
"""

from collections import deque
from dataclasses import dataclass

__all__ = ["LEAST_CALLS", "MOST_TOKENS", "Flow", "Sent"]

MOST_TOKENS = 16_384
"""Tokens in flight at one server at most, whatever it could take: it is somebody's machine, and others use it too."""
LEAST_CALLS = 4
"""Calls in flight that a server always may have: one each on its way there, waiting, computed, on its way back."""
GAIN = 2.0
"""Times rate and distance: the second half covers what comes back in bunches, and lets the rate grow."""
CLOSE = 0.05
"""Seconds: below it, distances say more of how busy servers were when they were asked than of where they are."""
MEMORY = 10.0
"""Seconds that the best rate is believed."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A call on its way: what had come back, and since when, as it left."""

    work: float
    at: float
    delivered: float
    delivered_at: float


class Flow:
    """One server's window. Times are seconds on one clock.

    distance: seconds that a small question to it takes, with nothing before it; 0 while that is not known.
    """

    def __init__(self) -> None:
        self.in_flight = 0.0
        self.distance = 0.0
        self._calls = 0  # in flight
        self._delivered = 0.0
        self._delivered_at = 0.0
        self._ready_at = 0.0
        self._rates: deque[tuple[float, float]] = deque()  # (when, work per second), falling
        self._largest = 0.0  # work of one call, fading
        self._since_idle = 0  # calls that came back since nothing was in flight

    @property
    def rate(self) -> float | None:
        """Work per second, the best of late; None before the first answer."""
        return self._rates[0][1] if self._rates else None

    def measured(self, distance: float) -> None:
        """What a small question took just now. The least counts: the others had something before them."""
        self.distance = min(distance, self.distance or distance)

    def begins(self, now: float) -> None:
        """A call leaves only now. Of the first one this counts: it waited until the server had shown that it may be
        used, with all that were to leave beside it, and that is not the server's work."""
        self._ready_at = self._ready_at or now

    def limit(self, blocks: int) -> float:
        """Work that may be in flight, for calls of so many blocks."""
        least = LEAST_CALLS * self._largest
        on_its_way = GAIN * (self.rate or 0.0) * self.distance
        # After a pause one more for each that comes back: all at once would share the link, and all come late.
        grown = least + self._since_idle * self._largest
        return max(least, min(least + on_its_way, grown, float(MOST_TOKENS * blocks)))

    def has_room(self, work: float, blocks: int, hops: int = 1) -> bool:
        """Whether to send this now. hops: servers that it passes before an answer comes."""
        return self._calls < LEAST_CALLS * hops or self.in_flight + work <= self.limit(blocks)

    def seconds_for(self, work: float, unmeasured: float) -> float:
        """When the answer to this would come: after what is in flight, and from as far away. For comparing servers:
        those that are close are all equally close, or one that was busy at the start would never be called.

        unmeasured: seconds per work of a server that has not answered yet.
        """
        slowness = unmeasured if self.rate is None else 1 / self.rate
        return max(0.0, self.distance - CLOSE) + (self.in_flight + work) * slowness

    def send(self, work: float, now: float) -> Sent:
        """Count it as in flight; give what this returns to `came_back` or to `lost`."""
        if self.in_flight == 0:
            self._delivered_at = now  # an idle server delivers nothing, through no fault of its own
            self._since_idle = 0
        self.in_flight += work
        self._calls += 1
        return Sent(work, now, self._delivered, self._delivered_at)

    def lost(self, sent: Sent) -> None:
        """It will not come back."""
        self._calls -= 1
        self.in_flight = max(0.0, self.in_flight - sent.work)

    def slowed_down(self) -> None:
        """What was measured holds no more: a call took far longer than it lets expect. Believe a third of the rate."""
        if self._rates:
            when, rate = self._rates[-1]
            self._rates.clear()
            self._rates.append((when, rate / 3))

    def came_back(self, sent: Sent, now: float) -> None:
        self.lost(sent)
        self._since_idle += 1
        self._delivered += sent.work
        self._delivered_at = now
        # Over the time this call was out: shorter ones would take a bunch of answers for a high rate.
        since = max(self._ready_at, min(sent.at, sent.delivered_at))
        rate = (self._delivered - sent.delivered) / max(1e-6, now - since)
        _keep(self._rates, now, rate)
        # It may have been busy, or starting, when it was asked; it is no farther away than any answer took.
        self.distance = min(self.distance, now - sent.at)
        self._largest = max(sent.work, 0.95 * self._largest)


def _keep(values: deque[tuple[float, float]], now: float, value: float) -> None:
    """Add to a sliding maximum: the first entry is the highest of the last `MEMORY` seconds."""
    while values and values[-1][1] <= value:
        values.pop()
    values.append((now, value))
    while values[0][0] < now - MEMORY:
        values.popleft()
