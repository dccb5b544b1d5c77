"""Before a run: can this swarm do it, and how long will it take? From the records alone, in one line."""

from collections.abc import Mapping

from petals_eval.evaluation.prepare import Prepared
from petals_eval.swarm.wire.records import Snapshot
from petals_eval.swarm.wire.span import spans_text
from petals_eval.text import plural

__all__ = ["estimate_run", "expected_positions"]


def expected_positions(prepared: Prepared) -> int:
    """Estimate the positions of a run, prompts included, from the length of its first examples."""
    first = prepared.first_examples
    prefix = max((adapter.prefix_length for _, adapter, _ in prepared.variants if adapter is not None), default=0)
    requests = [request for example in first for request in example.requests]
    positions = sum(len(request.input_ids) + prefix for request in requests) / max(1, len(first))
    return round(positions * prepared.total)


def estimate_run(snapshot: Snapshot, positions: int, measured: Mapping[str, float] | None = None) -> str:
    """Return a line on whether the servers of a snapshot can do a run, and about how long they take.

    positions: rows x positions that go through every block, prompts included.
    measured: tokens/s by peer id, as seen from here; where a server has none its own word is taken.

    All servers of a block share its work, and the slowest block holds up the rest. Petals computes a server's
    `throughput` for its whole span, so that the sum over a block's servers is what the block takes.

    >>> from petals_eval.swarm.wire.records import ServerRecord, SpanServer
    >>> from petals_eval.swarm.wire.span import Span
    >>> record = ServerRecord(state=2, throughput=50.0)
    >>> servers = {"a": SpanServer("a", Span(0, 3), record), "b": SpanServer("b", Span(0, 2), record)}
    >>> estimate_run(Snapshot(3, servers), 10_000)
    'swarm: 2 servers hold all 3 blocks (fewest: block 2, 1 server); at the 50 tok/s they claim 10,000 positions take \
about 3 min'
    >>> estimate_run(Snapshot(4, servers), 10_000)
    'swarm: no server holds blocks 3:4 of 4: a run would wait for one'
    """
    missing = snapshot.missing()
    if missing:
        return f"swarm: no server holds blocks {spans_text(missing)} of {snapshot.num_blocks}: a run would wait for one"
    holders = [0] * snapshot.num_blocks
    rates = [0.0] * snapshot.num_blocks
    seen = measured or {}
    for server in snapshot.servers.values():
        for block in range(server.span.start, min(server.span.stop, snapshot.num_blocks)):
            holders[block] += 1
            rates[block] += seen.get(server.peer_id, server.record.throughput)
    fewest = min(holders)
    servers = f"{plural(len(snapshot.servers), 'server holds', 'servers hold')} all {snapshot.num_blocks} blocks"
    thinnest = f"fewest: block {holders.index(fewest)}, {plural(fewest, 'server')}"
    rate = min(rates)
    if rate <= 0:
        return f"swarm: {servers} ({thinnest}); how fast they are, they do not say"
    source = "seen" if set(snapshot.servers) <= set(seen) else "they claim"
    time = _duration(positions / rate)
    return f"swarm: {servers} ({thinnest}); at the {rate:,.0f} tok/s {source} {positions:,} positions take about {time}"


def _duration(seconds: float) -> str:
    """
    >>> _duration(0.4), _duration(90), _duration(7000), _duration(200_000)
    ('1 s', '90 s', '117 min', '56 h')
    """
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    if seconds < 7200:
        return f"{round(seconds / 60)} min"
    return f"{round(seconds / 3600)} h"
