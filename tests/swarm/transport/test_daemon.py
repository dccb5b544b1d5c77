"""The local libp2p daemon: answers that meet their timeout, and a daemon that dies or hangs."""

import asyncio
import os
import random
import signal
import threading
import time

import psutil
import pytest
import torch
from hivemind.p2p import P2P
from hivemind.p2p.p2p_daemon import P2PContext
from hivemind.p2p.servicer import ServicerBase
from hivemind.proto import runtime_pb2

from petals_eval.config import SwarmSettings
from petals_eval.errors import SwarmError
from petals_eval.local_swarm import LocalSwarm
from petals_eval.swarm import SwarmConnection
from petals_eval.swarm.transport.daemon import keep_reading, start_daemon
from tests.support.tiny_models import make_tiny

DELAY = 0.02  # seconds until the echo comes


class Echo(ServicerBase):
    async def rpc_echo(self, request: runtime_pb2.ExpertUID, context: P2PContext) -> runtime_pb2.ExpertInfo:
        await asyncio.sleep(DELAY)
        return runtime_pb2.ExpertInfo(serialized_info=request.uid.encode())


def test_the_daemon_is_told_of_its_work_and_nobody_else_is(monkeypatch):
    monkeypatch.setenv("GOGC", "75")
    monkeypatch.delenv("GOMAXPROCS", raising=False)

    async def told():
        daemon = await start_daemon(nat_port_map=False, auto_nat=False, use_relay=False)
        try:
            return psutil.Process(daemon._child.pid).environ()
        finally:
            await daemon.shutdown()

    environment = asyncio.run(told())
    assert environment["GOGC"] == "75", "the user's own"
    assert environment["GOMAXPROCS"] == "1"
    assert "GOMAXPROCS" not in os.environ


def test_answers_that_meet_their_timeout_stop_nothing():
    """Without keep_reading this ends within the first hundred calls: hivemind's reader dies of InvalidStateError."""

    async def main():
        server = await P2P.create(nat_port_map=False, auto_nat=False, use_relay=False)
        client = None
        try:
            await Echo().add_p2p_handlers(server)
            peers = [str(address) for address in await server.get_visible_maddrs()]
            client = await P2P.create(
                initial_peers=peers, dht_mode="client", nat_port_map=False, auto_nat=False, use_relay=False
            )
            keep_reading(client)
            stub = Echo.get_stub(client, server.peer_id)
            rng = random.Random(0)

            async def call(patience) -> bool:
                try:
                    async with asyncio.timeout(patience * rng.uniform(0.8, 1.2)):  # wait_for from Python 3.12 on
                        await stub.rpc_echo(runtime_pb2.ExpertUID(uid="late"))
                except TimeoutError:
                    return False
                return True

            patience, mixed = 2 * DELAY, 0
            for _ in range(60):
                answered = sum(await asyncio.gather(*[call(patience) for _ in range(32)]))
                patience *= 1.2 if answered < 16 else 0.9  # stay where about half come in time, on a busy machine too
                mixed += 0 < answered < 32
                assert patience < 5, "nothing is answered any more"
            assert mixed >= 10, "the timeouts of this test should lie around the time an answer takes"
            answer = await stub.rpc_echo(runtime_pb2.ExpertUID(uid="still here"), timeout=5)
            assert answer.serialized_info == b"still here"
            assert not client._client.control._pending_calls, "a call that ended is remembered"
        finally:
            if client is not None:
                await client.shutdown()
            await server.shutdown()

    asyncio.run(main())


@pytest.fixture(scope="module")
def swarm(tmp_path_factory):
    folder = make_tiny("llama", tmp_path_factory.mktemp("models") / "tiny", blocks=2)
    with LocalSwarm(folder, spans=[(0, 2)], mode="thread") as running:
        yield running


def connect(swarm, **settings):
    """A connection, and its own daemon."""
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    connection = SwarmConnection.connect(SwarmSettings(initial_peers=tuple(swarm.initial_peers), **settings))
    (daemon,) = (process for process in psutil.Process().children(recursive=True) if process.pid not in before)
    assert daemon.name() == "p2pd"
    return connection, daemon


def test_a_daemon_that_dies_is_said_at_once(swarm):
    connection, daemon = connect(swarm)
    try:
        blocks = connection.remote_sequential(swarm.dht_prefix, 2)
        hidden = torch.randn(1, 4, 32)
        assert blocks(hidden).shape == hidden.shape
        daemon.send_signal(signal.SIGSTOP)
        threading.Timer(0.3, daemon.kill).start()
        started = time.monotonic()
        with pytest.raises(SwarmError, match=r"the local libp2p daemon \(p2pd\).* has ended.*Connect again"):
            blocks(hidden)
        with pytest.raises(SwarmError, match="has ended"):
            blocks(hidden)
        with pytest.raises(SwarmError, match="has ended"):
            blocks.refresh()
        assert time.monotonic() - started < 5
    finally:
        connection.close()
    assert not daemon.is_running()


def test_a_daemon_that_hangs_does_not_hold_up_the_end(swarm, monkeypatch):
    monkeypatch.setattr("petals_eval.swarm.connection._SHUTDOWN_TIMEOUT", 0.3)
    connection, daemon = connect(swarm)
    daemon.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    connection.close()
    assert time.monotonic() - started < 3
    assert not daemon.is_running()


def test_a_daemon_whose_start_is_cancelled_has_ended_when_its_loop_ends(monkeypatch):
    """Left to the garbage collector it would be found after the end of the loop, which it needs to be ended."""
    begun = []

    async def never(self: P2P, ready: asyncio.Future) -> None:
        begun.append(self._child)
        await self._child.stdout.read()

    monkeypatch.setattr(P2P, "_read_outputs", never)

    async def start_and_cancel() -> None:
        starting = asyncio.create_task(start_daemon(no_listen=True, dht_mode="client"))
        while not begun:
            await asyncio.sleep(0.01)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert begun[0].returncode is not None

    asyncio.run(start_and_cancel())
