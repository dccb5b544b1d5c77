"""Admission control: who may enter a block now, and which servers take what is to be computed.

Micro-batches queue before each block, first come first served. Only the first in a queue looks for a server: whoever is
behind it would find the same one, and with hundreds of micro-batches waiting the looking would cost more than the
sending. How many wait says whether to make more of them (`petals_eval.swarm.stream`): what runs far ahead of the
slowest server only fills the memory.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from petals_eval.errors import NoSessionError, PetalsEvalError, RequestTooLargeError
from petals_eval.swarm.peers.peer import Peer, PeerBook
from petals_eval.swarm.peers.session_cache import Wait
from petals_eval.swarm.wire.records import SpanServer
from petals_eval.swarm.wire.span import Span

__all__ = ["Admission", "AdmissionQueues"]


class _Queue:
    """The micro-batches that wait to enter one block."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self.length = 0


class AdmissionQueues:
    """The queues of one pipeline.

    waiting: micro-batches in all of them. May be read from any thread.
    listeners: called whenever one has left a queue.
    producing: those who will send more. May be changed from any thread.
    """

    def __init__(self) -> None:
        self._queues: dict[int, _Queue] = {}  # by the block that is entered
        self._capacity = asyncio.Event()
        self.waiting = 0
        self.listeners: set[Callable[[], None]] = set()
        self.producing: set[object] = set()

    def length(self, block: int) -> int:
        """Return how many micro-batches wait before a block. May be called from any thread."""
        queue = self._queues.get(block)
        return 0 if queue is None else queue.length

    @asynccontextmanager
    async def turn(self, block: int, seconds: float | None = None) -> AsyncIterator[None]:
        """Wait in the queue before a block, and be the first in it while the body runs.

        seconds: that are waited at most, for one that has a deadline already; then the body runs all the same.
        """
        queue = self._queues.setdefault(block, _Queue())
        queue.length += 1
        self.waiting += 1
        has_turn = False
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await queue.turn.acquire()
                    has_turn = True
            yield
        finally:
            if has_turn:
                queue.turn.release()
            queue.length -= 1
            if not queue.length:
                del self._queues[block]
            self.waiting -= 1
            for listener in self.listeners:
                listener()

    async def wait_for_capacity(self, timeout: float) -> None:
        """Wait until a call has ended somewhere, `timeout` seconds at most."""
        capacity = self._capacity
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await capacity.wait()

    def notify_capacity(self) -> None:
        """Say that a call has ended: a window may have room now."""
        self._capacity.set()
        self._capacity = asyncio.Event()


@dataclass(frozen=True, slots=True)
class Admission:
    """Which servers take so many rows of so many positions, from the block that is entered on.

    in_session: as one inference session. Otherwise in calls, where a row that is longer than a call may be takes a
        session of its own.
    """

    peers: PeerBook
    rows: int
    positions: int
    in_session: bool = False

    def refusal(self, server: SpanServer, rest: Span) -> PetalsEvalError | None:
        """Return the error to raise where nobody else is left: the server never takes it. None: it may.

        rest: the blocks that are left of the route.
        """
        peer = self.peers.of(server.peer_id)
        if not self._takes_session(peer):
            return None
        too_large = peer.limits.session_refusal(self._rows, self.positions)
        if too_large is not None:
            return too_large
        closed, never = peer.cache.never_opens(), peer.cache.never_fits(self._need(server, rest))
        if not self.in_session:
            why = closed or never
            if why is None:
                return None
            return RequestTooLargeError(
                f"an input holds {self.positions} tokens (prompt included), but server {peer.name} takes "
                f"{peer.limits.per_call} in one call, and {why}: set a smaller max_length in the task"
            )
        if closed is not None:
            span = server.span.common(rest) or rest
            return NoSessionError(
                f"no server of blocks {span} opens a session for this client. Server {peer.name}: {closed}. Its blocks "
                "compute all the same: call them without a session",
                ((span.start, span.stop),),
            )
        if never is not None:
            return RequestTooLargeError(
                f"server {peer.name}: {never}: open the session with a smaller max_length or batch"
            )
        return None

    def wait(self, server: SpanServer, rest: Span) -> Wait | None:
        """Return until when not to ask the server, and why; None: nothing speaks against it."""
        peer = self.peers.of(server.peer_id)
        return peer.cache.wait(self._need(server, rest)) if self._takes_session(peer) else None

    def is_ready(self, server: SpanServer, rest: Span) -> bool:
        """Return whether the server may be asked now."""
        wait = self.wait(server, rest)
        return wait is None or wait.is_over

    def _takes_session(self, peer: Peer) -> bool:
        limit = peer.limits.per_call
        return self.in_session or (limit is not None and limit < self.positions)

    @property
    def _rows(self) -> int:
        return self.rows if self.in_session else 1

    def _need(self, server: SpanServer, rest: Span) -> int:
        """Return the tokens of its cache that the blocks take which it would compute next; 0 where it comes later in
        the route: what it is to compute then depends on who comes before it."""
        blocks = min(server.span.stop, rest.stop) - rest.start if rest.start in server.span else 0
        return self._rows * self.positions * blocks
