"""The congestion window: how much work one server should have in flight, by how it answers. No I/O.

A window that is too small leaves the link or the server idle between two calls. One that is too large makes calls wait
in a volunteer's queue, and holds up all that share the link. So, as TCP BBR does (Cardwell et al., "BBR:
congestion-based congestion control", 2016), the window is the bandwidth-delay product: the highest rate at which a
server delivers, times its round-trip time. A small multiple of it is sent, and a few calls that it computes and unpacks
meanwhile. Where more in flight delivers more, the rate grows and the window with it; where more only makes answers come
later, the rate stays, and so does the window.

The round-trip time cannot be taken from these calls: each has others before it on the link and in the server, and a
window made from what they take asks for a longer one. It is taken from a small question that is asked before anything
else is on its way.

Nor are calls sent together that a window has room for: they would share the link, arrive together, be computed together
and leave for the next server together, while the links before and behind them stand idle. Each leaves when the one
before it is through at the rate at which the server delivers, its link included (BBR's pacing). Half as much again was
measured over a chain of links.

Work is counted in tokens times blocks, for a server may be asked for a part of its span.
"""

import math
from collections import deque
from dataclasses import dataclass

__all__ = ["CongestionWindow", "SentCall", "WindowPolicy"]


@dataclass(frozen=True)
class WindowPolicy:
    """What decides the size of a window.

    max_tokens: in flight at one server, whatever it could take: it is somebody's machine, and others use it too.
    min_calls: that a server always may have: one each on its way there, waiting, computed, on its way back.
    bdp_gain: times the bandwidth-delay product; the second half covers answers that come back in bunches, and lets the
        rate grow.
    near_rtt: seconds; below it, round trips tell more of how busy servers were when they were asked than of how far
        away they are.
    rate_filter_seconds: for which the highest rate is believed.
    pacing_gain: times that rate calls leave at: a rate that was measured while little was sent can grow.
    startup_gain: the same until the rate has stopped growing (BBR's 2 / ln 2, with which it doubles in each round trip).
    full_growth, full_calls: by less than so much for so many answers, the rate has stopped growing.
    stretch_smoothing: of the difference to what one call tells is made up for at once.
    """

    max_tokens: int = 16_384
    min_calls: int = 4
    bdp_gain: float = 2.0
    near_rtt: float = 0.05
    rate_filter_seconds: float = 10.0
    pacing_gain: float = 1.25
    startup_gain: float = 2.89
    full_growth: float = 1.25
    full_calls: int = 8
    stretch_smoothing: float = 0.1


@dataclass(frozen=True, slots=True)
class SentCall:
    """A call in flight: its work, when it was sent, and what had been delivered by then, last when."""

    work: float
    at: float
    delivered: float
    delivered_at: float


