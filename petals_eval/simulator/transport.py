"""The transport of a simulated swarm: what `Libp2pTransport` is on the wire, in virtual time."""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from typing import Any

import torch

from petals_eval.errors import PeerRefusedError, PeerUnreachableError
from petals_eval.local_swarm.faults import catalog as f
from petals_eval.simulator.scenario import Client
from petals_eval.simulator.servers import Connection, SimulatedServer, conclude, line
from petals_eval.swarm.activations import Activations
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.peers.peer import PeerBook
from petals_eval.swarm.tasks import retrieve_exception
from petals_eval.swarm.transport.codec_negotiation import negotiate
from petals_eval.swarm.transport.hop_session import HopSession
from petals_eval.swarm.transport.rpc import Answer, peer_errors
from petals_eval.swarm.transport.transport import AskedInfo, kept_info
from petals_eval.swarm.wire.codecs import LOSSY_CODES, LossyCode
from petals_eval.swarm.wire.server_info import SESSION_TENSORS, ServerInfo
from petals_eval.swarm.wire.session_messages import NextServer

__all__ = ["SimulatedTransport"]

_SMALL_BYTES = 512  # a question without hidden states, its answer, and what a message has beside its tensors
_TOLERANCE = 1e-6  # seconds
_CONNECT_ROUND_TRIPS = 3  # to agree on encryption (Noise) and on sharing the connection (yamux), after TCP's own


