"""Real peers over real libp2p that send far more than was asked for: what that costs the client is bounded."""

import asyncio
import contextlib
import time

import psutil
import pytest
import torch
from anyio.from_thread import start_blocking_portal
from hivemind.dht.node import DHTNode
from hivemind.p2p import P2P
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.proto import runtime_pb2

from petals_eval.config import SwarmSettings
from petals_eval.errors import PeerError
from petals_eval.local_swarm import LocalSwarm
from petals_eval.local_swarm.faults.catalog import Oversized
from petals_eval.swarm import SwarmConnection
from petals_eval.swarm.activations import Activations
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.peers.peer import PeerBook
from petals_eval.swarm.transport.client import HopClient
from petals_eval.swarm.transport.libp2p import Libp2pTransport
from petals_eval.swarm.wire.span import Span
from tests.support.fake_swarm import server
from tests.support.rpc_info import info

MIB = 1 << 20
NAME = "TransformerConnectionHandler"
BOUND = 48 * MIB
"""Bytes by which the client's process may grow, whatever a peer sends."""


class Hostile:
    """A peer whose daemon takes messages of a gigabyte, and which answers every call with `megabytes`."""

    def __init__(self, megabytes: int):
        self.megabytes = megabytes
        self.sent = 0
        self._ending = contextlib.ExitStack()
        self.portal = self._ending.enter_context(start_blocking_portal("asyncio", name="hostile"))
        self.p2p, self.node = self.portal.call(asyncio.wait_for, self._open(), 30)

    async def _open(self) -> tuple[P2P, DHTNode]:
        p2p = await P2P.create(
            host_maddrs=["/ip4/127.0.0.1/tcp/0"],
            nat_port_map=False,
            auto_nat=False,
            use_relay=False,
            persistent_conn_max_msg_size=1 << 30,
        )
        node = await DHTNode.create(p2p=p2p)
        await p2p.add_protobuf_handler(f"{NAME}.rpc_info", self._info, runtime_pb2.ExpertUID)
        await p2p.add_protobuf_handler(f"{NAME}.rpc_forward", self._forward, runtime_pb2.ExpertRequest)
        for method in ("rpc_forward_stream", "rpc_inference"):
            await p2p.add_binary_stream_handler(f"{NAME}.{method}", self._stream)
        return p2p, node

    async def _info(self, request, context) -> runtime_pb2.ExpertInfo:
        return runtime_pb2.ExpertInfo(serialized_info=info())

    async def _forward(self, request, context) -> runtime_pb2.ExpertResponse:
        self.sent = self.megabytes
        return runtime_pb2.ExpertResponse(metadata=bytes(self.megabytes * MIB))

    async def _stream(self, stream: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One message that is said to be of a terabyte, and then goes on and on."""
        with contextlib.suppress(ConnectionError):
            writer.write(P2P.MESSAGE_MARKER + (1 << 40).to_bytes(8, "big"))
            for _ in range(self.megabytes):
                writer.write(bytes(MIB))
                await writer.drain()
                self.sent += 1
        writer.close()

    async def _close(self) -> None:
        await self.p2p.shutdown()

    def close(self) -> None:
        self.portal.call(asyncio.wait_for, self._close(), 30)
        self._ending.close()


@pytest.fixture
def hostile():
    peer = Hostile(megabytes=400)
    yield peer
    peer.close()


class Growth:
    """By how many bytes this process and its daemon grew at most, looked at while a coroutine runs."""

    def __init__(self, connection: SwarmConnection):
        self._here = psutil.Process()
        self._daemon = psutil.Process(connection.p2p._child.pid)
        self.first = self._now()
        self.most = list(self.first)

    def _now(self) -> list[int]:
        return [each.memory_info().rss for each in (self._here, self._daemon)]

    async def watch(self) -> None:
        while True:
            self.most = [max(pair) for pair in zip(self.most, self._now(), strict=True)]
            await asyncio.sleep(0.02)

    @property
    def grown(self) -> list[int]:
        return [after - before for before, after in zip(self.first, self.most, strict=True)]


HIDDEN = torch.zeros(1, 4, 64, dtype=torch.bfloat16)
LARGE = torch.zeros(20, 600, 64)


@pytest.mark.parametrize("path", ["unary", "streamed", "session"])
def test_an_answer_beyond_any_use_is_cut_off(path, hostile):
    """In a process with the hostile peer, whose own memory must not count: it sends from one buffer of a mebibyte, but
    for the unary answer, which its daemon would have to take whole."""
    maddrs = [str(each) for each in hostile.portal.call(hostile.p2p.get_visible_maddrs)]
    settings = SwarmSettings(initial_peers=tuple(maddrs), request_timeout=10.0, connect_timeout=10.0)
    hop = Hop(server(hostile.p2p.peer_id.to_base58(), 0, 2), Span(0, 2))
    if path == "unary":
        hostile.megabytes = 32
    with SwarmConnection.connect(settings) as connection:
        peers = PeerBook(settings)
        transport = Libp2pTransport(connection.p2p, "m", peers)

        async def ask() -> None:
            if path == "session":
                session = await HopClient(transport, peers).open_session(hop, 1, 16)
                try:
                    await session.step(HIDDEN)
                finally:
                    await session.close()
            else:
                await transport.call(hop, Activations(HIDDEN if path == "unary" else LARGE))

        async def measured() -> None:
            watching = asyncio.create_task(growth.watch())
            try:
                await ask()
            finally:
                watching.cancel()

        growth = Growth(connection)
        started = time.monotonic()
        with pytest.raises(PeerError) as refused:
            connection.loop.run(measured)
        seconds = time.monotonic() - started
    here, daemon = (grown / MIB for grown in growth.grown)
    print(
        f"{path}: {refused.value}; {seconds:.1f} s, it sent {hostile.sent} MiB, here +{here:.0f}, daemon +{daemon:.0f}"
    )
    assert seconds < 15
    if path != "unary":
        assert "found one of 1099511627776" in str(refused.value)
        assert hostile.sent < hostile.megabytes, "all of it was taken"
        assert growth.grown[0] < BOUND
    assert growth.grown[1] < BOUND


def test_a_server_of_a_run_that_answers_at_sixteen_times_the_size_is_refused(realdata):
    hidden = torch.randn(4, 100, 64, generator=torch.Generator().manual_seed(0))
    spans = {"spans": [(0, 5)], "max_batch_size": 8192}  # above one MiB of hidden states, to be streamed
    with LocalSwarm(realdata / "stories260K-hf", mode="thread", **spans) as swarm:
        oversized = swarm.servers[0]
        settings = SwarmSettings(initial_peers=tuple(swarm.initial_peers))
        hop = Hop(server(oversized.peer_id, 0, 5), Span(0, 5))
        with SwarmConnection.connect(settings) as connection:
            transport = Libp2pTransport(connection.p2p, swarm.dht_prefix, PeerBook(settings))
            oversized.switch(Oversized(times=16))
            for states, says in ((hidden, "values, found"), (hidden.repeat(11, 1, 1), "at most|goes on after")):
                with pytest.raises(PeerError, match=says):
                    connection.loop.run(transport.call, hop, Activations(states))
        assert oversized.fault_counts()["oversized"].in_flight == 2
