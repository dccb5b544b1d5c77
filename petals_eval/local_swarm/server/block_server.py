"""One block server: a libp2p peer, a span of blocks and the RPCs over them, in one event loop."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial

import torch
from hivemind.p2p.p2p_daemon_bindings.datastructures import PeerID

from petals_eval.local_swarm.faults.catalog import Fault, TrainingMode
from petals_eval.local_swarm.faults.injector import Switchboard
from petals_eval.local_swarm.peer import Peer
from petals_eval.local_swarm.server.announce import announce
from petals_eval.local_swarm.server.cache_budget import CacheBudget
from petals_eval.local_swarm.server.compute import Middleware, SpanThread, wrapped
from petals_eval.local_swarm.server.handler import TransformerConnectionHandler
from petals_eval.local_swarm.server.settings import ServerSettings
from petals_eval.model.blocks import DTYPES, BlockSpan
from petals_eval.swarm.wire.records import ServerState

__all__ = ["BlockServer"]

# Announcing OFFLINE to a swarm that goes down as well must not hold up the end.
_GOODBYE_TIMEOUT = 5.0  # seconds
_MEASURED_TOKENS = 64


class BlockServer:
    """A server of blocks first:last. `open` it, and `close` or `abort` it in the same event loop."""

    def __init__(self, settings: ServerSettings, peer: Peer, span: BlockSpan, middleware: Sequence[Middleware]):
        self.settings = settings
        self.peer = peer
        self.span = span
        self.budget = CacheBudget(settings.cache_tokens * span.cache_bytes_per_token * (span.last - span.first))
        self._thread = SpanThread(span, settings.max_batch_size, settings.max_chunk_bytes)
        self.faults = Switchboard(self._crash, self._reset)
        self.faults.switch(settings.first_faults)
        compute = wrapped(self._thread, (*middleware, self.faults.around(span)))
        self.handler = TransformerConnectionHandler(settings, span, compute, self.budget, peer.p2p, self.faults)
        self.on_crash: Callable[[], Awaitable[None]] = self.abort
        self._announcing: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, settings: ServerSettings, middleware: Sequence[Middleware] = ()) -> "BlockServer":
        """Join the swarm, load the blocks, and return once they are served and announced.

        middleware: what stands between the RPCs and the arithmetic (faults, measurements).
        Raises ModelError for what the folder does not hold, and hivemind's errors when no initial peer answers.
        """
        dtype = None if settings.dtype is None else DTYPES[settings.dtype]
        load = partial(
            BlockSpan.load,
            settings.model,
            settings.first,
            settings.last,
            dtype,
            revision=settings.revision,
            token=settings.token,
            cache_dir=settings.cache_dir,
        )
        loading = asyncio.create_task(asyncio.to_thread(load))
        try:
            peer = await Peer.open(
                settings.initial_peers,
                host_maddrs=settings.host_maddrs,
                announce_maddrs=settings.announce_maddrs,
                identity_path=settings.identity_path,
            )
        except BaseException:
            loading.cancel()
            raise
        try:
            await announce(peer.node, settings, ServerState.JOINING)
            span = await loading
            if settings.throughput is None:
                settings = settings.model_copy(update={"throughput": await asyncio.to_thread(_measure, span)})
            server = cls(settings, peer, span, middleware)
            await server.handler.add_p2p_handlers(peer.p2p)
            await server.announce(ServerState.ONLINE)
        except BaseException:
            await peer.close()
            raise
        server._announcing = asyncio.create_task(server._keep_announcing())
        return server

    async def announce(self, state: ServerState) -> None:
        """Tell the DHT about this server now."""
        # Petals divides the cache of all blocks by half of what a token takes in one block; so does its client.
        bytes_per_token = self.span.cache_bytes_per_token // 2
        await announce(
            self.peer.node,
            self.settings,
            state,
            num_blocks=self.span.num_blocks,
            torch_dtype=str(self.span.dtype).removeprefix("torch."),
            cache_tokens_left=self.budget.bytes_left // bytes_per_token,
            faults=self.faults,
        )

    async def switch(self, faults: Sequence[Fault]) -> None:
        """These faults and no others from now on; what it says of itself is announced anew at once."""
        trained = self.faults.of(TrainingMode)
        self.faults.switch(faults)
        if trained is not None and self.faults.of(TrainingMode) is None:
            self.span.drop_out(0.0)
        await self.announce(ServerState.ONLINE)

    async def _crash(self) -> None:
        """End as a crash does, in a task of its own: whoever asked for it is ended with the rest."""
        self._crashing = asyncio.ensure_future(self.on_crash())

    async def _reset(self, remote: str) -> None:
        await self.peer.p2p._client.disconnect(PeerID.from_base58(remote))

    async def _keep_announcing(self) -> None:
        while True:
            await asyncio.sleep(self.settings.update_period)
            await self.announce(ServerState.ONLINE)

    async def close(self) -> None:
        """Say OFFLINE, then leave."""
        await self._stop_announcing()
        with suppress(TimeoutError):
            await asyncio.wait_for(self.announce(ServerState.OFFLINE), _GOODBYE_TIMEOUT)
        await self.peer.close()
        await asyncio.to_thread(self._thread.close)

    async def abort(self) -> None:
        """Vanish as a crashed server does: nothing is announced, connections break."""
        await self._stop_announcing()
        await self.peer.abort()
        await asyncio.to_thread(self._thread.close)

    async def _stop_announcing(self) -> None:
        if self._announcing is not None:
            self._announcing.cancel()
            with suppress(asyncio.CancelledError):
                await self._announcing


def _measure(span: BlockSpan) -> float:
    """Tokens per second through all blocks of the span, as a server of Petals measures before it announces."""
    hidden = torch.zeros(1, _MEASURED_TOKENS, span.hidden_size, dtype=span.dtype)
    span.forward(hidden, first=span.first, last=span.last)  # the first time takes longer
    started = time.perf_counter()
    span.forward(hidden, first=span.first, last=span.last)
    return _MEASURED_TOKENS / (time.perf_counter() - started)
