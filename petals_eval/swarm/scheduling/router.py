"""The router: which server a micro-batch goes to next, among those in good standing, and the wait for one."""

import asyncio
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from petals_eval.swarm.activations import Activations
from petals_eval.swarm.directory.directory import Directory
from petals_eval.swarm.directory.routing import Cost, Hop, hold_all, next_hop, plan_route
from petals_eval.swarm.peers.limits import USUAL_MAX_TOKENS
from petals_eval.swarm.peers.peer import PeerBook
from petals_eval.swarm.peers.session_cache import CachePolicy, Wait
from petals_eval.swarm.scheduling.admission import Admission, AdmissionQueues
from petals_eval.swarm.scheduling.planned_routes import PlannedRoutes, PlanPolicy
from petals_eval.swarm.scheduling.waiting import WaitingList, first_of
from petals_eval.swarm.trust.quarantine import Quarantine
from petals_eval.swarm.wire.records import ServerRecord, SpanServer
from petals_eval.swarm.wire.span import Span

__all__ = ["HopDeadline", "PacePolicy", "Router"]


@dataclass(frozen=True)
class PacePolicy:
    """What servers are expected to take. Times are seconds.

    hop_overhead: that a hop costs before any token is computed, as long as nothing was measured.
    unmeasured: per token and block of a server not called yet that claims no pace (`forward_rps` in its record):
        optimistic, so that every server gets its first call.
    quickest_claim, slowest_claim: what a claim may come to: nobody draws all work by a word, and nobody is shut out by
        one.
    patience, min_patience: times what a call was expected to take, and seconds at least, before another server is asked
        as well.
    first_patience: for the first call, of which nothing is known.
    shortest_pause: between two calls to a server that is worth a timer.
    """

    hop_overhead: float = 0.02
    unmeasured: float = 1e-5
    quickest_claim: float = 1e-6
    slowest_claim: float = 1e-4
    patience: float = 3.0
    min_patience: float = 1.0
    first_patience: float = 30.0
    shortest_pause: float = 0.0005


@dataclass(slots=True)
class HopDeadline:
    """When a hop of a micro-batch is given up, on the runtime's clock; None before its first turn in the queue."""

    give_up: float | None = None


