"""The peer: everything that this client knows of one server, in one place. A record is a claim; this is what was seen.

`PeerBook` is the only mapping by peer id that outlives a call, besides the directory's snapshot. Layers above fill in
what they find out; this one decides nothing but whether a server may be called.
"""

import asyncio
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from petals_eval.config import SwarmSettings
from petals_eval.errors import PeerDistrustedError
from petals_eval.swarm.peers.finding import TrustFinding
from petals_eval.swarm.peers.lane_standing import LaneStanding
from petals_eval.swarm.peers.limits import ModelLimits, TokenLimits
from petals_eval.swarm.peers.peer_text import error_text, short_peer
from petals_eval.swarm.peers.sampling import Sampler
from petals_eval.swarm.peers.session_cache import SessionCache
from petals_eval.swarm.peers.window import CongestionWindow, SentCall
from petals_eval.swarm.runtime import Runtime
from petals_eval.swarm.tasks import Once
from petals_eval.swarm.wire.codecs import LossyCode
from petals_eval.swarm.wire.server_info import ServerInfo
from petals_eval.swarm.wire.span import Span

__all__ = ["Peer", "PeerBook", "ProbeState"]

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class ProbeState:
    """The determinism probes of a server for one span that it announces: a new span is probed again.

    probes: by the blocks that were asked. tokens: computed so far. due_at: tokens at which it is probed again.
    """

    due_at: float
    tokens: int = 0
    probes: dict[Span, Once[None]] = field(default_factory=dict)


