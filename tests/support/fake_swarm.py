"""A swarm without a network: it plugs in at the seam between "which server next" and "send it"."""

import asyncio
import inspect
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from petals_eval.config import SwarmSettings
from petals_eval.errors import PeerUnreachableError
from petals_eval.swarm.activations import Activations
from petals_eval.swarm.directory.directory import Directory
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.peers.peer import PeerBook
from petals_eval.swarm.pipeline import Pipeline, ServedHop
from petals_eval.swarm.runtime import Runtime
from petals_eval.swarm.transport.rpc import Answer
from petals_eval.swarm.transport.transport import AskedInfo
from petals_eval.swarm.wire.records import ServerRecord, ServerState, Snapshot, SpanServer
from petals_eval.swarm.wire.server_info import SESSION_TENSORS, ServerInfo
from petals_eval.swarm.wire.session_messages import NextServer
from petals_eval.swarm.wire.span import Span

PEER = "/ip4/127.0.0.1/tcp/1/p2p/QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY"


def server(name: str, start: int, stop: int, **fields: object) -> SpanServer:
    record = ServerRecord.model_validate({"state": ServerState.ONLINE, "throughput": 1.0, **fields})
    return SpanServer(name, Span(start, stop), record)


def info(version: str | None = "2.2.0", dtype: torch.dtype = torch.float32, cache: int | None = None) -> ServerInfo:
    """Return what a server says of itself. cache: tokens of one block that are free."""
    return ServerInfo(version, dtype, dtype, cache, session_tensors=SESSION_TENSORS)


def settings(**values: object) -> SwarmSettings:
    """Settings under which nothing takes long, and nothing is audited unless a test asks for it."""
    quick = {"min_backoff": 0.01, "max_backoff": 0.05, "missing_update_period": 0.02, "deadline": 0.3, "verify": 0}
    return SwarmSettings.model_validate({"initial_peers": (PEER,), **quick, **values})


class FakeDirectory(Directory):
    """A directory whose snapshot a test sets; `on_refresh` may change it at each look."""

    def __init__(self, num_blocks: int, *servers: SpanServer):
        self.snapshot = Snapshot(num_blocks, {one.peer_id: one for one in servers})
        self.dht_prefix = "tiny"
        self.looks = 0
        self.users = 0
        self.on_refresh: Callable[[FakeDirectory], object] | None = None

    async def use(self) -> None:
        """It is always fresh."""

    async def refresh(self, *, older_than: float = 0.0) -> Snapshot:
        self.looks += 1
        if self.on_refresh is not None:
            self.on_refresh(self)
        return self.snapshot


class Blocks(Protocol):
    """What the servers of a fake swarm compute."""

    def forward(self, hop: Hop, activations: Activations) -> torch.Tensor: ...


class AddingBlocks:
    """Block b adds 10**b, times one plus the sum of its prompts: an answer shows which blocks ran, and how often."""

    def forward(self, hop: Hop, activations: Activations) -> torch.Tensor:
        hidden, prompts = activations.hidden, activations.prompts
        if prompts is not None and prompts.shape[0] != hop.blocks:
            raise ValueError(f"{prompts.shape[0]} prompts for {hop.blocks} blocks")
        for index, block in enumerate(range(hop.span.start, hop.span.stop)):
            scale = 1.0 if prompts is None else 1.0 + prompts[index].sum(dim=(1, 2))[:, None, None]
            hidden = hidden + scale * 10.0**block
        return hidden


