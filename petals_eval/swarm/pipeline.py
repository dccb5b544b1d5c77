"""The way of a micro-batch through the swarm: hop by hop, on to another server where one fails, under a deadline."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import torch

from petals_eval.config import SwarmSettings
from petals_eval.errors import (
    DeadlineError,
    MissingBlocksError,
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
from petals_eval.swarm.sessions import RouteSession

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
    """What a progress display shows. waiting: why nothing moves, or None."""

    retries: int
    servers: tuple[str, ...]
    waiting: str | None


class Pipeline:
    """Sends micro-batches along routes. Used from the connection's event loop only."""

    def __init__(self, calls: BlockCalls, directory: Directory, peers: PeerBook, settings: SwarmSettings):
        self._calls = calls
        self._directory = directory
        self._settings = settings
        self._limits = TokenLimits(settings.max_tokens_per_call)
        self._stepping: dict[str, asyncio.Lock] = {}  # by server
        self._waiting: dict[object, str] = {}
        self.peers = peers

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
                    self.peers.failed(hop.server.peer_id, error)
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
                self.peers.failed(hop.server.peer_id, error)

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
                self._waiting[token] = f"{self._what_is_missing(position, last, left)}; deadline in {_minutes(left)}"
                await asyncio.sleep(min(left, self._settings.missing_update_period / 4))
                await self._directory.refresh(older_than=self._settings.missing_update_period)
        finally:
            self._waiting.pop(token, None)

    @asynccontextmanager
    async def _at_most_until(self, give_up: float, peer_id: str) -> AsyncIterator[None]:
        """No call goes on after the deadline, however long a call may take. Raises PeerTimeoutError."""
        try:
            async with asyncio.timeout(give_up - time.monotonic()):
                yield
        except TimeoutError as error:
            before = f"; before that: {self.peers.of(peer_id).last_error}" if self.peers.is_failing(peer_id) else ""
            raise PeerTimeoutError(f"no answer by the deadline{before}") from error

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
                    answers = await _gather([self._call_part(hop, hidden, prompts, part) for part in parts])
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
        return SwarmStatus(self.peers.retries, used, waiting)


def _served(hop: Hop, answer: torch.Tensor) -> ServedHop:
    record = hop.server.record
    dtype = str(answer.dtype).removeprefix("torch.")
    return ServedHop(hop.server.peer_id, hop.first, hop.last, record.version, dtype, record.quant_type)


async def _gather(calls: Sequence[Coroutine[Any, Any, Answer]]) -> list[Answer]:
    """All of them, or the first error with the rest cancelled: asyncio.gather would let the rest run on."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def _rows_of(prompts: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return prompts if prompts is None or prompts.shape[1] == 1 else prompts[:, rows]


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60:02d}:{int(seconds) % 60:02d}"


def _span_of_time(seconds: float) -> str:
    return f"{seconds / 60:g} min" if seconds >= 60 else f"{seconds:g} s"
