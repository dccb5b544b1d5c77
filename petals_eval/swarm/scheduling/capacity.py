"""Whether servers admit what is to be computed, now, later or never, as far as their limits and caches are known."""

from dataclasses import dataclass
from typing import Protocol

from petals_eval.errors import MissingBlocksError, PetalsEvalError, RequestTooLargeError
from petals_eval.swarm.peers.caches import CacheBook, Wait
from petals_eval.swarm.peers.limits import TokenLimits
from petals_eval.swarm.peers.peer import short_peer
from petals_eval.swarm.wire.records import SpanServer

__all__ = ["Admission", "RowAdmission", "SessionAdmission", "is_ready"]


class Admission(Protocol):
    """What to ask of a server about a hop that begins at block `first` and goes on to `last` at most."""

    def refusal(self, server: SpanServer, first: int, last: int) -> PetalsEvalError | None:
        """The error to raise where nobody else is left: the server never takes it. None: it may."""
        ...

    def wait(self, server: SpanServer, first: int, last: int) -> Wait | None:
        """Until when not to ask the server, and why; None: nothing speaks against it."""
        ...


def is_ready(admission: Admission, server: SpanServer, first: int, last: int) -> bool:
    """Whether the server may be asked now."""
    wait = admission.wait(server, first, last)
    return wait is None or wait.is_over


@dataclass(frozen=True, slots=True)
class RowAdmission:
    """Of rows of so many positions. Where these are more than a call may hold, each row takes a session of its own."""

    limits: TokenLimits
    caches: CacheBook
    positions: int

    def refusal(self, server: SpanServer, first: int, last: int) -> PetalsEvalError | None:
        peer_id = server.peer_id
        if not self._goes_in_steps(peer_id):
            return None
        too_large = self.limits.session_too_large(peer_id, 1, self.positions)
        why = self.caches.never_opens(peer_id) or self.caches.never_fits(peer_id, self._need(server, first, last))
        if too_large is not None or why is None:
            return too_large
        return RequestTooLargeError(
            f"an input holds {self.positions} tokens (prompt included), but server {short_peer(peer_id)} takes "
            f"{self.limits.per_call(peer_id)} in one call, and {why}: set a smaller max_length in the task"
        )

    def wait(self, server: SpanServer, first: int, last: int) -> Wait | None:
        if not self._goes_in_steps(server.peer_id):
            return None
        return self.caches.wait(server.peer_id, self._need(server, first, last))

    def _goes_in_steps(self, peer_id: str) -> bool:
        limit = self.limits.per_call(peer_id)
        return limit is not None and limit < self.positions

    def _need(self, server: SpanServer, first: int, last: int) -> int:
        return self.positions * _blocks(server, first, last)


@dataclass(frozen=True, slots=True)
class SessionAdmission:
    """Of an inference session with so many rows and positions."""

    limits: TokenLimits
    caches: CacheBook
    rows: int
    positions: int

    def refusal(self, server: SpanServer, first: int, last: int) -> PetalsEvalError | None:
        peer_id = server.peer_id
        too_large = self.limits.session_too_large(peer_id, self.rows, self.positions)
        if too_large is not None:
            return too_large
        if (closed := self.caches.never_opens(peer_id)) is not None:
            span = max(server.start, first), min(server.end, last)
            return MissingBlocksError(
                f"no server of blocks {span[0]}:{span[1]} opens a session for this client. Server "
                f"{short_peer(peer_id)}: {closed}. Its blocks compute all the same: call them without a session",
                (span,),
            )
        if (never := self.caches.never_fits(peer_id, self._need(server, first, last))) is not None:
            return RequestTooLargeError(
                f"server {short_peer(peer_id)}: {never}: open the session with a smaller max_length or batch"
            )
        return None

    def wait(self, server: SpanServer, first: int, last: int) -> Wait | None:
        return self.caches.wait(server.peer_id, self._need(server, first, last))

    def _need(self, server: SpanServer, first: int, last: int) -> int:
        return self.rows * self.positions * _blocks(server, first, last)


def _blocks(server: SpanServer, first: int, last: int) -> int:
    """Of a hop that begins at block `first`; 0 where the server comes later in the route: what it is to compute then
    depends on who comes before it."""
    return min(server.end, last) - first if server.start <= first < server.end else 0
