"""Whether a server's sessions go back to a position when told to: by its version first, then by trying it out."""

import torch

from petals_eval.errors import PeerRefusedError
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.peers.peer import Peer
from petals_eval.swarm.transport.client import HopClient
from petals_eval.swarm.transport.hop_session import HopSession
from petals_eval.swarm.wire.server_info import may_roll_back

__all__ = ["PROOF_TOKENS", "proves_rolling_back", "rolls_back"]

PROOF_TOKENS = 18
"""Tokens of cache that `proves_rolling_back` needs."""


async def rolls_back(client: HopClient, peer: Peer, hop: Hop, hidden_size: int) -> bool:
    """Return whether the sessions of the hop's server go back to a position, asked once and kept. Raises PeerError."""

    async def ask() -> bool:
        if not may_roll_back(hop.server.record.version):
            return False
        return await proves_rolling_back(await client.open_session(hop, 1, PROOF_TOKENS), hidden_size)

    try:
        return await peer.rolls_back.get(ask)
    except PeerRefusedError:
        return False  # no room in its cache now; asked again another time


async def proves_rolling_back(session: HopSession, hidden_size: int) -> bool:
    """Return whether a server's sessions honour start_from_position; `session` is a fresh one, closed here.

    Eight random positions are computed, then the last five once more after going back to the third, then the same
    five without going back. A server that goes back repeats its first answer there, and differs where they are
    appended; one that ignores the position appends them twice. Both are compared, so that no tolerance for the
    server's dtype is needed; a server whose answers are noise counts as one that does not.
    Raises PeerError when the server cannot be asked.
    """
    hidden = torch.randn(1, 8, hidden_size, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    try:
        first = (await session.step(hidden)).hidden[:, 3:].float()
        try:
            session.roll_back(3)
            again = (await session.step(hidden[:, 3:])).hidden.float()
            appended = (await session.step(hidden[:, 3:])).hidden.float()
        except PeerRefusedError:
            return False  # it knows the word, but not what to do
    finally:
        await session.close()
    return bool((again - first).abs().max() < 0.1 * (appended - first).abs().max())
