"""How many tokens a server takes: read from its refusals, for the records do not say."""

import re

from petals_eval.errors import PeerRefusedError, RequestTooLargeError
from petals_eval.swarm.peers.peer import short_peer

__all__ = ["USUAL_MAX_TOKENS", "TokenLimits", "says_cache_is_full"]

USUAL_MAX_TOKENS = 2048
"""Tokens (rows x positions) any Petals server takes in one call unless its operator said otherwise."""

# What Petals servers of both lines say; the operator's number is in it.
_PER_CALL = re.compile(r"Task size greater than max_batch_size \((\d+)\)")
_PER_SESSION = re.compile(r"Cannot allocate KV cache for \d+ tokens, max = (\d+)")
_CACHE = re.compile(r"Could not allocate (\d+) bytes, max cache size = (\d+) bytes")
# Of 2.2.0 and 2.3.0.dev2 alike. The first is all that a session hears that is never to wait, the others are for those
# that are.
_FULL = re.compile(
    r"Could not allocate \d+ bytes immediately: out of memory"
    r"|Could not allocate \d+( bytes)? (\(timeout=|within )"
    r"|attention cache is full"
)


def says_cache_is_full(error: PeerRefusedError) -> bool:
    """Whether a server refused a session because its cache has no room for it now."""
    return _FULL.search(str(error)) is not None


class TokenLimits:
    """The limits of the servers met so far.

    max_tokens_per_call: rows x positions that servers take as long as they have not said otherwise, or None.
    steps_alike: positions up to which the steps of a session compute what one call does; None: always. Where rotary
        angles go by the length of a call, it is the length beyond which they change.
    """

    def __init__(self, max_tokens_per_call: int | None):
        self.steps_alike: int | None = None
        self._default = max_tokens_per_call
        self._per_call: dict[str, int] = {}
        self._per_session: dict[tuple[str, int], int] = {}

    def per_call(self, peer_id: str) -> int | None:
        """Tokens (rows x positions) the server takes in one call, as it said or as was set; None: not known."""
        return self._per_call.get(peer_id, self._default)

    def learn_per_call(self, peer_id: str, error: PeerRefusedError, tokens: int) -> bool:
        """Whether the server refused `tokens` in one call because they are more than it takes."""
        told = _PER_CALL.search(str(error))
        if told is None or not 0 < int(told[1]) < tokens:
            return False
        self._per_call[peer_id] = int(told[1])
        return True

    def learn_per_session(self, peer_id: str, error: PeerRefusedError, batch: int, positions: int) -> bool:
        """Whether the server refused a session of `batch` rows because it never has room for so many positions.

        A cache that is full at the moment is another matter.
        """
        told = _PER_SESSION.search(str(error))
        cache = _CACHE.search(str(error))
        if told is not None:
            limit = int(told[1])
        elif cache is not None:
            limit = positions * int(cache[2]) // max(1, int(cache[1]))
        else:
            return False
        if limit >= positions:
            return False
        self._per_session[peer_id, batch] = limit
        return True

    def session_too_large(self, peer_id: str, batch: int, positions: int) -> RequestTooLargeError | None:
        """The error for a session of these sizes, where the server is known not to take it, or where it would compute
        something else than one call."""
        if self.steps_alike is not None and positions > self.steps_alike:
            return RequestTooLargeError(
                f"an input holds {positions} tokens (prompt included), more than the {self.steps_alike} up to which "
                "calls of any length turn this model's rotary embeddings alike: in steps it would get other numbers "
                f"than in one call. Server {short_peer(peer_id)} takes "
                f"{self.per_call(peer_id) or USUAL_MAX_TOKENS} in one call: set a smaller max_length in the task, or "
                "in the session"
            )
        limit = self._per_session.get((peer_id, batch))
        if limit is None or limit >= positions:
            return None
        rows = f" in {batch} rows" if batch > 1 else ""
        return RequestTooLargeError(
            f"an input holds {positions} tokens (prompt included){rows}, but server {short_peer(peer_id)} takes "
            f"{self.per_call(peer_id) or USUAL_MAX_TOKENS} in one call and has a cache for {limit} in a session of "
            "several: set a smaller max_length in the task"
        )
