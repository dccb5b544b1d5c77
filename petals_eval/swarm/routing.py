"""Which server next: pure functions over a snapshot of the directory.

A route is found from its end: the cheapest way from block b to the last block is the cheapest server that holds b, plus
the cheapest way from where that server ends. Costs are estimated seconds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from petals_eval.swarm.records import SpanServer

__all__ = ["Hop", "hold_all", "next_hop", "plan_route"]

Cost = Callable[[SpanServer, int], float]
"""Estimated seconds until a server has computed a number of its blocks for one micro-batch."""


@dataclass(frozen=True, slots=True)
class Hop:
    """Blocks first:last on one server."""

    server: SpanServer
    first: int
    last: int


def plan_route(servers: Sequence[SpanServer], first: int, last: int, cost: Cost) -> tuple[Hop, ...] | None:
    """The cheapest hops from block `first` up to, not including, `last`; None where no server holds a block.

    A hop goes on to the end of its server's span: every hop costs a round trip, and stopping early saves none.
    """
    best: list[tuple[float, Hop | None] | None] = [None] * (last + 1)
    best[last] = (0.0, None)
    for block in range(last - 1, first - 1, -1):
        for server in servers:
            if not server.start <= block < server.end:
                continue
            end = min(server.end, last)
            rest = best[end]
            if rest is None:
                continue
            total = cost(server, end - block) + rest[0]
            current = best[block]
            if current is None or total < current[0]:
                best[block] = (total, Hop(server, block, end))
    route: list[Hop] = []
    block = first
    while block < last:
        step = best[block]
        if step is None or step[1] is None:
            return None
        route.append(step[1])
        block = step[1].last
    return tuple(route)


def next_hop(servers: Sequence[SpanServer], first: int, last: int, cost: Cost) -> Hop | None:
    """The first hop of the cheapest route; None where there is no route."""
    route = plan_route(servers, first, last, cost)
    return route[0] if route else None


def hold_all(servers: Sequence[SpanServer], first: int, last: int) -> bool:
    """Whether these servers hold every block of first:last between them."""
    return plan_route(servers, first, last, lambda server, blocks: 0.0) is not None
