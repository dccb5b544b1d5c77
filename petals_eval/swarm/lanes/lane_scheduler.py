"""Which lane a micro-batch goes through, how many there are, and what becomes of one that is lost."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import torch
from anyio import CancelScope

from petals_eval.errors import (
    ExampleError,
    NoSessionError,
    PeerAnswerError,
    PeerCacheFullError,
    PeerDistrustedError,
    PeerError,
    PeerLimitError,
    SwarmError,
)
from petals_eval.swarm.activations import Activations
from petals_eval.swarm.directory.routing import Hop, plan_route
from petals_eval.swarm.lanes.lane import Lane
from petals_eval.swarm.lanes.lane_trust import LaneTrust
from petals_eval.swarm.lanes.prefix import LaneSize, PrefixedRows
from petals_eval.swarm.peers.peer import PeerBook
from petals_eval.swarm.peers.peer_text import error_text, short_peer
from petals_eval.swarm.scheduling.admission import AdmissionQueues
from petals_eval.swarm.scheduling.router import Router
from petals_eval.swarm.sessions.route_session import RouteSession
from petals_eval.swarm.tasks import together
from petals_eval.swarm.transport.client import HopClient
from petals_eval.swarm.transport.rolling_back import rolls_back
from petals_eval.swarm.transport.rpc import ServedHop
from petals_eval.swarm.trust.acceptance import Acceptance
from petals_eval.swarm.trust.quarantine import Quarantine
from petals_eval.swarm.wire.records import SpanServer
from petals_eval.swarm.wire.server_info import may_roll_back
from petals_eval.swarm.wire.span import Span

__all__ = ["LanePolicy", "LaneScheduler"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LanePolicy:
    """When lanes are given up, and how many there may be. Times are seconds.

    least_share: of the positions, that must be in the prefix where nobody asks for lanes always.
    lanes_a_hop, most_rows: rows share a lane as far as there is room for so many lanes for each hop, and so many rows
        at most.
    first, reuses, most: lanes at once to begin with, one more for each so many micro-batches that found their prefix in
        one, and at most.
    most_bytes: of what enters each hop, kept at home for as long as a lane is open.
    idle: after which a lane that nobody uses is closed; servers end one by themselves after 300.
    longest: that a lane lives; servers end it after 1,800.
    patience, min_patience: times what the slowest micro-batch of late took, and seconds at least, until one is taken
        out of its lane and goes by forward calls.
    first_patience: for the first, of which nothing is known and which brings the prefix.
    first_rest, longest_rest: without lanes through a server that lost one; twice as long each time.
    look_again: until one that waits for a lane looks whether another may be opened.
    """

    least_share: float = 1 / 3
    lanes_a_hop: int = 6
    most_rows: int = 8
    first: int = 3
    reuses: int = 2
    most: int = 64
    most_bytes: int = 256 << 20
    idle: float = 60.0
    longest: float = 1500.0
    patience: float = 4.0
    min_patience: float = 5.0
    first_patience: float = 60.0
    first_rest: float = 5.0
    longest_rest: float = 600.0
    look_again: float = 1.0


Forward = Callable[[Activations, Span], Awaitable[tuple[Activations, tuple[ServedHop, ...]]]]
"""Runs activations through blocks by forward calls: `Pipeline.forward`."""


class LaneScheduler:
    """Used from the connection's event loop only."""

    def __init__(
        self,
        client: HopClient,
        acceptance: Acceptance,
        router: Router,
        queues: AdmissionQueues,
        quarantine: Quarantine,
        peers: PeerBook,
        on_failed: Callable[[Hop, PeerError], object],
    ):
        """on_failed: told of a server that answered wrongly. Whatever else goes wrong in a lane is not held against a
        server's forward calls, which follow at once."""
        self._client = client
        self._acceptance = acceptance
        self._trust = LaneTrust(client, acceptance, quarantine, peers)
        self._router = router
        self._queues = queues
        self._quarantine = quarantine
        self._peers = peers
        self._on_failed = on_failed
        self._settings, self._runtime = peers.settings, peers.runtime
        self._lanes: list[Lane] = []
        self._reused = 0  # micro-batches that found their prefix in a lane
        self._slowest = 0.0  # seconds that a position of a lane took of late
        self._watch: asyncio.Task[None] | None = None

    async def forward(
        self, work: PrefixedRows, span: Span, by_calls: Forward
    ) -> tuple[Activations, tuple[ServedHop, ...]]:
        """Return what the blocks make of the rows' own positions, and who computed them.

        by_calls: computes all of it where there is no lane for it, or that is lost on the way. Raises what that raises.
        """
        found = await self._in_lane(work, span)
        if found is not None:
            return found
        answer, hops = await by_calls(work.whole(span.start), span)
        return Activations(answer.hidden[:, work.prefix.end :], None, span.stop), hops

    async def _in_lane(self, work: PrefixedRows, span: Span) -> tuple[Activations, tuple[ServedHop, ...]] | None:
        """Do that in a lane; None where it is to go by forward calls: nothing of it has counted then."""
        lanes, saves = self._settings.lanes, work.prefix.end >= LanePolicy.least_share * work.end
        if lanes == "never" or self._settings.wire is not None or (lanes == "auto" and not saves):
            return None
        lane = await self._take(work, span)
        if lane is None:
            return None
        try:
            async with lane.turn:
                hidden = None if lane.is_lost else await self._through(lane, work)
        finally:
            lane.users -= 1
            lane.used_at = self._runtime.monotonic()
            if lane.is_lost:
                await self._close([lane])
            self._queues.notify_capacity()
        return None if hidden is None else (Activations(hidden, None, span.stop), lane.session.hops)

    # -- how large

    def rows(self, span: Span, positions: int) -> int:
        """Return how many rows of so many positions best share a lane: so many that there is room for a few lanes for
        each hop, for while one micro-batch is computed others are on their way. May be called from any thread."""
        servers = [each for each in self._quarantine.trusted() if each.span.overlaps(span)]
        room = {each.peer_id: self._room(each, span) // positions for each in servers}
        by_block = [
            max((room[each.peer_id] for each in servers if block in each.span), default=0)
            for block in range(span.start, span.stop)
        ]
        hops = plan_route(servers, span, lambda server, blocks: 1.0) or ()
        lanes = LanePolicy.lanes_a_hop * max(1, len(hops))
        return max(1, min(LanePolicy.most_rows, min(by_block, default=0) // lanes))

    def _room(self, server: SpanServer, span: Span) -> int:
        """Return the tokens of each block that lanes may take on a server, as far as is known."""
        left, most_free = server.record.cache_tokens_left, self._peers.of(server.peer_id).cache.most_free
        free = max(most_free or 0, (left or 0) // 2)  # keys and values count apart in the record
        return int(self._settings.cache_share * free) // max(1, len(server.span.common(span) or ()))

    # -- which lane

    async def _take(self, work: PrefixedRows, span: Span) -> Lane | None:
        """Return a lane that is this micro-batch's once it is its turn there; None where there is none to wait for.

        One whose prefix another is just computing waits for that one, and keeps nobody from other lanes meanwhile.
        """
        async with self._queues.turn(span.start):
            give_up = self._runtime.monotonic() + self._settings.deadline
            while True:
                lane = self._holder(work, span) or self._free(work, span) or await self._new(work, span)
                if lane is not None or self._runtime.monotonic() >= give_up:
                    break
                if not any(each.fits(work, span) for each in self._lanes):
                    return None
                await self._queues.wait_for_capacity(LanePolicy.look_again)
            if lane is not None:
                lane.users += 1
                lane.path = work.prefix.path
            return lane

    def _holder(self, work: PrefixedRows, span: Span) -> Lane | None:
        """Return the lane that holds, or soon will, all of a prefix that is more than a root, as every lane has one."""
        if work.prefix.before is None:
            return None
        return next((each for each in self._lanes if each.path[-1:] == (work.prefix,) and each.fits(work, span)), None)

    def _free(self, work: PrefixedRows, span: Span) -> Lane | None:
        """Return the lane that nobody uses which holds most of the prefix."""
        free = [each for each in self._lanes if not each.users and each.fits(work, span)]
        return max(free, key=lambda each: each.shared(work.prefix), default=None)

    async def _new(self, work: PrefixedRows, span: Span) -> Lane | None:
        """Return a lane that opens with its first micro-batch; None where no route has room for another."""
        size = work.lane_size
        if any(each.fits(work, span) for each in self._lanes):
            hops = self._route(span, size) if self._pays_another else None
        elif (hops := self._route(span, size)) is None:
            await self._close([each for each in self._lanes if not each.users])
            hops = self._route(span, size)
        hidden_size = work.hidden.shape[2]
        if hops is None or not await self._go_back(hops, hidden_size):
            return None
        nbytes = (len(hops) + 1) * size.rows * size.positions * hidden_size * torch.float32.itemsize
        if self._lanes and nbytes + sum(each.nbytes for each in self._lanes) > LanePolicy.most_bytes:
            return None

        async def find_hop(rest: Span, tokens: int, give_up: float) -> Hop:
            hops = self._route(rest, size, without=lane)
            if hops is None:
                raise NoSessionError(f"no lane through blocks {rest} now", ((rest.start, rest.stop),))
            return hops[0]

        session = RouteSession(
            self._client,
            self._acceptance,
            find_hop,
            self._on_hop_failed,
            self._router.holders,
            lambda change: None,  # whoever waits for a lane is not shown to wait
            self._peers,
            span=span,
            rows=size.rows,
            max_length=size.positions,
        )
        lane = Lane(session, size, tuple(hop.peer_id for hop in hops), nbytes, self._runtime.monotonic())
        self._lanes.append(lane)
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._close_idle())
        return lane

    @property
    def _pays_another(self) -> bool:
        """Whether to open another lane beside those that there are: each computes the prefix once more, which is what
        each micro-batch saves that finds it in a lane."""
        return len(self._lanes) < min(LanePolicy.most, LanePolicy.first + self._reused // LanePolicy.reuses)

    async def _go_back(self, hops: Sequence[Hop], hidden_size: int) -> bool:
        """Return whether the sessions of all these servers go back, which is tried out once, before any lane is there:
        then their caches may have no room for it."""
        asked = [rolls_back(self._client, self._peers.of(hop.peer_id), hop, hidden_size) for hop in hops]
        try:
            return all(await together(asked))
        except PeerError as error:
            _log.debug("no lane: %s", error_text(error))
            for hop in hops:
                self._rest(hop.peer_id)
            return False

    def _route(self, rest: Span, size: LaneSize, without: Lane | None = None) -> tuple[Hop, ...] | None:
        """Return the cheapest route of servers whose sessions go back and that have room for a lane.

        without: a lane that asks for itself.
        """
        tokens = size.rows * size.positions
        others = [each for each in self._lanes if each is not without]
        servers = [each for each in self._quarantine.trusted() if self._takes(each, rest, size, others)]

        def seconds(server: SpanServer, blocks: int) -> float:
            there = sum(each.tokens for each in others if server.peer_id in each.servers)
            return self._router.seconds(server, blocks, tokens + there)

        return plan_route(servers, rest, seconds)

    def _takes(self, server: SpanServer, rest: Span, size: LaneSize, others: Sequence[Lane]) -> bool:
        """Return whether a server's sessions go back, as far as is known, and our share of its cache has room beside
        these lanes, of which some have yet to open."""
        peer, blocks = self._peers.of(server.peer_id), len(server.span.common(rest) or ())
        need = size.rows * size.positions * blocks
        peer.cache.observe_record(server.record)
        most_free = peer.cache.most_free
        promised = sum(each.tokens for each in others if server.peer_id in each.planned and not each.is_open)
        taken = peer.cache.held + promised * blocks
        has_room = not taken if most_free is None else taken + need <= self._settings.cache_share * most_free
        return (
            has_room
            and blocks > 0
            and may_roll_back(server.record.version)
            and peer.may_be_called
            and peer.rolls_back.answer is not False
            and peer.lanes.goes_back.answer is not False
            and peer.lanes.rest_until <= self._runtime.monotonic()
            and peer.limits.session_refusal(size.rows, size.positions) is None
            and peer.cache.may_be_asked(need)
        )

    # -- through it

    async def _through(self, lane: Lane, work: PrefixedRows) -> torch.Tensor | None:
        """Return the answer; None where the lane was lost, which is noted."""
        route, started = lane.session.peer_ids, self._runtime.monotonic()
        computed = work.end - lane.kept(work.prefix)
        try:
            async with asyncio.timeout(self._patience(lane, work)):
                hidden, went_back = await lane.run(work)
            seconds = (self._runtime.monotonic() - started) / computed
            self._slowest = max(seconds, 0.9 * self._slowest)
            self._reused += went_back
            if not route or lane.session.peer_ids == route:
                calls = lane.session.recorded()
                await together([self._trust.accept(call, went_back=went_back) for call in calls])
        except (PeerError, SwarmError, ExampleError, TimeoutError) as error:
            _log.debug("a lane of %s is lost: %r", [short_peer(each) for each in route] or "no server yet", error)
            lane.is_lost = True
            if isinstance(error, TimeoutError):
                for peer_id in route:
                    self._rest(peer_id)
            return None
        except BaseException:
            lane.is_lost = True
            raise
        # What another server came in for has been computed from the first position, and is nobody's alone.
        lane.is_lost = bool(route) and lane.session.peer_ids != route
        if not lane.is_lost:
            for peer_id in route:
                self._peers.of(peer_id).lanes.on_used()
        return hidden

    def _patience(self, lane: Lane, work: PrefixedRows) -> float:
        """Return the seconds for a micro-batch, with what the lane does not hold of its prefix."""
        expected = self._slowest * (work.end - lane.kept(work.prefix))
        patience = max(LanePolicy.min_patience, LanePolicy.patience * expected)
        return min(self._settings.request_timeout, patience if expected else LanePolicy.first_patience)

    def _on_hop_failed(self, hop: Hop, error: PeerError) -> None:
        if isinstance(error, PeerAnswerError | PeerDistrustedError):
            self._on_failed(hop, error)
            return
        if isinstance(error, PeerCacheFullError | PeerLimitError):
            return  # its cache and its limits know when to ask it for another
        self._peers.of(hop.peer_id).retries += 1
        self._rest(hop.peer_id)

    def _rest(self, peer_id: str) -> None:
        """Open no lane there for a while."""
        lanes = self._peers.of(peer_id).lanes
        lanes.on_lost(self._runtime.monotonic(), LanePolicy.first_rest, LanePolicy.longest_rest)

    # -- the end of lanes

    async def _close_idle(self) -> None:
        while self._lanes:
            await asyncio.sleep(LanePolicy.idle / 4)
            await self._close(self._over())

    def _over(self) -> list[Lane]:
        """Return the lanes that nobody uses now, and nobody has for long, or that servers would end soon."""
        now = self._runtime.monotonic()
        return [
            each
            for each in self._lanes
            if not each.users and (now - each.used_at > LanePolicy.idle or now - each.opened_at > LanePolicy.longest)
        ]

    async def close_unused(self) -> None:
        """End the lanes that nobody uses now; one in which something is under way ends where that is cancelled."""
        await self._close([each for each in self._lanes if not each.users])
        if not self._lanes and self._watch is not None:
            self._watch.cancel()
            self._watch = None

    async def _close(self, lanes: list[Lane]) -> None:
        """Close lanes; nobody is given one of them any more."""
        for lane in lanes:
            lane.is_lost = True
        self._lanes = [each for each in self._lanes if each not in lanes]
        with CancelScope(shield=True):
            async with asyncio.TaskGroup() as group:
                for lane in lanes:
                    group.create_task(lane.session.close())
