"""A swarm at the seam of a look: no network; each server is a few lines of what it says and computes."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from petals_eval.errors import PeerError, PeerRefusedError
from petals_eval.health.census import AnnouncedModel, Census, claims_in
from petals_eval.health.check import ProbeRun, probe_swarm
from petals_eval.health.live import RouteTimes
from petals_eval.health.locked import LockedServers
from petals_eval.health.reference_blocks import ReferenceBlocks
from petals_eval.health.results import HealthReport
from petals_eval.health.settings import HealthSettings
from petals_eval.simulator.virtual_time import run_in_virtual_time
from petals_eval.swarm.activations import Activations
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.peers.peer import PeerBook
from petals_eval.swarm.runtime import Runtime
from petals_eval.swarm.transport.transport import AskedInfo
from petals_eval.swarm.wire.records import Announcement
from petals_eval.swarm.wire.server_info import SESSION_TENSORS, ServerInfo, dtype_name
from tests.support.fake_swarm import PEER, FakeTransport

HIDDEN = 32
EVIL = "<script>alert(1)</script>\"'&\x1b[31m\u202e\n# HELP x"
REFUSED = PeerRefusedError("RuntimeError('boom')")
INFO_BYTES = 776  # of a stub's real answer to rpc_info


def computed(hidden: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    for block in range(start, stop):
        hidden = hidden * (1 + block / 10) + 0.01
    return hidden


@dataclass
class FakeBlocks:
    """Blocks at home."""

    start: int
    stop: int

    def forward(self, hidden: torch.Tensor, prompts: None, *, start: int, stop: int) -> torch.Tensor:
        assert self.start <= start < stop <= self.stop
        return computed(hidden, start, stop)


@dataclass
class FakeServer:
    """Block b multiplies by 1 + b / 10. info, answer: what it does instead. session: raises what it opens none for.

    compute: given hidden states and blocks, in the place of `computed`.
    """

    start: int
    end: int
    state: int = 2
    dtype: torch.dtype = torch.float32
    record: dict[str, object] = field(default_factory=dict)
    info: Callable[[int], ServerInfo] | None = None
    answer: Callable[[torch.Tensor], torch.Tensor] | None = None
    session: Callable[[int], None] | None = None
    remaining: float = 240.0
    delay: float = 0.0
    connected: bool = True
    compute: Callable[[torch.Tensor, int, int], torch.Tensor] = computed

    def says(self, block: int) -> ServerInfo:
        if self.info is not None:
            return self.info(block)
        if not self.start <= block < self.end:
            raise PeerRefusedError(f"KeyError('tiny.{block}')")
        return ServerInfo("2.2.0", self.dtype, self.dtype, 100, HIDDEN, SESSION_TENSORS)

    def announcements(self, peer_id: str, now: float) -> list[Announcement]:
        name = dtype_name(self.dtype)
        extra = {"start_block": self.start, "end_block": self.end, "version": "2.2.0", "torch_dtype": name}
        value = (self.state, 10.0, {**extra, "quant_type": "none", **self.record})
        return [Announcement(block, peer_id, value, now + self.remaining) for block in range(self.start, self.end)]


class FakeSwarm:
    """`petals_eval.health.check.Swarm` over such servers, and the network of each of its models.

    refused_adapters: LoRA adapters that no server can compute with.
    """

    def __init__(self, num_blocks: int, **servers: FakeServer):
        self.num_blocks = num_blocks
        self.servers = servers
        self.more: list[Announcement] = []
        self.announced: list[AnnouncedModel] | None = None
        self.adapters: list[str | None] = []
        self.refused_adapters: set[str] = set()
        self.in_flight: Counter[str] = Counter()  # calls, by server
        self.most_in_flight = 0  # servers
        self.forwards: list[tuple[str, int, int]] = []
        self.sessions: Counter[str] = Counter()  # asked for
        self.transports: list[_HealthTransport] = []

    @property
    def open_sessions(self) -> int:
        return sum(transport.open_sessions for transport in self.transports)

    async def models(self):
        return self.announced if self.announced is not None else [AnnouncedModel("tiny", self.num_blocks, None)], 0

    async def count_blocks(self, prefix: str) -> int:
        return self.num_blocks

    async def census(self, model: AnnouncedModel) -> Census:
        found = [each for name, one in self.servers.items() for each in one.announcements(name, 1000.0)]
        claims, malformed = claims_in([*found, *self.more], 1000.0)
        return Census(model, claims, malformed)

    def network(self, prefix: str) -> "FakeSwarm":
        return self

    def transport(self, peers: PeerBook) -> "_HealthTransport":
        self.transports.append(_HealthTransport(self, peers.settings.active_adapter))
        return self.transports[-1]

    async def is_connected(self, peer_id: str) -> bool:
        return self.servers[peer_id].connected

    def forward(self, hop: Hop, activations: Activations) -> torch.Tensor:
        """Return what the hop's server answers, as the blocks of a fake transport."""
        server = self.servers[hop.peer_id]
        hidden = server.compute(activations.hidden, hop.span.start, hop.span.stop)
        if server.answer is not None:
            hidden = server.answer(hidden)
        return hidden.to(server.dtype)


