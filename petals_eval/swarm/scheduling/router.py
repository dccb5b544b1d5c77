"""Where a micro-batch goes next among servers in good standing, and the wait for one, under a deadline."""

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from petals_eval.config import SwarmSettings
from petals_eval.errors import DeadlineError, MissingBlocksError
from petals_eval.swarm.directory.coverage import listed, what_is_missing, within
from petals_eval.swarm.directory.dht import Directory
from petals_eval.swarm.directory.routing import Cost, Hop, RouteIndex, hold_all, next_hop, plan_route
from petals_eval.swarm.peers.caches import LONGEST_WAIT, Wait
from petals_eval.swarm.peers.peer import PeerBook
from petals_eval.swarm.scheduling.capacity import Admission, is_ready
from petals_eval.swarm.trust.quarantine import Distrust
from petals_eval.swarm.wire.records import Snapshot, SpanServer

__all__ = ["HopFinder"]

FEW = 64
"""Servers of which every route is looked at anew for every micro-batch, which takes some tenths of a millisecond."""
PLAN_SHARE = 0.05
"""Of the time that planning ahead may take with more of them (`petals_eval.swarm.directory.routing.RouteIndex`)."""


@dataclass(frozen=True, slots=True)
class _Planned:
    """The ways on to block `last` in a snapshot. until: when to plan anew, monotonic."""

    index: RouteIndex
    snapshot: Snapshot
    last: int
    until: float


