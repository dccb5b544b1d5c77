"""The transport of a simulated swarm: what `Libp2pTransport` is on the wire, in virtual time."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from itertools import count
from typing import Any

import torch

from petals_eval.errors import PeerRefusedError, PeerUnreachableError
from petals_eval.simulator.scenario import Client
from petals_eval.simulator.servers import SimulatedServer
from petals_eval.swarm.activations import Activations
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.peers.peer import PeerBook
from petals_eval.swarm.tasks import retrieve_exception
from petals_eval.swarm.transport.hop_session import HopSession
from petals_eval.swarm.transport.rpc import Answer, peer_errors
from petals_eval.swarm.transport.transport import AskedInfo, kept_info
from petals_eval.swarm.wire.server_info import SESSION_TENSORS, ServerInfo
from petals_eval.swarm.wire.session_messages import NextServer

__all__ = ["SimulatedTransport"]

_SMALL_BYTES = 512  # a question without hidden states, its answer, and what a message has beside its tensors
_CONNECT_ROUND_TRIPS = 3  # to agree on encryption (Noise) and on sharing the connection (yamux), after TCP's own


class SimulatedTransport:
    """A `Transport` to simulated servers. Used from one event loop, on its clock.

    hop_calls: calls that carried hidden states. processing: seconds that the client's processor has taken so far.
    """

    def __init__(self, servers: Mapping[str, SimulatedServer], peers: PeerBook, client: Client):
        self.hop_calls = 0
        self.processing = 0.0
        self._servers = servers
        self._peers = peers
        self._settings = peers.settings
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._connections: dict[str, asyncio.Task[None]] = {}
        self._processor_free_at = 0.0
        self._sessions: dict[str, SimulatedSession] = {}
        self.session_numbers = count(1)
        self.request_timeout = peers.settings.request_timeout

    async def ask_info(self, peer_id: str, block: int) -> AskedInfo:
        started, timeout = self._loop.time(), self._settings.connect_timeout
        with peer_errors(timeout):
            async with asyncio.timeout(timeout):
                server = await self._connected(peer_id)
                await self._ask(server)
        info = ServerInfo(
            server.described.version, server.dtype, server.dtype, server.free_cache, session_tensors=SESSION_TENSORS
        )
        return AskedInfo(info, self._loop.time() - started, _SMALL_BYTES, _SMALL_BYTES)

    async def call(self, hop: Hop, activations: Activations, *, lossless: bool = False) -> Answer:
        peer = self._peers.of(hop.peer_id)
        if not peer.info.is_answered:
            await kept_info(self, peer, hop.span.start, self._settings)
        self.hop_calls += 1
        started, nbytes, timeout = self._loop.time(), activations.nbytes, self.request_timeout
        with peer_errors(timeout):
            async with asyncio.timeout(timeout):
                server = await self._connected(hop.peer_id)
                await self.process(nbytes)
                await server.carry(server.up, nbytes + _SMALL_BYTES)
                try:
                    hidden = await server.compute(activations, hop.span)
                except PeerRefusedError:
                    await server.carry(server.down, _SMALL_BYTES)
                    raise
                await server.carry(server.down, nbytes + _SMALL_BYTES)
                await self.process(nbytes)
        return Answer(hidden, self._loop.time() - started, nbytes, nbytes)

    async def open_session(self, hop: Hop, rows: int, positions: int) -> HopSession:
        info = await kept_info(self, self._peers.of(hop.peer_id), hop.span.start, self._settings)
        need, timeout = rows * positions * hop.blocks, self._settings.connect_timeout
        with peer_errors(timeout):
            async with asyncio.timeout(timeout):
                server = await self._connected(hop.peer_id)
                await self.process(0)
                await server.carry(server.up, _SMALL_BYTES)
                if server.free_cache < need:  # in the words of Petals' servers
                    await server.carry(server.down, _SMALL_BYTES)
                    raise PeerRefusedError(f"Could not allocate {need} bytes immediately: out of memory")
                session = SimulatedSession(self, server, hop, info, rows, need)
                self._sessions[session.id] = session
                try:
                    await server.carry(server.down, _SMALL_BYTES)
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

    async def _connected(self, peer_id: str) -> SimulatedServer:
        """Return a server once there is a connection to it; those who wait for one share it."""
        server = self._servers.get(peer_id)
        if server is None:
            raise PeerUnreachableError("failed to find any peer in table")
        connecting = self._connections.get(peer_id)
        if connecting is None or server.is_gone:
            connecting = self._connections[peer_id] = asyncio.create_task(self._connect(server))
            connecting.add_done_callback(retrieve_exception)
        if not connecting.done() or connecting.exception() is not None:
            await asyncio.shield(connecting)
        return server

    async def _connect(self, server: SimulatedServer) -> None:
        for _ in range(_CONNECT_ROUND_TRIPS):
            await self._ask(server)

    async def _ask(self, server: SimulatedServer) -> None:
        """Send a few bytes there and back."""
        await server.carry(server.up, _SMALL_BYTES)
        await server.carry(server.down, _SMALL_BYTES)


class SimulatedSession(HopSession):
    """An inference session on a simulated server, which remembers nothing: each value tells of its row alone."""

    def __init__(
        self,
        transport: SimulatedTransport,
        server: SimulatedServer,
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
        self._server = server
        self._span = hop.span
        self._is_open = True
        self._cache_tokens = cache_tokens
        server.free_cache -= cache_tokens
        self._close_callbacks: list[Callable[[], object]] = []
        self._pushed: asyncio.Queue[tuple[torch.Tensor, Sequence[NextServer]]] = asyncio.Queue()

    def roll_back(self, position: int) -> None:
        self.position = position

    async def step(
        self,
        hidden: torch.Tensor,
        prompts: torch.Tensor | None = None,
        hypo_ids: torch.Tensor | None = None,
        next_servers: Sequence[NextServer] = (),
    ) -> Answer:
        transport, server = self._transport, self._server

        async def send() -> torch.Tensor:
            await transport.process(hidden.nbytes)
            await server.carry(server.up, hidden.nbytes + _SMALL_BYTES)
            return await self._computed(hidden, next_servers)

        return await self._answered(send(), hidden.nbytes)

    async def pushed_step(self, positions: int, hidden_size: int) -> Answer:
        async def wait() -> torch.Tensor:
            hidden, next_servers = await self._pushed.get()
            return await self._computed(hidden, next_servers)

        return await self._answered(wait(), 0)

    def take_push(self, hidden: torch.Tensor, next_servers: Sequence[NextServer]) -> None:
        """Take a step from another server, which names those that come after this one."""
        self._pushed.put_nowait((hidden, next_servers))

    async def _computed(self, hidden: torch.Tensor, next_servers: Sequence[NextServer]) -> torch.Tensor:
        """Return the answer to a step as the client gets it; the server passes it on besides."""
        server = self._server
        answer = await server.compute(Activations(hidden, None, self._span.start), self._span)
        following = self._transport.session(next_servers[0].session_id) if next_servers else None
        if following is not None:  # a push to a session that is not open vanishes
            following._server.pushes.send(
                answer.nbytes + _SMALL_BYTES, lambda: following.take_push(answer, next_servers[1:])
            )
        await server.carry(server.down, answer.nbytes + _SMALL_BYTES)
        await self._transport.process(answer.nbytes)
        return answer

    async def _answered(self, step: Coroutine[Any, Any, torch.Tensor], sent: int) -> Answer:
        loop, timeout = asyncio.get_running_loop(), self._transport.request_timeout
        started = loop.time()
        with peer_errors(timeout):
            async with asyncio.timeout(timeout):
                hidden = await step
        self.position += hidden.shape[1]
        return Answer(hidden, loop.time() - started, sent, hidden.nbytes)

    async def close(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        try:
            with suppress(PeerUnreachableError):
                await self._server.carry(self._server.up, _SMALL_BYTES)
                await self._server.carry(self._server.down, _SMALL_BYTES)
        finally:
            self._transport.forget(self)
            self._server.free_cache += self._cache_tokens
            for callback in self._close_callbacks:
                callback()
