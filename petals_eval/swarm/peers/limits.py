"""How many tokens a server takes at once: read from its refusals, for the records do not say. No I/O."""

import re
from dataclasses import dataclass

from petals_eval.errors import PeerRefusedError, RequestTooLargeError

__all__ = ["USUAL_MAX_TOKENS", "ModelLimits", "TokenLimits", "says_cache_is_full"]

USUAL_MAX_TOKENS = 2048
"""Tokens (rows x positions) that any Petals server takes in one call unless its operator said otherwise."""

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
    """Return whether a server refused a session because its cache has no room for it now."""
    return _FULL.search(str(error)) is not None


@dataclass(slots=True)
class ModelLimits:
    """Limits that come with the model and hold on every server.

    steps_alike: positions up to which the steps of a session compute what one call does; None: always. Where rotary
        angles go by the length of a call, it is the length beyond which they change.
    """

    steps_alike: int | None = None


class TokenLimits:
    """How much one server takes.

    per_call: tokens (rows x positions) in one call, as far as it was set or told; None: nothing is known.
    """

    def __init__(self, server: str, per_call: int | None, model: ModelLimits):
        """server: its name for messages. model: shared with all servers."""
        self.per_call = per_call
        self._server = server
        self._model = model
        self._per_session: dict[int, int] = {}  # positions, by rows

    def learn_per_call(self, error: PeerRefusedError, tokens: int) -> bool:
        """Return whether the server refused `tokens` in one call because they are more than it takes, and note that."""
        told = _PER_CALL.search(str(error))
        if told is None or not 0 < int(told[1]) < tokens:
            return False
        self.per_call = int(told[1])
        return True

    def learn_per_session(self, error: PeerRefusedError, rows: int, positions: int) -> bool:
        """Return whether the server refused a session because it never has room for so many positions, and note that.

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
        self._per_session[rows] = limit
        return True

    def session_refusal(self, rows: int, positions: int) -> RequestTooLargeError | None:
        """Return the error for a session of these sizes, where the server is known not to take it, or where it would
        compute something else than one call."""
        in_one_call = self.per_call or USUAL_MAX_TOKENS
        alike = self._model.steps_alike
        if alike is not None and positions > alike:
            return RequestTooLargeError(
                f"an input holds {positions} tokens (prompt included), more than the {alike} up to which "
                "calls of any length turn this model's rotary embeddings alike: in steps it would get other numbers "
                f"than in one call. Server {self._server} takes {in_one_call} in one call: set a smaller max_length in "
                "the task, or in the session"
            )
        limit = self._per_session.get(rows)
        if limit is None or limit >= positions:
            return None
        in_rows = f" in {rows} rows" if rows > 1 else ""
        return RequestTooLargeError(
            f"an input holds {positions} tokens (prompt included){in_rows}, but server {self._server} takes "
            f"{in_one_call} in one call and has a cache for {limit} in a session of several: set a smaller max_length "
            "in the task"
        )
