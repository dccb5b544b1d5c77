"""Which server next: pure functions over a snapshot of the directory.

A route is found from its end: the cheapest way from block b to the last block is the cheapest server that holds b, plus
the cheapest way from where that server ends. Costs are estimated seconds.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from petals_eval.swarm.wire.records import SpanServer

__all__ = ["Hop", "RouteIndex", "hold_all", "next_hop", "plan_route"]

Cost = Callable[[SpanServer, int], float]
"""Estimated seconds until a server has computed a number of its blocks for one micro-batch."""


@dataclass(frozen=True, slots=True)
class Hop:
    """Blocks first:last on one server."""

    server: SpanServer
    first: int
    last: int


class RouteIndex:
    """The servers of one snapshot by the blocks they hold, and the cheapest way on from each block.

    For large swarms: `plan` looks at every server of every block, which is worth doing once after a refresh; picking a
    server for a micro-batch then looks at the servers of one block only. In between, the way on from where a server
    ends is reckoned with the costs of the last `plan`, while the servers to pick from have their costs of now.
    """

    def __init__(self, servers: Iterable[SpanServer], num_blocks: int):
        self.num_blocks = num_blocks
        self._holders: list[list[SpanServer]] = [[] for _ in range(num_blocks)]
        for server in servers:
            for holders in self._holders[server.start : server.end]:
                holders.append(server)
        self._rest: list[float] = [math.inf] * num_blocks + [0.0]

    def holders(self, block: int) -> Sequence[SpanServer]:
        """The servers that hold a block."""
        return self._holders[block]

    def plan(self, cost: Cost, first: int = 0, last: int | None = None) -> None:
        """Reckon the cheapest way from each block of first:last to the last one; `last` None: the model's."""
        last = self.num_blocks if last is None else last
        self._rest = [math.inf] * (self.num_blocks + 1)
        self._rest[last] = 0.0
        for block in range(last - 1, first - 1, -1):
            hop = self.next_hop(block, cost, last)
            if hop is not None:
                self._rest[block] = cost(hop.server, hop.last - block) + self._rest[hop.last]

    def next_hop(
        self, block: int, cost: Cost, last: int | None = None, is_usable: Callable[[SpanServer], bool] | None = None
    ) -> Hop | None:
        """The best server of a block now; None where no way leads on to `last`, which must be that of `plan`."""
        last = self.num_blocks if last is None else last
        rest = self._rest
        best, chosen = math.inf, None
        for server in self._holders[block]:
            end = server.end if server.end < last else last
            after = rest[end]
            if after == math.inf or (is_usable is not None and not is_usable(server)):
                continue
            total = cost(server, end - block) + after
            if total < best:
                best, chosen = total, server
        return None if chosen is None else Hop(chosen, block, min(chosen.end, last))

    def route(self, first: int, cost: Cost, last: int | None = None) -> tuple[Hop, ...] | None:
        """The hops from block `first` on; None where there is a hole."""
        last = self.num_blocks if last is None else last
        hops: list[Hop] = []
        block = first
        while block < last:
            hop = self.next_hop(block, cost, last)
            if hop is None:
                return None
            hops.append(hop)
            block = hop.last
        return tuple(hops)


def plan_route(servers: Iterable[SpanServer], first: int, last: int, cost: Cost) -> tuple[Hop, ...] | None:
    """The cheapest hops from block `first` up to, not including, `last`; None where no server holds a block.

    A hop goes on to the end of its server's span: every hop costs a round trip, and stopping early saves none.
    """
    index = RouteIndex(servers, last)
    index.plan(cost, first)
    return index.route(first, cost)


def next_hop(servers: Iterable[SpanServer], first: int, last: int, cost: Cost) -> Hop | None:
    """The first hop of the cheapest route; None where there is no route."""
    index = RouteIndex(servers, last)
    index.plan(cost, first)
    return index.next_hop(first, cost) if first < last else None


def hold_all(servers: Iterable[SpanServer], first: int, last: int) -> bool:
    """Whether these servers hold every block of first:last between them."""
    reach = [0] * (last + 1)  # by block: how far a server leads that begins there, or before for the first
    for server in servers:
        start = min(max(server.start, first), last)
        reach[start] = max(reach[start], server.end)
    furthest = first
    for block in range(first, last):
        furthest = max(furthest, reach[block])
        if furthest <= block:
            return False
    return True
