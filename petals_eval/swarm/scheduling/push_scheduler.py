"""Micro-batches that servers push along a whole route: which routes take them, how many at once, what came of them."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from petals_eval.config import SwarmSettings
from petals_eval.errors import (
    PeerAnswerError,
    PeerCacheFullError,
    PeerDistrustedError,
    PeerError,
    PeerNoSessionError,
    PeerRefusedError,
)
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.peers.caches import CacheBook
from petals_eval.swarm.peers.limits import USUAL_MAX_TOKENS, TokenLimits
from petals_eval.swarm.peers.peer import PeerBook
from petals_eval.swarm.peers.window import Flow, Sent
from petals_eval.swarm.scheduling.admission import Lines
from petals_eval.swarm.scheduling.hop_runner import FIRST_PATIENCE, HopCalls
from petals_eval.swarm.scheduling.push_choice import PushChoice
from petals_eval.swarm.scheduling.tuning import MicroBatchSize
from petals_eval.swarm.transport.client import BlockCalls
from petals_eval.swarm.transport.push import Pushed
from petals_eval.swarm.wire import messages as wire

__all__ = ["PushCalls", "Way"]

Way = Literal["pushed", "ordinary"] | None
"""Of a micro-batch; None: it could not be pushed."""

PATIENCE, LEAST_PATIENCE = 3.0, 3.0
"""Times what the hops were expected to take, and seconds at least, until the rest goes the ordinary way."""
FIRST_REST, LONGEST_REST = 5.0, 600.0
"""Seconds without pushing through a server that did not do it; twice as long each time, up to this."""
CACHE_SHARE = 0.25
"""Of `cache_tokens_left`, where Petals counts keys and values apart: half of the room. Others have sessions, too."""
_LOOK_AGAIN = 1.0  # seconds


class PushCalls:
    """Used from the connection's event loop only.

    failed: told of a server that answered wrongly. Whatever else goes wrong in a session is not held against a server's
    ordinary calls, which follow at once: one that takes no sessions may still be the only one that holds its blocks.
    """

    def __init__(
        self,
        calls: BlockCalls,
        peers: PeerBook,
        limits: TokenLimits,
        caches: CacheBook,
        hop_calls: HopCalls,
        lines: Lines,
        sizes: MicroBatchSize,
        settings: SwarmSettings,
        failed: Callable[[Hop, PeerError], object],
    ):
        self.choice = PushChoice(settings.push)
        self._calls = calls
        self._peers = peers
        self._limits = limits
        self._caches = caches
        self._hop_calls = hop_calls
        self._lines = lines
        self._sizes = sizes
        self._settings = settings
        self._failed = failed
        self._flows: dict[tuple[int, int], Flow] = {}  # by the blocks of the route: whatever its hops
        self._reserved: Counter[str] = Counter()  # by server: tokens times blocks
        self._rests: dict[str, tuple[float, float]] = {}  # by server: until when, and how long

    def sent(self, hidden: torch.Tensor, prompts: torch.Tensor | None) -> Way:
        """Count a micro-batch on its way; returns which way that is to be. Give it to `ended`, whatever comes of it."""
        can_be_pushed = (
            prompts is None  # servers push no step that carries deep prompts
            and self._settings.wire is None
            and 4 * hidden.numel() <= wire.MAX_PUSH_BYTES
        )
        if not can_be_pushed:
            return None
        return "pushed" if self.choice.sent() else "ordinary"

    def ended(self, way: Way) -> None:
        if way is not None:
            self.choice.ended(way == "pushed")

    def came_back(self, way: Way, versions: Sequence[str | None], positions: int) -> None:
        """It is back. versions: of the servers of its route, as they say; others than could push are not compared."""
        if way is None or len(versions) < 2 or not all(map(wire.may_push, versions)) or self._sizes.is_on_trial:
            return
        was_on = self.choice.is_on
        self.choice.came_back(way == "pushed", positions, time.monotonic())
        if self.choice.is_on != was_on:
            self._sizes.pause()  # what a size brings is measured while nothing else changes

    async def through(
        self, plan: Callable[[], Sequence[Hop] | None], hidden: torch.Tensor, first: int, last: int
    ) -> list[tuple[Hop, torch.Tensor]]:
        """Push hidden (batch, seq, hidden) through blocks first:last, once there is room for it.

        plan: the best route now. Returns the hops that answered, in order: none where the route does not push, not all
        where something went wrong on the way.
        """
        flow = self._flows.setdefault((first, last), Flow())
        work = float(hidden.shape[0] * hidden.shape[1] * (last - first))
        async with self._lines.first(first) as line:
            while True:
                hops = plan()
                if hops is None or not self._takes(hops, hidden):
                    return []
                flow.distance = sum(self._peers.of(hop.server.peer_id).flow.distance for hop in hops)
                has_room = self._settings.window or flow.has_room(work, last - first, len(hops))
                if has_room and self._has_cache(hops, hidden):
                    break
                await line.news(_LOOK_AGAIN)
            patience = self._patience(hops, hidden)
            sent_all = flow.send(work, time.monotonic())
            sent = [self._sent(hop, hidden) for hop in hops]
        pushed = Pushed(())
        try:
            pushed = await self._calls.push(hops, hidden, patience)
        finally:
            now = time.monotonic()
            for index, (hop, one) in enumerate(zip(hops, sent, strict=True)):
                self._ended(hop, hidden)
                its = self._peers.of(hop.server.peer_id).flow
                if index < len(pushed.answers):
                    its.came_back(one, now)
                else:
                    its.lost(one)
            if len(pushed.answers) == len(hops):
                flow.came_back(sent_all, now)
            else:
                flow.lost(sent_all)
            self._lines.tell_news()
        self._note(hops, hidden, pushed)
        return [(hops[index], answer.hidden) for index, answer in enumerate(pushed.answers)]

    def _takes(self, hops: Sequence[Hop], hidden: torch.Tensor) -> bool:
        """Whether every server of the route, as far as is known, takes this in one step and passes it on."""
        rows, seq = hidden.shape[:2]
        now = time.monotonic()
        return len(hops) > 1 and all(
            wire.may_push(hop.server.record.version)
            and rows * seq <= (self._limits.per_call(hop.server.peer_id) or USUAL_MAX_TOKENS)
            and self._limits.session_too_large(hop.server.peer_id, rows, seq) is None
            and self._caches.may_be_asked(hop.server.peer_id, _size(hop, hidden))
            and self._rests.get(hop.server.peer_id, (0.0, 0.0))[0] <= now
            for hop in hops
        )

    def _has_cache(self, hops: Sequence[Hop], hidden: torch.Tensor) -> bool:
        """Whether the servers' caches have room for another; a server without a session of ours takes one."""
        for hop in hops:
            reserved, left = self._reserved[hop.server.peer_id], hop.server.record.cache_tokens_left
            if reserved and left is not None and reserved + _size(hop, hidden) > CACHE_SHARE * left:
                return False
        return True

    def _patience(self, hops: Sequence[Hop], hidden: torch.Tensor) -> float:
        """Seconds until all must have answered."""
        expected = PATIENCE * sum(self._hop_calls.seconds_for(hop, hidden) for hop in hops)
        if any(self._peers.of(hop.server.peer_id).flow.rate is None for hop in hops):
            expected = FIRST_PATIENCE
        return min(self._settings.request_timeout, max(LEAST_PATIENCE, expected))

    def _sent(self, hop: Hop, hidden: torch.Tensor) -> Sent:
        """Count it as in flight at a server, for whoever picks one."""
        history = self._peers.of(hop.server.peer_id)
        history.in_flight += hidden.shape[0] * hidden.shape[1]
        self._reserved[hop.server.peer_id] += _size(hop, hidden)
        return history.flow.send(float(_size(hop, hidden)), time.monotonic())

    def _ended(self, hop: Hop, hidden: torch.Tensor) -> None:
        self._peers.of(hop.server.peer_id).in_flight -= hidden.shape[0] * hidden.shape[1]
        self._reserved[hop.server.peer_id] -= _size(hop, hidden)

    def _note(self, hops: Sequence[Hop], hidden: torch.Tensor, pushed: Pushed) -> None:
        """What the answers, and the error, say of the servers."""
        rows, seq = hidden.shape[:2]
        for index, answer in enumerate(pushed.answers):
            server = hops[index].server
            peer_id = server.peer_id
            self._peers.of(peer_id).spans.add((server.start, server.end))
            self._rests.pop(peer_id, None)
            self._peers.succeeded(peer_id, tokens=rows * seq, sent=answer.bytes_sent, received=answer.bytes_received)
        if pushed.error is None or pushed.at is None:
            return
        hop, error = hops[pushed.at], pushed.error
        if isinstance(error, PeerAnswerError | PeerDistrustedError):
            self._failed(hop, error)
            return
        peer_id = hop.server.peer_id
        if isinstance(error, PeerRefusedError) and (
            self._limits.learn_per_call(peer_id, error, rows * seq)
            or self._limits.learn_per_session(peer_id, error, rows, seq)
        ):
            return  # it pushes what is smaller
        if not isinstance(error, PeerCacheFullError | PeerNoSessionError):
            self._peers.retries += 1
        now = time.monotonic()
        until, rest = self._rests.get(peer_id, (0.0, 0.0))
        if until <= now:  # those in flight together fail together
            rest = min(LONGEST_REST, max(FIRST_REST, 2 * rest))
            self._rests[peer_id] = (now + rest, rest)
        self.choice.failed()


def _size(hop: Hop, hidden: torch.Tensor) -> int:
    """Tokens times blocks: what it takes of the server's cache, and what it computes."""
    return hidden.shape[0] * hidden.shape[1] * (hop.last - hop.first)
