"""A look's way to a real swarm: the DHT, the calls, and a canary all the way."""

import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from hivemind.utils.timed_storage import get_dht_time

from petals_eval.errors import MissingBlocksError, PetalsEvalError
from petals_eval.health.canary import canary_for
from petals_eval.health.census import AnnouncedModel, Census, announced_models, count_blocks, take_census
from petals_eval.health.findings import finding
from petals_eval.health.results import Finding
from petals_eval.swarm.connection import SwarmConnection
from petals_eval.swarm.peers.peer import PeerBook
from petals_eval.swarm.transport.libp2p import Libp2pTransport
from petals_eval.swarm.wire.span import Span

if TYPE_CHECKING:
    from petals_eval.swarm.remote_sequential import RemoteSequential

__all__ = ["LiveNetwork", "LiveSwarm", "RouteTimes", "try_route"]


class LiveSwarm:
    """A `check.Swarm` over libp2p.

    Its connection is made for this look: one that is kept open says nothing about who can be reached.
    """

    def __init__(self, connection: SwarmConnection):
        self._connection = connection

    async def models(self) -> tuple[list[AnnouncedModel], int]:
        return await announced_models(self._connection.dht, self._connection.settings.index_keys)

    async def count_blocks(self, prefix: str) -> int:
        return await count_blocks(self._connection.dht, prefix)

    async def census(self, model: AnnouncedModel) -> Census:
        return await take_census(self._connection.dht, model, get_dht_time())

    def network(self, prefix: str) -> "LiveNetwork":
        return LiveNetwork(self._connection, prefix)


class LiveNetwork:
    """The servers of one model over libp2p."""

    def __init__(self, connection: SwarmConnection, prefix: str):
        self._connection = connection
        self._prefix = prefix

    def transport(self, peers: PeerBook) -> Libp2pTransport:
        return Libp2pTransport(self._connection.p2p, self._prefix, peers)

    async def is_connected(self, peer_id: str) -> bool:
        return any(peer.peer_id.to_base58() == peer_id for peer in await self._connection.p2p.list_peers())


@dataclass(frozen=True, slots=True)
class RouteTimes:
    """How quick a canary went through all blocks over connections that were there already.

    seconds: it took. tokens_per_second: of that canary.
    """

    seconds: float
    tokens_per_second: float


def try_route(
    connection: SwarmConnection, model: AnnouncedModel, hidden_size: int, positions: int, timeout: float
) -> RouteTimes | Finding | None:
    """Send a canary through all blocks, the way a run sends it, and once more with the clock on.

    Returns None where the time ran out first, which says nothing about the swarm. timeout: seconds.
    """
    hidden = canary_for(Span(0, model.num_blocks), hidden_size, positions)
    outcome: Future[float] = Future()
    try:
        blocks = connection.remote_sequential(model.prefix, model.num_blocks)
    except MissingBlocksError as error:  # the last record has expired since the census
        return finding("route-fails", str(error))
    # In a thread: a call that hangs ends with the connection, and must not outlast the time limit.
    threading.Thread(target=_time_route, args=(blocks, hidden, outcome), daemon=True, name="health route").start()
    try:
        seconds = outcome.result(timeout)
    except FutureTimeoutError:
        return None
    except PetalsEvalError as error:
        return finding("route-fails", str(error))
    return RouteTimes(seconds, hidden.shape[0] * hidden.shape[1] / max(1e-6, seconds))


def _time_route(blocks: "RemoteSequential", hidden: torch.Tensor, outcome: "Future[float]") -> None:
    try:
        with torch.inference_mode():
            blocks(hidden)
            started = time.monotonic()
            blocks(hidden)
        outcome.set_result(time.monotonic() - started)
    except BaseException as error:  # noqa: BLE001  # handed to whoever waits
        outcome.set_exception(error)
