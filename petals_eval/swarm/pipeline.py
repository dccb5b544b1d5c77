"""The way of a micro-batch through the swarm: hop by hop, on to another server where one fails, under a deadline."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import torch

from petals_eval.config import SwarmSettings
from petals_eval.errors import (
    DeadlineError,
    MissingBlocksError,
    PeerDistrustedError,
    PeerError,
    PeerRefusedError,
    PeerTimeoutError,
    PeerUnreachableError,
    RequestTooLargeError,
)
from petals_eval.swarm.calls import Answer, BlockCalls
from petals_eval.swarm.directory import Directory
from petals_eval.swarm.limits import USUAL_MAX_TOKENS, TokenLimits
from petals_eval.swarm.missing import spans_text, what_is_missing, within
from petals_eval.swarm.peers import PeerBook, short_peer
from petals_eval.swarm.records import SpanServer
from petals_eval.swarm.routing import Hop, hold_all, next_hop
from petals_eval.swarm.rpc import together
from petals_eval.swarm.sessions import RouteSession
from petals_eval.swarm.unequal import UnequalServer, stop_text, warning_text

__all__ = ["USUAL_MAX_TOKENS", "Pipeline", "ServedHop", "SwarmStatus", "short_peer", "spans_text"]

HOP_OVERHEAD = 0.02
"""Seconds a hop costs before any token is computed, as long as nothing was measured."""
UNMEASURED = 1e-5
"""Seconds per token and block of a server not called yet: optimistic, so that every server gets its first call."""


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
        self._stepping: dict[str, asyncio.Lock] = {}  # by server
        self._waiting: dict[object, str] = {}
        self._notices: list[str] = []
        self._unequal: dict[str, UnequalServer] = {}
        self.peers = peers
        self.config_dropout: Mapping[str, float] = {}  # what the model's config at home says, for the warnings

    async def forward(
        self, hidden: torch.Tensor, prompts: torch.Tensor | None, first: int, last: int
    ) -> tuple[torch.Tensor, tuple[ServedHop, ...]]:
        """Run hidden (batch, seq, hidden) through blocks first:last.

        prompts: (last - first, batch or 1, prefix, hidden) or None.
        Returns the hidden states in the last server's dtype, and who computed them, hop by hop.
        Raises MissingBlocksError or DeadlineError when a hop finds no server within the deadline, RequestTooLargeError
        when a single row is longer than the servers take, even in steps.
        """
        seq = hidden.shape[1]
        route: list[ServedHop] = []
        position = first
        give_up = time.monotonic() + self._settings.deadline
        while position < last:
            hop = await self._find_hop(
                position, last, hidden.shape[0] * seq, give_up, lambda peer: self._limits.row_too_large(peer, seq)
            )
            span_prompts = None if prompts is None else prompts[hop.first - first : hop.last - first]
            try:
                async with self._at_most_until(give_up, hop.server.peer_id):
                    hidden = await self._call(hop, hidden, span_prompts)
            except PeerError as error:
                if not self._is_too_small(hop, error, 1, seq):
                    self._failed(hop, error)
                continue
            route.append(_served(hop, hidden))
            position = hop.last
            give_up = time.monotonic() + self._settings.deadline
        return hidden, tuple(route)

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

    @asynccontextmanager
    async def _at_most_until(self, give_up: float, peer_id: str) -> AsyncIterator[None]:
        """No call goes on after the deadline, however long a call may take. Raises PeerTimeoutError."""
        try:
            async with asyncio.timeout(give_up - time.monotonic()):
                yield
        except TimeoutError as error:
            before = f"; before: {self.peers.of(peer_id).last_error}" if self.peers.is_failing(peer_id) else ""
            raise PeerTimeoutError(f"nothing by the deadline{before}") from error

    def _cost(self, server: SpanServer, blocks: int, tokens: int) -> float:
        history = self.peers.of(server.peer_id)
        per_token = history.seconds_per_token_block
        return HOP_OVERHEAD + (UNMEASURED if per_token is None else per_token) * blocks * (tokens + history.in_flight)

    async def _call(self, hop: Hop, hidden: torch.Tensor, prompts: torch.Tensor | None) -> torch.Tensor:
        """One hop, in as many calls as the server's token limit asks for, all of them together.

        A row that is longer than a call may be goes through a session, in steps.
        """
        peer_id = hop.server.peer_id
        history = self.peers.of(peer_id)
        rows, seq = hidden.shape[:2]
        while True:
            # Only a limit that was set or told is held against a single row: servers of grouped-query models take more
            # than the usual number, and the refusal of one that does not names its own.
            known = self._limits.per_call(peer_id)
            in_steps = known is not None and seq > known
            limit = known or USUAL_MAX_TOKENS
            step = max(1, limit // seq)
            parts = [slice(start, start + step) for start in range(0, rows, step)]
            history.in_flight += rows * seq
            try:
                if in_steps:
                    answers = await self._call_in_steps(hop, hidden, prompts, parts, limit)
                else:
                    answers = await together([self._call_part(hop, hidden, prompts, part) for part in parts])
            except PeerRefusedError as error:
                if not self._limits.learn_per_call(peer_id, error, limit if in_steps else step * seq):
                    raise
                continue
            finally:
                history.in_flight -= rows * seq
            history.spans.add((hop.server.start, hop.server.end))
            for part, answer in zip(parts, answers, strict=True):
                self.peers.succeeded(
                    peer_id,
                    tokens=len(range(*part.indices(rows))) * seq,
                    blocks=hop.last - hop.first,
                    seconds=answer.seconds,
                    sent=answer.bytes_sent,
                    received=answer.bytes_received,
                )
            return answers[0].hidden if len(answers) == 1 else torch.cat([answer.hidden for answer in answers])

    async def _call_part(self, hop: Hop, hidden: torch.Tensor, prompts: torch.Tensor | None, part: slice) -> Answer:
        return await self._calls.forward(hop, hidden[part], _rows_of(prompts, part))

    async def _call_in_steps(
        self, hop: Hop, hidden: torch.Tensor, prompts: torch.Tensor | None, parts: Sequence[slice], step: int
    ) -> list[Answer]:
        peer_id = hop.server.peer_id
        # One session at a time: a server may have no room for a second one of this length.
        async with self._stepping.setdefault(peer_id, asyncio.Lock()):
            if not self.peers.is_usable(peer_id):
                raise PeerUnreachableError("it failed while this input waited for its turn")
            return [
                await self._calls.forward_in_steps(hop, hidden[part], _rows_of(prompts, part), step) for part in parts
            ]

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


def _rows_of(prompts: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return prompts if prompts is None or prompts.shape[1] == 1 else prompts[:, rows]


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60:02d}:{int(seconds) % 60:02d}"


def _span_of_time(seconds: float) -> str:
    return f"{seconds / 60:g} min" if seconds >= 60 else f"{seconds:g} s"
