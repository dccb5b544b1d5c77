"""Answers that are not finite: is it the server's fault, or the input's? Half precision overflows on some inputs, on
every server alike; to ask for ever would end a whole run over one example."""

from collections.abc import Sequence

import torch

from petals_eval.errors import NotFiniteError, PeerError
from petals_eval.swarm.activations import Activations
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.transport.client import HopClient

__all__ = ["raise_if_input_overflows"]

_ENOUGH_SERVERS, _ENOUGH_ANSWERS = 3, 2
"""Servers, or as many as there are, and answers to one question that make the question suspect."""
_USUAL_SCALE = 0.1
"""Standard deviation of embeddings, about: blocks normalise what they read."""


async def raise_if_input_overflows(
    client: HopClient, hops: list[Hop], holders: Sequence[str], activations: Activations
) -> None:
    """Raise NotFiniteError if enough servers agree that this input overflows; otherwise return.

    hops: those that answered these activations with NaN or infinity; emptied where the last of them computes another
        question no better. holders: peer ids of those that could be asked.
    """
    servers = {hop.peer_id for hop in hops}
    if len(hops) < _ENOUGH_ANSWERS or len(servers) < min(_ENOUGH_SERVERS, len(set(holders))):
        return
    hop, shape = hops[-1], (1, min(16, activations.positions), activations.hidden_size)
    other = Activations(_USUAL_SCALE * torch.randn(shape, dtype=torch.float32))
    try:
        await client.run(hop, other, may_step=False, lossless=True)
    except PeerError:
        hops.clear()
        return
    among = "the only server" if len(servers) == 1 else f"{len(servers)} servers"
    raise NotFiniteError(
        f"expected finite hidden states after blocks {hop.span}, found NaN or infinity from {among} of these blocks, "
        "which compute other inputs well: this input overflows their dtype. Use servers of another one "
        "(--require-dtype bfloat16 or float32), or a smaller max_length in the task"
    )
