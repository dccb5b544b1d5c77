"""One block server: a libp2p peer, a span of blocks and the RPCs over them, in one event loop."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from anyio import CancelScope
from hivemind.p2p.p2p_daemon_bindings.datastructures import PeerID

from petals_eval.local_swarm.faults.catalog import Fault, TrainingMode
from petals_eval.local_swarm.faults.injector import FaultInjector
from petals_eval.local_swarm.peer import Peer
from petals_eval.local_swarm.server.announce import announce
from petals_eval.local_swarm.server.cache_budget import CacheBudget
from petals_eval.local_swarm.server.compute import SpanThread
from petals_eval.local_swarm.server.handler import BlockHandler
from petals_eval.local_swarm.server.paced_span import PacedSpan
from petals_eval.local_swarm.server.served_span import ServedSpan
from petals_eval.local_swarm.server.settings import ServerSettings
from petals_eval.local_swarm.work import Middleware, wrapped
from petals_eval.model.blocks import DTYPES, BlockSpan
from petals_eval.swarm.wire.records import ServerState
from petals_eval.swarm.wire.server_info import dtype_name

__all__ = ["BlockServer"]

_OFFLINE_TIMEOUT = 5.0
"""Seconds that announcing OFFLINE may take: a swarm that goes down as well must not hold up the end."""
_MEASURED_TOKENS = 64
"""Tokens of the forward pass by which the throughput is measured."""


class BlockServer:
    """A server of a span of blocks. `open` it, and `close` or `abort` it in the same event loop."""

    def __init__(self, settings: ServerSettings, peer: Peer, blocks: BlockSpan, middleware: Sequence[Middleware]):
        self.settings = settings
        self.peer = peer
        self.blocks = blocks
        self.budget = CacheBudget(settings.cache_tokens * blocks.cache_bytes_per_token * len(settings.span))
        self.faults = FaultInjector(self._crash, self._reset)
        self.faults.switch(settings.initial_faults)
        self._thread = SpanThread(blocks, settings.max_batch_size, settings.max_chunk_bytes)
        arithmetic = self._thread if settings.pace is None else PacedSpan(settings)
        compute = wrapped(arithmetic, (*middleware, self.faults.middleware(blocks)))
        self.handler = BlockHandler(
            ServedSpan(settings, blocks, compute, self._thread.gradients, self.budget, self.faults), peer.p2p
        )
        self.on_crash: Callable[[], Awaitable[None]] = self.abort
        self._announcing: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, settings: ServerSettings, middleware: Sequence[Middleware] = ()) -> "BlockServer":
        """Join the swarm, load the blocks, and return once they are served and announced.

        middleware: what stands between the RPCs and the arithmetic (measurements, faults of a test's own).
        Raises ModelError for what the folder does not hold, SwarmUnreachableError when no initial peer answers, and
        hivemind's errors for what this machine cannot do.
        """
        load = partial(
            _loaded,
            settings.arithmetic,
            settings.model,
            settings.start,
            settings.stop,
            None if settings.dtype is None else DTYPES[settings.dtype],
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
            blocks = await loading
            if settings.throughput is None:
                pace = settings.pace or await asyncio.to_thread(_measured, blocks)
                settings = settings.model_copy(update={"throughput": pace})
            server = cls(settings, peer, blocks, middleware)
            await server.handler.add_p2p_handlers(peer.p2p)
            await server.announce(ServerState.ONLINE)
        except BaseException:
            with CancelScope(shield=True):
                await peer.close()
            raise
        server._announcing = asyncio.create_task(server._keep_announcing())
        return server

    async def announce(self, state: ServerState) -> None:
        """Tell the DHT about this server now."""
        # Petals divides the cache of all blocks by half of what a token takes in one block; so does its client.
        bytes_per_token = self.blocks.cache_bytes_per_token // 2
        await announce(
            self.peer.node,
            self.settings,
            state,
            num_blocks=self.blocks.num_blocks,
            torch_dtype=dtype_name(self.blocks.dtype),
            cache_tokens_left=self.budget.bytes_left // bytes_per_token,
            faults=self.faults,
        )

    async def switch(self, faults: Sequence[Fault]) -> None:
        """Have these faults and no others from now on; what the server says of itself is announced anew at once."""
        trained = self.faults.active(TrainingMode)
        self.faults.switch(faults)
        if trained is not None and self.faults.active(TrainingMode) is None:
            self.blocks.drop_out(0.0)
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
            await asyncio.wait_for(self.announce(ServerState.OFFLINE), _OFFLINE_TIMEOUT)
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


def _loaded(arithmetic: str, *args: Any, **options: Any) -> BlockSpan:
    """Load blocks as `BlockSpan.load` does, to be computed by this arithmetic of `ServerSettings`."""
    blocks = BlockSpan.load(*args, **options)
    if arithmetic == "fused":
        blocks.compute_in_float32()
    elif arithmetic == "tf32":
        blocks.compute_in_tf32()
    return blocks


def _measured(blocks: BlockSpan) -> float:
    """Return tokens per second through all blocks, as a server of Petals measures before it announces."""
    hidden = torch.zeros(1, _MEASURED_TOKENS, blocks.hidden_size, dtype=blocks.dtype)
    blocks.forward(hidden)  # the first time takes longer
    started = time.perf_counter()
    blocks.forward(hidden)
    return _MEASURED_TOKENS / (time.perf_counter() - started)
