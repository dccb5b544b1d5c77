"""The way of a micro-batch through the swarm: hop by hop, on to another server where one fails, under a deadline."""

import asyncio
import functools
import time
from dataclasses import dataclass

import torch

from petals_eval.config import SwarmSettings
from petals_eval.errors import (
    PeerCacheFullError,
    PeerDistrustedError,
    PeerError,
    PeerNoSessionError,
    PeerRefusedError,
)
from petals_eval.swarm.directory.coverage import spans_text
from petals_eval.swarm.directory.dht import Directory
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.peers.caches import CacheBook, Wait
from petals_eval.swarm.peers.limits import USUAL_MAX_TOKENS, TokenLimits
from petals_eval.swarm.peers.peer import PeerBook, short_peer
from petals_eval.swarm.scheduling.admission import Line, Lines
from petals_eval.swarm.scheduling.capacity import RowAdmission, SessionAdmission, is_ready
from petals_eval.swarm.scheduling.hop_runner import HopCalls
from petals_eval.swarm.scheduling.push_scheduler import PushCalls
from petals_eval.swarm.scheduling.router import HopFinder
from petals_eval.swarm.scheduling.tuning import MicroBatchSize
from petals_eval.swarm.sessions.route_session import RouteSession
from petals_eval.swarm.transport.client import BlockCalls
from petals_eval.swarm.trust.overflow import Overflow
from petals_eval.swarm.trust.quarantine import Distrust
from petals_eval.swarm.trust.unequal import UnequalServer

__all__ = ["USUAL_MAX_TOKENS", "Pipeline", "ServedHop", "SwarmStatus", "short_peer", "spans_text"]


@dataclass(frozen=True, slots=True)
class ServedHop:
    """Who computed blocks first:last of a micro-batch, and in what: the server's own words on version and quantisation,
    the dtype of its answer."""

    peer_id: str
    first: int
    last: int
    version: str | None
    dtype: str
    quant: str | None


@dataclass(frozen=True, slots=True)
class SwarmStatus:
    """What a progress display shows.

    waiting: why nothing moves, or None.
    notices: warnings, in order; each is to be shown once.
    unequal: servers that gave two answers to one question.
    """

    retries: int
    servers: tuple[str, ...]
    waiting: str | None
    notices: tuple[str, ...] = ()
    unequal: tuple[UnequalServer, ...] = ()