class SimulatedTransport:
    """A `Transport` to simulated servers. Used from one event loop, on its clock.

    hop_calls: calls that carried hidden states. processing: seconds that the client's processor has taken so far.
    answered_at: when the last answer came. longest_pause: the most seconds between two of them.
    overdue: calls that went on for longer than they may. links: the client's own, up and down.
    """

    def __init__(self, servers: Mapping[str, SimulatedServer], peers: PeerBook, client: Client):
        self.hop_calls = 0
        self.processing = 0.0
        self.overdue = 0
        self.answered_at = self.longest_pause = 0.0
        self._servers = servers
        self._peers = peers
        self._settings = peers.settings
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._connections: dict[str, asyncio.Task[Connection]] = {}
        self.links = line(client.up_mbps), line(client.down_mbps)
        self._code = None if peers.settings.wire is None else LOSSY_CODES[peers.settings.wire]
        self._processor_free_at = 0.0
        self._sessions: dict[str, SimulatedSession] = {}
        self.session_numbers = count(1)
        self.request_timeout = peers.settings.request_timeout

    async def ask_info(self, peer_id: str, block: int) -> AskedInfo:
        started = self._loop.time()
        with self.rpc(self._settings.connect_timeout) as timeout:
            async with timeout:
                connection = await self._connected(peer_id)
                await _ask(connection)
        server = connection.server
        layout = server.faults.active(f.OtherLayout)
        tensors = SESSION_TENSORS if layout is None else layout.tensors
        free, dtype = server.free_cache, server.dtype
        info = ServerInfo(server.version, dtype, dtype, free, session_tensors=tensors)
        return AskedInfo(info, self._loop.time() - started, _SMALL_BYTES, _SMALL_BYTES)

    async def call(self, hop: Hop, activations: Activations, *, lossless: bool = False) -> Answer:
        peer = self._peers.of(hop.peer_id)
        info = peer.info.answer or await kept_info(self, peer, hop.span.start, self._settings)
        code = None
        if self._code is not None and not lossless and activations.values:
            first = Activations(activations.hidden[:1, :1])
            code = await negotiate(peer, self._code, info, partial(self._forward, hop, info, first))
        return await self._forward(hop, info, activations, code)

    async def _forward(self, hop: Hop, info: ServerInfo, activations: Activations, code: LossyCode | None) -> Answer:
        self.hop_calls += 1
        started = self._loop.time()
        sent = activations.nbytes if code is None else activations.values * code.bytes_per_value
        with self.rpc(self.request_timeout) as timeout:
            async with timeout:
                connection = await self._connected(hop.peer_id)
                await self.process(sent)
                await connection.carry(connection.up, sent + _SMALL_BYTES)
                answer, received = await self.received(connection, hop, activations, info, code)
        return Answer(answer, self._loop.time() - started, sent, received)

    async def received(
        self,
        connection: Connection,
        hop: Hop,
        activations: Activations,
        info: ServerInfo,
        code: LossyCode | None = None,
        pass_on: Callable[[torch.Tensor], object] | None = None,
    ) -> tuple[torch.Tensor, int]:
        """Return the answer to what has arrived at a server, once it is here, and its bytes.

        pass_on: told of the answer as it leaves the server. Raises PeerError.
        """
        try:
            message = await connection.server.answer(activations, hop.span, connection, code)
        except PeerRefusedError:
            await connection.carry(connection.down, _SMALL_BYTES)
            raise
        if pass_on is not None:
            pass_on(message.hidden)
        await connection.carry(connection.down, message.nbytes + _SMALL_BYTES)
        await self.process(message.nbytes)
        return message.read(tuple(activations.hidden.shape), info.output_dtype), message.nbytes

    @contextmanager
    def rpc(self, timeout: float) -> Iterator["asyncio.Timeout"]:
        """Watch one RPC, the body, which is to be done within `timeout` seconds."""
        started = self._loop.time()
        try:
            with peer_errors(timeout):
                yield asyncio.timeout(timeout)
            self.note_answer()
        finally:
            self.overdue += self._loop.time() - started > timeout + _TOLERANCE

    def note_answer(self) -> None:
        """Count the seconds since the last answer, or the last call of this, as a pause."""
        now = self._loop.time()
        self.longest_pause = max(self.longest_pause, now - self.answered_at)
        self.answered_at = now

    async def open_session(self, hop: Hop, rows: int, positions: int) -> HopSession:
        info = await kept_info(self, self._peers.of(hop.peer_id), hop.span.start, self._settings)
        need = rows * positions * hop.blocks
        with self.rpc(self._settings.connect_timeout) as timeout:
            async with timeout:
                connection = await self._connected(hop.peer_id)
                await self.process(0)
                await connection.carry(connection.up, _SMALL_BYTES)
                server = connection.server
                if server.faults.hits_call(f.LockedCache):
                    await connection.silence()
                if server.free_cache < need:  # in the words of Petals' servers
                    await connection.carry(connection.down, _SMALL_BYTES)
                    raise PeerRefusedError(f"Could not allocate {need} bytes immediately: out of memory")
                session = SimulatedSession(self, connection, hop, info, rows, need)
                self._sessions[session.id] = session
                try:
                    await connection.carry(connection.down, _SMALL_BYTES)
                except BaseException:
                    await session.close()
                    raise
        return session

    async def process(self, nbytes: int) -> None:
        """Wait until the client's processor has made or read a message of so many bytes of hidden states."""
        now, seconds = self._loop.time(), self._client.call_seconds / 2 + nbytes * self._client.byte_seconds
        if seconds:
            self.processing += seconds
            self._processor_free_at = max(now, self._processor_free_at) + seconds
            await asyncio.sleep(self._processor_free_at - now)

    def session(self, session_id: str) -> "SimulatedSession | None":
        """Return a session that is open."""
        return self._sessions.get(session_id)

    def forget(self, session: "SimulatedSession") -> None:
        """Count a session as closed."""
        self._sessions.pop(session.id, None)

    async def _connected(self, peer_id: str) -> Connection:
        """Return the connection to a server; those who wait for a new one share it."""
        server = self._servers.get(peer_id)
        if server is None:
            raise PeerUnreachableError("failed to find any peer in table")
        connecting = self._connections.get(peer_id)
        if connecting is not None and connecting.done():
            failed = connecting.cancelled() or connecting.exception() is not None
            connecting = None if failed or not connecting.result().is_open else connecting
        if connecting is None:
            connecting = self._connections[peer_id] = asyncio.create_task(self._connect(server))
            connecting.add_done_callback(retrieve_exception)
        return connecting.result() if connecting.done() else await asyncio.shield(connecting)

    async def _connect(self, server: SimulatedServer) -> Connection:
        connection = Connection(server, *self.links)
        for _ in range(_CONNECT_ROUND_TRIPS):
            await _ask(connection)
        return connection


