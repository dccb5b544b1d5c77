"""The way of a micro-batch through the swarm: hop by hop, on to another server where one fails, under a deadline."""

import asyncio
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from petals_eval.config import SwarmSettings
from petals_eval.errors import (
    DeadlineError,
    MissingBlocksError,
    PeerDistrustedError,
    PeerError,
    PeerRefusedError,
    RequestTooLargeError,
)
from petals_eval.swarm.calls import BlockCalls
from petals_eval.swarm.directory import Directory
from petals_eval.swarm.hop_calls import HopCalls
from petals_eval.swarm.limits import USUAL_MAX_TOKENS, TokenLimits
from petals_eval.swarm.lines import Line, Lines
from petals_eval.swarm.missing import spans_text, what_is_missing, within
from petals_eval.swarm.peers import PeerBook, short_peer
from petals_eval.swarm.push_calls import PushCalls
from petals_eval.swarm.records import SpanServer
from petals_eval.swarm.routing import Hop, hold_all, next_hop, plan_route
from petals_eval.swarm.sessions import RouteSession
from petals_eval.swarm.sizes import MicroBatchSize
from petals_eval.swarm.unequal import UnequalServer, stop_text, warning_text

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

    def __init__(self, calls: BlockCalls, directory: Directory, peers: PeerBook, settings: SwarmSettings):
        self._calls = calls
        self._directory = directory
        self._settings = settings
        self._limits = TokenLimits(settings.max_tokens_per_call)
        self.lines = Lines()
        self.sizes = MicroBatchSize()
        self._hop_calls = HopCalls(calls, peers, self._limits, self.lines)
        self._push_calls = PushCalls(
            calls, peers, self._limits, self._hop_calls, self.lines, self.sizes, settings, failed=self._failed
        )
        self._waiting: dict[object, str] = {}
        self._notices: list[str] = []
        self._unequal: dict[str, UnequalServer] = {}
        self.peers = peers
        self.config_dropout: Mapping[str, float] = {}  # what the model's config at home says, for the warnings

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
        when a single row is longer than the servers take, even in steps.
        """
        positions, seq = hidden.shape[0] * hidden.shape[1], hidden.shape[1]
        route: list[ServedHop] = []
        position = first
        give_up: float | None = None
        way = self._push_calls.sent(hidden, prompts)
        try:
            if way == "pushed":
                plan = functools.partial(self._plan, first, last, positions)
                for hop, hidden in await self._push_calls.through(plan, hidden, first, last):  # noqa: B020
                    route.append(_served(hop, hidden))
                    position = hop.last
            while position < last:
                async with self.lines.first(position) as line:
                    # Waiting in line is nobody's failure.
                    give_up = give_up or time.monotonic() + self._settings.deadline
                    hop = await self._hop_with_room(position, last, hidden.shape[0], seq, give_up, line)
                span_prompts = None if prompts is None else prompts[hop.first - first : hop.last - first]
                served = await self._compute(hop, hidden, span_prompts, give_up)
                if served is None:
                    continue
                hop, hidden = served
                route.append(_served(hop, hidden))
                position = hop.last
                give_up = None
        finally:
            self._push_calls.ended(way)
        self._push_calls.came_back(way, [hop.version for hop in route], positions)
        return hidden, tuple(route)

    def _plan(self, first: int, last: int, tokens: int) -> tuple[Hop, ...] | None:
        """The cheapest route among servers in good standing now."""
        servers = [each for each in self._trusted() if self.peers.may_be_called(each.peer_id)]
        return plan_route(servers, first, last, lambda server, blocks: self._cost(server, blocks, tokens))

    def size_came_back(self, made_for: int, positions: int) -> None:
        """A micro-batch made for this size is back: what the size brings, while all else stays as it is."""
        if not self._push_calls.choice.is_on_trial:
            self.sizes.came_back(made_for, positions, time.monotonic())

    def pause(self) -> None:
        """Nothing is in flight any more: what comes next is another stream's."""
        self.sizes.pause()
        self._push_calls.choice.pause()

    async def _compute(
        self, hop: Hop, hidden: torch.Tensor, prompts: torch.Tensor | None, give_up: float
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
                        seq = hidden.shape[1]
                        left_aside = self._is_too_small(asked, error, 1, seq) and self._limits.row_too_large(
                            asked.server.peer_id, seq
                        )
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
        candidates = [
            Hop(server, hop.first, hop.last)
            for server in self._trusted()
            if server.peer_id != hop.server.peer_id
            and server.start <= hop.first
            and hop.last <= server.end
            and self.peers.may_be_called(server.peer_id)
            and self._limits.row_too_large(server.peer_id, hidden.shape[1]) is None
            and self._hop_calls.has_room_for(Hop(server, hop.first, hop.last), hidden.shape[0] * hidden.shape[1])
        ]
        return min(candidates, key=lambda other: self._hop_calls.seconds_for(other, hidden), default=None)

    async def _hop_with_room(self, position: int, last: int, rows: int, seq: int, give_up: float, line: Line) -> Hop:
        """The hop that would be done soonest, once its server has room for another call."""
        while True:
            hop = await self._find_hop(
                position, last, rows * seq, give_up, lambda peer: self._limits.row_too_large(peer, seq)
            )
            if self._settings.window or self._hop_calls.has_room_for(hop, rows * seq):
                return hop
            await line.news(give_up - time.monotonic())

    def session(self, first: int, last: int, batch: int, max_length: int) -> RouteSession:
        """An inference session on blocks first:last, for `batch` rows of up to `max_length` positions."""

        async def find_hop(position: int, last: int, tokens: int, give_up: float) -> Hop:
            return await self._find_hop(
                position,
                last,
                tokens,
                give_up,
                lambda peer: self._limits.session_too_large(peer, batch, max_length),
            )

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
        """Leave the hop's server alone for a while, or for good when it answers otherwise each time."""
        peer_id = hop.server.peer_id
        if not isinstance(error, PeerDistrustedError):
            self._calls.forget(peer_id)
            self.peers.failed(peer_id, error)
        else:
            self.distrust(hop, error)

    def distrust(self, hop: Hop, error: PeerDistrustedError) -> None:
        """Leave the hop's server out for good, and tell of it."""
        if not self.peers.is_left_out(hop.server.peer_id):
            self.peers.leave_out(hop.server.peer_id, error)
            self.note_unequal(UnequalServer(hop.server, error.difference, blocks=(hop.first, hop.last)))

    def note_unequal(self, unequal: UnequalServer) -> None:
        """Tell of a server whose answers cannot be counted on; whoever found out has left it out where it is to be."""
        peer_id = unequal.server.peer_id
        known = self._unequal.get(peer_id)
        if unequal.verdict == "disputed" and known is not None:
            return  # told already
        self._unequal[peer_id] = unequal
        if unequal.verdict == "disputed":
            if not any(other in self._unequal for other in unequal.others):  # one warning names them all
                self._warn_of(unequal, others=0)
            return
        # Whoever was in dispute with nobody but this one is cleared.
        for other in [each for each in self._unequal.values() if each.verdict == "disputed"]:
            if set(other.others) <= {peer_id}:
                del self._unequal[other.server.peer_id]
        first, last = unequal.blocks or (unequal.server.start, unequal.server.end)
        trusted = self._trusted()
        others = [server for server in trusted if server.start <= first and last <= server.end]
        if unequal.verdict == "liar" or not self._settings.allow_nondeterministic or hold_all(trusted, first, last):
            self._warn_of(unequal, others=len(others))

    def _trusted(self) -> list[SpanServer]:
        every = self._directory.snapshot.servers.values()
        return [server for server in every if not self.peers.is_left_out(server.peer_id)]

    def _warn_of(self, unequal: UnequalServer, *, others: int) -> None:
        self._notices.append(warning_text(unequal, others, self.config_dropout))

    async def _find_hop(
        self,
        position: int,
        last: int,
        tokens: int,
        give_up: float,
        too_large: Callable[[str], RequestTooLargeError | None],
    ) -> Hop:
        """The next hop of the cheapest route among servers in good standing; waits for one until `give_up`.

        too_large: why a server does not take what is to be computed, or None; raised where it leaves no route.
        """
        token = object()
        looked_again = False
        try:
            while True:
                every = list(self._directory.snapshot.servers.values())
                refusals = {server.peer_id: error for server in every if (error := too_large(server.peer_id))}
                fitting = [server for server in every if server.peer_id not in refusals]
                if refusals and hold_all(every, position, last) and not hold_all(fitting, position, last):
                    raise next(iter(refusals.values()))
                servers = [server for server in fitting if self.peers.may_be_called(server.peer_id)]
                hop = next_hop(servers, position, last, lambda server, blocks: self._cost(server, blocks, tokens))
                left = give_up - time.monotonic()
                if left <= 0:  # also with servers to try: two that fail in turns are never both left alone
                    raise self._deadline_error(position, last)
                if hop is not None:
                    return hop
                if hold_all(fitting, position, last) and not hold_all(self._trusted(), position, last):
                    if not looked_again:  # somebody else may have come since
                        looked_again = True
                        await self._directory.refresh(older_than=self._settings.missing_update_period)
                        continue
                    hop = self._last_resort(fitting, position, last)
                    if hop is not None:
                        return hop
                self._waiting[token] = f"{self._what_is_missing(position, last, left)}; deadline in {_minutes(left)}"
                await asyncio.sleep(min(left, self._settings.missing_update_period / 4))
                await self._directory.refresh(older_than=self._settings.missing_update_period)
        finally:
            self._waiting.pop(token, None)

    def _last_resort(self, servers: Sequence[SpanServer], position: int, last: int) -> Hop | None:
        """A hop on a server that was left out, where the settings allow it; None while that one is failing, too.

        Raises MissingBlocksError where they do not: waiting would not help.
        """
        left_out = frozenset(peer_id for peer_id in self._unequal if self.peers.is_left_out(peer_id))
        liars = {peer_id for peer_id, each in self._unequal.items() if each.verdict == "liar"}
        tolerable = [server for server in servers if server.peer_id not in liars]
        if not self._settings.allow_nondeterministic or not hold_all(tolerable, position, last):
            held_by_them_alone = within(self._directory.snapshot.missing(without=left_out), position, last)
            caught = [
                each
                for peer_id, each in self._unequal.items()
                if peer_id in left_out
                and any(each.server.start < end and start < each.server.end for start, end in held_by_them_alone)
            ]
            message = stop_text(spans_text(held_by_them_alone), caught, self.config_dropout)
            raise MissingBlocksError(message, held_by_them_alone)
        # Those left out cost more than any route around them, so that they are used for what nobody else holds.
        usable = [server for server in tolerable if self.peers.is_usable(server.peer_id, even_left_out=True)]
        hop = next_hop(usable, position, last, lambda server, blocks: 1e6 * blocks * (server.peer_id in left_out))
        known = None if hop is None else self._unequal.get(hop.server.peer_id)
        if known is not None and not known.is_used:
            self._unequal[known.server.peer_id] = replace(known, is_used=True)
            self._warn_of(self._unequal[known.server.peer_id], others=0)
        return hop

    def _cost(self, server: SpanServer, blocks: int, tokens: int) -> float:
        return self._hop_calls.seconds(server, blocks, tokens)

    def _what_is_missing(self, position: int, last: int, left: float) -> str:
        since = time.time() - (self._settings.deadline - left)
        return what_is_missing(self._directory, self.peers, position, last, since)

    def _deadline_error(self, position: int, last: int) -> MissingBlocksError | DeadlineError:
        reason = self._what_is_missing(position, last, 0.0)
        message = f"stopped at the deadline ({_span_of_time(self._settings.deadline)}): {reason}"
        absent = within(self._directory.snapshot.missing(), position, last)
        return MissingBlocksError(message, absent) if absent else DeadlineError(message)

    def status(self) -> SwarmStatus:
        """Safe to call from any thread: it only reads."""
        used = tuple(peer for peer, history in list(self.peers.histories.items()) if history.calls)
        waiting = next(iter(list(self._waiting.values())), None)
        unequal = list(self._unequal.values())
        return SwarmStatus(self.peers.retries, used, waiting, tuple(self._notices), tuple(unequal))


def _served(hop: Hop, answer: torch.Tensor) -> ServedHop:
    record = hop.server.record
    dtype = str(answer.dtype).removeprefix("torch.")
    return ServedHop(hop.server.peer_id, hop.first, hop.last, record.version, dtype, record.quant_type)


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60:02d}:{int(seconds) % 60:02d}"


def _span_of_time(seconds: float) -> str:
    return f"{seconds / 60:g} min" if seconds >= 60 else f"{seconds:g} s"
