"""A simulation: evaluations of a scenario by the client's own pipeline, over a simulated swarm, in virtual time."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from random import Random

import numpy as np
import torch

from petals_eval.data.batching import MicroBatch, micro_batches
from petals_eval.errors import ExampleError, SwarmError
from petals_eval.local_swarm.faults.catalog import Fault
from petals_eval.simulator.faults import MODULUS
from petals_eval.simulator.floor import RunFloor, run_floor
from petals_eval.simulator.records import Records
from petals_eval.simulator.scenario import Scenario
from petals_eval.simulator.servers import SimulatedServer, after_blocks
from petals_eval.simulator.transport import SimulatedTransport
from petals_eval.simulator.virtual_time import run_in_virtual_time
from petals_eval.swarm.directory.directory import Directory
from petals_eval.swarm.micro_batch import Computed, Work
from petals_eval.swarm.peers.peer import PeerBook
from petals_eval.swarm.pipeline import Pipeline
from petals_eval.swarm.runtime import Runtime
from petals_eval.swarm.stream import MicroBatchStream, Returned
from petals_eval.swarm.tasks import together
from petals_eval.swarm.wire.span import Span

__all__ = ["Evaluated", "Simulated", "SimulatedClient", "SimulatedSwarm", "Timeline", "simulate"]

_PREFIX = "simulated"


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One evaluation of all rows, by all clients.

    seconds: of virtual time. lost, doubled, different: rows that did not come back, came twice, or as another server's
    blocks would have them. late: calls that went on for longer than they may, and pauses without an answer for longer
    than the deadline. retries: calls made again. micro_batches: that came back. stopped: why the evaluation ended
    before it was done, or None. busy: the share of its time that each server computed.
    up, down: the share of its time that each server's link carried bytes. client_up, client_down, processor: the same
    of a client's own link, which all of them share, and of its processor.
    """

    seconds: float
    lost: int
    doubled: int
    different: int
    late: int
    retries: int
    micro_batches: int
    stopped: str | None
    busy: tuple[float, ...]
    up: tuple[float, ...]
    down: tuple[float, ...]
    client_up: float
    client_down: float
    processor: float