class Router:
    """Used from the connection's event loop only; `waiting` from any thread."""

    def __init__(self, directory: Directory, peers: PeerBook, quarantine: Quarantine, queues: AdmissionQueues):
        self._directory = directory
        self._peers = peers
        self._quarantine = quarantine
        self._queues = queues
        self._settings, self._runtime = peers.settings, peers.runtime
        self.waiting = WaitingList(directory, peers)
        self._planned = PlannedRoutes(peers.runtime)

    # -- what a server is expected to take

    def seconds(self, server: SpanServer, blocks: int, tokens: int) -> float:
        """Return when the answer would come, by what was measured of the server, and before that by what it claims."""
        window = self._peers.of(server.peer_id).window
        return PacePolicy.hop_overhead + window.seconds_for(float(tokens * blocks), self._claimed(server.record))

    def patience(self, hop: Hop, tokens: int) -> float:
        """Return the seconds after which a call is a straggler."""
        if self._peers.of(hop.peer_id).window.rate is None:
            return PacePolicy.first_patience
        return max(PacePolicy.min_patience, PacePolicy.patience * self.seconds(hop.server, hop.blocks, tokens))

    def pause(self, hop: Hop, tokens: int) -> float:
        """Return the seconds until another call may leave for the server; infinity until one of its calls has ended."""
        window = self._peers.of(hop.peer_id).window
        if not window.has_room(float(tokens * hop.blocks), hop.blocks):
            return math.inf
        return window.pause(self._runtime.monotonic())

    def _claimed(self, record: ServerRecord) -> float:
        """Return seconds per token and block. Petals servers measure `forward_rps` as they start: tokens a second for a
        block."""
        if not record.forward_rps:
            return PacePolicy.unmeasured
        return min(PacePolicy.slowest_claim, max(PacePolicy.quickest_claim, 1 / record.forward_rps))

    def _cost(self, tokens: int) -> Cost:
        """Return what servers are chosen by: whatever is to be preferred, beyond the seconds expected, belongs here."""
        return lambda server, blocks: self.seconds(server, blocks, tokens)

    # -- the next hop

    async def admit(self, activations: Activations, rest: Span, deadline: HopDeadline) -> Hop:
        """Return the hop that would be done soonest, once it is this micro-batch's turn and a window has room.

        rest: the blocks that are left of the route. Raises MissingBlocksError or DeadlineError at the deadline, and
        what the servers that are left can never take.
        """
        admission = Admission(self._peers, activations.rows, activations.positions)
        while True:
            # The deadline begins with the first turn: to wait in the queue before that is nobody's failure.
            left = None if deadline.give_up is None else deadline.give_up - self._runtime.monotonic()
            async with self._queues.turn(rest.start, left):
                give_up = deadline.give_up = deadline.give_up or self._runtime.monotonic() + self._settings.deadline
                found = await self._with_room(activations, rest, give_up, admission)
            if not isinstance(found, Wait):
                return found
            await self._wait_for_cache(found, give_up)  # out of the queue: those behind it may need no room in a cache

    async def _with_room(
        self, activations: Activations, rest: Span, give_up: float, admission: Admission
    ) -> Hop | Wait:
        tokens = activations.tokens
        while True:
            hop = await self._find_or_wait(rest, tokens, give_up, admission)
            if isinstance(hop, Wait) or self._settings.window:
                return hop
            pause = self.pause(hop, tokens)
            if pause < PacePolicy.shortest_pause:
                return hop
            other = self._free_hop(rest, tokens, admission)
            if other is not None and self._serves_all(other, hop, tokens):
                return other
            await self._queues.wait_for_capacity(min(pause, give_up - self._runtime.monotonic()))

    def _free_hop(self, rest: Span, tokens: int, admission: Admission) -> Hop | None:
        """Return the first hop of the cheapest way on that begins with a server which could begin at once: that need be
        no replica of one that is busy, for another way on may pass it by, or leave it less to do."""

        def takes(server: SpanServer) -> bool:
            return self._takes(server, rest, admission)

        def is_free(server: SpanServer) -> bool:
            return self.pause(Hop(server, server.span.common(rest) or rest), tokens) < PacePolicy.shortest_pause

        return self._planned.free_hop(self._directory.snapshot, rest, self._cost(tokens), takes, is_free)

    def _serves_all(self, other: Hop, hop: Hop, tokens: int) -> bool:
        """Return whether to send to a server that would be done later than the hop's, which is busy now.

        This micro-batch would be back sooner if it waited, but those behind it wait as well: with more to come the
        other is better used than not, and at the end of a run as long as the hop's would not be through before it.
        """
        if self._queues.producing:
            return True
        all_waiting = tokens * self._queues.length(hop.span.start)
        return self.seconds(other.server, other.blocks, tokens) <= self.seconds(hop.server, hop.blocks, all_waiting)

    async def find(self, rest: Span, tokens: int, give_up: float, admission: Admission) -> Hop:
        """Return the next hop of the cheapest route among servers in good standing; wait for one until `give_up`.

        admission: which servers take it; its refusal is raised where it leaves no route.
        """
        await self._directory.use()
        while isinstance(found := await self._find_or_wait(rest, tokens, give_up, admission), Wait):
            await self._wait_for_cache(found, give_up)
        return found

    async def _find_or_wait(self, rest: Span, tokens: int, give_up: float, admission: Admission) -> Hop | Wait:
        """Like `find`, but where nothing is missing but room in a server's cache, return how long to wait for that:
        others need not."""
        has_looked_again = False
        while True:
            left = give_up - self._runtime.monotonic()
            every = list(self._directory.snapshot.servers.values())
            if left <= 0:  # also with servers to try: two that fail in turns are never both left alone
                raise self.waiting.deadline_error(rest, _waits(every, rest, admission))
            if len(every) > PlanPolicy.few and (hop := self._planned_hop(rest, tokens, admission)):
                return hop
            refusals = {each.peer_id: error for each in every if (error := admission.refusal(each, rest))}
            fitting = [server for server in every if server.peer_id not in refusals]
            if refusals and hold_all(every, rest) and not hold_all(fitting, rest):
                raise next(iter(refusals.values()))
            servers = [server for server in fitting if self._peers.of(server.peer_id).may_be_called]
            ready = [each for each in servers if admission.is_ready(each, rest)]
            hop = next_hop(ready, rest, self._cost(tokens))
            if hop is not None:
                return hop
            if len(ready) < len(servers) and hold_all(servers, rest):
                return first_of(_waits(servers, rest, admission), rest)
            if hold_all(fitting, rest) and not hold_all(self._quarantine.trusted(), rest):
                if not has_looked_again:  # somebody else may have come since
                    has_looked_again = True
                    await self._directory.refresh(older_than=self._settings.missing_update_period)
                    continue
                hop = self._quarantine.fallback_hop(fitting, rest)
                if hop is not None:
                    return hop
            with self.waiting.server(rest, left):
                await asyncio.sleep(min(left, self._settings.missing_update_period / 4))
                await self._directory.refresh(older_than=self._settings.missing_update_period)

    async def _wait_for_cache(self, wait: Wait, give_up: float) -> None:
        """Wait until a server may be asked for room once more, or until `give_up`."""
        left = max(0.0, give_up - self._runtime.monotonic())
        with self.waiting.cache(wait, left):
            # Not for longer than a full cache is left alone: somebody else may have come since.
            await asyncio.sleep(min(left, wait.seconds, CachePolicy.longest_wait))

    def _planned_hop(self, rest: Span, tokens: int, admission: Admission) -> Hop | None:
        def fits(server: SpanServer) -> bool:
            return self._takes(server, rest, admission)

        return self._planned.next_hop(self._directory.snapshot, rest, self._cost(tokens), self._may_be_called, fits)

    def _takes(self, server: SpanServer, rest: Span, admission: Admission) -> bool:
        standing = self._may_be_called(server)
        return standing and admission.refusal(server, rest) is None and admission.is_ready(server, rest)

    def _may_be_called(self, server: SpanServer) -> bool:
        return self._peers.of(server.peer_id).may_be_called

    # -- other ways

    def plan(self, span: Span, tokens: int) -> tuple[Hop, ...] | None:
        """Return the cheapest route among servers in good standing now."""
        servers = [each for each in self._quarantine.trusted() if self._may_be_called(each)]
        return plan_route(servers, span, self._cost(tokens))

    def free_replica(self, hop: Hop, activations: Activations, without: Collection[str]) -> Hop | None:
        """Return the same blocks on the server that would be done soonest, of those that could begin at once.

        without: servers (peer ids) that are not meant.
        """
        admission, tokens = Admission(self._peers, activations.rows, activations.positions), activations.tokens
        free = [
            other
            for server in self._planned.holders(self._directory.snapshot, hop.span.start)
            if server.peer_id not in without
            and hop.span.within(server.span)
            and self._takes(server, hop.span, admission)
            and self.pause(other := Hop(server, hop.span), tokens) < PacePolicy.shortest_pause
        ]
        cost = self._cost(tokens)
        return min(free, key=lambda other: cost(other.server, other.blocks), default=None)

    def likely_servers(self) -> list[SpanServer]:
        """Return the servers that work will go to first, some at most, and none that is known already."""
        new = [
            server
            for server in self._quarantine.trusted()
            if self._may_be_called(server) and self._peers.of(server.peer_id).info.is_open
        ]
        cost = self._cost(USUAL_MAX_TOKENS)
        return sorted(new, key=lambda each: cost(each, len(each.span)) / len(each.span))[: PlanPolicy.few]

    def holders(self, block: int) -> list[str]:
        """Return the servers (peer ids) of a block that are not quarantined."""
        return [server.peer_id for server in self._quarantine.trusted() if block in server.span]


def _waits(servers: Iterable[SpanServer], rest: Span, admission: Admission) -> list[Wait]:
    return [wait for each in servers if (wait := admission.wait(each, rest)) is not None]