class ResidualBlocks:
    """Blocks that each add a mixture of what they are given, as those of a model do; servers of them can be wrong.

    Each server computes in the dtype that it announces (float32 where it announces none).
    scale, nonlinear: how much a block adds, and whether through a tanh.
    dropout: {server: {block: p}}; change it while it runs. rounding: servers that add up in another order each time.
    seeded: servers that give all rows of a call the same mask. spoil: {server: f(answer, question) -> answer}.
    """

    def __init__(self, size: int = 32, num_blocks: int = 16, *, scale: float = 0.3, nonlinear: bool = True):
        self.weights = torch.randn(num_blocks, size, size, generator=torch.Generator().manual_seed(1)) / math.sqrt(size)
        self.scale = scale
        self.nonlinear = nonlinear
        self.dropout: dict[str, dict[int, float]] = {}
        self.rounding: set[str] = set()
        self.seeded: set[str] = set()
        self.spoil: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {}

    def truth(
        self,
        hidden: torch.Tensor,
        start: int,
        stop: int,
        dtype: torch.dtype = torch.float32,
        prompts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return what an honest server answers."""
        hop = Hop(server("", start, stop, torch_dtype=str(dtype).removeprefix("torch.")), Span(start, stop))
        return self.forward(hop, Activations(hidden, prompts, start))

    def forward(self, hop: Hop, activations: Activations) -> torch.Tensor:
        name, prompts = hop.peer_id, activations.prompts
        states = activations.hidden.to(getattr(torch, hop.server.record.torch_dtype or "float32"))
        for index, block in enumerate(range(hop.span.start, hop.span.stop)):
            if prompts is not None:
                states = states.clone()
                states[:, : prompts.shape[2]] += prompts[index].to(states.dtype)
            states = states + self.scale * self._added(name, block, states)
        spoil = self.spoil.get(name)
        return states if spoil is None else spoil(states, activations.hidden)

    def _added(self, name: str, block: int, states: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(torch.seed() % 2**31)
        weights = self.weights[block].to(states.dtype)
        normed = torch.nn.functional.layer_norm(states, states.shape[-1:])
        if name in self.rounding:
            first, second = torch.randperm(weights.shape[0], generator=generator).chunk(2)
            added = normed[..., first] @ weights[first] + normed[..., second] @ weights[second]
        else:
            added = normed @ weights
        if self.nonlinear:
            added = torch.tanh(added)
        p = self.dropout.get(name, {}).get(block, 0.0)
        if p and name in self.seeded:  # one mask for every row of a call
            return added * (torch.rand(added.shape[1:], generator=generator) >= p) / (1 - p)
        return torch.nn.functional.dropout(added, p) if p else added


def noise(
    size: float = 0.01, seed: int = 0, *, repeats: bool = True
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return what adds noise of a relative size to an answer; where it repeats, the same for the same question."""
    sequence = torch.Generator().manual_seed(seed)

    def spoil(answer: torch.Tensor, question: torch.Tensor) -> torch.Tensor:
        asked = int(question.double().abs().sum() * 1e6) % 2**31
        draws = torch.Generator().manual_seed(seed + asked) if repeats else sequence
        usual = answer.float().square().mean(dim=-1, keepdim=True).sqrt()
        return (answer + size * usual * torch.randn(answer.shape, generator=draws)).to(answer.dtype)

    return spoil


@dataclass(frozen=True)
class FakeCall:
    """One call that a server was sent. is_step: in a session."""

    peer_id: str
    span: Span
    shape: tuple[int, ...]
    is_step: bool = False

    @property
    def tokens(self) -> int:
        return self.shape[0] * self.shape[1]


class FakeSession:
    """A session of a fake server, which remembers nothing: its blocks compute each position by itself."""

    def __init__(self, transport: "FakeTransport", hop: Hop, rows: int, positions: int, info: ServerInfo):
        self.info = info
        self.id = f"session {len(transport.sessions)}"
        self.hop, self.rows, self.max_length = hop, rows, positions
        self.position = 0
        self.steps: list[tuple[int, ...]] = []
        self.is_open = True
        self._transport = transport
        self._close_callbacks: list[Callable[[], object]] = []
        self._pushed: asyncio.Queue[torch.Tensor] = asyncio.Queue()

    def add_close_callback(self, callback: Callable[[], object]) -> None:
        self._close_callbacks.append(callback)

    def roll_back(self, position: int) -> None:
        self.position = position

    async def step(
        self,
        hidden: torch.Tensor,
        prompts: torch.Tensor | None = None,
        hypo_ids: torch.Tensor | None = None,
        *,
        next_servers: Sequence[NextServer] = (),
    ) -> Answer:
        self.steps.append(tuple(hidden.shape))
        answer = await self._transport.answer(self.hop, Activations(hidden, prompts, self.hop.span.start), is_step=True)
        self.position += hidden.shape[1]
        if next_servers:
            await self._transport.push(answer.hidden, next_servers)
        return answer

    async def pushed_step(self, positions: int, hidden_size: int) -> Answer:
        hidden = await self._pushed.get()
        assert hidden.shape[1:] == (positions, hidden_size)
        answer = await self._transport.answer(self.hop, Activations(hidden, None, self.hop.span.start), is_step=True)
        self.position += positions
        await self._transport.push(answer.hidden, self._transport.rest_of_route(self))
        return answer

    def take_push(self, hidden: torch.Tensor) -> None:
        self._pushed.put_nowait(hidden)

    async def close(self) -> None:
        if self.is_open:
            self.is_open = False
            self._transport.open_sessions -= 1
            for callback in self._close_callbacks:
                callback()


class FakeTransport:
    """A `Transport` whose servers are in this process.

    calls, probes: what servers were sent, in order; probes are the determinism guard's, calls all else.
    sessions: every one that was opened. down: servers that cannot be reached; hanging: those that never answer.
    on_call, on_probe, on_session, on_info: called before an answer is given; what they raise is what the server does.
        Where `on_call` or `on_probe` returns an awaitable, it is awaited.
    info: what they all say of themselves. seconds: that a call takes.
    max_in_flight, max_sessions: the most there were at once.
    """

    def __init__(self, blocks: Blocks | None = None, *, seconds: float = 0.001):
        self.blocks = blocks or AddingBlocks()
        self.seconds = seconds
        self.calls: list[FakeCall] = []
        self.probes: list[FakeCall] = []
        self.infos: list[str] = []
        self.sessions: list[FakeSession] = []
        self.down: set[str] = set()
        self.hanging: set[str] = set()
        self.on_call: Callable[[Hop, torch.Tensor], object] | None = None
        self.on_probe: Callable[[Hop, torch.Tensor], object] | None = None
        self.on_session: Callable[[Hop, int, int], object] | None = None
        self.on_info: Callable[[str], object] | None = None
        self.info = info()
        self.in_flight = self.max_in_flight = 0
        self.open_sessions = self.max_sessions = 0
        self._routes: dict[str, tuple[NextServer, ...]] = {}

    async def ask_info(self, peer_id: str, block: int) -> AskedInfo:
        self.infos.append(peer_id)
        await self._reach(peer_id)
        if self.on_info is not None:
            self.on_info(peer_id)
        return AskedInfo(self.info, self.seconds, 8, 8)

    async def call(self, hop: Hop, activations: Activations, *, lossless: bool = False) -> Answer:
        return await self.answer(hop, activations, is_probe=lossless)

    async def answer(
        self, hop: Hop, activations: Activations, *, is_probe: bool = False, is_step: bool = False
    ) -> Answer:
        """Compute on the hop's server, as any call does."""
        noted = self.probes if is_probe else self.calls
        noted.append(FakeCall(hop.peer_id, hop.span, tuple(activations.hidden.shape), is_step))
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            await self._reach(hop.peer_id)
            if (hook := self.on_probe if is_probe else self.on_call) is not None:
                waited_for = hook(hop, activations.hidden)
                if inspect.isawaitable(waited_for):
                    await waited_for
        finally:
            self.in_flight -= 1
        return Answer(self.blocks.forward(hop, activations), self.seconds, 8, 8)

    async def _reach(self, peer_id: str) -> None:
        await asyncio.sleep(self.seconds)
        if peer_id in self.down:
            raise PeerUnreachableError("gone")
        if peer_id in self.hanging:
            await asyncio.sleep(3600)

    async def open_session(self, hop: Hop, rows: int, positions: int) -> FakeSession:
        await self._reach(hop.peer_id)
        if self.on_session is not None:
            self.on_session(hop, rows, positions)
        session = FakeSession(self, hop, rows, positions, self.info)
        self.sessions.append(session)
        self.open_sessions += 1
        self.max_sessions = max(self.max_sessions, self.open_sessions)
        return session

    async def push(self, hidden: torch.Tensor, next_servers: Sequence[NextServer]) -> None:
        """Hand an answer to the session that comes next, and remember for it what comes after."""
        if next_servers:
            session = next(each for each in self.sessions if each.id == next_servers[0].session_id)
            self._routes[session.id] = tuple(next_servers[1:])
            session.take_push(hidden)

    def rest_of_route(self, session: FakeSession) -> tuple[NextServer, ...]:
        return self._routes.get(session.id, ())


def pipeline(
    directory: Directory, transport: FakeTransport, *, runtime: Runtime | None = None, **values: object
) -> Pipeline:
    """Return a pipeline over a fake swarm; values: of the settings."""
    chosen = settings(**values)
    runtime = runtime or Runtime()
    return Pipeline(transport, directory, PeerBook(chosen, runtime))  # type: ignore[arg-type]


async def forward(
    pipe: Pipeline, hidden: torch.Tensor, prompts: torch.Tensor | None = None, start: int = 0, stop: int = 4
) -> tuple[torch.Tensor, tuple[ServedHop, ...]]:
    """Run hidden states through blocks start:stop."""
    answer, hops = await pipe.forward(Activations(hidden, prompts, start), Span(start, stop))
    return answer.hidden, hops


def run(
    pipe: Pipeline, hidden: torch.Tensor, prompts: torch.Tensor | None = None, start: int = 0, stop: int = 4
) -> tuple[torch.Tensor, tuple[ServedHop, ...]]:
    """Run one micro-batch through blocks start:stop, in an event loop of its own."""
    return asyncio.run(forward(pipe, hidden, prompts, start, stop))


def run_all(
    pipe: Pipeline,
    micro_batches: Iterable[torch.Tensor],
    *,
    at_once: int = 8,
    prompts: torch.Tensor | None = None,
    stop: int = 4,
) -> list[tuple[torch.Tensor, tuple[ServedHop, ...]]]:
    """Run many micro-batches, some at once, and wait for every audit; return the answers in order."""

    async def everything() -> list[tuple[torch.Tensor, tuple[ServedHop, ...]]]:
        limit = asyncio.Semaphore(at_once)

        async def one(hidden: torch.Tensor) -> tuple[torch.Tensor, tuple[ServedHop, ...]]:
            async with limit:
                return await forward(pipe, hidden, prompts, 0, stop)

        answers = await asyncio.gather(*(one(hidden) for hidden in micro_batches))
        await pipe.audit.settle()
        return answers

    return asyncio.run(everything())


def set_pace(peers: PeerBook, peer_id: str, seconds_per_token_block: float) -> None:
    """Let the server seem to have answered at this pace just now."""
    window, now = peers.of(peer_id).window, time.monotonic()
    window.on_delivered(window.send(1.0, now - seconds_per_token_block), now)