@dataclass(frozen=True, slots=True, eq=False)
class Timeline:
    """How busy everything was over time.

    at: (looks,) seconds from the start. busy: by name, shares (looks - 1,) of the time between two looks: of each
    server its computing and its link in both directions, then those of the clients' links and processors.
    """

    at: np.ndarray
    busy: dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Simulated:
    """What came of a scenario: its evaluations in order, the first of them on a new connection.

    hop_calls: calls that carried hidden states. processor_seconds: of this machine, that the simulation took.
    timeline: None where nobody looked.
    """

    floor: RunFloor
    evaluations: tuple[Evaluated, ...]
    hop_calls: int
    processor_seconds: float
    timeline: Timeline | None = None

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of the floor that each evaluation reached."""
        return tuple(self.floor.seconds / each.seconds for each in self.evaluations)


def simulate(scenario: Scenario, evaluations: int = 1, *, looks: int | None = None) -> Simulated:
    """Evaluate a scenario some times over one connection, the same for its seed.

    looks: how often to look at how busy everything is, in the time of the floor; None: never.
    """
    floor = run_floor(scenario)

    async def everything(runtime: Runtime) -> tuple[tuple[Evaluated, ...], int, Timeline | None]:
        async with SimulatedSwarm(scenario, runtime).running() as swarm:
            if looks is not None:
                swarm.watch(floor.seconds / looks)
            done = tuple([await swarm.evaluate() for _ in range(evaluations)])
            timeline = swarm.timeline() if looks is not None else None
        return done, sum(client.transport.hop_calls for client in swarm.clients), timeline

    began = time.process_time()
    (done, hop_calls, timeline), _ = run_in_virtual_time(everything, seed=scenario.seed)
    return Simulated(floor, done, hop_calls, time.process_time() - began, timeline)


class SimulatedSwarm:
    """The servers of a scenario, and its clients. Used from one event loop, on its clock."""

    def __init__(self, scenario: Scenario, runtime: Runtime):
        self.scenario = scenario
        self._loop = asyncio.get_running_loop()
        self.servers = {
            f"server{index}": SimulatedServer(each, scenario) for index, each in enumerate(scenario.servers)
        }
        self._faults: list[list[Fault]] = [[] for _ in scenario.servers]
        self._records = Records(scenario, self.servers, runtime)
        self._looks: list[tuple[float, np.ndarray]] = []
        self.clients = [
            SimulatedClient(
                scenario, self.servers, self._records, replace(runtime, random=Random(scenario.seed + number))
            )
            for number in range(scenario.clients)
        ]

    @asynccontextmanager
    async def running(self) -> AsyncIterator["SimulatedSwarm"]:
        """Let servers announce themselves, come, go and fail, and have the clients connected, while the body runs."""
        self._records.begin()
        for name, server in self.servers.items():
            self._plan(name, server)
        for each in self.scenario.faults:
            self._at(each.at, f"server{each.server}", partial(self._switch_on, each.server, each.fault))
        async with AsyncExitStack() as stack:
            for client in self.clients:
                await stack.enter_async_context(client.connected())
            yield self

    def _plan(self, name: str, server: SimulatedServer) -> None:
        described = server.described
        if described.joins:
            self._at(described.joins, name, server.come)
        if described.leaves is not None:
            self._at(described.leaves, None, server.leave)
        if described.returns is not None:
            self._at(described.returns, name, server.come)
        for move in described.moves:
            self._at(move.at, name, partial(server.move, move.blocks))

    def _at(self, seconds: float, name: str | None, happen: Callable[[], object]) -> None:
        """Let something happen to a server, which announces it where it has a name."""

        def happens() -> None:
            happen()
            if name is not None and not self.servers[name].is_gone:
                self._records.announce(name)

        self._loop.call_later(seconds, happens)

    def _switch_on(self, server: int, fault: Fault) -> None:
        self._faults[server].append(fault)
        self.servers[f"server{server}"].faults.switch(self._faults[server])

    def make_well(self) -> None:
        """End all faults, and let whoever is gone come back."""
        for name, server in self.servers.items():
            server.faults.switch(())
            if server.is_gone:
                server.come()
            self._records.announce(name)

    @property
    def in_flight(self) -> int:
        """Calls under way that were hit so far: by a fault, or because their server left."""
        counts = (count for server in self.servers.values() for count in server.faults.counts.values())
        return sum(count.in_flight for count in counts) + sum(each.broken_off for each in self.servers.values())

    async def evaluate(self, *, resume: bool = False) -> Evaluated:
        """Let every client send all rows, and hold what comes back against what is right.

        resume: whether to go on with an evaluation that stopped.
        """
        began, before = self._loop.time(), self._counters()
        done = await together([client.evaluate(resume) for client in self.clients])
        seconds = self._loop.time() - began
        retries, micro_batches, computing, up, down, client = (
            new - old for new, old in zip(self._counters(), before, strict=True)
        )
        return Evaluated(
            seconds=max(each.seconds for each in done),
            lost=sum(each.lost for each in done),
            doubled=sum(each.doubled for each in done),
            different=sum(each.different for each in done),
            late=sum(each.late for each in done),
            retries=int(retries[0]),
            micro_batches=int(micro_batches[0]),
            stopped=next((each.stopped for each in done if each.stopped is not None), None),
            busy=tuple(computing / seconds),
            up=tuple(up / seconds),
            down=tuple(down / seconds),
            **dict(zip(("client_up", "client_down", "processor"), (client / seconds).tolist(), strict=True)),
        )

    def watch(self, seconds: float) -> None:
        """Look at how busy everything is, every so many seconds from now on."""
        self._look()
        self._loop.call_later(seconds, self.watch, seconds)

    def _look(self) -> None:
        now = self._loop.time()
        counts = [
            (each.computed, *(link.sent_by(now) for link in (each.up, each.down))) for each in self.servers.values()
        ]
        self._looks.append((now, np.array([*np.ravel(counts), *self._client_busy()])))

    def _client_busy(self) -> np.ndarray:
        """Return the seconds that a client's link up, its link down and its processor have been busy, on average."""
        now = self._loop.time()
        busy = [
            [*(link.sent_by(now) for link in each.transport.links), each.transport.processing] for each in self.clients
        ]
        return np.mean(busy, axis=0)

    def timeline(self) -> Timeline:
        """Return what was seen since `watch`."""
        self._look()
        at = np.array([seconds for seconds, _ in self._looks])
        elapsed = np.maximum(np.diff(at), 1e-9)
        shares = np.diff([counts for _, counts in self._looks], axis=0) / elapsed[:, None]
        names = [
            f"server {index} ({server.blocks}) {part}"
            for index, server in enumerate(self.scenario.servers)
            for part in ("computing", "link up", "link down")
        ]
        names += ["the client's link up", "the client's link down", "the client's processor"]
        return Timeline(at, dict(zip(names, np.clip(shares.T, 0, 1), strict=True)))

    def _counters(self) -> Sequence[np.ndarray]:
        """Return what only grows: retries, micro-batches, seconds each server computed and each link was busy, the
        clients' own."""
        servers = self.servers.values()
        return [
            np.array([sum(client.peers.retries for client in self.clients)]),
            np.array([sum(client.micro_batches for client in self.clients)]),
            np.array([each.computing for each in servers]),
            np.array([each.up.busy for each in servers]),
            np.array([each.down.busy for each in servers]),
            self._client_busy(),
        ]


