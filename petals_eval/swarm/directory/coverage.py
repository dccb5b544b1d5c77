"""Why nothing moves: blocks that nobody holds, and blocks whose servers all fail."""

import time
from collections.abc import Iterable, Sequence

from petals_eval.swarm.directory.directory import Directory
from petals_eval.swarm.peers.peer import PeerBook, short_peer
from petals_eval.swarm.wire.records import Snapshot
from petals_eval.swarm.wire.span import Span, joined, spans_text
from petals_eval.text import plural

__all__ = ["common_spans", "first_few", "what_is_missing"]


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


def common_spans(spans: Iterable[Span], span: Span) -> tuple[Span, ...]:
    """Return what of the spans lies within another one.

    >>> [str(each) for each in common_spans([Span(0, 2), Span(5, 8)], Span(1, 6))]
    ['1:2', '5:6']
    """
    return tuple(common for each in spans if (common := each.common(span)) is not None)


def first_few(reasons: Iterable[str], separator: str = "; ", most: int = 3) -> str:
    """Return the first `most` reasons, and a sign where there are more."""
    every = list(reasons)
    return separator.join(every[:most]) + (" ..." if every[most:] else "")


def _who_else(directory: Directory, absent: Sequence[Span]) -> str:
    """Return who holds the rest, and whose records did not count."""
    snapshot: Snapshot = directory.snapshot
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
