"""Routes planned ahead, for swarms that are too large to look at every route for every micro-batch."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from petals_eval.swarm.directory.routing import Cost, Hop, RouteIndex, next_hop
from petals_eval.swarm.runtime import Runtime
from petals_eval.swarm.wire.records import Snapshot, SpanServer
from petals_eval.swarm.wire.span import Span

__all__ = ["PlanPolicy", "PlannedRoutes"]


@dataclass(frozen=True)
class PlanPolicy:
    """When routes are planned ahead.

    few: servers of which every route is looked at anew for every micro-batch, which takes some tenths of a millisecond.
    max_share: of the time that planning ahead may take with more of them (`directory.routing.RouteIndex`).
    """

    few: int = 64
    max_share: float = 0.05


class PlannedRoutes:
    """The ways on from each block, by a plan that may be a little old."""

    def __init__(self, runtime: Runtime):
        self._runtime = runtime
        self._snapshot: Snapshot | None = None
        self._index = RouteIndex([], 0)
        self._until = 0.0  # then to be planned anew

    def next_hop(
        self,
        snapshot: Snapshot,
        rest: Span,
        cost: Cost,
        may_be_called: Callable[[SpanServer], bool],
        fits: Callable[[SpanServer], bool],
    ) -> Hop | None:
        """Return the hop that begins the cheapest way on; None where it leads nowhere, which is to be looked into.

        may_be_called: asked when a plan is made. fits: asked of the servers of the next block now.
        """
        now = self._runtime.monotonic()
        if self._snapshot is not snapshot or self._index.stop != rest.stop or now > self._until:
            self._snapshot, self._index = snapshot, RouteIndex(snapshot.servers.values(), rest.stop)
            self._index.plan(lambda each, blocks: cost(each, blocks) if may_be_called(each) else math.inf)
            ended = self._runtime.monotonic()
            self._until = ended + (ended - now) / PlanPolicy.max_share
        return self._index.next_hop(rest.start, cost, is_usable=fits)

    def free_hop(
        self,
        snapshot: Snapshot,
        rest: Span,
        cost: Cost,
        takes: Callable[[SpanServer], bool],
        is_free: Callable[[SpanServer], bool],
    ) -> Hop | None:
        """Return the hop that begins the cheapest way on with a server that is free; by a plan of now, or where servers
        are many by the last one of their next hops.

        takes: asked of all servers, or where they are many of those of the next block.
        """
        if len(snapshot.servers) <= PlanPolicy.few:
            return next_hop([each for each in snapshot.servers.values() if takes(each)], rest, cost, is_free)
        if self._snapshot is not snapshot or self._index.stop != rest.stop:
            return None  # planned by whoever looks for the best one
        return self._index.next_hop(rest.start, cost, lambda server: takes(server) and is_free(server))

    def holders(self, snapshot: Snapshot, block: int) -> Iterable[SpanServer]:
        """Return the servers that may hold a block: of many those that do, once there is a plan of the snapshot."""
        planned = self._snapshot is snapshot and block < self._index.stop
        return self._index.holders(block) if planned else snapshot.servers.values()
