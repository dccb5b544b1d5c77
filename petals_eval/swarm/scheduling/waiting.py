"""Why nothing moves: blocks that nobody holds, blocks whose servers all fail, and caches without room."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from petals_eval.errors import DeadlineError, MissingBlocksError
from petals_eval.swarm.directory.directory import Directory
from petals_eval.swarm.peers.peer import PeerBook
from petals_eval.swarm.peers.peer_text import short_peer
from petals_eval.swarm.peers.session_cache import Wait
from petals_eval.swarm.wire.span import Span, common_spans, joined, spans_text
from petals_eval.text import plural

__all__ = ["WaitingList", "first_of", "what_is_missing"]


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


def what_is_missing(directory: Directory, peers: PeerBook, span: Span, since: float) -> str:
    """Return one line: which of the blocks have no server in good standing, since when, and why.

    since: seconds since the epoch, when whoever waits began to.
    """
    snapshot = directory.snapshot
    failed = frozenset(peer_id for peer_id in snapshot.servers if peers.of(peer_id).is_failing)
    absent = common_spans(snapshot.missing(), span)
    absent_blocks = {block for each in absent for block in range(each.start, each.stop)}
    failing = joined(
        block
        for each in common_spans(snapshot.missing(without=failed), span)
        for block in range(each.start, each.stop)
        if block not in absent_blocks
    )
    fail = f"every server of blocks {spans_text(failing)} fails"
    reasons = first_few(
        f"{short_peer(peer_id)}: {peers.of(peer_id).last_error}"
        for peer_id in sorted(failed)
        if any(map(snapshot.servers[peer_id].span.overlaps, failing))
    )
    clock = time.strftime("%H:%M", time.localtime(since))
    if absent:
        others = f"; {fail}: {reasons}" if failing else ""
        return f"no server holds blocks {spans_text(absent)} (since {clock}, {_who_else(directory, absent)}){others}"
    if failing:
        return f"{fail} (since {clock}): {reasons}"
    return f"no server of blocks {span} has answered (since {clock})"


def first_few(reasons: Iterable[str], separator: str = "; ", most: int = 3) -> str:
    """Return the first `most` reasons, and a sign where there are more."""
    every = list(reasons)
    return separator.join(every[:most]) + (" ..." if every[most:] else "")


def _who_else(directory: Directory, absent: Sequence[Span]) -> str:
    """Return who holds the rest, and whose records did not count."""
    snapshot = directory.snapshot
    others = len(snapshot.servers)
    hold = f"{plural(others, 'server holds', 'servers hold')} the rest"
    if not others:
        hold = "no server is left"
        if not snapshot.left_out:
            hold = f"nobody announces {directory.dht_prefix!r}: is that the name the servers use?"
    dropped = f", {snapshot.dropped} malformed records ignored" if snapshot.dropped else ""
    left_out = first_few(
        (
            f"{short_peer(peer_id)} {reason}"
            for peer_id, (server, reason) in sorted(snapshot.left_out.items())
            if any(map(server.span.overlaps, absent))
        ),
        ", ",
    )
    return f"{hold}{dropped}" + (f"; left out: {left_out}" if left_out else "")


def first_of(waits: Sequence[Wait], rest: Span) -> Wait:
    """Return until when the first server may not be asked, and what is known of them all."""
    why = f"no server of blocks {rest} has room for a session now: {first_few(wait.why for wait in waits)}"
    return Wait(min((wait.seconds for wait in waits if not wait.is_over), default=0.0), why)


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60:02d}:{int(seconds) % 60:02d}"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:g} min" if seconds >= 60 else f"{seconds:g} s"
