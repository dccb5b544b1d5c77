"""Before a run: can this swarm do it, and how long will it take? From the records alone, in one line."""

import sys
from collections.abc import Iterator, Mapping

from petals_eval.evaluation.prepare import Prepared
from petals_eval.swarm.wire.records import Snapshot
from petals_eval.swarm.wire.span import spans_text
from petals_eval.tasks.requests import Request
from petals_eval.text import number_text, plural

__all__ = ["estimate_generation", "estimate_run", "expected_new_tokens", "expected_positions"]

_CENTURY = 100 * 365.25 * 86_400  # seconds


def expected_positions(prepared: Prepared) -> int:
    """Estimate the positions of a run, prompts included, from the length of its first examples; of texts that are to be
    generated, what they take in sessions at most.
    """
    prefix = max((adapter.prefix_length for _, adapter, _ in prepared.variants if adapter is not None), default=0)
    return _of_all(prepared, sum(request.positions + prefix for request in _first_requests(prepared)))


def expected_new_tokens(prepared: Prepared) -> int:
    """Estimate the tokens that a run generates at most; 0 where it generates none."""
    return _of_all(prepared, sum(request.new_tokens for request in _first_requests(prepared)))


def _first_requests(prepared: Prepared) -> Iterator[Request]:
    return (request for example in prepared.first_examples for request in example.requests)


def _of_all(prepared: Prepared, in_the_first: int) -> int:
    return round(in_the_first / max(1, len(prepared.first_examples)) * prepared.total)


def estimate_generation(snapshot: Snapshot, new_tokens: int) -> str:
    """Return a line on what it takes at most to generate so many tokens, one text after the other.

    A token waits for every block in turn. A server says how many tokens a second one block of its own takes in a
    session (`inference_rps`), and Petals' client plans its sessions by that, too.

    >>> from petals_eval.swarm.wire.records import ServerRecord, SpanServer
    >>> from petals_eval.swarm.wire.span import Span
    >>> record = ServerRecord(state=2, throughput=50.0, inference_rps=60.0)
    >>> snapshot = Snapshot(3, {"a": SpanServer("a", Span(0, 3), record)})
    >>> estimate_generation(snapshot, 10_000)
    'generation: at most 10,000 new tokens; at the 50 ms a token that servers claim, one text after the other takes at \
most 8 min, the way there and back not counted'
    """
    line = f"generation: at most {plural(new_tokens, 'new token')}"
    fastest = [0.0] * snapshot.num_blocks
    for server in snapshot.servers.values():
        for block in range(server.span.start, min(server.span.stop, snapshot.num_blocks)):
            fastest[block] = max(fastest[block], server.record.inference_rps or 0.0)
    if not all(fastest):
        return f"{line}; how fast the servers are at that, they do not say"
    seconds = sum(1 / rate for rate in fastest)
    return (
        f"{line}; at the {_claimed(1000 * seconds)} ms a token that servers claim, one text after the other takes "
        f"at most {_duration(new_tokens * seconds)}, the way there and back not counted"
    )


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
    work = f"{positions:,} positions take about {_duration(positions / rate)}"
    return f"swarm: {servers} ({thinnest}); at the {_claimed(rate)} tok/s {source} {work}"


def _claimed(number: float) -> str:
    return number_text(min(number, sys.float_info.max), 0)


def _duration(seconds: float) -> str:
    """
    >>> _duration(0.4), _duration(90), _duration(7000), _duration(200_000), _duration(float("inf"))
    ('1 s', '90 s', '117 min', '56 h', 'more than a century')
    """
    if seconds > _CENTURY:  # servers may claim any speed
        return "more than a century"
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    if seconds < 7200:
        return f"{round(seconds / 60)} min"
    return f"{round(seconds / 3600)} h"
