"""A simulation: evaluations of a scenario by the client's own pipeline, over a simulated swarm, in virtual time."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from petals_eval.data.batching import MicroBatch, micro_batches
from petals_eval.simulator.floor import RunFloor, run_floor
from petals_eval.simulator.scenario import Scenario
from petals_eval.simulator.servers import MODULUS, SimulatedServer, after_blocks, line
from petals_eval.simulator.transport import SimulatedTransport
from petals_eval.simulator.virtual_time import run_in_virtual_time
from petals_eval.swarm.directory.directory import Directory
from petals_eval.swarm.micro_batch import Computed, Work
from petals_eval.swarm.peers.peer import PeerBook
from petals_eval.swarm.pipeline import Pipeline
from petals_eval.swarm.runtime import Runtime
from petals_eval.swarm.stream import MicroBatchStream, Returned
from petals_eval.swarm.wire.records import Announcement, ServerState
from petals_eval.swarm.wire.span import Span

__all__ = ["Evaluated", "Simulated", "simulate"]

_PREFIX = "simulated"
_EXPIRES_AFTER = 600.0  # seconds, as records of Petals' servers that announce themselves every 60 s do


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One evaluation of all rows.

    seconds: of virtual time. lost, doubled, different: rows that did not come back, came twice, or as another server's
    blocks would have them. retries: calls made again. busy: the share of its time that each server computed.
    up, down: the share of its time that each server's link carried bytes. processor: that of the client's processor.
    """

    seconds: float
    lost: int
    doubled: int
    different: int
    retries: int
    busy: tuple[float, ...]
    up: tuple[float, ...]
    down: tuple[float, ...]
    processor: float


