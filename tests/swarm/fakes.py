"""A swarm without a network: it plugs in at the seam between "which server next" and "send it"."""

import asyncio
import time
from collections.abc import Callable

import torch
from petals_eval.swarm.peers.caches import CacheBook

from petals_eval.config import SwarmSettings
from petals_eval.errors import PeerCacheFullError
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.peers.peer import PeerBook
from petals_eval.swarm.pipeline import Pipeline
from petals_eval.swarm.transport.client import Answer
from petals_eval.swarm.wire.records import ServerRecord, ServerState, Snapshot, SpanServer

PEER = "/ip4/127.0.0.1/tcp/1/p2p/QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY"


def server(name: str, start: int, end: int, **fields: object) -> SpanServer:
    return SpanServer(name, start, end, ServerRecord(state=ServerState.ONLINE, throughput=1.0, **fields))


def settings(**values: object) -> SwarmSettings:
    quick = {"min_backoff": 0.01, "max_backoff": 0.05, "missing_update_period": 0.02, "deadline": 0.3}
    return SwarmSettings(initial_peers=(PEER,), **{**quick, **values})


class FakeDirectory:
    def __init__(self, num_blocks: int, *servers: SpanServer):
        self.snapshot = Snapshot(num_blocks, {one.peer_id: one for one in servers})
        self.dht_prefix = "tiny"
        self.looks = 0
        self.on_look: Callable[[FakeDirectory], None] | None = None

    async def use(self) -> None:
        """It is always fresh."""

    async def refresh(self, *, older_than: float = 0.0) -> Snapshot:
        self.looks += 1
        if self.on_look is not None:
            self.on_look(self)
        return self.snapshot


class FakeCalls:
    """Block b adds 10**b, times one plus the sum of its prompts: an answer shows which blocks ran, and how often."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int, tuple[int, ...]]] = []
        self.on_call: Callable[[Hop, torch.Tensor], None] | None = None
        self.on_session: Callable[[Hop, torch.Tensor], None] | None = None
        self.in_steps: list[tuple[str, tuple[int, ...], int]] = []
        self.sessions = 0
        self.most_sessions = 0
        self.in_flight = 0
        self.most_in_flight = 0
        self.forgotten: list[str] = []
        self.caches = CacheBook()

    def forget(self, peer_id: str) -> None:
        self.forgotten.append(peer_id)

    async def forward(
        self, hop: Hop, hidden: torch.Tensor, prompts: torch.Tensor | None, *, lossless: bool = False
    ) -> Answer:
        self.calls.append((hop.server.peer_id, hop.first, hop.last, tuple(hidden.shape)))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(0.001)
            if self.on_call is not None:
                self.on_call(hop, hidden)
        finally:
            self.in_flight -= 1
        if prompts is not None and prompts.shape[0] != hop.last - hop.first:
            raise ValueError(f"{prompts.shape[0]} prompts for {hop.last - hop.first} blocks")
        for index, block in enumerate(range(hop.first, hop.last)):
            scale = 1.0 if prompts is None else 1.0 + prompts[index].sum(dim=(1, 2))[:, None, None]
            hidden = hidden + scale * 10.0**block
        return Answer(hidden, 0.001, 8, 8)

    async def forward_in_steps(self, hop: Hop, hidden: torch.Tensor, prompts: torch.Tensor | None, step: int) -> Answer:
        self.in_steps.append((hop.server.peer_id, tuple(hidden.shape), step))
        if self.on_session is not None:
            try:
                self.on_session(hop, hidden)
            except PeerCacheFullError as error:  # noted as the real calls do
                need = hidden.shape[0] * hidden.shape[1] * (hop.last - hop.first)
                self.caches.refused(hop.server.peer_id, need, str(error))
                raise
        self.sessions += 1
        self.most_sessions = max(self.most_sessions, self.sessions)
        try:
            return await self.forward(hop, hidden, prompts)
        finally:
            self.sessions -= 1


def pipeline(directory: FakeDirectory, calls: FakeCalls, **values: object) -> Pipeline:
    chosen = settings(**values)
    return Pipeline(calls, directory, PeerBook(chosen), chosen, calls.caches)


def set_pace(peers: PeerBook, peer_id: str, seconds_per_token_block: float) -> None:
    """Let the server seem to have answered at this pace just now."""
    flow, now = peers.of(peer_id).flow, time.monotonic()
    flow.came_back(flow.send(1.0, now - seconds_per_token_block), now)
