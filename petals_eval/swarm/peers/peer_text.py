"""Peers as people read of them: who it is, and what it did wrong."""

import re

from petals_eval.errors import (
    PeerAnswerError,
    PeerCacheFullError,
    PeerDisagreesError,
    PeerNondeterministicError,
    PeerNoSessionError,
    PeerNotFiniteError,
    PeerRefusedError,
    PeerTimeoutError,
    PeerUnreachableError,
)

__all__ = ["error_text", "short_peer"]


def short_peer(peer_id: str) -> str:
    """Return a peer's identity as people read it: its last letters."""
    return f"...{peer_id[-6:]}"


_WHAT_IT_DOES: dict[type[Exception], str] = {
    PeerUnreachableError: "cannot be reached",
    PeerTimeoutError: "does not answer",
    PeerRefusedError: "refuses",
    PeerCacheFullError: "has no room",
    PeerNoSessionError: "gives no session",
    PeerAnswerError: "answers wrongly",
    PeerNotFiniteError: "answers wrongly",
    PeerNondeterministicError: "is left out",
    PeerDisagreesError: "is left out",
}
# What hivemind and libp2p put before the reason, each its own; the peer is named already.
_DIALLING = re.compile(r"^(Connect failed\. msg=)?(failed to dial:? ?)*(\w+: )?")


def error_text(error: Exception) -> str:
    """Return a failure for a person to read: what the server does, and what came from it or from libp2p."""
    text = str(error)
    if isinstance(error, PeerUnreachableError) and "failed to dial" in text:
        text = _DIALLING.sub("", text, count=1)
    text = " ".join(text.split())
    doing = _WHAT_IT_DOES.get(type(error))
    return f"{doing} ({text})" if doing else f"{type(error).__name__}: {text}"
