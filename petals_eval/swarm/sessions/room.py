"""Whether there is room for one more session, also in the eyes of others."""

from petals_eval.swarm.directory.routing import hold_all
from petals_eval.swarm.peers.peer import PeerBook
from petals_eval.swarm.wire.records import Snapshot
from petals_eval.swarm.wire.span import Span

__all__ = ["leaves_others"]


def leaves_others(snapshot: Snapshot, peers: PeerBook, span: Span, max_length: int, share: float) -> bool:
    """Return whether one more session, of a row of `max_length` positions, would leave others this share of the cache
    of a server of each block, as far as that is known. Where none of ours is open it may take what it needs.
    """
    roomy = []
    for server in snapshot.servers.values():
        cache, blocks = peers.of(server.peer_id).cache, server.span.common(span)
        if blocks is not None and cache.leaves_others(max_length * len(blocks), share):
            roomy.append(server)
    return hold_all(roomy, span)