async def _ask(connection: Connection) -> None:
    """Send a few bytes there and back."""
    await connection.carry(connection.up, _SMALL_BYTES)
    await connection.carry(connection.down, _SMALL_BYTES)


class SimulatedSession(HopSession):
    """An inference session on a simulated server, which remembers nothing: each value tells of its row alone."""

    def __init__(
        self,
        transport: SimulatedTransport,
        connection: Connection,
        hop: Hop,
        info: ServerInfo,
        rows: int,
        cache_tokens: int,
    ):
        """cache_tokens: that it takes, of one block."""
        self.info = info
        self.rows = rows
        self.position = 0
        self._id = f"session {next(transport.session_numbers)}"
        self._transport = transport
        self._connection = connection
        self._hop = hop
        self._is_open = True
        self._cache_tokens = cache_tokens
        self._life = connection.server.lives
        connection.server.free_cache -= cache_tokens
        self._close_callbacks: list[Callable[[], object]] = []
        self._pushed: deque[tuple[torch.Tensor, Sequence[NextServer]]] = deque()
        self._arrival: asyncio.Future[None] | None = None

    def roll_back(self, position: int) -> None:
        self.position = position

    async def step(
        self,
        hidden: torch.Tensor,
        prompts: torch.Tensor | None = None,
        hypo_ids: torch.Tensor | None = None,
        next_servers: Sequence[NextServer] = (),
    ) -> Answer:
        transport, connection = self._transport, self._connection

        async def send() -> tuple[torch.Tensor, int]:
            await transport.process(hidden.nbytes)
            await connection.carry(connection.up, hidden.nbytes + _SMALL_BYTES)
            if connection.server.faults.hits_call(f.OtherLayout):
                await connection.carry(connection.down, _SMALL_BYTES)
                raise PeerRefusedError("not enough values to unpack (expected 10, got 3)")
            return await self._computed(hidden, next_servers)

        return await self._answered(send(), hidden.nbytes)

    async def pushed_step(self, positions: int, hidden_size: int) -> Answer:
        async def wait() -> tuple[torch.Tensor, int]:
            if not self._pushed:
                self._arrival = self._connection.expect()
                await self._arrival
            hidden, next_servers = self._pushed.popleft()
            return await self._computed(hidden, next_servers)

        return await self._answered(wait(), 0)

    def take_push(self, hidden: torch.Tensor, next_servers: Sequence[NextServer]) -> None:
        """Take a step from another server, which names those that come after this one."""
        self._pushed.append((hidden, next_servers))
        if self._arrival is not None:
            conclude(self._arrival)

    async def _computed(self, hidden: torch.Tensor, next_servers: Sequence[NextServer]) -> tuple[torch.Tensor, int]:
        """Return the answer to a step as the client gets it, and its bytes; the server passes it on besides."""

        def pass_on(answer: torch.Tensor) -> None:
            following = self._transport.session(next_servers[0].session_id) if next_servers else None
            if following is not None:  # a push to a session that is not open vanishes
                following._connection.server.pushes.send(
                    answer.nbytes + _SMALL_BYTES, lambda: following.take_push(answer, next_servers[1:])
                )

        activations = Activations(hidden, None, self._hop.span.start)
        return await self._transport.received(self._connection, self._hop, activations, self.info, None, pass_on)

    async def _answered(self, step: Coroutine[Any, Any, tuple[torch.Tensor, int]], sent: int) -> Answer:
        loop = asyncio.get_running_loop()
        started = loop.time()
        with self._transport.rpc(self._transport.request_timeout) as timeout:
            async with timeout:
                hidden, received = await step
        self.position += hidden.shape[1]
        return Answer(hidden, loop.time() - started, sent, received)

    async def close(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        connection = self._connection
        try:
            with suppress(PeerUnreachableError):
                await _ask(connection)
        finally:
            self._transport.forget(self)
            if connection.server.lives == self._life:
                connection.server.free_cache += self._cache_tokens
            for callback in self._close_callbacks:
                callback()