class CongestionWindow:
    """One server's window. Times are seconds on one clock.

    min_rtt: the shortest round trip of a small question with nothing before it; 0 while none was asked.
    stretch: times as long as the quickest of their size calls take of late: the rest they wait, somewhere on the way.
    """

    def __init__(self) -> None:
        self.in_flight = 0.0
        self.min_rtt = 0.0
        self.stretch = 1.0
        self._quickest = math.inf  # seconds per work, beyond the shortest round trip
        self._calls = 0  # in flight
        self._delivered = 0.0
        self._delivered_at = 0.0
        self._started_at = 0.0
        self._rates: deque[tuple[float, float]] = deque()  # (when, work per second), falling
        self._largest_call = 0.0  # its work, fading
        self._delivered_since_idle = 0  # calls
        self._next_send_at = 0.0
        self._full_rate = 0.0  # the rate when it last grew, and the answers since then
        self._calls_since_growth = 0

    @property
    def rate(self) -> float | None:
        """Work per second, the highest of late; None before the first answer."""
        return self._rates[0][1] if self._rates else None

    def observe_rtt(self, seconds: float) -> None:
        """Note the round trip of a small question. The shortest counts: the others had something before them."""
        self.min_rtt = min(seconds, self.min_rtt or seconds)

    def mark_started(self, now: float) -> None:
        """Start the clock of the first call here: the time it spent waiting for the determinism probe is not the
        server's. Later calls change nothing."""
        self._started_at = self._started_at or now

    def limit(self, blocks: int) -> float:
        """Return the work that may be in flight, for calls of so many blocks."""
        least = WindowPolicy.min_calls * self._largest_call
        bandwidth_delay = WindowPolicy.bdp_gain * (self.rate or 0.0) * self.min_rtt
        # After a pause one more for each that is delivered: all at once would share the link, and all come late.
        grown = least + self._delivered_since_idle * self._largest_call
        return max(least, min(least + bandwidth_delay, grown, float(WindowPolicy.max_tokens * blocks)))

    def has_room(self, work: float, blocks: int, hops: int = 1) -> bool:
        """Return whether to send this work now. hops: servers that it passes before an answer comes."""
        return self._calls < WindowPolicy.min_calls * hops or self.in_flight + work <= self.limit(blocks)

    def pause(self, now: float) -> float:
        """Return the seconds until what was sent last is through, and the next call may leave."""
        return max(0.0, self._next_send_at - now)

    def seconds_for(self, work: float, unmeasured: float) -> float:
        """Return when the answer to this work would come, after what is in flight, for comparing servers.

        Servers that are near count as equally near, or one that was busy at the start would never be called.
        unmeasured: seconds per work of a server that has not answered yet.
        """
        slowness = unmeasured if self.rate is None else 1 / self.rate
        return max(0.0, self.min_rtt - WindowPolicy.near_rtt) + (self.in_flight + work) * slowness

    def send(self, work: float, now: float) -> SentCall:
        """Count a call as in flight; what is returned goes to `on_delivered` or `on_lost`."""
        if self.in_flight == 0:
            self._delivered_at = now  # an idle server delivers nothing, through no fault of its own
            self._delivered_since_idle = 0
        self.in_flight += work
        self._calls += 1
        if self.rate is not None:
            is_full = self._calls_since_growth >= WindowPolicy.full_calls
            gain = WindowPolicy.pacing_gain if is_full else WindowPolicy.startup_gain
            self._next_send_at = max(now, self._next_send_at) + work / (gain * self.rate)
        return SentCall(work, now, self._delivered, self._delivered_at)

    def settle(self, sent: SentCall, now: float, *, is_delivered: bool) -> None:
        """Count a call as not in flight any more, whatever came of it."""
        if is_delivered:
            self.on_delivered(sent, now)
        else:
            self.on_lost(sent)

    def on_lost(self, sent: SentCall) -> None:
        """Count a call as not in flight any more: no answer will come."""
        self._calls -= 1
        self.in_flight = max(0.0, self.in_flight - sent.work)

    def on_overtaken(self) -> None:
        """Believe a third of the measured rate from now on: a call took far longer than that rate lets expect."""
        if self._rates:
            when, rate = self._rates[-1]
            self._rates.clear()
            self._rates.append((when, rate / 3))

    def on_delivered(self, sent: SentCall, now: float) -> None:
        """Take the rate and the round trip from a call that was answered."""
        self.on_lost(sent)
        self._delivered_since_idle += 1
        self._delivered += sent.work
        self._delivered_at = now
        # Over the time this call was out: shorter ones would take a bunch of answers for a high rate.
        since = max(self._started_at, min(sent.at, sent.delivered_at))
        self._keep_rate(now, (self._delivered - sent.delivered) / max(1e-6, now - since))
        # It may have been busy, or starting, when it was asked; it is no farther away than any answer took.
        self.min_rtt = min(self.min_rtt, now - sent.at)
        self._largest_call = max(sent.work, 0.95 * self._largest_call)
        seconds, work = now - max(sent.at, self._started_at), max(sent.work, 1e-9)
        self._quickest = min(self._quickest, (seconds - self.min_rtt) / work)
        quickest = max(self.min_rtt + self._quickest * work, 1e-9)
        self.stretch += WindowPolicy.stretch_smoothing * (seconds / quickest - self.stretch)

    def _keep_rate(self, now: float, rate: float) -> None:
        """Add to a sliding maximum: the first entry is the highest rate of the filter's time."""
        rates = self._rates
        while rates and rates[-1][1] <= rate:
            rates.pop()
        rates.append((now, rate))
        while rates[0][0] < now - WindowPolicy.rate_filter_seconds:
            rates.popleft()
        self._calls_since_growth += 1
        if rates[0][1] >= WindowPolicy.full_growth * self._full_rate:
            self._full_rate, self._calls_since_growth = rates[0][1], 0