@dataclass(frozen=True, slots=True)
class Simulated:
    """What came of a scenario: its evaluations in order, the first of them on a new connection.

    hop_calls: calls that carried hidden states. processor_seconds: of this machine, that the simulation took.
    """

    floor: RunFloor
    evaluations: tuple[Evaluated, ...]
    hop_calls: int
    processor_seconds: float

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of the floor that each evaluation reached."""
        return tuple(self.floor.seconds / each.seconds for each in self.evaluations)


def simulate(scenario: Scenario, evaluations: int = 1) -> Simulated:
    """Evaluate a scenario some times over one connection, the same for its seed."""

    async def everything(runtime: Runtime) -> tuple[tuple[Evaluated, ...], int]:
        swarm = _SimulatedSwarm(scenario, runtime)
        async with swarm.connected():
            done = [await swarm.evaluate() for _ in range(evaluations)]
        return tuple(done), swarm.transport.hop_calls

    began = time.process_time()
    (done, hop_calls), _ = run_in_virtual_time(everything, seed=scenario.seed)
    return Simulated(run_floor(scenario), done, hop_calls, time.process_time() - began)


@dataclass(frozen=True, eq=False, slots=True)
class _Row:
    """A row to be evaluated. input_ids: as many as it has positions; nobody reads them."""

    number: int
    input_ids: tuple[int, ...]


class _Records:
    """The DHT, as a `RecordSource`: whatever servers are there announce."""

    def __init__(self, scenario: Scenario, servers: Mapping[str, SimulatedServer], runtime: Runtime):
        self._scenario = scenario
        self._servers = servers
        self._runtime = runtime

    async def read(self, blocks: Mapping[str, int]) -> tuple[Sequence[Announcement], int]:
        expiration = self.now() + _EXPIRES_AFTER
        return [
            Announcement(block, name, self._record(server), expiration)
            for name, server in self._servers.items()
            if not server.is_gone
            for block in [server.described.blocks.start]
        ], 0

    def now(self) -> float:
        return self._runtime.epoch()

    def _record(self, server: SimulatedServer) -> tuple[int, float, dict[str, object]]:
        described = server.described
        extra = {
            "start_block": described.blocks.start,
            "end_block": described.blocks.stop,
            "version": described.version,
            "torch_dtype": self._scenario.dtype,
            "cache_tokens_left": 2 * server.free_cache,  # keys and values count apart
            "forward_rps": described.claimed_pace,
        }
        return int(ServerState.ONLINE), 1.0, extra


class _SimulatedSwarm:
    """A client and its swarm. Used from one event loop, on its clock."""

    def __init__(self, scenario: Scenario, runtime: Runtime):
        self._scenario = scenario
        self._loop = asyncio.get_running_loop()
        client = scenario.client
        self._client_links = line(client.up_mbps), line(client.down_mbps)
        self._servers = {
            f"server{index}": SimulatedServer(each, scenario, *self._client_links)
            for index, each in enumerate(scenario.servers)
        }
        self._peers = PeerBook(scenario.swarm_settings, runtime)
        source = _Records(scenario, self._servers, runtime)
        self._directory = Directory(source, _PREFIX, scenario.blocks, self._peers)
        self.transport = SimulatedTransport(self._servers, self._peers, client)
        self._pipeline = Pipeline(self.transport, self._directory, self._peers)

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Know the servers while the body runs, as a connection does."""
        await self._directory.refresh()
        keeping = asyncio.create_task(self._directory.keep_fresh())
        try:
            yield
        finally:
            keeping.cancel()

    async def evaluate(self) -> Evaluated:
        """Send all rows through the swarm, as `RemoteModel` does, and hold what comes back against what is right."""
        span = Span(0, self._scenario.blocks)
        returned: asyncio.Queue[Returned[MicroBatch[_Row]] | None] = asyncio.Queue()
        stream = MicroBatchStream[MicroBatch[_Row]](
            self._pipeline, span, self._peers.settings.window, returned.put_nowait
        )
        began, before = self._loop.time(), self._counters()
        running = asyncio.create_task(stream.run())
        seen, different, work = Counter[int](), 0, self._work()
        following = next(work, None)
        try:
            while following is not None or stream.in_flight:
                if following is not None and stream.has_room():
                    await self.transport.process(0)
                    stream.send(following)
                    following = next(work, None)
                    if following is None:
                        stream.end()
                elif (back := await returned.get()) is not None:
                    result = stream.take(back)
                    if isinstance(result, Computed):
                        seen.update(row.number for row in result.tag.requests)
                        expected = after_blocks(_values(result.tag), span).to(result.hidden.dtype)
                        different += int((result.hidden[:, 0, 0] != expected).sum())
        finally:
            running.cancel()
        seconds = self._loop.time() - began
        await self._pipeline.audit.settle()
        retries, computing, up, down, processing = (
            new - old for new, old in zip(self._counters(), before, strict=True)
        )
        return Evaluated(
            seconds,
            lost=self._scenario.rows - len(seen),
            doubled=seen.total() - len(seen),
            different=different,
            retries=int(retries[0]),
            busy=tuple(computing / seconds),
            up=tuple(up / seconds),
            down=tuple(down / seconds),
            processor=float(processing[0] / seconds),
        )

    def _work(self) -> Iterator[Work[MicroBatch[_Row]]]:
        scenario = self._scenario
        dtype = getattr(torch, scenario.dtype)
        rows = (_Row(number, (0,) * length) for number, length in enumerate(scenario.lengths))
        at_once = partial(self._pipeline.positions_at_once, scenario.hidden_size, dtype)
        for batch in micro_batches(rows, max_tokens=at_once):
            shape = *batch.input_ids.shape, scenario.hidden_size
            hidden = _values(batch).to(dtype)[:, None, None].expand(shape)
            yield Work(batch, hidden, None)

    def _counters(self) -> Sequence[np.ndarray]:
        """Return what only grows: retries, seconds each server computed and each link was busy, the client's own."""
        servers = self._servers.values()
        return [
            np.array([self._peers.retries]),
            np.array([each.computing for each in servers]),
            np.array([each.up.links[-1].busy for each in servers]),
            np.array([each.down.links[0].busy for each in servers]),
            np.array([self.transport.processing]),
        ]


def _values(batch: MicroBatch[_Row]) -> torch.Tensor:
    """Return the values (rows,) that a micro-batch enters the first block with."""
    return torch.tensor([37 * row.number % MODULUS for row in batch.requests])
