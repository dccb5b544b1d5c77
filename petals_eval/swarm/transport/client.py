"""One hop on one server, in as many calls as the server's token limit asks for.

This is the one place where a limit is learned from a refusal: runs, probes, audits, sessions and health all come here.
"""

import logging
from collections.abc import Sequence
from contextlib import suppress

import torch

from petals_eval.errors import PeerError, PeerLimitError, PeerRefusedError, PeerUnreachableError
from petals_eval.swarm.activations import Activations
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.peers.limits import USUAL_MAX_TOKENS
from petals_eval.swarm.peers.peer import Peer, PeerBook
from petals_eval.swarm.tasks import together
from petals_eval.swarm.transport.hop_session import HopSession
from petals_eval.swarm.transport.opening import SessionOpener
from petals_eval.swarm.transport.rpc import Answer, joined_answer
from petals_eval.swarm.transport.transport import Transport, kept_info
from petals_eval.swarm.wire.records import SpanServer
from petals_eval.swarm.wire.server_info import may_push

__all__ = ["HopClient"]

_log = logging.getLogger(__name__)


class HopClient:
    """Computes hops on their servers. Used from the connection's event loop only."""

    def __init__(self, transport: Transport, peers: PeerBook):
        self._transport = transport
        self._peers = peers
        self._opener = SessionOpener(transport, peers.settings)

    def max_tokens(self, hop: Hop) -> int | None:
        """Return how many tokens the hop's server takes in one call; None: nothing is known."""
        return self._peers.of(hop.peer_id).limits.per_call

    async def run(
        self,
        hop: Hop,
        activations: Activations,
        *,
        positions_per_step: int | None = None,
        may_step: bool = True,
        lossless: bool = False,
    ) -> Answer:
        """Run what enters the hop's first block through its blocks, in calls below the server's token limit.

        Rows are split over calls that are made together. A row that is longer than a call may be goes through a session
        of its own, in steps; causal blocks give the same numbers as in one call.

        positions_per_step: go through a session in any case, and in steps no longer than this.
        may_step: False raises PeerLimitError for a row that is longer than a call may be.
        lossless: whatever the lossy code of the settings is.
        Raises PeerError.
        """
        peer = self._peers.of(hop.peer_id)
        positions = activations.positions
        while True:
            # Only a limit that was set or told is held against a single row: servers of grouped-query models take more
            # than the usual number, and the refusal of one that does not names its own.
            known = peer.limits.per_call
            limit = known or USUAL_MAX_TOKENS
            in_steps = positions_per_step is not None or (known is not None and positions > known)
            parts = activations.by_rows(1 if in_steps else max(1, limit // positions))
            try:
                if in_steps:
                    if not may_step:
                        raise PeerLimitError(f"it takes {limit} tokens in one call")
                    answers = await self._in_steps(peer, hop, parts, min(positions_per_step or limit, limit))
                elif len(parts) == 1:
                    answers = [await self._transport.call(hop, parts[0], lossless=lossless)]
                else:
                    calls = [self._transport.call(hop, part, lossless=lossless) for part in parts]
                    answers = await together(calls)
            except PeerRefusedError as error:
                sent = limit if in_steps else parts[0].tokens
                if isinstance(error, PeerLimitError) or not self._learn_per_call(peer, error, sent):
                    raise
            else:
                return joined_answer(answers, dim=0, at_once=not in_steps)

    async def meet(self, server: SpanServer) -> None:
        """Connect to a server and have what it says of itself, so that its first call need not wait for that."""
        with suppress(PeerError):  # its first call meets the error, if there is one
            await kept_info(self._transport, self._peers.of(server.peer_id), server.span.start, self._peers.settings)

    async def _in_steps(self, peer: Peer, hop: Hop, parts: Sequence[Activations], step: int) -> list[Answer]:
        """One session after the other: beside it another of this length may have no room."""
        async with peer.stepping:
            if peer.is_backing_off:
                raise PeerUnreachableError("it failed while this input waited for its turn")
            return [await self._through_session(hop, part, step) for part in parts]

    async def _through_session(self, hop: Hop, activations: Activations, step: int) -> Answer:
        session = await self.open_session(hop, activations.rows, activations.positions)
        try:
            answers = [await session.step(part.hidden, part.prompts) for part in activations.by_positions(step)]
        finally:
            await session.close()
        return joined_answer(answers, dim=1)

    async def open_session(self, hop: Hop, rows: int, positions: int) -> HopSession:
        """Return a session on the hop's blocks with its cache reserved, to be closed by whoever asked for it.

        Raises PeerLimitError where the server never has room for so many positions, PeerCacheFullError where it has
        none now, PeerNoSessionError where it opens none for us, and other PeerErrors.
        """
        peer = self._peers.of(hop.peer_id)
        if (too_large := peer.limits.session_refusal(rows, positions)) is not None:
            raise PeerLimitError(str(too_large))
        try:
            return await self._opener.open(peer, hop, rows, positions)
        except PeerRefusedError as error:
            raise self.explain_session(hop, error, rows, positions) from error

    async def check_push(self, hop: Hop) -> None:
        """Raise PeerError where the hop's server opens no session for us, or does not push on what it is pushed."""
        version = (await self._opener.check(self._peers.of(hop.peer_id), hop)).version
        if not may_push(version):
            raise PeerRefusedError(f"petals {version or 'of no version'} does not push on what it was pushed")

    async def step(
        self,
        session: HopSession,
        hop: Hop,
        hidden: torch.Tensor,
        prompts: torch.Tensor | None = None,
        hypo_ids: torch.Tensor | None = None,
    ) -> Answer:
        """Make a step of a session (`HopSession.step`). Raises PeerLimitError where it holds more than a call may."""
        try:
            return await session.step(hidden, prompts, hypo_ids)
        except PeerRefusedError as error:
            tokens = hidden.shape[0] * hidden.shape[1]
            if self._learn_per_call(self._peers.of(hop.peer_id), error, tokens):
                raise PeerLimitError(str(error)) from error
            raise

    def explain_session(self, hop: Hop, error: PeerRefusedError, rows: int, positions: int) -> PeerRefusedError:
        """Return PeerLimitError where a session was refused for its size, which is noted; otherwise the error."""
        peer = self._peers.of(hop.peer_id)
        if peer.limits.learn_per_session(error, rows, positions):
            _log.debug("%s: has no cache for %d x %d positions: %s", peer.name, rows, positions, error)
            return PeerLimitError(str(error))
        return error

    def explain_push(self, hop: Hop, error: PeerError, rows: int, positions: int) -> PeerError:
        """Return PeerLimitError where a pushed step or its session was refused for its size, which is noted."""
        if not isinstance(error, PeerRefusedError):
            return error
        if self._learn_per_call(self._peers.of(hop.peer_id), error, rows * positions):
            return PeerLimitError(str(error))
        return self.explain_session(hop, error, rows, positions)

    def _learn_per_call(self, peer: Peer, error: PeerRefusedError, tokens: int) -> bool:
        if not peer.limits.learn_per_call(error, tokens):
            return False
        _log.debug("%s: takes %s tokens in one call", peer.name, peer.limits.per_call)
        return True