@dataclass(frozen=True, eq=False, slots=True)
class _Row:
    """A row to be evaluated. input_ids: as many as it has positions; nobody reads them."""

    number: int
    input_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Done:
    """What one client's evaluation came to, as `Evaluated` has it."""

    seconds: float
    lost: int
    doubled: int
    different: int
    late: int
    stopped: str | None


class SimulatedClient:
    """A client, and its links to the servers. Used from one event loop, on its clock.

    micro_batches: that came back so far.
    """

    def __init__(self, scenario: Scenario, servers: Mapping[str, SimulatedServer], records: Records, runtime: Runtime):
        self._scenario = scenario
        self._loop = asyncio.get_running_loop()
        self.peers = PeerBook(scenario.swarm_settings, runtime)
        self._directory = Directory(records, _PREFIX, scenario.blocks, self.peers)
        self.transport = SimulatedTransport(servers, self.peers, scenario.client)
        self._pipeline = Pipeline(self.transport, self._directory, self.peers)
        self._span = Span(0, scenario.blocks)
        self.micro_batches = 0
        self._answers: dict[int, tuple[bool, frozenset[str]]] = {}  # by row: is it right, and who computed it
        self._doubled = 0
        self._stopped: str | None = None

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Know the servers while the body runs, as a connection does."""
        await self._directory.refresh()
        keeping = asyncio.create_task(self._directory.keep_fresh())
        try:
            yield
        finally:
            keeping.cancel()

    async def evaluate(self, resume: bool) -> _Done:
        """Send all rows, or those that are left, through the swarm as `RemoteModel` and the evaluation do: what a
        server had computed that was caught in the end is computed again elsewhere."""
        if not resume:
            self._answers.clear()
        self._stopped, self._doubled = None, 0
        began, transport = self._loop.time(), self.transport
        transport.answered_at, transport.longest_pause, transport.overdue = began, 0.0, 0
        seconds = 0.0
        while (left := self._left()) and self._stopped is None:
            await self._stream(left)
            seconds = self._loop.time() - began
            transport.note_answer()
            await self._pipeline.audit.settle()
            caught = {each.server.peer_id for each in self._pipeline.quarantine.findings if not each.is_used}
            failed = len(self._left())
            self._answers = {row: each for row, each in self._answers.items() if caught.isdisjoint(each[1])}
            if len(self._left()) == failed:
                break
        is_paused = transport.longest_pause > self.peers.settings.deadline + 1
        return _Done(
            seconds,
            lost=len(self._left()),
            doubled=self._doubled,
            different=sum(not is_right for is_right, _ in self._answers.values()),
            late=transport.overdue + is_paused,
            stopped=self._stopped,
        )

    def _left(self) -> list[int]:
        return [row for row in range(self._scenario.rows) if row not in self._answers]

    async def _stream(self, rows: Collection[int]) -> None:
        returned: asyncio.Queue[Returned[MicroBatch[_Row]] | None] = asyncio.Queue()
        stream = MicroBatchStream[MicroBatch[_Row]](
            self._pipeline, self._span, self.peers.settings.window, returned.put_nowait
        )
        running = asyncio.create_task(stream.run())
        work = self._work(rows)
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
                        self._count(result)
                    elif isinstance(result.error, SwarmError):
                        self._stopped = str(result.error)
                        return
                    elif not isinstance(result.error, ExampleError):
                        raise result.error
        finally:
            running.cancel()
            await asyncio.wait([running])

    def _count(self, result: Computed[MicroBatch[_Row]]) -> None:
        self.micro_batches += 1
        servers = frozenset(hop.peer_id for hop in result.hops)
        expected = after_blocks(_values(result.tag), self._span)
        is_right = (result.hidden[:, 0, 0].to(torch.int64) == expected).tolist()
        for row, right in zip(result.tag.requests, is_right, strict=True):
            self._doubled += row.number in self._answers
            self._answers[row.number] = right, servers

    def _work(self, numbers: Collection[int]) -> Iterator[Work[MicroBatch[_Row]]]:
        scenario = self._scenario
        dtype = getattr(torch, scenario.dtype)
        lengths = scenario.lengths
        rows = (_Row(number, (0,) * lengths[number]) for number in numbers)
        at_once = scenario.tokens_per_micro_batch or partial(
            self._pipeline.positions_at_once, scenario.hidden_size, dtype
        )
        for batch in micro_batches(rows, max_tokens=at_once):
            shape = *batch.input_ids.shape, scenario.hidden_size
            hidden = _values(batch).to(dtype)[:, None, None].expand(shape)
            yield Work(batch, hidden, None)


def _values(batch: MicroBatch[_Row]) -> torch.Tensor:
    """Return the values (rows,) that a micro-batch enters the first block with."""
    return torch.tensor([37 * row.number % MODULUS for row in batch.requests])
