"""The determinism guard: each server is asked one question twice before its first call, and later again.

The question is a corner of the activations on their way to the server (`question_from`), in two calls. Equal bits prove
that no dropout is active: two masks are never equal. Unequal ones are held against what the dtype's rounding explains.
Where that could be it, the blocks are asked one by one: rounding stays what it is, while dropout in a single block is
no longer thinned by what the others do.
"""

import logging
import math
from dataclasses import dataclass

import torch

from petals_eval.config import SwarmSettings
from petals_eval.errors import PeerLimitError, PeerNondeterministicError
from petals_eval.swarm.activations import Activations
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.peers.limits import USUAL_MAX_TOKENS
from petals_eval.swarm.peers.peer import Peer, ProbeState
from petals_eval.swarm.tasks import Once, together
from petals_eval.swarm.transport.client import HopClient
from petals_eval.swarm.trust.determinism import difference, question_from
from petals_eval.swarm.trust.quarantine import Quarantine
from petals_eval.swarm.trust.tolerance import SAME_SERVER
from petals_eval.swarm.wire.span import Span

__all__ = ["AskedTwice", "DeterminismGuard", "ask_twice"]

_log = logging.getLogger(__name__)

_FIRST_DUE_AT = 1024
"""Tokens a server has computed when it is probed again for the first time: about a micro-batch."""


@dataclass(frozen=True, eq=False)
class AskedTwice:
    """What came of asking one question twice.

    answer: (rows, positions, hidden size), of the first time. difference: of the two, relative to what the blocks did.
    allowed: what rounding explains. seconds: the quicker of the two calls took.
    """

    question: Activations
    answer: torch.Tensor
    difference: float
    allowed: float
    seconds: float

    @property
    def is_alike(self) -> bool:
        """Whether the answers are the same but for rounding."""
        return self.difference <= self.allowed

    @property
    def text(self) -> str:
        """What a person is told of answers that are not alike."""
        return f"two answers to one question (difference {self.difference:.2g}, rounding explains {self.allowed:g})"


async def ask_twice(client: HopClient, hop: Hop, question: Activations) -> AskedTwice:
    """Ask the hop's blocks one question twice, and where rounding could explain a difference, block by block.

    Rows and positions that are more than the server takes are left out. Raises PeerError when it cannot be asked.
    """
    whole = await _ask_twice(client, hop, question)
    if whole.difference == 0 or not whole.is_alike or hop.blocks == 1:
        return whole
    largest, question = whole.difference, whole.question
    for block in range(hop.span.start, hop.span.stop):
        alone = await _ask_twice(client, Hop(hop.server, Span(block, block + 1)), question)
        largest = max(largest, alone.difference)
        question = Activations(alone.answer)
    return AskedTwice(whole.question, whole.answer, largest, whole.allowed, whole.seconds)


async def _ask_twice(client: HopClient, hop: Hop, question: Activations) -> AskedTwice:
    while True:
        # Small as the question is, an operator may have set a limit below it.
        limit = client.max_tokens(hop) or USUAL_MAX_TOKENS
        question = Activations(question.hidden[:, :limit])
        try:
            first, second = await together([client.run(hop, question, may_step=False, lossless=True) for _ in range(2)])
            break
        except PeerLimitError:
            if client.max_tokens(hop) == limit:
                raise
    apart = difference(question.hidden, first.hidden, second.hidden)
    seconds = min(first.seconds, second.seconds)
    return AskedTwice(question, first.hidden, apart, SAME_SERVER[first.hidden.dtype], seconds)


class DeterminismGuard:
    """Probes servers and quarantines those that give two answers. Used from the connection's event loop only."""

    def __init__(self, client: HopClient, quarantine: Quarantine, settings: SwarmSettings):
        self._client = client
        self._quarantine = quarantine
        self._settings = settings

    def new_state(self, peer: Peer, span: Span) -> ProbeState:
        """Begin to probe a server for a span that it announces."""
        due_at = _FIRST_DUE_AT if self._settings.recheck_share > 0 else math.inf
        return peer.probes.setdefault(span, ProbeState(due_at))

    async def ensure_probed(self, peer: Peer, hop: Hop, activations: Activations) -> None:
        """Return once the server has answered one question twice alike. Raises PeerError."""
        state = peer.probes.get(hop.server.span) or self.new_state(peer, hop.server.span)
        probe = _valid_probe(state, hop.span)
        if probe is None:
            probe = state.probes[hop.span] = Once()
        elif state.tokens >= state.due_at:
            question = Activations(question_from(activations.hidden))
            state.due_at = state.tokens + 2 * question.tokens / self._settings.recheck_share
            await self._ask(peer, hop, question)
        await probe.get(lambda: self._ask(peer, hop, Activations(question_from(activations.hidden))))

    async def _ask(self, peer: Peer, hop: Hop, question: Activations) -> None:
        asked = await ask_twice(self._client, hop, question)
        peer.window.observe_rtt(asked.seconds)
        _log.debug(
            "%s: blocks %s asked twice: difference %.2g, rounding explains %g; %.3f s",
            *(peer.name, hop.span, asked.difference, asked.allowed, asked.seconds),
        )
        if not asked.is_alike:
            error = PeerNondeterministicError(f"it gave {asked.text}", asked.difference)
            self._quarantine.add(hop, error)
            raise error


def _valid_probe(state: ProbeState, blocks: Span) -> Once[None] | None:
    """Return a probe of all these blocks that was answered in order, or is on its way."""
    for span, probe in state.probes.items():
        if blocks.within(span) and not probe.is_open:
            return probe
    return None
