"""The emulated network: late by its delay, no faster than its rate, shared where it says so, byte for byte."""

import asyncio
import os
import time
from pathlib import Path

import psutil
import pytest
import torch

from petals_eval.bench.processes import connected_ports
from petals_eval.config import SwarmSettings
from petals_eval.errors import ConfigError, MachineError
from petals_eval.local_swarm import LocalSwarm
from petals_eval.local_swarm.network import EmulatedNetwork, Link, LinkProfile
from petals_eval.swarm import SwarmConnection
from tests.tiny_models import make_tiny

MEGABIT = 1e6 / 8  # bytes
EARLY = 0.003  # seconds by which timers fire too soon: uvloop counts milliseconds


def test_a_link_is_a_serial_line():
    link = Link(rate=1000.0)
    ends = [link.send(100, now=0.0) for _ in range(10)]
    assert ends == pytest.approx([0.1 * count for count in range(1, 11)])
    assert (link.bytes, link.busy) == (1000, pytest.approx(1.0))
    free = Link(rate=None)
    assert (free.send(10**9, now=3.0), free.busy) == (3.0, 0.0)


def echo_through(network: EmulatedNetwork, *profiles: LinkProfile, size: int = 0) -> tuple[list[float], float]:
    """Round trips of a byte, and the seconds to send `size` bytes to and fro over each relay at once."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def one(relay, start: asyncio.Barrier, trips: list[float]) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
        for _ in range(5):
            began = time.perf_counter()
            writer.write(b"x")
            await reader.readexactly(1)
            trips.append(time.perf_counter() - began)
        await start.wait()
        sent = os.urandom(size)
        writer.write(sent)
        assert await reader.readexactly(size) == sent
        writer.close()

    async def all_of_them() -> tuple[list[float], float]:
        async with await asyncio.start_server(echo, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            relays = [network.open_relay(profile) for profile in profiles]
            for relay in relays:
                network.connect(relay, port)
            trips: list[float] = []
            barrier = asyncio.Barrier(len(relays) + 1)
            async with asyncio.TaskGroup() as group:
                for relay in relays:
                    group.create_task(one(relay, barrier, trips))
                await barrier.wait()
                began = time.perf_counter()
            return trips, time.perf_counter() - began

    return asyncio.run(all_of_them())


def test_delay_and_jitter_are_added_each_way():
    with EmulatedNetwork() as network:
        trips, _ = echo_through(network, LinkProfile(delay=0.03))
        assert min(trips) >= 0.06 - EARLY
        jittered, _ = echo_through(network, LinkProfile(delay=0.03, jitter=0.03))
        assert min(jittered) >= 0.06 - EARLY
        assert max(jittered) > min(jittered) + 0.002


def test_no_more_passes_than_the_link_carries():
    with EmulatedNetwork() as network:
        profile = LinkProfile(up=16, down=32)
        _, seconds = echo_through(network, profile, size=int(8 * MEGABIT))
        assert seconds >= 0.5 - EARLY  # 8 megabits at 16 per second
        relays, client = network.use()
        assert relays[0].bytes_up == relays[0].bytes_down == int(8 * MEGABIT) + 5
        assert relays[0].busy_up == pytest.approx(0.5, rel=0.01)
        assert relays[0].busy_down == pytest.approx(0.25, rel=0.01)
        assert (client.bytes_up, client.busy_up) == (relays[0].bytes_up, 0.0)
        assert network.processor_seconds() > 0


def test_the_clients_own_link_is_shared_by_all_relays():
    with EmulatedNetwork(client_up=16) as network:
        free = LinkProfile()
        _, seconds = echo_through(network, free, free, size=int(4 * MEGABIT))
        assert seconds >= 0.5 - EARLY  # twice 4 megabits at 16 per second


def test_a_server_that_is_not_there_closes_the_connection():
    async def read_all(port: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        found = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        return found

    with EmulatedNetwork() as network:
        relay = network.open_relay(LinkProfile())
        network.connect(relay, 1)
        assert asyncio.run(read_all(relay.port)) == b""


def test_it_ends_with_its_owner():
    before = set(psutil.Process().children(recursive=True))
    with EmulatedNetwork() as network:
        network.open_relay(LinkProfile())
        assert set(psutil.Process().children(recursive=True)) - before
    assert not set(psutil.Process().children(recursive=True)) - before
    with pytest.raises(MachineError, match="not running"):
        network.use()


def test_no_byte_of_a_local_swarm_goes_around_its_relays(tmp_path: Path):
    """What the client sends and gets is what the relays carried, and its daemon is connected to nothing else."""
    folder = make_tiny("llama", tmp_path / "model", blocks=2)
    link = LinkProfile(delay=0.005, up=200, down=200)
    with (
        EmulatedNetwork() as network,
        LocalSwarm(folder, servers=2, mode="thread", network=network, links=link) as swarm,
    ):
        relays = {int(maddr.split("/")[4]) for maddr in swarm.initial_peers}
        relays |= {int(maddr.split("/")[4]) for server in swarm.servers for maddr in server.maddrs}
        assert len(relays) == 3  # the bootstrap peer has one, too
        others = set(psutil.Process().children())
        settings = SwarmSettings(initial_peers=tuple(swarm.initial_peers))
        with SwarmConnection.connect(settings) as connection:
            blocks = connection.remote_sequential(swarm.dht_prefix, 2)
            before, client_before = network.use()
            hidden = torch.zeros(16, 60, 32)
            for _ in range(3):
                blocks(hidden)
            (daemon,) = set(psutil.Process().children()) - others
            connected = connected_ports([daemon.pid])
            after, client_after = network.use()
        assert connected
        assert connected <= relays
        payload = 3 * hidden.nbytes
        for old, new in zip(before[1:], after[1:], strict=True):  # the first is the bootstrap's
            assert payload <= new.bytes_up - old.bytes_up < 1.1 * payload + 20_000
            assert payload <= new.bytes_down - old.bytes_down < 1.1 * payload + 20_000
        assert after[0].bytes_up - before[0].bytes_up < 20_000
        carried = sum(new.bytes_up - old.bytes_up for old, new in zip(before, after, strict=True))
        # Servers talk to each other through the relays as well, but not over the client's link.
        assert 2 * payload <= client_after.bytes_up - client_before.bytes_up <= carried


def test_links_need_a_network(tmp_path: Path):
    folder = make_tiny("llama", tmp_path / "model", blocks=2)
    with pytest.raises(ConfigError, match="network="):
        LocalSwarm(folder, servers=2, links=LinkProfile())
    with EmulatedNetwork() as network, pytest.raises(ConfigError, match="one link for all"):
        LocalSwarm(folder, servers=2, network=network, links=[LinkProfile()])
