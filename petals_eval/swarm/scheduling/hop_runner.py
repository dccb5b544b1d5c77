"""One hop of a micro-batch on one server: in as many calls as it takes, under the deadline, counted in its window."""

import asyncio
import time
from collections.abc import Sequence

import torch

from petals_eval.errors import PeerRefusedError, PeerTimeoutError, PeerUnreachableError
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.peers.limits import USUAL_MAX_TOKENS, TokenLimits
from petals_eval.swarm.peers.peer import PeerBook
from petals_eval.swarm.scheduling.admission import Lines
from petals_eval.swarm.transport.client import Answer, BlockCalls
from petals_eval.swarm.transport.rpc import together
from petals_eval.swarm.wire.records import SpanServer

__all__ = ["HopCalls"]

HOP_OVERHEAD = 0.02
"""Seconds a hop costs before any token is computed, as long as nothing was measured."""
UNMEASURED = 1e-5
"""Seconds per token and block of a server not called yet that claims no pace (`forward_rps` in its record): optimistic,
so that every server gets its first call."""
CLAIMED = 1e-6, 1e-4
"""What a claim may come to: nobody draws all work by a word, and nobody is shut out by one."""

PATIENCE, LEAST_PATIENCE = 3.0, 1.0
"""Times what a call was expected to take, and seconds at least, before another server is asked as well."""
FIRST_PATIENCE = 30.0
"""Seconds for the first call, of which nothing is known."""


class HopCalls:
    """Used from the connection's event loop only."""

    def __init__(self, calls: BlockCalls, peers: PeerBook, limits: TokenLimits, lines: Lines):
        self._calls = calls
        self._peers = peers
        self._limits = limits
        self._lines = lines
        self._stepping: dict[str, asyncio.Lock] = {}  # by server

    def seconds(self, server: SpanServer, blocks: int, tokens: int) -> float:
        """When the answer would come, by what was measured of the server so far, and before that by what it claims."""
        flow = self._peers.of(server.peer_id).flow
        return HOP_OVERHEAD + flow.seconds_for(float(tokens * blocks), _claimed(server))

    def seconds_for(self, hop: Hop, hidden: torch.Tensor) -> float:
        return self.seconds(hop.server, hop.last - hop.first, hidden.shape[0] * hidden.shape[1])

    def patience(self, hop: Hop, hidden: torch.Tensor) -> float:
        """Seconds after which this call is a straggler."""
        if self._peers.of(hop.server.peer_id).flow.rate is None:
            return FIRST_PATIENCE
        return max(LEAST_PATIENCE, PATIENCE * self.seconds_for(hop, hidden))

    def has_room_for(self, hop: Hop, tokens: int) -> bool:
        """Whether the server's window has room for another call."""
        blocks = hop.last - hop.first
        return self._peers.of(hop.server.peer_id).flow.has_room(float(tokens * blocks), blocks)

    def start(
        self, hop: Hop, hidden: torch.Tensor, prompts: torch.Tensor | None, give_up: float
    ) -> asyncio.Task[torch.Tensor]:
        """Send it now. The task raises PeerError, and PeerTimeoutError when nothing came by `give_up`."""
        history = self._peers.of(hop.server.peer_id)
        tokens = hidden.shape[0] * hidden.shape[1]
        history.in_flight += tokens
        sent = history.flow.send(float(tokens * (hop.last - hop.first)), time.monotonic())
        call = asyncio.create_task(self._until(give_up, hop, hidden, prompts))

        def ended(call: asyncio.Task[torch.Tensor]) -> None:
            history.in_flight -= tokens
            if call.cancelled() or call.exception() is not None:
                history.flow.lost(sent)
            else:
                history.flow.came_back(sent, time.monotonic())
            self._lines.tell_news()

        call.add_done_callback(ended)
        return call

    async def _until(
        self, give_up: float, hop: Hop, hidden: torch.Tensor, prompts: torch.Tensor | None
    ) -> torch.Tensor:
        """No call goes on after the deadline, however long a call may take."""
        peer_id = hop.server.peer_id
        try:
            async with asyncio.timeout(give_up - time.monotonic()):
                return await self._call(hop, hidden, prompts)
        except TimeoutError as error:
            began_with = self._peers.of(peer_id).began_with if self._peers.is_failing(peer_id) else ""
            before = f"; before: {began_with}" if began_with else ""
            raise PeerTimeoutError(f"nothing by the deadline{before}") from error

    async def _call(self, hop: Hop, hidden: torch.Tensor, prompts: torch.Tensor | None) -> torch.Tensor:
        """One hop, in as many calls as the server's token limit asks for, all of them together.

        A row that is longer than a call may be goes through a session, in steps.
        """
        peer_id = hop.server.peer_id
        history = self._peers.of(peer_id)
        rows, seq = hidden.shape[:2]
        while True:
            # Only a limit that was set or told is held against a single row: servers of grouped-query models take more
            # than the usual number, and the refusal of one that does not names its own.
            known = self._limits.per_call(peer_id)
            in_steps = known is not None and seq > known
            limit = known or USUAL_MAX_TOKENS
            step = max(1, limit // seq)
            parts = [slice(start, start + step) for start in range(0, rows, step)]
            if in_steps and (too_large := self._limits.session_too_large(peer_id, 1, seq)) is not None:
                raise PeerRefusedError(str(too_large))
            try:
                if in_steps:
                    answers = await self._call_in_steps(hop, hidden, prompts, parts, limit)
                else:
                    answers = await together([self._call_part(hop, hidden, prompts, part) for part in parts])
            except PeerRefusedError as error:
                if not self._limits.learn_per_call(peer_id, error, limit if in_steps else step * seq):
                    raise
                continue
            history.spans.add((hop.server.start, hop.server.end))
            for part, answer in zip(parts, answers, strict=True):
                self._peers.succeeded(
                    peer_id,
                    tokens=len(range(*part.indices(rows))) * seq,
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
        # One session at a time: a server may have no room for a second one of this length. In line here and not below
        # (`RemoteCalls.forward_in_steps`), where it would not be noticed that the server has failed meanwhile.
        async with self._stepping.setdefault(peer_id, asyncio.Lock()):
            if not self._peers.is_usable(peer_id):
                raise PeerUnreachableError("it failed while this input waited for its turn")
            return [
                await self._calls.forward_in_steps(hop, hidden[part], _rows_of(prompts, part), step) for part in parts
            ]


def _claimed(server: SpanServer) -> float:
    """Seconds per token and block. Petals servers measure `forward_rps` as they start: tokens a second for a block."""
    claim = server.record.forward_rps
    least, most = CLAIMED
    return UNMEASURED if not claim else min(most, max(least, 1 / claim))


def _rows_of(prompts: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return prompts if prompts is None or prompts.shape[1] == 1 else prompts[:, rows]
