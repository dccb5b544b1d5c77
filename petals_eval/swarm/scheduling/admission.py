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
from typing import Protocol

from petals_eval.errors import MissingBlocksError, PetalsEvalError, RequestTooLargeError
from petals_eval.swarm.peers.peer import Peer, PeerBook
from petals_eval.swarm.peers.session_cache import Wait
from petals_eval.swarm.wire.records import SpanServer
from petals_eval.swarm.wire.span import Span

__all__ = ["Admission", "AdmissionQueues", "RowAdmission", "SessionAdmission", "is_ready"]


class _Queue:
    """The micro-batches that wait to enter one block."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self.length = 0


class AdmissionQueues:
    """The queues of one pipeline.

    waiting: micro-batches in all of them. May be read from any thread.
    listeners: called whenever one has left a queue.
    """

    def __init__(self) -> None:
        self._queues: dict[int, _Queue] = {}  # by the block that is entered
        self._capacity = asyncio.Event()
        self.waiting = 0
        self.listeners: set[Callable[[], None]] = set()

    def length(self, block: int) -> int:
        """Return how many micro-batches wait before a block. May be called from any thread."""
        queue = self._queues.get(block)
        return 0 if queue is None else queue.length

    @asynccontextmanager
    async def turn(self, block: int) -> AsyncIterator[None]:
        """Wait in the queue before a block, and be the first in it while the body runs."""
        queue = self._queues.setdefault(block, _Queue())
        queue.length += 1
        self.waiting += 1
        try:
            async with queue.turn:
                yield
        finally:
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


class Admission(Protocol):
    """What to ask of a server about the blocks that are left of a route, from the one that is entered on."""

    def refusal(self, server: SpanServer, rest: Span) -> PetalsEvalError | None:
        """Return the error to raise where nobody else is left: the server never takes it. None: it may."""
        ...

    def wait(self, server: SpanServer, rest: Span) -> Wait | None:
        """Return until when not to ask the server, and why; None: nothing speaks against it."""
        ...


def is_ready(admission: Admission, server: SpanServer, rest: Span) -> bool:
    """Return whether the server may be asked now."""
    wait = admission.wait(server, rest)
    return wait is None or wait.is_over


@dataclass(frozen=True, slots=True)
class RowAdmission:
    """Admission of rows of so many positions. A row of more than a call may hold takes a session of its own."""

    peers: PeerBook
    positions: int

    def refusal(self, server: SpanServer, rest: Span) -> PetalsEvalError | None:
        peer = self.peers.of(server.peer_id)
        if not self._goes_in_steps(peer):
            return None
        too_large = peer.limits.session_refusal(1, self.positions)
        why = peer.cache.never_opens() or peer.cache.never_fits(self._need(server, rest))
        if too_large is not None or why is None:
            return too_large
        return RequestTooLargeError(
            f"an input holds {self.positions} tokens (prompt included), but server {peer.name} takes "
            f"{peer.limits.per_call} in one call, and {why}: set a smaller max_length in the task"
        )

    def wait(self, server: SpanServer, rest: Span) -> Wait | None:
        peer = self.peers.of(server.peer_id)
        return peer.cache.wait(self._need(server, rest)) if self._goes_in_steps(peer) else None

    def _goes_in_steps(self, peer: Peer) -> bool:
        limit = peer.limits.per_call
        return limit is not None and limit < self.positions

    def _need(self, server: SpanServer, rest: Span) -> int:
        return self.positions * _blocks(server, rest)


@dataclass(frozen=True, slots=True)
class SessionAdmission:
    """Admission of an inference session with so many rows and positions."""

    peers: PeerBook
    rows: int
    positions: int

    def refusal(self, server: SpanServer, rest: Span) -> PetalsEvalError | None:
        peer = self.peers.of(server.peer_id)
        too_large = peer.limits.session_refusal(self.rows, self.positions)
        if too_large is not None:
            return too_large
        if (closed := peer.cache.never_opens()) is not None:
            span = server.span.common(rest) or rest
            return MissingBlocksError(
                f"no server of blocks {span} opens a session for this client. Server {peer.name}: {closed}. Its blocks "
                "compute all the same: call them without a session",
                ((span.start, span.stop),),
            )
        if (never := peer.cache.never_fits(self._need(server, rest))) is not None:
            return RequestTooLargeError(
                f"server {peer.name}: {never}: open the session with a smaller max_length or batch"
            )
        return None

    def wait(self, server: SpanServer, rest: Span) -> Wait | None:
        return self.peers.of(server.peer_id).cache.wait(self._need(server, rest))

    def _need(self, server: SpanServer, rest: Span) -> int:
        return self.rows * self.positions * _blocks(server, rest)


def _blocks(server: SpanServer, rest: Span) -> int:
    """Return the blocks that the server would compute next; 0 where it comes later in the route: what it is to compute
    then depends on who comes before it."""
    return min(server.span.stop, rest.stop) - rest.start if rest.start in server.span else 0
