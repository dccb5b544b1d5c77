"""Answers that are not finite: the server's fault, or the input's? Half precision overflows on some inputs, on every
server alike; to ask for ever would end a whole run over one example."""

from collections.abc import Sequence

import torch

from petals_eval.errors import NotFiniteError, PeerError, PeerNotFiniteError
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.transport.client import BlockCalls

__all__ = ["Overflow"]

ENOUGH_SERVERS, ENOUGH_ANSWERS = 3, 2
"""Servers, or as many as there are, and answers to one question that make the question suspect."""
_SCALE = 0.1  # of embeddings, about: blocks normalise what they read


class Overflow:
    """What servers made of one micro-batch at one hop."""

    def __init__(self, calls: BlockCalls):
        self._calls = calls
        self._hops: list[Hop] = []

    def note(self, hop: Hop, error: PeerError) -> None:
        """That a call failed, with whatever."""
        if isinstance(error, PeerNotFiniteError):
            self._hops.append(hop)

    async def judge(self, holders: Sequence[str], hidden: torch.Tensor) -> None:
        """Return where the servers may be at fault, so that others are to be tried.

        holders: peer ids of those that could be asked. hidden: (batch, seq, hidden), the question.
        Raises NotFiniteError where enough of them agreed, and the last of them computes another question well.
        """
        servers = {hop.server.peer_id for hop in self._hops}
        if len(self._hops) < ENOUGH_ANSWERS or len(servers) < min(ENOUGH_SERVERS, len(set(holders))):
            return
        hop = self._hops[-1]
        other = _SCALE * torch.randn(1, min(16, hidden.shape[1]), hidden.shape[2], dtype=torch.float32)
        try:
            await self._calls.forward(hop, other, None, lossless=True)
        except PeerError:
            self._hops.clear()
            return
        among = "the only server" if len(servers) == 1 else f"{len(servers)} servers"
        raise NotFiniteError(
            f"expected finite hidden states after blocks {hop.first}:{hop.last}, found NaN or infinity from {among} of "
            "these blocks, which compute other inputs well: this input overflows their dtype. Use servers of another "
            "one (--require-dtype bfloat16 or float32), or a smaller max_length in the task"
        )