class HopFinder:
    """Used from the connection's event loop only.

    seconds: when a server would have computed a number of its blocks for a number of tokens.
    """

    def __init__(
        self,
        directory: Directory,
        peers: PeerBook,
        distrust: Distrust,
        settings: SwarmSettings,
        seconds: Callable[[SpanServer, int, int], float],
    ):
        self._directory = directory
        self._peers = peers
        self._distrust = distrust
        self._settings = settings
        self._seconds = seconds
        self._waiting: dict[object, str] = {}
        self._waiting_for_caches: dict[object, str] = {}
        self._planned: _Planned | None = None

    @property
    def waiting(self) -> str | None:
        """Why nothing moves, or None. Safe to read from any thread."""
        return next(iter(list(self._waiting.values())), None)

    @property
    def waiting_for_caches(self) -> tuple[str, ...]:
        """What those wait for that only need room in a cache; others may go on. Safe to read from any thread."""
        return tuple(self._waiting_for_caches.copy().values())

    async def find(self, position: int, last: int, tokens: int, give_up: float, admission: Admission) -> Hop:
        """The next hop of the cheapest route among servers in good standing; waits for one until `give_up`.

        tokens: of the micro-batch. admission: which servers take it; its refusal is raised where it leaves no route.
        """
        await self.begin()
        while isinstance(found := await self.find_or_wait(position, last, tokens, give_up, admission), Wait):
            await self.wait_for_cache(found, give_up)
        return found

    async def begin(self) -> None:
        """Before anything is planned: see to it that what is known of the servers is not old."""
        await self._directory.use()

    async def wait_for_cache(self, wait: Wait, give_up: float) -> None:
        """Wait until a server may be asked for room once more, or until `give_up`."""
        token = object()
        left = max(0.0, give_up - time.monotonic())
        self._waiting_for_caches[token] = f"{wait.why}; deadline in {_minutes(left)}"
        try:
            await asyncio.sleep(min(left, wait.seconds, LONGEST_WAIT))  # somebody else may have come since
        finally:
            del self._waiting_for_caches[token]

    async def find_or_wait(
        self, position: int, last: int, tokens: int, give_up: float, admission: Admission
    ) -> Hop | Wait:
        """Like `find`, but where nothing is missing but room in a server's cache, how long to wait for that: others
        need not."""
        token = object()
        looked_again = False
        try:
            while True:
                left = give_up - time.monotonic()
                every = list(self._directory.snapshot.servers.values())
                if left <= 0:  # also with servers to try: two that fail in turns are never both left alone
                    raise self._deadline_error(position, last, _waits(every, position, last, admission))
                if len(every) > FEW and (hop := self._ahead(position, last, tokens, admission)):
                    return hop
                refusals = {each.peer_id: error for each in every if (error := admission.refusal(each, position, last))}
                fitting = [server for server in every if server.peer_id not in refusals]
                if refusals and hold_all(every, position, last) and not hold_all(fitting, position, last):
                    raise next(iter(refusals.values()))
                servers = [server for server in fitting if self._peers.may_be_called(server.peer_id)]
                ready = [each for each in servers if is_ready(admission, each, position, last)]
                hop = next_hop(ready, position, last, self._cost(tokens))
                if hop is not None:
                    return hop
                if len(ready) < len(servers) and hold_all(servers, position, last):
                    return _first_of(_waits(servers, position, last, admission), position, last)
                if hold_all(fitting, position, last) and not hold_all(self._distrust.trusted(), position, last):
                    if not looked_again:  # somebody else may have come since
                        looked_again = True
                        await self._directory.refresh(older_than=self._settings.missing_update_period)
                        continue
                    hop = self._distrust.last_resort(fitting, position, last)
                    if hop is not None:
                        return hop
                self._waiting[token] = f"{self._what_is_missing(position, last, left)}; deadline in {_minutes(left)}"
                await asyncio.sleep(min(left, self._settings.missing_update_period / 4))
                await self._directory.refresh(older_than=self._settings.missing_update_period)
        finally:
            self._waiting.pop(token, None)

    def _ahead(self, position: int, last: int, tokens: int, admission: Admission) -> Hop | None:
        """The hop by a plan that may be a little old; None where it leads nowhere, which is then to be looked into."""
        snapshot, now = self._directory.snapshot, time.monotonic()
        planned = self._planned
        if planned is None or planned.snapshot is not snapshot or planned.last != last or now > planned.until:
            index = RouteIndex(snapshot.servers.values(), last)
            usable = self._peers.may_be_called
            seconds = self._seconds
            index.plan(lambda each, blocks: seconds(each, blocks, tokens) if usable(each.peer_id) else math.inf)
            ended = time.monotonic()
            planned = self._planned = _Planned(index, snapshot, last, until=ended + (ended - now) / PLAN_SHARE)

        def fits(server: SpanServer) -> bool:
            return (
                self._peers.may_be_called(server.peer_id)
                and admission.refusal(server, position, last) is None
                and is_ready(admission, server, position, last)
            )

        return planned.index.next_hop(position, self._cost(tokens), is_usable=fits)

    def _cost(self, tokens: int) -> Cost:
        return lambda server, blocks: self._seconds(server, blocks, tokens)

    def plan(self, first: int, last: int, tokens: int) -> tuple[Hop, ...] | None:
        """The cheapest route among servers in good standing now."""
        servers = [each for each in self._distrust.trusted() if self._peers.may_be_called(each.peer_id)]
        return plan_route(servers, first, last, self._cost(tokens))

    def others_of(self, hop: Hop) -> list[Hop]:
        """The same blocks on other servers in good standing."""
        return [
            Hop(server, hop.first, hop.last)
            for server in self._distrust.trusted()
            if server.peer_id != hop.server.peer_id
            and server.start <= hop.first
            and hop.last <= server.end
            and self._peers.may_be_called(server.peer_id)
        ]

    def holders(self, block: int) -> list[str]:
        """The servers (peer ids) of a block that were not left out."""
        return [server.peer_id for server in self._distrust.trusted() if server.start <= block < server.end]

    def _what_is_missing(self, position: int, last: int, left: float) -> str:
        since = time.time() - (self._settings.deadline - left)
        return what_is_missing(self._directory, self._peers, position, last, since)

    def _deadline_error(self, position: int, last: int, waits: list[Wait]) -> MissingBlocksError | DeadlineError:
        """waits: for room in caches, which is what was lacking where no blocks are missing."""
        absent = within(self._directory.snapshot.missing(), position, last)
        for_caches = _first_of(waits, position, last).why if waits and not absent else None
        reason = for_caches or self._what_is_missing(position, last, 0.0)
        message = f"stopped at the deadline ({_span_of_time(self._settings.deadline)}): {reason}"
        return MissingBlocksError(message, absent) if absent else DeadlineError(message)


def _waits(servers: Iterable[SpanServer], position: int, last: int, admission: Admission) -> list[Wait]:
    return [wait for each in servers if (wait := admission.wait(each, position, last)) is not None]


def _first_of(waits: Sequence[Wait], position: int, last: int) -> Wait:
    """Until the first server may be asked again, and what is known of them all."""
    why = f"no server of blocks {position}:{last} has room for a session now: {listed(wait.why for wait in waits)}"
    return Wait(min((wait.seconds for wait in waits if not wait.is_over), default=0.0), why)


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60:02d}:{int(seconds) % 60:02d}"


def _span_of_time(seconds: float) -> str:
    return f"{seconds / 60:g} min" if seconds >= 60 else f"{seconds:g} s"
