"""Servers that do not do what they say: real peers with one fault each, over a real model."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from anyio.from_thread import start_blocking_portal
from hivemind.p2p import PeerID, ServicerBase
from hivemind.p2p.p2p_daemon import P2PContext
from hivemind.proto import runtime_pb2
from hivemind.utils.timed_storage import get_dht_time

from petals_eval.local_swarm.peer import Peer
from petals_eval.local_swarm.server.announce import announce
from petals_eval.local_swarm.server.block_server import BlockServer
from petals_eval.local_swarm.server.settings import ServerSettings
from petals_eval.local_swarm.work import Compute, Work
from petals_eval.swarm.wire.records import ServerState

T = TypeVar("T")

TIMEOUT = 60
UNKNOWN_PEER = "12D3KooWHdduK3xuXojcDqUBywcuLzygJjMv9zAMFptPRwfLsKui"


def nan(output: torch.Tensor) -> torch.Tensor:
    return output.index_fill(-1, torch.tensor([0]), torch.nan)


def noise(output: torch.Tensor) -> torch.Tensor:
    """The same noise each time: only another server shows it."""
    random = torch.Generator().manual_seed(len(output.shape))
    return output + 0.5 * output.std() * torch.randn(output.shape, generator=random)


def shorter(output: torch.Tensor) -> torch.Tensor:
    return output[:, :-1]


def failing(output: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("CUDA error: out of memory")


def with_fault(fault: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
    async def layer(work: Work, compute: Compute) -> torch.Tensor:
        return fault(await compute(work))

    return layer


class TransformerConnectionHandler(ServicerBase):
    """Named as Petals' own, and answers rpc_info with whatever it was given."""

    def __init__(self, answer: bytes | Exception | None):
        self._answer = answer

    async def rpc_info(self, request: runtime_pb2.ExpertUID, context: P2PContext) -> runtime_pb2.ExpertInfo:
        if self._answer is None:
            await asyncio.sleep(TIMEOUT)
        if isinstance(self._answer, Exception):
            raise self._answer
        return runtime_pb2.ExpertInfo(serialized_info=self._answer)


class HostileSwarm(contextlib.AbstractContextManager):
    """Peers in one thread, added one by one, in a swarm of their own or in that of `initial_peers`."""

    def __init__(self, model: Path, dht_prefix: str, initial_peers: Sequence[str] = ()):
        self.dht_prefix = dht_prefix
        self._model = model
        self._ending = contextlib.ExitStack()
        self._portal = self._ending.enter_context(start_blocking_portal("asyncio", name="hostile"))
        self._open: list[BlockServer | Peer] = []
        self._joined = list(initial_peers)

    def __exit__(self, *exc_details: object) -> None:
        for one in reversed(self._open):
            self._run(one.abort())
        self._ending.close()

    def _run(self, call: Coroutine[Any, Any, T]) -> T:
        return self._portal.call(asyncio.wait_for, call, TIMEOUT)

    @property
    def initial_peers(self) -> list[str]:
        first = self._open[0] if self._open else None
        if first is None:
            return self._joined
        return self._joined or list((first.peer if isinstance(first, BlockServer) else first).maddrs)

    def settings(self, first: int, last: int, **fields: object) -> ServerSettings:
        return ServerSettings(
            model=str(self._model),
            dht_prefix=self.dht_prefix,
            start=first,
            stop=last,
            initial_peers=tuple(self.initial_peers),
            **fields,
        )

    def add(
        self, first: int, last: int, fault: Callable[[torch.Tensor], torch.Tensor] | None = None, **fields: object
    ) -> BlockServer:
        """A stub server whose answers pass through `fault`."""
        layers = [] if fault is None else [with_fault(fault)]
        server = self._run(BlockServer.open(self.settings(first, last, **fields), layers))
        self._open.append(server)
        return server

    def bare(self) -> Peer:
        """A peer of the DHT that serves nothing."""
        peer = self._run(Peer.open(self.initial_peers))
        self._open.append(peer)
        return peer

    def answering(self, answer: bytes | Exception | None) -> Peer:
        """A peer that answers rpc_info with these bytes, this error, or never."""
        peer = self.bare()
        self._run(TransformerConnectionHandler(answer).add_p2p_handlers(peer.p2p))
        return peer

    def claim(
        self, peer: Peer, first: int, last: int, state: ServerState = ServerState.ONLINE, **fields: object
    ) -> None:
        """Let a peer announce blocks in its own name."""
        settings = self.settings(first, last, **fields)
        self._run(announce(peer.node, settings, state, torch_dtype="float32", cache_tokens_left=0))

    def store(self, peer_id: str, blocks: Sequence[int], value: object, seconds: float = 240.0) -> None:
        """Store a record in anybody's name. seconds: that it lives."""
        node = (self._open[0].peer if isinstance(self._open[0], BlockServer) else self._open[0]).node
        PeerID.from_base58(peer_id)
        stores = node.store_many(
            keys=[f"{self.dht_prefix}.{block}" for block in blocks],
            values=[value] * len(blocks),
            expiration_time=get_dht_time() + seconds,
            subkeys=[peer_id] * len(blocks),
        )
        stored = self._run(stores)
        assert all(stored.values())

    def kill(self, server: BlockServer | Peer) -> None:
        self._open.remove(server)
        self._run(server.abort())
