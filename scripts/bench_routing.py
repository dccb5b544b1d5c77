"""How long the pure parts of choosing servers take on a large swarm: a directory that is simulated, no network.

    python scripts/bench_routing.py --servers 10000 --blocks 126

Each line is the best and the middle of several repeats, in one thread. What is not in it: reading the DHT.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence

from petals_eval.health.canary import segments_of
from petals_eval.health.census import claims_in
from petals_eval.swarm.directory.routing import RouteIndex, hold_all, next_hop, plan_route
from petals_eval.swarm.wire.records import Announcement, Snapshot, SpanServer, read_snapshot
from petals_eval.swarm.wire.span import Span

PERIOD = 240.0


def simulated(servers: int, blocks: int, longest: int, seed: int = 0) -> list[Announcement]:
    """What the DHT holds: a record under each block of each server, as the values come out of it (a dict each)."""
    draw = random.Random(seed)
    found = []
    for index in range(servers):
        length = draw.randint(1, min(longest, blocks))
        start = draw.randint(0, blocks - length)
        for block in range(start, start + length):
            extra = {
                "start_block": start,
                "end_block": start + length,
                "public_name": f"server-{index}",
                "version": "2.3.0.dev2",
                "network_rps": 100.0,
                "forward_rps": 200.0,
                "inference_rps": 20.0,
                "adapters": (),
                "torch_dtype": "bfloat16",
                "quant_type": "nf4",
                "using_relay": False,
                "cache_tokens_left": draw.randint(0, 8192),
                "next_pings": {f"12D3KooWpeer{peer:05d}": 0.05 for peer in range(3)},
            }
            found.append(Announcement(block, f"12D3KooWpeer{index:05d}", (2, draw.uniform(10, 500), extra), PERIOD))
    return found


def timed(name: str, function: Callable[[], object], repeats: int, per: int = 1) -> float:
    """Print and return the middle, in seconds. per: how many of the thing one call does."""
    function()
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        taken.append((time.perf_counter() - started) / per)
    middle = statistics.median(taken)
    print(f"{name:<66} {_text(min(taken)):>10} best {_text(middle):>10} middle")
    return middle


def _text(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """The middles, in seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--servers", type=int, default=10_000)
    parser.add_argument("--blocks", type=int, default=126)
    parser.add_argument("--longest", type=int, default=24, help="blocks of the longest span")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args(arguments)
    announcements = simulated(options.servers, options.blocks, options.longest)
    snapshot: Snapshot = read_snapshot(announcements, options.blocks)
    servers = list(snapshot.servers.values())
    print(f"simulated: {len(servers):,} servers, {options.blocks} blocks, {len(announcements):,} records, no network")

    draw = random.Random(1)
    met = servers[:: max(1, len(servers) // 200)]
    per_token = {server.peer_id: draw.uniform(1e-5, 1e-3) for server in met}  # seconds for a token and a block

    def cost(server: SpanServer, blocks: int) -> float:
        return 0.05 + per_token.get(server.peer_id, 1e-4) * blocks * 1024

    last = options.blocks
    spans = [server.span for server in servers]
    index = RouteIndex(servers, last)
    index.plan(cost)

    def repeated(name: str, function: Callable[[], object], per: int = 1) -> float:
        return timed(name, function, options.repeats, per)

    return {
        "refresh": repeated("refresh: records to servers", lambda: read_snapshot(announcements, last)),
        "census": repeated("health: records to claims", lambda: claims_in(announcements, 0.0)),
        "segments": repeated("health: cut the model where spans begin and end", lambda: segments_of(spans)),
        "index": repeated("after a refresh: index the servers by block", lambda: RouteIndex(servers, last)),
        "replan": repeated("after a refresh: cheapest way on from every block", lambda: index.plan(cost)),
        "pick": repeated(
            "pick a server for a micro-batch, indexed (mean over the blocks)",
            lambda: [index.next_hop(block, cost) for block in range(last)],
            per=last,
        ),
        "route": repeated("a whole route, indexed", lambda: index.route(0, cost)),
        "plan_route": repeated("plan_route, not indexed", lambda: plan_route(servers, Span(0, last), cost)),
        "next_hop": repeated(
            "next_hop from the middle of the model, not indexed", lambda: next_hop(servers, Span(last // 2, last), cost)
        ),
        "hold_all": repeated("hold_all: do all together hold the model?", lambda: hold_all(servers, Span(0, last))),
        "missing": repeated("missing: which blocks nobody holds", snapshot.missing),
    }


if __name__ == "__main__":
    main()
