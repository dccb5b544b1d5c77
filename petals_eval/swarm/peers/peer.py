"""The peer book: what each server did in this run. A record is a claim; this is what was seen."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from petals_eval.config import SwarmSettings
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
from petals_eval.swarm.peers.window import Flow

__all__ = ["PeerBook", "PeerHistory", "in_words", "short_peer"]


def short_peer(peer_id: str) -> str:
    """A peer's identity as people read it: its last letters."""
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


def in_words(error: Exception) -> str:
    """A failure for a person to read: what the server does, and what came from it or from libp2p."""
    text = str(error)
    if isinstance(error, PeerUnreachableError) and "failed to dial" in text:
        text = _DIALLING.sub("", text, count=1)
    text = " ".join(text.split())
    doing = _WHAT_IT_DOES.get(type(error))
    return f"{doing} ({text})" if doing else f"{type(error).__name__}: {text}"


@dataclass(slots=True)
class PeerHistory:
    """What was seen of one server. Times are seconds, `blocked_until` on the book's clock."""

    calls: int = 0
    failures: int = 0
    failures_in_a_row: int = 0
    blocked_until: float = 0.0
    last_error: str = ""
    began_with: str = ""  # the first error of the failures in a row
    is_left_out: bool = False  # for good
    tokens: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    in_flight: int = 0  # tokens it is working on for us
    overtaken: int = 0  # calls that another server, asked later, was done with first
    flow: Flow = field(default_factory=Flow)  # its rate and its window
    spans: set[tuple[int, int]] = field(default_factory=set)


class PeerBook:
    """Histories by peer id. Used from the connection's event loop only, so it needs no lock."""

    def __init__(self, settings: SwarmSettings, clock: Callable[[], float] = time.monotonic):
        self._settings = settings
        self._clock = clock
        self.histories: dict[str, PeerHistory] = {}
        self.retries = 0

    def of(self, peer_id: str) -> PeerHistory:
        history = self.histories.get(peer_id)
        if history is None:
            history = self.histories[peer_id] = PeerHistory()
        return history

    def is_usable(self, peer_id: str, *, even_left_out: bool = False) -> bool:
        """Whether the server is neither left out nor being left alone after a failure."""
        history = self.histories.get(peer_id)
        if history is None:
            return True
        return history.blocked_until <= self._clock() and (even_left_out or not history.is_left_out)

    def is_left_out(self, peer_id: str) -> bool:
        """Whether the server was left out for good."""
        history = self.histories.get(peer_id)
        return history is not None and history.is_left_out

    def leave_out(self, peer_id: str, error: Exception) -> None:
        """Use the server no more: what it did is no failure that passes."""
        history = self.of(peer_id)
        history.is_left_out = True
        history.last_error = in_words(error)

    def may_be_called(self, peer_id: str) -> bool:
        """Whether to send it work now: one that failed last time is tried with one micro-batch, not with all of them.

        A server that hangs would otherwise hold up half of what is in flight each time it is tried again.
        """
        history = self.histories.get(peer_id)
        on_trial = history is not None and history.failures_in_a_row > 0 and history.in_flight > 0
        return self.is_usable(peer_id) and not on_trial

    def is_failing(self, peer_id: str) -> bool:
        """Whether its last call failed, or it is still left alone after one that did."""
        history = self.histories.get(peer_id)
        return history is not None and (history.failures_in_a_row > 0 or not self.is_usable(peer_id))

    def failed(self, peer_id: str, error: Exception) -> None:
        """Leave the server alone: min_backoff seconds, doubled with each failure in a row, up to max_backoff."""
        history = self.of(peer_id)
        now = self._clock()
        history.failures += 1
        self.retries += 1
        history.last_error = in_words(error)
        if history.blocked_until > now:
            return  # calls that were in flight together fail together: that is one failure, not many
        if history.failures_in_a_row == 0:
            history.began_with = history.last_error
        history.failures_in_a_row += 1
        delay = self._settings.min_backoff * 2 ** min(history.failures_in_a_row - 1, 30)
        history.blocked_until = now + min(delay, self._settings.max_backoff)

    def succeeded(self, peer_id: str, *, tokens: int, sent: int, received: int) -> None:
        history = self.of(peer_id)
        history.failures_in_a_row = 0
        history.calls += 1
        history.tokens += tokens
        history.bytes_sent += sent
        history.bytes_received += received

    def overtaken(self, peer_id: str) -> None:
        """Another server, asked later, was done first."""
        history = self.of(peer_id)
        history.overtaken += 1
        history.flow.slowed_down()
