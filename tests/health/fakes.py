"""A swarm at the seam of a look: no network; each server is a few lines of what it says and computes."""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from petals_eval.errors import PeerError, PeerRefusedError
from petals_eval.health.census import AnnouncedModel, Census, claims_in
from petals_eval.health.check import look
from petals_eval.health.locked import LockedServers
from petals_eval.health.reference_blocks import Home
from petals_eval.health.results import HealthReport
from petals_eval.health.settings import HealthSettings
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.transport.client import Answer, Asked
from petals_eval.swarm.wire import messages as wire
from petals_eval.swarm.wire.records import Announcement
from tests.swarm.fakes import PEER

HIDDEN = 32
INFO_BYTES = 776  # of a stub's real answer to rpc_info


def computed(hidden: torch.Tensor, first: int, last: int) -> torch.Tensor:
    for block in range(first, last):
        hidden = hidden * (1 + block / 10) + 0.01
    return hidden


@dataclass
class FakeBlocks:
    """Blocks at home."""

    first: int
    last: int

    def forward(self, hidden: torch.Tensor, prompts: None, *, first: int, last: int) -> torch.Tensor:
        assert self.first <= first < last <= self.last
        return computed(hidden, first, last)


@dataclass
class FakeServer:
    """Block b multiplies by 1 + b / 10. info, answer: what it does instead. session: raises what it opens none for."""

    start: int
    end: int
    state: int = 2
    dtype: torch.dtype = torch.float32
    record: dict[str, object] = field(default_factory=dict)
    info: Callable[[int], wire.ServerInfo] | None = None
    answer: Callable[[torch.Tensor], torch.Tensor] | None = None
    session: Callable[[int], None] | None = None
    remaining: float = 240.0
    delay: float = 0.0
    connected: bool = True

    def says(self, block: int) -> wire.ServerInfo:
        if self.info is not None:
            return self.info(block)
        if not self.start <= block < self.end:
            raise PeerRefusedError(f"KeyError('tiny.{block}')")
        return wire.ServerInfo("2.2.0", self.dtype, self.dtype, 100, HIDDEN, wire.SESSION_TENSORS)

    def announcements(self, peer_id: str, now: float) -> list[Announcement]:
        name = wire.dtype_name(self.dtype)
        extra = {"start_block": self.start, "end_block": self.end, "version": "2.2.0", "torch_dtype": name}
        value = (self.state, 10.0, {**extra, "quant_type": "none", **self.record})
        return [Announcement(block, peer_id, value, now + self.remaining) for block in range(self.start, self.end)]


class FakeSwarm:
    """`petals_eval.health.check.Swarm` over such servers."""

    def __init__(self, num_blocks: int, **servers: FakeServer):
        self.num_blocks = num_blocks
        self.servers = servers
        self.more: list[Announcement] = []
        self.announced: list[AnnouncedModel] | None = None
        self.adapters: list[str | None] = []
        self.in_flight = self.most_in_flight = 0
        self.forwards: list[tuple[str, int, int]] = []
        self.sessions: Counter[str] = Counter()  # asked for
        self.open_sessions = 0

    async def models(self):
        return self.announced if self.announced is not None else [AnnouncedModel("tiny", self.num_blocks, None)], 0

    async def count_blocks(self, prefix: str) -> int:
        return self.num_blocks

    async def census(self, model: AnnouncedModel) -> Census:
        found = [each for name, one in self.servers.items() for each in one.announcements(name, 1000.0)]
        claims, malformed = claims_in([*found, *self.more], 1000.0)
        return Census(model, claims, malformed)

    def calls(self, prefix: str) -> "FakeSwarm":
        return self

    def with_adapter(self, adapter: str | None) -> "_FakeCalls":
        return _FakeCalls(self, adapter)

    async def is_connected(self, peer_id: str) -> bool:
        return self.servers[peer_id].connected


class _FakeCalls:
    def __init__(self, swarm: FakeSwarm, adapter: str | None):
        self._swarm = swarm
        self._adapter = adapter

    async def ask_info(self, peer_id: str, block: int) -> Asked:
        server = await self._reach(peer_id)
        return Asked(server.says(block), 0.001, 20, INFO_BYTES)

    async def forward(self, hop: Hop, hidden: torch.Tensor, prompts: torch.Tensor | None) -> Answer:
        self._swarm.adapters.append(self._adapter)
        self._swarm.forwards.append((hop.server.peer_id, hop.first, hop.last))
        server = await self._reach(hop.server.peer_id)
        hidden = computed(hidden, hop.first, hop.last)
        if server.answer is not None:
            hidden = server.answer(hidden)
        sent = hidden.numel() * server.dtype.itemsize
        return Answer(hidden.to(server.dtype), 0.001, sent, sent)

    async def session(self, hop: Hop, batch: int, max_length: int) -> "_FakeSession":
        assert batch * max_length * (hop.last - hop.first) == 1, "a probe reserves no more than it takes"
        self._swarm.sessions[hop.server.peer_id] += 1
        server = await self._reach(hop.server.peer_id)
        if server.session is not None:
            server.session(self._swarm.sessions[hop.server.peer_id])
        return _FakeSession(self._swarm)

    async def _reach(self, peer_id: str) -> FakeServer:
        swarm, server = self._swarm, self._swarm.servers[peer_id]
        swarm.in_flight += 1
        swarm.most_in_flight = max(swarm.most_in_flight, swarm.in_flight)
        try:
            await asyncio.sleep(server.delay)
        finally:
            swarm.in_flight -= 1
        return server


class _FakeSession:
    def __init__(self, swarm: FakeSwarm):
        self._swarm = swarm
        swarm.open_sessions += 1

    async def close(self) -> None:
        self._swarm.open_sessions -= 1


def report_on(
    swarm: FakeSwarm,
    *,
    route: object = None,
    home: FakeBlocks | None = None,
    locked: LockedServers | None = None,
    **settings: object,
) -> HealthReport:
    """A look at it. route: what trying the route gave, as the verdict should see it. home: blocks at home. locked: what
    looks before it found."""
    import time

    chosen = HealthSettings(initial_peers=(PEER,), **{"level": "forward", **settings})
    judge = None if home is None else Home("tiny", home, HIDDEN)
    looked = asyncio.run(look(swarm, chosen, time.monotonic() + chosen.time_limit, judge, locked))
    return looked.report(
        0.0, 1.0, {} if route is None else {model.census.model.prefix: route for model in looked.models}
    )


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


def changed(server: FakeServer, **fields: object) -> FakeServer:
    return replace(server, **fields)