class _HealthTransport(FakeTransport):
    def __init__(self, swarm: FakeSwarm, adapter: str | None):
        super().__init__(swarm)
        self._swarm = swarm
        self._adapter = adapter
        self.on_session = self._refuse_session

    async def ask_info(self, peer_id: str, block: int) -> AskedInfo:
        await self._reach(peer_id)
        return AskedInfo(self._swarm.servers[peer_id].says(block), 0.001, 20, INFO_BYTES)

    async def call(self, hop: Hop, activations: Activations, *, lossless: bool = False):
        self._swarm.adapters.append(self._adapter)
        self._swarm.forwards.append((hop.peer_id, hop.span.start, hop.span.stop))
        if self._adapter in self._swarm.refused_adapters:
            raise PeerRefusedError("KeyError('adapter not found')")
        return await super().call(hop, activations, lossless=lossless)

    def _refuse_session(self, hop: Hop, rows: int, positions: int) -> None:
        assert rows * positions * hop.blocks == 1, "a probe reserves no more than it takes"
        self._swarm.sessions[hop.peer_id] += 1
        refuse = self._swarm.servers[hop.peer_id].session
        if refuse is not None:
            refuse(self._swarm.sessions[hop.peer_id])

    async def _reach(self, peer_id: str) -> None:
        swarm = self._swarm
        swarm.in_flight[peer_id] += 1
        swarm.most_in_flight = max(swarm.most_in_flight, sum(calls > 0 for calls in swarm.in_flight.values()))
        try:
            await asyncio.sleep(swarm.servers[peer_id].delay)
        finally:
            swarm.in_flight[peer_id] -= 1


def good() -> dict[str, FakeServer]:
    return {name: FakeServer(0, 4) for name in ("good", "other")}


def info_of(**fields: object) -> Callable[[int], ServerInfo]:
    """Return what says the usual, but for these fields."""
    info = ServerInfo("2.2.0", torch.float32, torch.float32, 5, HIDDEN, SESSION_TENSORS)
    return lambda block: replace(info, **fields)


def noisy(hidden: torch.Tensor) -> torch.Tensor:
    return hidden + 0.3 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))


def report_on(
    swarm: FakeSwarm,
    *,
    route: object = None,
    home: FakeBlocks | None = None,
    locked: LockedServers | None = None,
    in_virtual_time: bool = False,
    **settings: object,
) -> HealthReport:
    """Look at it. route: what trying the route gave, as the verdict should see it. home: blocks at home. locked: what
    looks before it found. in_virtual_time: pauses pass at once."""
    chosen = HealthSettings(initial_peers=(PEER,), **{"level": "forward", **settings})
    reference = None if home is None else ReferenceBlocks("tiny", home, HIDDEN)

    def look(runtime: Runtime) -> Coroutine[Any, Any, ProbeRun]:
        deadline = runtime.monotonic() + chosen.time_limit
        return probe_swarm(swarm, chosen, deadline, reference, locked, runtime)

    run = run_in_virtual_time(look)[0] if in_virtual_time else asyncio.run(look(Runtime()))
    return run.report(0.0, 1.0, {} if route is None else {model.census.model.prefix: route for model in run.models})


def clean_report() -> HealthReport:
    swarm = FakeSwarm(4, a=FakeServer(0, 4), b=FakeServer(0, 2))
    return replace(report_on(swarm, level="route", route=RouteTimes(0.1, 10.0)), time=time.time())


def broken_report() -> HealthReport:
    return replace(report_on(FakeSwarm(4, b=FakeServer(0, 2))), time=time.time())


def raising(error: PeerError) -> Callable:
    def answer(_: object) -> object:
        raise error

    return answer


def findings(report: HealthReport, peer: str | None = None) -> set[str]:
    """Names found, of everybody or of one server."""
    return {
        found.name
        for model in report.models
        for server, found in model.all_findings
        if peer is None or (server is not None and server.peer_id == peer)
    }


def server_of(report: HealthReport, peer: str):
    return next(server for model in report.models for server in model.servers if server.peer_id == peer)
