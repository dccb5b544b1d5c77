"""Micro-batches that servers push along a whole route: which routes take them, how many at once, what came of them."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from petals_eval.errors import (
    PeerAnswerError,
    PeerCacheFullError,
    PeerDistrustedError,
    PeerError,
    PeerLimitError,
    PeerNoSessionError,
    PeerTimeoutError,
)
from petals_eval.swarm.activations import Activations
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.peers.limits import USUAL_MAX_TOKENS
from petals_eval.swarm.peers.peer import PeerBook
from petals_eval.swarm.peers.window import CongestionWindow
from petals_eval.swarm.scheduling.admission import AdmissionQueues
from petals_eval.swarm.scheduling.router import HopDeadline, PacePolicy, Router
from petals_eval.swarm.scheduling.tuning import PushChoice
from petals_eval.swarm.transport.client import HopClient
from petals_eval.swarm.transport.push import Pushed, push
from petals_eval.swarm.transport.rpc import Answer
from petals_eval.swarm.trust.acceptance import Acceptance
from petals_eval.swarm.trust.recorded_call import RecordedCall
from petals_eval.swarm.wire.server_info import may_push
from petals_eval.swarm.wire.span import Span

__all__ = ["PushScheduler", "PushSchedulerPolicy"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PushSchedulerPolicy:
    """When a push is given up, and what it may take. Times are seconds.

    patience, min_patience: times what the hops were expected to take, and seconds at least, until the rest goes the
        ordinary way.
    first_rest, longest_rest: without pushing through a server that did not do it; twice as long each time.
    cache_share: of `cache_tokens_left`, where Petals counts keys and values apart: half of the room. Others have
        sessions, too.
    look_again: until a route without room is planned anew.
    """

    patience: float = 3.0
    min_patience: float = 3.0
    first_rest: float = 5.0
    longest_rest: float = 600.0
    cache_share: float = 0.25
    look_again: float = 1.0


class PushScheduler:
    """Used from the connection's event loop only."""

    def __init__(
        self,
        client: HopClient,
        acceptance: Acceptance,
        router: Router,
        queues: AdmissionQueues,
        choice: PushChoice,
        peers: PeerBook,
        on_failed: Callable[[Hop, PeerError], object],
    ):
        """on_failed: told of a server that answered wrongly. Whatever else goes wrong in a session is not held against
        a server's ordinary calls, which follow at once: one that takes no sessions may still be the only one that holds
        its blocks."""
        self._client = client
        self._acceptance = acceptance
        self._router = router
        self._queues = queues
        self._choice = choice
        self._peers = peers
        self._on_failed = on_failed
        self._settings, self._runtime = peers.settings, peers.runtime
        self._windows: dict[Span, CongestionWindow] = {}  # by the blocks of the route: whatever its hops

    async def push(self, activations: Activations, span: Span, deadline: HopDeadline) -> list[tuple[Hop, Answer]]:
        """Push activations without prompts through these blocks, once there is room for it.

        deadline: of the first hop, whose time this takes where nothing comes of it.
        Returns the hops that answered, in order: none where the route does not push, not all where something went wrong
        on the way.
        """
        window = self._windows.setdefault(span, CongestionWindow())
        tokens = activations.tokens
        work = float(tokens * len(span))
        async with self._queues.turn(span.start):
            give_up = deadline.give_up = self._runtime.monotonic() + self._settings.deadline
            while True:
                hops = self._router.plan(span, tokens)
                if hops is None or not self._takes(hops, activations) or self._runtime.monotonic() >= give_up:
                    return []
                window.min_rtt = sum(self._peers.of(hop.peer_id).window.min_rtt for hop in hops)
                has_room = self._settings.window or window.has_room(work, len(span), len(hops))
                if has_room and self._has_cache(hops, activations):
                    break
                await self._queues.wait_for_capacity(PushSchedulerPolicy.look_again)
            patience = min(self._patience(hops, activations), give_up - self._runtime.monotonic())
            whole = window.send(work, self._runtime.monotonic())
            peers = [self._peers.of(hop.peer_id) for hop in hops]
            sent = [peer.send(tokens, hop.blocks) for peer, hop in zip(peers, hops, strict=True)]
            for peer, one in zip(peers, sent, strict=True):
                peer.push_tokens_reserved += one.work
        pushed = Pushed(())
        try:
            pushed = await self._through(hops, activations, patience, give_up)
        finally:
            answered = len(pushed.answers)
            for index, (peer, one) in enumerate(zip(peers, sent, strict=True)):
                peer.push_tokens_reserved -= one.work
                peer.settle(one, tokens, is_delivered=index < answered)
            window.settle(whole, self._runtime.monotonic(), is_delivered=answered == len(hops))
            self._queues.notify_capacity()
        self._note(hops, activations, pushed)
        return list(zip(hops[: len(pushed.answers)], pushed.answers, strict=True))

    async def _through(self, hops: Sequence[Hop], activations: Activations, timeout: float, give_up: float) -> Pushed:
        """Push, and accept each answer as any other. A server that has yet to be probed has `timeout` seconds for it.

        Only the first server is probed before: what the others are given is known when they have answered.
        """
        try:
            await self._ready(hops[0], activations, timeout, give_up)
        except PeerError as error:
            return Pushed((), error, 0)
        for index, hop in enumerate(hops):
            peer = self._peers.of(hop.peer_id)
            peer.window.mark_started(self._runtime.monotonic())
            if peer.distrusted is not None:
                return Pushed((), peer.distrusted, index)
        pushed = await push(self._client, hops, activations, timeout)
        for index, answer in enumerate(pushed.answers):
            try:
                if index > 0:
                    await self._ready(hops[index], activations, timeout, give_up)
                call = RecordedCall(hops[index], activations, answer.hidden, seconds=answer.seconds)
                await self._acceptance.accept(call)
            except PeerError as error:
                return Pushed(pushed.answers[:index], error, index)
            activations = activations.after(answer.hidden, hops[index].span.stop)
        return pushed

    async def _ready(self, hop: Hop, activations: Activations, timeout: float, give_up: float) -> None:
        seconds = min(timeout, give_up - self._runtime.monotonic())
        try:
            async with asyncio.timeout(seconds):
                await self._acceptance.ready(hop, activations)
        except TimeoutError as error:
            raise PeerTimeoutError(f"no answer to a question within {seconds:.3g} s") from error

    def _takes(self, hops: Sequence[Hop], activations: Activations) -> bool:
        """Return whether every server of the route, as far as is known, takes this in one step and passes it on."""
        now = self._runtime.monotonic()
        return len(hops) > 1 and all(
            may_push(hop.server.record.version)
            and activations.tokens <= (peer.limits.per_call or USUAL_MAX_TOKENS)
            and peer.limits.session_refusal(activations.rows, activations.positions) is None
            and peer.cache.may_be_asked(activations.tokens * hop.blocks)
            and peer.push_rest_until <= now
            for hop, peer in ((hop, self._peers.of(hop.peer_id)) for hop in hops)
        )

    def _has_cache(self, hops: Sequence[Hop], activations: Activations) -> bool:
        """Return whether the servers' caches have room for another; a server without a session of ours takes one."""
        for hop in hops:
            reserved, left = self._peers.of(hop.peer_id).push_tokens_reserved, hop.server.record.cache_tokens_left
            need = activations.tokens * hop.blocks
            if reserved and left is not None and reserved + need > PushSchedulerPolicy.cache_share * left:
                return False
        return True

    def _patience(self, hops: Sequence[Hop], activations: Activations) -> float:
        """Return the seconds until all must have answered."""
        expected = PushSchedulerPolicy.patience * sum(
            self._router.seconds(hop.server, hop.blocks, activations.tokens) for hop in hops
        )
        if any(self._peers.of(hop.peer_id).window.rate is None for hop in hops):
            expected = PacePolicy.first_patience
        return min(self._settings.request_timeout, max(PushSchedulerPolicy.min_patience, expected))

    def _note(self, hops: Sequence[Hop], activations: Activations, pushed: Pushed) -> None:
        """Note what the answers, and the error, say of the servers."""
        for index, answer in enumerate(pushed.answers):
            peer = self._peers.of(hops[index].peer_id)
            peer.push_rest = peer.push_rest_until = 0.0
            peer.on_succeeded(
                hops[index].server.span,
                tokens=activations.tokens,
                sent=answer.bytes_sent,
                received=answer.bytes_received,
            )
        if pushed.error is None or pushed.at is None:
            return
        hop, error = hops[pushed.at], pushed.error
        peer = self._peers.of(hop.peer_id)
        _log.debug("%s: push given up, %d of %d hops done: %s", peer.name, len(pushed.answers), len(hops), error)
        if isinstance(error, PeerAnswerError | PeerDistrustedError):
            self._on_failed(hop, error)
            return
        if isinstance(error, PeerLimitError):
            return  # it pushes what is smaller
        if not isinstance(error, PeerCacheFullError | PeerNoSessionError):
            peer.retries += 1
        now = self._runtime.monotonic()
        if peer.push_rest_until <= now:  # those in flight together fail together
            rest = max(PushSchedulerPolicy.first_rest, 2 * peer.push_rest)
            peer.push_rest = min(PushSchedulerPolicy.longest_rest, rest)
            peer.push_rest_until = now + peer.push_rest
            _log.debug("%s: no pushes for %g s", peer.name, peer.push_rest)
        self._choice.on_failed()
