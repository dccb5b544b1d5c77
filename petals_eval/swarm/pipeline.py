"""The way of a micro-batch through the swarm: hop by hop, on to another server where one fails, under a deadline."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import torch

from petals_eval.errors import (
    PeerCacheFullError,
    PeerDistrustedError,
    PeerError,
    PeerLimitError,
    PeerNoSessionError,
    PeerNotFiniteError,
    PeerTimeoutError,
)
from petals_eval.swarm.activations import Activations
from petals_eval.swarm.directory.directory import Directory
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.lanes.lane_scheduler import LaneScheduler
from petals_eval.swarm.lanes.prefix import Entering, PrefixedRows
from petals_eval.swarm.peers.limits import USUAL_MAX_TOKENS
from petals_eval.swarm.peers.peer import PeerBook
from petals_eval.swarm.scheduling.admission import Admission, AdmissionQueues
from petals_eval.swarm.scheduling.push_scheduler import PushScheduler
from petals_eval.swarm.scheduling.router import HopDeadline, PacePolicy, Router
from petals_eval.swarm.scheduling.swarm_status import SwarmStatus
from petals_eval.swarm.scheduling.tuning import Delivery, Tuning
from petals_eval.swarm.sessions.route_session import RouteSession
from petals_eval.swarm.transport.client import HopClient
from petals_eval.swarm.transport.rpc import Answer, ServedHop
from petals_eval.swarm.transport.transport import Transport
from petals_eval.swarm.trust.acceptance import Acceptance
from petals_eval.swarm.trust.arbiter import Arbiter
from petals_eval.swarm.trust.audit import ReplicaAudit
from petals_eval.swarm.trust.determinism_guard import DeterminismGuard
from petals_eval.swarm.trust.non_finite import raise_if_input_overflows
from petals_eval.swarm.trust.quarantine import Quarantine
from petals_eval.swarm.wire.codecs import LOSSY_CODES
from petals_eval.swarm.wire.messages import itemsize_of
from petals_eval.swarm.wire.span import Span

__all__ = ["Pipeline", "ServedHop", "SwarmStatus"]

_log = logging.getLogger(__name__)


class Pipeline:
    """Sends micro-batches along routes. Used from the connection's event loop only; `status` from any thread."""

    def __init__(self, transport: Transport, directory: Directory, peers: PeerBook):
        self.peers = peers
        self._directory = directory
        self._settings, self._runtime = peers.settings, peers.runtime
        self._under_way = 0
        self._client = client = HopClient(transport, peers)
        self.quarantine = Quarantine(directory, peers)
        self.guard = DeterminismGuard(client, self.quarantine, peers.settings)
        unaudited = Acceptance(client, peers, self.guard)
        arbiter = Arbiter(unaudited.run, directory, peers)
        self.audit = ReplicaAudit(arbiter, peers, self.quarantine)
        self._acceptance = accept = Acceptance(client, peers, self.guard, self.audit)
        self.queues = queues = AdmissionQueues()
        self.tuning = Tuning(peers.settings, peers.runtime)
        self._router = router = Router(directory, peers, self.quarantine, queues)
        self._pushes = PushScheduler(client, accept, router, queues, self.tuning.push, peers, self._on_failed)
        self.lanes = LaneScheduler(client, accept, router, queues, self.quarantine, peers, self._on_failed)

    async def forward(self, activations: Entering, span: Span) -> tuple[Activations, tuple[ServedHop, ...]]:
        """Run activations through these blocks, hop by hop; on to another server where one fails.

        Returns the hidden states in the last server's dtype, and who computed them.
        Raises MissingBlocksError or DeadlineError when a hop finds no server within the deadline, RequestTooLargeError
        when a single row is longer than the servers take, even in steps, NotFiniteError when it overflows their dtype.
        """
        if isinstance(activations, PrefixedRows):
            return await self.lanes.forward(activations, span, self.forward)
        hops: list[ServedHop] = []
        block = span.start
        delivery = self.tuning.choose(activations)
        deadline, non_finite = HopDeadline(), list[Hop]()
        self._under_way += 1
        try:
            if delivery is Delivery.PUSHED:
                for hop, answer in await self._pushes.push(activations, span, deadline):
                    hops.append(ServedHop.of(hop, answer.hidden))
                    block, activations = hop.span.stop, activations.after(answer.hidden, hop.span.stop)
                    deadline = HopDeadline()
            while block < span.stop:
                hop = await self._router.admit(activations, Span(block, span.stop), deadline)
                served = await self._hedged(hop, activations, deadline.give_up or 0.0, non_finite)
                if served is None:
                    if non_finite:
                        holders = self._router.holders(block)
                        await raise_if_input_overflows(self._client, non_finite, holders, activations)
                    continue
                hop, answer = served
                hops.append(ServedHop.of(hop, answer.hidden))
                block, activations = hop.span.stop, activations.after(answer.hidden, hop.span.stop)
                deadline, non_finite = HopDeadline(), []
        finally:
            self._under_way -= 1
            self.tuning.release(delivery)
        self._record(delivery, hops, activations)
        return activations, tuple(hops)

    def _record(self, delivery: Delivery, hops: list[ServedHop], answer: Activations) -> None:
        """Take in what a micro-batch that is back tells of the servers of its route."""
        windows = [(self.peers.of(hop.peer_id).window, hop.span.stop - hop.span.start) for hop in hops]
        stretch = min((window.stretch for window, _ in windows), default=1.0)
        self.tuning.record(delivery, [hop.version for hop in hops], answer.tokens, stretch)
        slowest = min((window.rate / blocks for window, blocks in windows if window.rate), default=0.0)
        if slowest and answer.tokens:
            farthest = max(window.min_rtt for window, _ in windows)
            self.tuning.size.on_delivered(slowest * answer.nbytes / answer.tokens, farthest)

    def positions_at_once(self, hidden_size: int, dtype: torch.dtype) -> int:
        """Return how many positions (rows x longest) of hidden states of this size and dtype to send at once."""
        limit = self._settings.max_tokens_per_call or USUAL_MAX_TOKENS
        itemsize = max((itemsize_of(name, dtype) for name in self._directory.snapshot.dtypes), default=dtype.itemsize)
        if self._settings.wire is not None:
            itemsize = min(itemsize, LOSSY_CODES[self._settings.wire].bytes_per_value)
        return max(1, min(limit, self.tuning.size.bytes // (hidden_size * itemsize)))

    async def _hedged(
        self, hop: Hop, activations: Activations, give_up: float, non_finite: list[Hop]
    ) -> tuple[Hop, Answer] | None:
        """Return the hop's answer, with who gave it; None where it failed.

        Where its server takes far longer than was to be expected and a replica is free, that one is asked, too, and so
        on; the first answer counts: one straggler would otherwise hold up the end of a run.
        non_finite: hops that answered with NaN or infinity, to be added to.
        """
        patience = until_next = self._router.patience(hop, activations.tokens)
        under_way = {self._start(hop, activations, give_up): hop}
        try:
            while under_way:
                done, _ = await asyncio.wait(under_way, timeout=until_next, return_when=asyncio.FIRST_COMPLETED)
                until_next = patience
                if not done:
                    asked_already = {each.peer_id for each in under_way.values()}
                    replica = self._router.free_replica(hop, activations, asked_already)
                    if replica is None:
                        until_next = PacePolicy.min_patience  # one may be free soon
                    else:
                        slow, other = (self.peers.of(each.peer_id).name for each in (hop, replica))
                        _log.debug("blocks %s: nothing from %s in time, %s is asked, too", hop.span, slow, other)
                        under_way[self._start(replica, activations, give_up)] = replica
                answers = []
                for call in [each for each in under_way if each in done]:  # a set has no order of its own
                    asked = under_way.pop(call)
                    try:
                        answers.append((asked, call.result()))
                    except PeerError as error:
                        if isinstance(error, PeerNotFiniteError):
                            non_finite.append(asked)
                        self._on_failed(asked, error)
                        until_next = 0.0
                if answers:
                    for slower in under_way.values():
                        self.peers.of(slower.peer_id).on_overtaken()
                    return answers[0]
            return None
        finally:
            for call in under_way:
                call.cancel()

    def _start(self, hop: Hop, activations: Activations, give_up: float) -> asyncio.Task[Answer]:
        """Send it now. The task raises PeerError, and PeerTimeoutError when nothing came by `give_up`."""
        peer, tokens = self.peers.of(hop.peer_id), activations.tokens
        if _log.isEnabledFor(logging.DEBUG):
            expected, window = self._router.seconds(hop.server, hop.blocks, tokens), peer.window
            limit = window.limit(hop.blocks)
            _log.debug(
                "blocks %s to %s: %d tokens, expected in %.3f s, window %.0f of %.0f token-blocks",
                *(hop.span, peer.name, tokens, expected, window.in_flight, limit),
            )
        sent = peer.send(tokens, hop.blocks)
        call = asyncio.create_task(self._run_by(give_up, hop, activations))

        def ended(call: asyncio.Task[Answer]) -> None:
            is_delivered = not call.cancelled() and call.exception() is None
            peer.settle(sent, tokens, is_delivered=is_delivered)
            took = self._runtime.monotonic() - sent.at
            _log.debug("blocks %s %s %s after %.3f s", hop.span, "by" if is_delivered else "not by", peer.name, took)
            self.queues.notify_capacity()

        call.add_done_callback(ended)
        return call

    async def _run_by(self, give_up: float, hop: Hop, activations: Activations) -> Answer:
        """Run a hop on its server. No call goes on after the deadline, however long a call may take."""
        peer = self.peers.of(hop.peer_id)
        try:
            async with asyncio.timeout(give_up - self._runtime.monotonic()):
                answer = await self._acceptance.run(hop, activations.entering(hop.span.start, hop.span.stop))
        except TimeoutError as error:
            began_with = peer.first_error_in_a_row if peer.is_failing else ""
            before = f"; before: {began_with}" if began_with else ""
            raise PeerTimeoutError(f"nothing by the deadline{before}") from error
        peer.on_succeeded(
            hop.server.span, tokens=activations.tokens, sent=answer.bytes_sent, received=answer.bytes_received
        )
        return answer

    def _on_failed(self, hop: Hop, error: PeerError) -> None:
        """The one retry policy. A server that is quarantined, or that only said how much it takes, has not failed; nor
        has one that gives no session: its cache knows when to ask it for another."""
        if isinstance(error, PeerDistrustedError | PeerLimitError | PeerCacheFullError | PeerNoSessionError):
            return
        peer = self.peers.of(hop.peer_id)
        peer.ask_anew()
        peer.on_failed(error)

    def session(self, span: Span, rows: int, max_length: int) -> RouteSession:
        """Return an inference session on these blocks, for `rows` rows of up to `max_length` positions."""
        admission = Admission(self.peers, rows, max_length, in_session=True)

        async def find_hop(rest: Span, tokens: int, give_up: float) -> Hop:
            return await self._router.find(rest, tokens, give_up, admission)

        def count_steps(change: int) -> None:
            self._under_way += change

        return RouteSession(
            self._client,
            self._acceptance,
            find_hop,
            self._on_failed,
            self._router.holders,
            count_steps,
            self.peers,
            span=span,
            rows=rows,
            max_length=max_length,
        )

    @asynccontextmanager
    async def streaming(self) -> AsyncIterator[None]:
        """Keep what is known of the servers fresh while the body sends micro-batches, and meet those that are new."""
        await self._directory.use()
        self._directory.users += 1
        meeting = [asyncio.create_task(self._client.meet(server)) for server in self._router.likely_servers()]
        try:
            yield
        finally:
            self._directory.users -= 1
            for task in meeting:
                task.cancel()
            self.tuning.push.pause()
            await self.lanes.close_unused()

    def status(self) -> SwarmStatus:
        """Return what a progress display shows."""
        peers = list(self.peers.values())
        used = tuple(peer.peer_id for peer in peers if peer.calls)
        notices = (*self.quarantine.notices, *(peer.cache.notice for peer in peers if peer.cache.notice))
        for_caches = self._router.waiting.for_caches  # where some wait for room in a cache, others may go on
        reason = for_caches[0] if len(for_caches) >= max(1, self._under_way) else None
        waiting = self._router.waiting.for_servers or reason
        return SwarmStatus(self.peers.retries, used, waiting, notices, self.quarantine.findings)