class Pipeline:
    """Sends micro-batches along routes. Used from the connection's event loop only."""

    def __init__(
        self,
        calls: BlockCalls,
        directory: Directory,
        peers: PeerBook,
        settings: SwarmSettings,
        caches: CacheBook | None = None,
    ):
        """caches: what `calls` note of the servers' caches; None: nothing yet."""
        self._calls = calls
        self._settings = settings
        self._caches = caches or CacheBook()
        self._under_way = 0
        self._limits = TokenLimits(settings.max_tokens_per_call)
        self.lines = Lines()
        self.sizes = MicroBatchSize()
        self._hop_calls = HopCalls(calls, peers, self._limits, self.lines)
        self._push_calls = PushCalls(
            calls, peers, self._limits, self._caches, self._hop_calls, self.lines, self.sizes, settings, self._failed
        )
        self.distrust = Distrust(directory, peers, allow_nondeterministic=settings.allow_nondeterministic)
        self._finder = HopFinder(directory, peers, self.distrust, settings, self._hop_calls.seconds)
        self.peers = peers

    async def forward(
        self,
        hidden: torch.Tensor,
        prompts: torch.Tensor | None,
        first: int,
        last: int,
    ) -> tuple[torch.Tensor, tuple[ServedHop, ...]]:
        """Run hidden (batch, seq, hidden) through blocks first:last.

        prompts: (last - first, batch or 1, prefix, hidden) or None.
        Returns the hidden states in the last server's dtype, and who computed them, hop by hop.
        Raises MissingBlocksError or DeadlineError when a hop finds no server within the deadline, RequestTooLargeError
        when a single row is longer than the servers take, even in steps, NotFiniteError when it overflows their dtype.
        """
        positions, seq = hidden.shape[0] * hidden.shape[1], hidden.shape[1]
        route: list[ServedHop] = []
        position = first
        give_up: float | None = None
        overflow = Overflow(self._calls)
        admission = RowAdmission(self._limits, self._caches, seq)
        await self._finder.begin()
        way = self._push_calls.sent(hidden, prompts)
        self._under_way += 1
        try:
            if way == "pushed":
                plan = functools.partial(self._finder.plan, first, last, positions)
                for hop, answer in await self._push_calls.through(plan, hidden, first, last):
                    route.append(_served(hop, answer))
                    position, hidden = hop.last, answer
            while position < last:
                async with self.lines.first(position) as line:
                    # Waiting in line is nobody's failure.
                    give_up = give_up or time.monotonic() + self._settings.deadline
                    found = await self._hop_with_room(position, last, hidden.shape[0], give_up, admission, line)
                if isinstance(found, Wait):  # out of line: those behind it may need no room in a cache
                    await self._finder.wait_for_cache(found, give_up)
                    continue
                hop = found
                span_prompts = None if prompts is None else prompts[hop.first - first : hop.last - first]
                served = await self._compute(hop, hidden, span_prompts, give_up, overflow)
                if served is None:
                    await overflow.judge(self._finder.holders(position), hidden)
                    continue
                hop, hidden = served
                route.append(_served(hop, hidden))
                position = hop.last
                give_up, overflow = None, Overflow(self._calls)
        finally:
            self._under_way -= 1
            self._push_calls.ended(way)
        self._push_calls.came_back(way, [hop.version for hop in route], positions)
        self.sizes.begin(max((self.peers.of(hop.peer_id).flow.distance for hop in route), default=0.0))
        return hidden, tuple(route)

    def size_came_back(self, made_for: int, positions: int) -> None:
        """A micro-batch made for this size is back: what the size brings, while all else stays as it is."""
        if not self._push_calls.choice.is_on_trial:
            self.sizes.came_back(made_for, positions, time.monotonic())

    def limit_steps(self, positions: int | None) -> None:
        """Let no row of more positions go in steps, and no session have more (`TokenLimits.steps_alike`)."""
        self._limits.steps_alike = positions

    def pause(self) -> None:
        """Nothing is in flight any more: what comes next is another stream's."""
        self.sizes.pause()
        self._push_calls.choice.pause()

    async def _compute(
        self, hop: Hop, hidden: torch.Tensor, prompts: torch.Tensor | None, give_up: float, overflow: Overflow
    ) -> tuple[Hop, torch.Tensor] | None:
        """The hop's answer, with who gave it; None where it failed.

        Where its server takes far longer than was to be expected and another one is free, that one is asked, too, and
        the first answer counts: one straggler would otherwise hold up the end of a run.
        """
        patience: float | None = self._hop_calls.patience(hop, hidden)
        under_way = {self._hop_calls.start(hop, hidden, prompts, give_up): hop}
        try:
            while under_way:
                done, _ = await asyncio.wait(under_way, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    patience = None
                    other = self._free_hop_like(hop, hidden)
                    if other is not None:
                        under_way[self._hop_calls.start(other, hidden, prompts, give_up)] = other
                for call in done:
                    asked = under_way.pop(call)
                    try:
                        answer = call.result()
                    except PeerError as error:
                        overflow.note(asked, error)
                        seq = hidden.shape[1]
                        admission = RowAdmission(self._limits, self._caches, seq)
                        if isinstance(error, PeerRefusedError):
                            self._limits.learn_per_session(asked.server.peer_id, error, 1, seq)
                        is_refusal = isinstance(error, PeerRefusedError)
                        left_aside = is_refusal and admission.refusal(asked.server, asked.first, asked.last)
                        if not left_aside:  # it would be asked again at once, and for ever
                            self._failed(asked, error)
                    else:
                        for slower in under_way.values():
                            self.peers.overtaken(slower.server.peer_id)
                        return asked, answer
            return None
        finally:
            for call in under_way:
                call.cancel()

    def _free_hop_like(self, hop: Hop, hidden: torch.Tensor) -> Hop | None:
        """The same blocks on the server that would be done soonest, of those that could begin at once."""
        rows, seq = hidden.shape[:2]
        admission = RowAdmission(self._limits, self._caches, seq)
        free = [
            other
            for other in self._finder.others_of(hop)
            if admission.refusal(other.server, other.first, other.last) is None
            and is_ready(admission, other.server, other.first, other.last)
            and self._hop_calls.has_room_for(other, rows * seq)
        ]
        return min(free, key=lambda other: self._hop_calls.seconds_for(other, hidden), default=None)

    async def _hop_with_room(
        self, position: int, last: int, rows: int, give_up: float, admission: RowAdmission, line: Line
    ) -> Hop | Wait:
        """The hop that would be done soonest, once its server has room for another call."""
        tokens = rows * admission.positions
        while True:
            hop = await self._finder.find_or_wait(position, last, tokens, give_up, admission)
            if isinstance(hop, Wait) or self._settings.window or self._hop_calls.has_room_for(hop, tokens):
                return hop
            await line.news(give_up - time.monotonic())

    def session(self, first: int, last: int, batch: int, max_length: int) -> RouteSession:
        """An inference session on blocks first:last, for `batch` rows of up to `max_length` positions."""

        admission = SessionAdmission(self._limits, self._caches, batch, max_length)

        async def find_hop(position: int, last: int, tokens: int, give_up: float) -> Hop:
            return await self._finder.find(position, last, tokens, give_up, admission)

        def failed(hop: Hop, error: PeerError) -> None:
            if not self._is_too_small(hop, error, batch, max_length):
                self._failed(hop, error)

        return RouteSession(
            self._calls,
            find_hop,
            failed,
            self.peers,
            self._limits,
            first=first,
            last=last,
            batch=batch,
            max_length=max_length,
            deadline=self._settings.deadline,
        )

    def _is_too_small(self, hop: Hop, error: PeerError, batch: int, positions: int) -> bool:
        """Whether it refused because of its size: no fault, but `_find_hop` leaves it aside from now on."""
        peer_id = hop.server.peer_id
        return isinstance(error, PeerRefusedError) and self._limits.learn_per_session(peer_id, error, batch, positions)

    def _failed(self, hop: Hop, error: PeerError) -> None:
        """Leave the hop's server alone for a while, or for good when it answers otherwise each time.

        One that gives no session has not failed: the cache book knows when to ask it for another.
        """
        peer_id = hop.server.peer_id
        if isinstance(error, PeerCacheFullError | PeerNoSessionError):
            return
        if not isinstance(error, PeerDistrustedError):
            self._calls.forget(peer_id)
            self.peers.failed(peer_id, error)
        else:
            self.distrust.leave_out(hop, error)

    def status(self) -> SwarmStatus:
        """Safe to call from any thread: it only reads."""
        used = tuple(peer for peer, history in list(self.peers.histories.items()) if history.calls)
        distrust = self.distrust
        notices = (*distrust.notices, *self._caches.notices)
        return SwarmStatus(self.peers.retries, used, self._waiting(), notices, distrust.unequal)

    def _waiting(self) -> str | None:
        """Why nothing moves. Where some wait for room in a cache, others may go on."""
        for_caches = self._finder.waiting_for_caches
        return self._finder.waiting or (for_caches[0] if len(for_caches) >= max(1, self._under_way) else None)


def _served(hop: Hop, answer: torch.Tensor) -> ServedHop:
    record = hop.server.record
    dtype = str(answer.dtype).removeprefix("torch.")
    return ServedHop(hop.server.peer_id, hop.first, hop.last, record.version, dtype, record.quant_type)
