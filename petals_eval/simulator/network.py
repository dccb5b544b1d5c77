"""Simulated connections: what a link, and a link that all share, make of messages that travel at the same time.

A connection is as the emulated network has it (`petals_eval.local_swarm.relays`, whose links these are): messages on
it are streams that take turns, a chunk each; a link is a serial line with a short queue; TCP delivers in order.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from petals_eval.local_swarm.relays import MAX_QUEUE_SECONDS, Link

__all__ = ["STREAM_WINDOW_BYTES", "Direction"]

STREAM_WINDOW_BYTES = 256 << 10
"""That a stream may send before the other side's leave, which takes a round trip (yamux, as libp2p has it)."""

_CHUNK_SECONDS = 0.01  # of the slowest link's time: coarser than the relays', for each chunk costs processor time here
_MIN_CHUNK_BYTES, _MAX_CHUNK_BYTES = 4096, 65536


@dataclass(slots=True, eq=False)
class _Message:
    left: int
    on_arrived: Callable[[], object]
    credit: int = STREAM_WINDOW_BYTES


class Direction:
    """One direction of a connection. Used from one event loop, on its clock.

    links: that it passes, in order. back: the direction in which the other side's leave to send more comes.
    """

    def __init__(self, links: Sequence[Link], delay: float, jitter: float = 0.0, draws: Random | None = None):
        """delay, jitter: seconds."""
        self.links = links
        self.back: Direction | None = None
        self._delay, self._jitter, self._draws = delay, jitter, draws or Random(0)
        self._loop = asyncio.get_running_loop()
        self._turns: deque[_Message] = deque()
        self._due = 0.0  # when what was sent last arrives
        self._is_held_back = False
        rates = [link.rate for link in links if link.rate is not None]
        chunk = int(min(rates) * _CHUNK_SECONDS) if rates else _MAX_CHUNK_BYTES
        self._chunk = max(_MIN_CHUNK_BYTES, min(_MAX_CHUNK_BYTES, chunk))

    def send(self, nbytes: int, on_arrived: Callable[[], object]) -> None:
        """Send a message in a stream of its own; `on_arrived` is called when its last byte is there."""
        self._turns.append(_Message(max(1, nbytes), on_arrived))
        if not self._is_held_back:
            self._send_turns()

    @property
    def seconds(self) -> float:
        """What a few bytes that are sent now take."""
        now = self._loop.time()
        return max([now, *(link.free_at for link in self.links)]) - now + self._delay

    def _send_turns(self) -> None:
        """Send a chunk of each message in turn until the links have enough to do for a moment."""
        self._is_held_back = False
        now = self._loop.time()
        while self._turns:
            message = self._turns.popleft()
            size = min(self._chunk, message.left, message.credit)
            left = now
            for link in self.links:
                left = link.send(size, left)
            self._due = max(self._due, left + self._delay + self._jitter * self._draws.random())
            message.left -= size
            message.credit -= size
            if not message.left:
                self._loop.call_at(self._due, message.on_arrived)
            elif message.credit:
                self._turns.append(message)
            else:
                self._loop.call_at(self._due, self._ask_for_more, message)
            if left - now > MAX_QUEUE_SECONDS:
                self._is_held_back = True
                self._loop.call_at(left - MAX_QUEUE_SECONDS, self._send_turns)
                return

    def _ask_for_more(self, message: _Message) -> None:
        """The other side has read what the window held: its leave to go on is on the way."""
        self._loop.call_later(self.back.seconds if self.back else self._delay, self._grant, message)

    def _grant(self, message: _Message) -> None:
        message.credit = STREAM_WINDOW_BYTES
        self._turns.append(message)
        if not self._is_held_back:
            self._send_turns()
