"""Why nothing moves: blocks that nobody holds, and blocks whose servers all fail. Spans are (first, last + 1)."""

import time
from collections.abc import Iterable, Sequence

from petals_eval.swarm.directory.dht import Directory
from petals_eval.swarm.peers.peer import PeerBook, short_peer
from petals_eval.swarm.wire.records import Snapshot

__all__ = ["listed", "spans_text", "what_is_missing", "within"]

Spans = Sequence[tuple[int, int]]


def what_is_missing(directory: Directory, peers: PeerBook, first: int, last: int, since: float) -> str:
    """One line: which of the blocks first:last have no server in good standing, since when, and why.

    since: seconds since the epoch, when whoever waits began to.
    """
    snapshot = directory.snapshot
    failed = frozenset(peer for peer in snapshot.servers if peers.is_failing(peer))
    absent = within(snapshot.missing(), first, last)
    failing = _minus(within(snapshot.missing(without=failed), first, last), absent)
    fail = f"every server of blocks {spans_text(failing)} fails"
    reasons = listed(
        f"{short_peer(peer)}: {peers.of(peer).last_error}"
        for peer in sorted(failed)
        if _touches(snapshot.servers[peer].start, snapshot.servers[peer].end, failing)
    )
    clock = time.strftime("%H:%M", time.localtime(since))
    if absent:
        others = f"; {fail}: {reasons}" if failing else ""
        return f"no server holds blocks {spans_text(absent)} (since {clock}, {_who_else(directory, absent)}){others}"
    if failing:
        return f"{fail} (since {clock}): {reasons}"
    return f"no server of blocks {first}:{last} has answered (since {clock})"


def within(spans: Spans, first: int, last: int) -> tuple[tuple[int, int], ...]:
    """What of the spans lies within first:last."""
    return tuple((max(start, first), min(end, last)) for start, end in spans if start < last and end > first)


def spans_text(spans: Spans) -> str:
    """Spans as first:last, the way servers are started with."""
    return " ".join(f"{start}:{end}" for start, end in spans)


def _who_else(directory: Directory, absent: Spans) -> str:
    """Who holds the rest, and whose records did not count."""
    snapshot: Snapshot = directory.snapshot
    others = len(snapshot.servers)
    hold = f"{others} server{'s hold' if others != 1 else ' holds'} the rest"
    if not others:
        hold = "no server is left"
        if not snapshot.left_out:
            hold = f"nobody announces {directory.dht_prefix!r}: is that the name the servers use?"
    dropped = f", {snapshot.dropped} malformed records ignored" if snapshot.dropped else ""
    left_out = listed(
        (
            f"{short_peer(peer)} {reason}"
            for peer, (server, reason) in sorted(snapshot.left_out.items())
            if _touches(server.start, server.end, absent)
        ),
        ", ",
    )
    return f"{hold}{dropped}" + (f"; left out: {left_out}" if left_out else "")


def _touches(start: int, end: int, spans: Spans) -> bool:
    return any(start < last and first < end for first, last in spans)


def _minus(spans: Spans, others: Spans) -> tuple[tuple[int, int], ...]:
    """The blocks of `spans` that are not in `others`, as spans."""
    taken = {block for start, end in others for block in range(start, end)}
    left: list[tuple[int, int]] = []
    for block in (block for start, end in spans for block in range(start, end) if block not in taken):
        if left and left[-1][1] == block:
            left[-1] = (left[-1][0], block + 1)
        else:
            left.append((block, block + 1))
    return tuple(left)


def listed(reasons: Iterable[str], separator: str = "; ", most: int = 3) -> str:
    """The first few, and a sign where there are more."""
    every = list(reasons)
    return separator.join(every[:most]) + (" ..." if every[most:] else "")
