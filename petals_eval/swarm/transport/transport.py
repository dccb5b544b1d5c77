"""The seam between "which server next" and "send it". What lies above it runs in a simulator just as well."""

from dataclasses import dataclass
from typing import Protocol

from petals_eval.config import SwarmSettings
from petals_eval.errors import PeerAnswerError
from petals_eval.swarm.activations import Activations
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.peers.peer import Peer
from petals_eval.swarm.transport.hop_session import HopSession
from petals_eval.swarm.transport.rpc import Answer
from petals_eval.swarm.wire.server_info import ServerInfo, dtype_name

__all__ = ["AskedInfo", "Transport", "ask_info", "kept_info"]


@dataclass(frozen=True, slots=True)
class AskedInfo:
    """A server's answer to rpc_info, the seconds it took and the bytes of the messages."""

    info: ServerInfo
    seconds: float
    bytes_sent: int
    bytes_received: int


class Transport(Protocol):
    """One RPC to one server: send, wait under a deadline, check the answer. No retries. Everything raises PeerError."""

    async def ask_info(self, peer_id: str, block: int) -> AskedInfo:
        """Ask now, whatever was asked before, what the server says of itself and of this block."""
        ...

    async def call(self, hop: Hop, activations: Activations, *, lossless: bool = False) -> Answer:
        """Run the hop's blocks in one call. lossless: whatever the lossy code of the settings is."""
        ...

    async def open_session(self, hop: Hop, rows: int, positions: int) -> HopSession:
        """Return a session on the hop's blocks with its cache reserved, to be closed by whoever asked for it."""
        ...


async def ask_info(transport: Transport, peer: Peer, block: int) -> ServerInfo:
    """Ask a server anew what it is, and note what it says of its cache. Raises PeerError."""
    info = (await transport.ask_info(peer.peer_id, block)).info
    peer.cache.observe_free(info.cache_tokens_available)
    return info


async def kept_info(transport: Transport, peer: Peer, block: int, settings: SwarmSettings) -> ServerInfo:
    """Return what a server says of itself, asked once and kept. Raises PeerError; for an unwanted dtype, too."""

    async def ask() -> ServerInfo:
        info = await ask_info(transport, peer, block)
        wanted = settings.require_dtype
        if wanted is not None and dtype_name(info.output_dtype) != wanted:
            raise PeerAnswerError(f"it announces {wanted}, but computes in {dtype_name(info.output_dtype)}")
        return info

    return await peer.info.get(ask)
