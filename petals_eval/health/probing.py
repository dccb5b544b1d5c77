"""Levels `info` and `forward`: ask one server what it is, and let it compute. Behind a seam: tests need no network."""

import asyncio
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch

from petals_eval.errors import PeerCacheFullError, PeerError
from petals_eval.health.canary import canary_for
from petals_eval.health.census import ServerClaim, record_age
from petals_eval.health.findings import finding, from_forward_error, from_info_error
from petals_eval.health.locked import LockedServers
from petals_eval.health.results import Finding, ServerHealth, Traffic
from petals_eval.health.settings import HealthSettings, Level
from petals_eval.health.verdict import of_server
from petals_eval.swarm.activations import Activations
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.peers.peer import PeerBook
from petals_eval.swarm.peers.peer_text import error_text
from petals_eval.swarm.runtime import Runtime
from petals_eval.swarm.transport.client import HopClient
from petals_eval.swarm.transport.hop_session import HopSession
from petals_eval.swarm.transport.rpc import Answer
from petals_eval.swarm.transport.transport import AskedInfo, Transport
from petals_eval.swarm.trust.determinism_guard import ask_twice
from petals_eval.swarm.wire.records import ServerState, SpanServer
from petals_eval.swarm.wire.server_info import ServerInfo, dtype_name, other_layout
from petals_eval.swarm.wire.span import Span
from petals_eval.text import number_text, printable

__all__ = ["Network", "ProbePolicy", "Prober", "ServerProbe"]

T = TypeVar("T", AskedInfo, Answer)


@dataclass(frozen=True)
class ProbePolicy:
    """How servers are asked, and what is held against their records.

    min_remaining: share of the announce period: a record with less time left than this should have been renewed.
    max_adapters: of those a server announces, to try.
    session_pauses: seconds before each time that a server is asked for a session, as often as it refuses one.
    """

    min_remaining: float = 0.75
    max_adapters: int = 3
    session_pauses: tuple[float, ...] = (0.0, 0.5, 1.0)


class Network(Protocol):
    """How probes reach the servers of one model."""

    def transport(self, peers: PeerBook) -> Transport:
        """Return a way to call them under the settings of a peer book."""
        ...

    async def is_connected(self, peer_id: str) -> bool:
        """Return whether there is a connection to the peer now."""
        ...


@dataclass(slots=True)
class ServerProbe:
    """What is known of one server so far.

    span: its blocks within the model; None: there are none. passed: of the levels asked, whether it passed.
    round_trip: seconds of an rpc_info. compared: blocks that another server computed, too.
    """

    claim: ServerClaim
    span: Span | None
    findings: list[Finding] = field(default_factory=list)
    info: ServerInfo | None = None
    round_trip: float | None = None
    tokens_per_second: float | None = None
    passed: dict[Level, bool] = field(default_factory=dict)
    compared: int = 0

    @property
    def server(self) -> SpanServer:
        """The server as it announces itself."""
        return self.claim.server

    @property
    def is_online(self) -> bool:
        """Whether it announces that it has loaded its blocks."""
        return self.server.record.state is ServerState.ONLINE

    def has_finding(self, name: str) -> bool:
        """Return whether something of this name was found."""
        return any(each.name == name for each in self.findings)

    def add_finding(self, found: Finding) -> None:
        """Add what was found, unless the same was found before."""
        if all((each.name, each.detail) != (found.name, found.detail) for each in self.findings):
            self.findings.append(found)

    def result(self, settings: HealthSettings) -> ServerHealth:
        """Return all of it, with the verdict."""
        server, record, info = self.server, self.server.record, self.info
        verdict = of_server(self.findings, self.passed.get(Level.FORWARD, False))
        outcomes = {True: "passed", False: "failed", None: "not asked"}
        return ServerHealth(
            peer_id=server.peer_id,
            public_name=record.public_name,
            start=server.span.start,
            end=server.span.stop,
            state=record.state.name.lower(),
            seen=self._seen(),
            version=record.version,
            version_seen=info.version if info else None,
            dtype=_dtype(record.torch_dtype),
            dtype_seen=dtype_name(info.output_dtype) if info else None,
            quant_type=record.quant_type,
            adapters=tuple(printable(each, longest=80) for each in record.adapters),
            using_relay=record.using_relay,
            throughput=record.throughput,
            network_rps=record.network_rps,
            forward_rps=record.forward_rps,
            inference_rps=record.inference_rps,
            next_pings=None if record.next_pings is None else dict(record.next_pings),
            tokens_per_second=self.tokens_per_second,
            cache_tokens_left=record.cache_tokens_left,
            cache_tokens_seen=info.cache_tokens_available if info else None,
            round_trip=self.round_trip,
            record_age=record_age(self.claim.remaining, settings.announce_period),
            probes={
                level.text: outcomes[self.passed.get(level)] for level in (Level.RECORD, Level.INFO, Level.FORWARD)
            },
            compared=self.compared,
            findings=tuple(self.findings),
            verdict=verdict,
        )

    def _seen(self) -> str:
        if Level.INFO not in self.passed:
            return "not asked"
        if self.has_finding("record-without-server") or self.has_finding("unreachable"):
            return "unreachable"
        if self.has_finding("no-answer"):
            return "silent"
        return "answers" if self.passed[Level.INFO] and self.passed.get(Level.FORWARD, True) else "fails"


