"""Why nothing moves: what micro-batches wait for, as a person reads it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from petals_eval.errors import DeadlineError, MissingBlocksError
from petals_eval.swarm.directory.coverage import common_spans, first_few, what_is_missing
from petals_eval.swarm.directory.directory import Directory
from petals_eval.swarm.peers.peer import PeerBook
from petals_eval.swarm.peers.session_cache import Wait
from petals_eval.swarm.wire.span import Span

__all__ = ["WaitingList", "first_of"]


class WaitingList:
    """What waits for servers, and for room in their caches. Used from the event loop; read from any thread."""

    def __init__(self, directory: Directory, peers: PeerBook):
        self._directory = directory
        self._peers = peers
        self._for_servers: dict[object, str] = {}
        self._for_caches: dict[object, str] = {}

    @property
    def for_servers(self) -> str | None:
        """Why nothing moves, or None."""
        return next(iter(list(self._for_servers.values())), None)

    @property
    def for_caches(self) -> tuple[str, ...]:
        """What those wait for that only need room in a cache; others may go on."""
        return tuple(self._for_caches.copy().values())

    @contextmanager
    def server(self, rest: Span, left: float) -> Iterator[None]:
        """Tell of one that waits for a server of these blocks while the body runs. left: seconds to its deadline."""
        token = object()
        self._for_servers[token] = f"{self._what_is_missing(rest, left)}; deadline in {_minutes(left)}"
        try:
            yield
        finally:
            del self._for_servers[token]

    @contextmanager
    def cache(self, wait: Wait, left: float) -> Iterator[None]:
        """Tell of one that waits for room in a cache while the body runs. left: seconds to its deadline."""
        token = object()
        self._for_caches[token] = f"{wait.why}; deadline in {_minutes(left)}"
        try:
            yield
        finally:
            del self._for_caches[token]

    def deadline_error(self, rest: Span, waits: Sequence[Wait]) -> MissingBlocksError | DeadlineError:
        """Return why a micro-batch stops at its deadline.

        waits: for room in caches, which is what was lacking where no blocks are missing.
        """
        absent = common_spans(self._directory.snapshot.missing(), rest)
        reason = first_of(waits, rest).why if waits and not absent else self._what_is_missing(rest, 0.0)
        message = f"stopped at the deadline ({_duration(self._peers.settings.deadline)}): {reason}"
        if absent:
            return MissingBlocksError(message, tuple((each.start, each.stop) for each in absent))
        return DeadlineError(message)

    def _what_is_missing(self, rest: Span, left: float) -> str:
        since = self._peers.runtime.epoch() - (self._peers.settings.deadline - left)
        return what_is_missing(self._directory, self._peers, rest, since)


def first_of(waits: Sequence[Wait], rest: Span) -> Wait:
    """Return until when the first server may not be asked, and what is known of them all."""
    why = f"no server of blocks {rest} has room for a session now: {first_few(wait.why for wait in waits)}"
    return Wait(min((wait.seconds for wait in waits if not wait.is_over), default=0.0), why)


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60:02d}:{int(seconds) % 60:02d}"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:g} min" if seconds >= 60 else f"{seconds:g} s"
