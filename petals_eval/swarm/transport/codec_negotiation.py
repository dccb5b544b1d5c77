"""Which servers take the lossy code of the settings. Each is asked once, before its first call.

A server says nowhere which codes it takes. One that lacks the library for a code, or whose NumPy broke hivemind's
decoder, answers each call with that error: so each server is sent one position in the code, and where it refuses or
answers wrongly the same position as it is. If that works it is the code's fault, and the server is spoken to lossless
from then on.
"""

import logging
from collections.abc import Awaitable, Callable

from petals_eval.errors import PeerAnswerError, PeerRefusedError
from petals_eval.swarm.peers.peer import Peer
from petals_eval.swarm.transport.rpc import Answer
from petals_eval.swarm.wire.codecs import LossyCode
from petals_eval.swarm.wire.records import peer_text
from petals_eval.swarm.wire.server_info import ServerInfo, dtype_name

__all__ = ["CAUSES", "TryOut", "negotiate"]

_log = logging.getLogger(__name__)

CAUSES = {
    "only 0-dimensional arrays can be converted": "its hivemind (before 1.2) reads no 8-bit code under NumPy 2.4",
    "requires bitsandbytes": "it has no bitsandbytes, which hivemind needs for this code",
}
"""What is behind the words of a server that fails on a code."""

TryOut = Callable[[LossyCode | None], Awaitable[Answer]]
"""Sends one position under a code, or as it is for None."""


async def negotiate(peer: Peer, code: LossyCode, info: ServerInfo, try_out: TryOut) -> LossyCode | None:
    """Return the code to speak to this server in; None: lossless, and `peer.codec_refusal` says why.

    Concurrent callers share the question. Raises what `try_out` raises, but for a code that is refused.
    """

    async def ask() -> LossyCode | None:
        peer.codec_refusal = await _reason_against(code, info, try_out)
        peer.has_taken_codec = peer.codec_refusal is None
        _log.debug("%s: %s", peer.name, f"takes {code.name}" if peer.has_taken_codec else peer.codec_refusal)
        return code if peer.has_taken_codec else None

    return peer.codec.answer if peer.codec.is_answered else await peer.codec.get(ask)


async def _reason_against(code: LossyCode, info: ServerInfo, try_out: TryOut) -> str | None:
    """Return why not to speak to a server in this code; None: it takes it."""
    if info.output_dtype.itemsize <= code.bytes_per_value:
        return f"it computes in {dtype_name(info.output_dtype)}: {code.name} saves nothing"
    try:
        await try_out(code)
    except (PeerRefusedError, PeerAnswerError) as error:
        await try_out(None)  # raises where it is not the code's fault
        words = str(error) or type(error).__name__
        cause = next((cause for part, cause in CAUSES.items() if part in words), None)
        return words if cause is None else f"{cause}: {peer_text(words)}"
    return None
