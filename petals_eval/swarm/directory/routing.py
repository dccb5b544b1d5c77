"""Which server next: pure functions over a snapshot of the directory.

A route is found from its end: the cheapest way from block b to the last one is the cheapest server that holds b, plus
the cheapest way from where that server stops. Costs are estimated seconds.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from petals_eval.swarm.wire.records import SpanServer
from petals_eval.swarm.wire.span import Span

__all__ = ["Cost", "Hop", "RouteIndex", "hold_all", "next_hop", "plan_route"]

Cost = Callable[[SpanServer, int], float]
"""Estimated seconds until a server has computed a number of its blocks for one micro-batch."""


@dataclass(frozen=True, slots=True)
class Hop:
    """Blocks on the server that is to compute them."""

    server: SpanServer
    span: Span

    @property
    def peer_id(self) -> str:
        """The server's identity."""
        return self.server.peer_id

    @property
    def blocks(self) -> int:
        """How many blocks these are."""
        return self.span.stop - self.span.start


class RouteIndex:
    """The servers of one snapshot by the blocks they hold, and the cheapest way on from each block up to `stop`.

    For large swarms: `plan` looks at every server of every block, which is worth doing once after a refresh; picking a
    server for a micro-batch then looks at the servers of one block only. In between, the way on from where a server
    stops is reckoned with the costs of the last `plan`, while the servers to pick from have their costs of now.
    """

    def __init__(self, servers: Iterable[SpanServer], stop: int):
        self.stop = stop
        self._holders: list[list[SpanServer]] = [[] for _ in range(stop)]
        self._stops = set[int]()
        for server in servers:
            self._stops.add(server.span.stop)
            for holders in self._holders[server.span.start : server.span.stop]:
                holders.append(server)
        self._rest: list[float] = [math.inf] * stop + [0.0]

    def holders(self, block: int) -> Sequence[SpanServer]:
        """Return the servers that hold a block."""
        return self._holders[block]

    def plan(self, cost: Cost, start: int = 0) -> None:
        """Reckon the cheapest way on from each block after `start` at which some server stops: nobody enters others."""
        self._rest = [math.inf] * self.stop + [0.0]
        for block in sorted((each for each in self._stops if start < each < self.stop), reverse=True):
            hop = self.next_hop(block, cost)
            if hop is not None:
                self._rest[block] = cost(hop.server, hop.blocks) + self._rest[hop.span.stop]

    def next_hop(self, block: int, cost: Cost, is_usable: Callable[[SpanServer], bool] | None = None) -> Hop | None:
        """Return the hop that begins the cheapest way on from a block; None where no way leads on."""
        rest = self._rest
        best, chosen = math.inf, None
        for server in self._holders[block]:
            stop = server.span.stop if server.span.stop < self.stop else self.stop
            after = rest[stop]
            if after == math.inf or (is_usable is not None and not is_usable(server)):
                continue
            total = cost(server, stop - block) + after
            if total < best:
                best, chosen = total, server
        return None if chosen is None else Hop(chosen, Span(block, min(chosen.span.stop, self.stop)))

    def route(self, start: int, cost: Cost) -> tuple[Hop, ...] | None:
        """Return the hops from block `start` on; None where there is a hole."""
        hops: list[Hop] = []
        block = start
        while block < self.stop:
            hop = self.next_hop(block, cost)
            if hop is None:
                return None
            hops.append(hop)
            block = hop.span.stop
        return tuple(hops)


def plan_route(servers: Iterable[SpanServer], span: Span, cost: Cost) -> tuple[Hop, ...] | None:
    """Return the cheapest hops through these blocks; None where no server holds one of them.

    A hop goes on to the end of its server's span: every hop costs a round trip, and stopping early saves none.
    """
    index = RouteIndex(servers, span.stop)
    index.plan(cost, span.start)
    return index.route(span.start, cost)


def next_hop(
    servers: Iterable[SpanServer], span: Span, cost: Cost, is_usable: Callable[[SpanServer], bool] | None = None
) -> Hop | None:
    """Return the first hop, on a usable server, of the cheapest route through these blocks; None without a route."""
    index = RouteIndex(servers, span.stop)
    index.plan(cost, span.start)
    return index.next_hop(span.start, cost, is_usable) if span.start < span.stop else None


def hold_all(servers: Iterable[SpanServer], span: Span) -> bool:
    """Return whether these servers hold every one of these blocks between them."""
    reach = [0] * (span.stop + 1)  # by block: how far a server leads that begins there, or before for the first
    for server in servers:
        start = min(max(server.span.start, span.start), span.stop)
        reach[start] = max(reach[start], server.span.stop)
    furthest = span.start
    for block in range(span.start, span.stop):
        furthest = max(furthest, reach[block])
        if furthest <= block:
            return False
    return True