class Peer:
    """One server, as far as this connection knows it. Used from the connection's event loop; counts from any thread.

    window, limits, cache: how much it takes.
    info, codec, rolls_back: what it answered when it was asked; `ask_anew` forgets that. codec: how hidden states
        travel to it and back (None: as they are). codec_refusal: why not under the code of the settings, as it was
        last; has_taken_codec: that it took it.
    stub: hivemind's object to call it with, kept by the transport.
    probes, samplers: by the span it announced, whether it was asked twice, and which of its answers are audited.
    finding: what is held against it. distrusted: the error that it was quarantined with.
    stepping: held while rows go to it in steps: it may have no room for a second session of their length.
    blocked_until: until when it is left alone, on the runtime's clock.
    tokens_in_flight: what it is working on for us. overtaken: calls that another server, asked later, answered first.
    push_rest: seconds it was last left without pushes, and push_rest_until: until when. lanes: how they fare there.
    is_avoided: whether others are to do the work, for they are to be compared with it.
    """

    def __init__(self, peer_id: str, settings: SwarmSettings, runtime: Runtime, model: ModelLimits):
        self.peer_id = peer_id
        self.name = short_peer(peer_id)
        self._settings = settings
        self._runtime = runtime
        self.window = CongestionWindow()
        self.limits = TokenLimits(self.name, settings.max_tokens_per_call, model)
        self.cache = SessionCache(self.name, runtime)
        self.info: Once[ServerInfo] = Once()
        self.codec: Once[LossyCode | None] = Once()
        self.codec_refusal: str | None = None
        self.has_taken_codec = False
        self.rolls_back: Once[bool] = Once()
        self.stub: Any = None
        self.probes: dict[Span, ProbeState] = {}
        self.samplers: dict[Span, Sampler[object]] = {}
        self.finding: TrustFinding | None = None
        self.distrusted: PeerDistrustedError | None = None
        self.stepping = asyncio.Lock()
        self.calls = self.tokens = self.bytes_sent = self.bytes_received = 0
        self.failures = self.retries = self.overtaken = 0
        self.tokens_in_flight = 0
        self.push_tokens_reserved = 0.0
        self.failures_in_a_row = 0
        self.blocked_until = 0.0
        self.last_error = ""
        self.first_error_in_a_row = ""
        self.spans: set[Span] = set()
        self.push_rest = self.push_rest_until = 0.0
        self.lanes = LaneStanding()
        self.is_avoided = False

    def ask_anew(self) -> None:
        """Forget what must be asked again, for it may have come back as another: info, codec, probes, cache.

        Failures, back-off, limits, the window and a quarantine stay.
        """
        for once in (self.info, self.codec, self.rolls_back, self.lanes.goes_back):
            once.ask_anew()
        for state in self.probes.values():
            state.probes.clear()
        self.cache.ask_anew()

    @property
    def is_quarantined(self) -> bool:
        """Whether it is left out for good: what it did is no failure that passes."""
        return self.distrusted is not None

    def quarantine(self, error: PeerDistrustedError) -> None:
        """Leave the server out for good."""
        self.distrusted = error
        self.last_error = error_text(error)
        _log.debug("%s: quarantined, %s", self.name, self.last_error)

    @property
    def is_backing_off(self) -> bool:
        """Whether it is left alone after a failure."""
        return self.blocked_until > self._runtime.monotonic()

    @property
    def is_usable(self) -> bool:
        """Whether it is neither quarantined nor left alone after a failure."""
        return self.distrusted is None and self.blocked_until <= self._runtime.monotonic()

    @property
    def may_be_called(self) -> bool:
        """Whether to send it work now: after a failure it is tried with one micro-batch, not with all of them.

        A server that hangs would otherwise hold up half of what is in flight each time it is tried again.
        """
        is_tried = self.failures_in_a_row > 0 and self.tokens_in_flight > 0
        return self.is_usable and not is_tried and not self.is_avoided

    @property
    def is_failing(self) -> bool:
        """Whether its last call failed, or it is still left alone after one that did."""
        return self.failures_in_a_row > 0 or not self.is_usable

    def send(self, tokens: int, blocks: int) -> SentCall:
        """Count a call as in flight; what is returned goes to `settle`."""
        self.tokens_in_flight += tokens
        return self.window.send(float(tokens * blocks), self._runtime.monotonic())

    def settle(self, sent: SentCall, tokens: int, *, is_delivered: bool) -> None:
        """Count a call as not in flight any more."""
        self.tokens_in_flight -= tokens
        self.window.settle(sent, self._runtime.monotonic(), is_delivered=is_delivered)

    def on_failed(self, error: Exception) -> None:
        """Leave the server alone: min_backoff seconds, doubled with each failure in a row, up to max_backoff."""
        now = self._runtime.monotonic()
        self.failures += 1
        self.retries += 1
        self.last_error = error_text(error)
        if self.blocked_until <= now:  # calls that were in flight together fail together: one failure, not many
            self._leave_alone(now)

    def _leave_alone(self, now: float) -> None:
        if self.failures_in_a_row == 0:
            self.first_error_in_a_row = self.last_error
        self.failures_in_a_row += 1
        delay = self._settings.min_backoff * 2 ** min(self.failures_in_a_row - 1, 30)
        self.blocked_until = now + min(delay, self._settings.max_backoff)
        _log.debug("%s: %s; left alone for %.2f s", self.name, self.last_error, self.blocked_until - now)

    def on_succeeded(self, span: Span, *, tokens: int, sent: int, received: int) -> None:
        """Count a call that was answered. span: what it announces; sent, received: bytes."""
        self.failures_in_a_row = 0
        self.spans.add(span)
        self.calls += 1
        self.tokens += tokens
        self.bytes_sent += sent
        self.bytes_received += received

    def on_overtaken(self) -> None:
        """Count a call that another server, asked later, answered first.

        It may hang, and would hold up each micro-batch that it is given: so it is left alone like one that failed, and
        then tried with one.
        """
        self.overtaken += 1
        now = self._runtime.monotonic()
        if self.blocked_until > now:
            return  # those that were in flight together are overtaken together
        if not self.failures_in_a_row:
            self.window.on_overtaken()
        self.last_error = "does not answer (another server was quicker)"
        self._leave_alone(now)


class PeerBook(Mapping[str, Peer]):
    """The peers that one connection met, by peer id. Used from its event loop; may be read from any thread.

    settings, runtime: of the connection, for whoever works with its peers.
    """

    def __init__(self, settings: SwarmSettings, runtime: Runtime | None = None):
        self.settings = settings
        self.runtime = runtime or Runtime()
        self.model_limits = ModelLimits()
        self._peers: dict[str, Peer] = {}

    def of(self, peer_id: str) -> Peer:
        """Return the peer, a new one where it was not met before."""
        peer = self._peers.get(peer_id)
        if peer is None:
            peer = self._peers[peer_id] = Peer(peer_id, self.settings, self.runtime, self.model_limits)
        return peer

    @property
    def retries(self) -> int:
        """Calls that failed and were made again."""
        return sum(peer.retries for peer in self.values())

    def __getitem__(self, peer_id: str) -> Peer:
        return self._peers[peer_id]

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._peers))

    def __len__(self) -> int:
        return len(self._peers)