def _dtype(name: str | None) -> str | None:
    return None if name is None else name.removeprefix("torch.")


class _CountingTransport:
    """A transport that counts what goes over it: calls, and bytes of their messages."""

    def __init__(self, transport: Transport, count: "_Count"):
        self._transport = transport
        self._count = count

    async def ask_info(self, peer_id: str, block: int) -> AskedInfo:
        return self._count.add(await self._transport.ask_info(peer_id, block))

    async def call(self, hop: Hop, activations: Activations, *, lossless: bool = False) -> Answer:
        return self._count.add(await self._transport.call(hop, activations, lossless=lossless))

    async def open_session(self, hop: Hop, rows: int, positions: int) -> HopSession:
        self._count.calls += 1
        return await self._transport.open_session(hop, rows, positions)


@dataclass(slots=True)
class _Count:
    """Calls that were made, and bytes of their messages."""

    calls: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0

    def add(self, answered: T) -> T:
        self.calls += 1
        self.bytes_sent += answered.bytes_sent
        self.bytes_received += answered.bytes_received
        return answered


class Prober:
    """Asks servers of one model. How many at once is the caller's to say."""

    def __init__(
        self,
        network: Network,
        num_blocks: int,
        settings: HealthSettings,
        locked: LockedServers | None = None,
        runtime: Runtime | None = None,
    ):
        """locked: servers that opened no session in looks before this one."""
        self._network = network
        self._model = Span(0, num_blocks)
        self._settings = settings
        self._locked = locked or LockedServers()
        self._count = _Count()
        self._peers = PeerBook(settings.for_swarm(), runtime)
        self._transport = self._transport_to(self._peers)
        self._client = HopClient(self._transport, self._peers)

    def _transport_to(self, peers: PeerBook) -> Transport:
        return _CountingTransport(self._network.transport(peers), self._count)

    @property
    def traffic(self) -> Traffic:
        """Calls so far, and the bytes of their messages."""
        return Traffic(self._count.calls, self._count.bytes_sent, self._count.bytes_received)

    def probe_record(self, claim: ServerClaim) -> ServerProbe:
        """Return what the claim says against itself: level `record`."""
        record, span = claim.server.record, claim.server.span
        probe = ServerProbe(claim, span.common(self._model))
        if record.state is ServerState.JOINING:
            probe.add_finding(finding("joining", "it announces JOINING"))
        if not len(span) or not span.within(self._model):
            probe.add_finding(finding("wrong-span", f"it names blocks {span} of {self._model.stop}"))
        else:
            outside = sorted(block for block in claim.found if block not in span)
            if outside:
                text = f"its record names blocks {span} and lies under block {outside[0]}, too"
                probe.add_finding(finding("wrong-span", text))
            left = sorted({block for block in claim.left if block not in span})
            if left:
                text = f"old records still name block {left[0]}" + (f" and {len(left) - 1} more" if left[1:] else "")
                probe.add_finding(finding("stale-record", text))
        period = self._settings.announce_period
        if claim.remaining < ProbePolicy.min_remaining * period:
            age = number_text(record_age(claim.remaining, period) or 0, 0)
            text = f"last announced {age} s ago, every {period:.0f} s is usual; it ends in {claim.remaining:.0f} s"
            probe.add_finding(finding("stale-record", text))
        wanted = self._settings.active_adapter
        if wanted is not None and wanted not in record.adapters:
            probe.add_finding(finding("adapter-not-announced", f"does not announce adapter {wanted}"))
        probe.passed[Level.RECORD] = not probe.findings
        return probe

    async def probe_info(self, probe: ServerProbe) -> None:
        """Ask for its first and its last block, which shows the round trip on a warm connection, too: level `info`."""
        peer_id, span = probe.server.peer_id, probe.server.span
        last = max(span.start, min(span.stop, self._model.stop) - 1)
        try:
            asked = await self._ask_info(peer_id, span.start)
            probe.info = asked.info
            probe.round_trip = (await self._ask_info(peer_id, last)).seconds
        except PeerError as error:
            connected = await self._network.is_connected(peer_id)
            probe.add_finding(from_info_error(error, f"{span.start}:{last + 1}", is_connected=connected))
            probe.passed[Level.INFO] = False
            return
        before = len(probe.findings)
        self._hold_against_record(probe, asked.info)
        probe.passed[Level.INFO] = len(probe.findings) == before

    async def _ask_info(self, peer_id: str, block: int) -> AskedInfo:
        asked = await self._transport.ask_info(peer_id, block)
        self._peers.of(peer_id).cache.observe_free(asked.info.cache_tokens_available)
        return asked

    def _hold_against_record(self, probe: ServerProbe, info: ServerInfo) -> None:
        record = probe.server.record
        said, seen = _dtype(record.torch_dtype), dtype_name(info.output_dtype)
        if said is not None and said != seen:
            probe.add_finding(finding("dtype-mismatch", f"announces {said}, answers in {seen}"))
        if record.version is not None and info.version is not None and record.version != info.version:
            text = f"announces petals {record.version}, says {info.version} when asked"
            probe.add_finding(finding("version-mismatch", text))

    async def probe_forward(self, probe: ServerProbe, span: Span, hidden_size: int) -> torch.Tensor | None:
        """Let its whole span compute a canary twice: level `forward`. span: its blocks within the model.

        Returns one of its answers (rows, positions, hidden size) where the two are alike.
        """
        probe.passed[Level.FORWARD] = False
        hop = Hop(probe.server, span)
        try:
            asked = await ask_twice(self._client, hop, self._canary(hop, hidden_size))
            probe.tokens_per_second = asked.question.tokens / max(1e-6, asked.seconds)
            if not asked.is_alike:
                probe.add_finding(finding("nondeterministic", asked.text))
                return None
            await self._try_adapters(probe, span.start, hidden_size)
        except PeerError as error:
            probe.add_finding(from_forward_error(error, str(span)))
            return None
        probe.passed[Level.FORWARD] = True
        return asked.answer

    async def compute_segment(self, probe: ServerProbe, segment: Span, hidden_size: int) -> torch.Tensor | None:
        """Return the answer of blocks within its span, for comparing it with other servers; None where it fails."""
        hop = Hop(probe.server, segment)
        try:
            return (await self._client.run(hop, self._canary(hop, hidden_size), may_step=False)).hidden
        except PeerError as error:
            probe.add_finding(from_forward_error(error, str(segment)))
            probe.passed[Level.FORWARD] = False
            return None

    def _canary(self, hop: Hop, hidden_size: int) -> Activations:
        """Return the canary of the hop's blocks. Positions that are more than its server takes are left out."""
        canary = canary_for(hop.span, hidden_size, self._settings.canary_positions)
        return Activations(canary[:, : self._client.max_tokens(hop)])

    async def _try_adapters(self, probe: ServerProbe, block: int, hidden_size: int) -> None:
        """Let one of its blocks compute with LoRA adapters that it announces."""
        hop = Hop(probe.server, Span(block, block + 1))
        question = Activations(self._canary(hop, hidden_size).hidden[:1])
        for adapter in probe.server.record.adapters[: ProbePolicy.max_adapters]:
            peers = PeerBook(self._peers.settings.model_copy(update={"active_adapter": adapter}), self._peers.runtime)
            try:
                await HopClient(self._transport_to(peers), peers).run(hop, question, may_step=False)
            except PeerError as error:
                probe.add_finding(finding("adapter-fails", f"{adapter}: {error}"))

    async def probe_session(self, probe: ServerProbe) -> None:
        """See whether a session opens, with room for one token in one block, and closed at once: level `forward`.

        It is asked for only where its sessions are those of Petals, and where it says right then that its cache has
        room. What refuses all the same is asked again: others may be waiting for more than there is.
        """
        peer_id = probe.server.peer_id
        found = self._locked.known(peer_id)
        if found is None:
            try:
                found = await self._session_refusal(probe)
            except PeerError as error:
                found = finding("opens-no-session", error_text(error))
            if found is None:
                return
            self._locked.add(peer_id, found)
        probe.add_finding(found)

    async def _session_refusal(self, probe: ServerProbe) -> Finding | None:
        """Raises PeerError, but for a full cache."""
        refusal = ""
        start = probe.server.span.start
        for pause in ProbePolicy.session_pauses:
            await asyncio.sleep(pause)
            info = (await self._ask_info(probe.server.peer_id, start)).info
            if other_layout(info) or not info.cache_tokens_available:
                return None
            try:
                session = await self._client.open_session(Hop(probe.server, Span(start, start + 1)), 1, 1)
                await session.close()
                return None
            except PeerCacheFullError as error:
                refusal = f"it says that {info.cache_tokens_available:,} tokens of its cache are free: {error}"
        return finding("opens-no-session", refusal)
