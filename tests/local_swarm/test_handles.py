"""Servers as processes: up together, killed one by one, and nothing left whoever ends first."""

import os
import signal
import time

import psutil
import pytest
import torch

from petals_eval.errors import ConfigError, MachineError, ModelError
from petals_eval.local_swarm import LocalSwarm
from petals_eval.model.blocks import BlockSpan
from tests.support.tensors import distance
from tests.support.tiny_models import make_tiny
from tests.support.wire_client import WireClient, chain

BLOCKS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny("bloom", tmp_path_factory.mktemp("models") / "tiny", blocks=BLOCKS)


def children():
    """Processes below this one, zombies included, other tests' excepted."""
    return {process.pid: process for process in psutil.Process().children(recursive=True)}


@pytest.mark.parametrize("mode", ["process", "thread"])
def test_kill_stop_and_replace(folder, mode):
    before = children()
    local = BlockSpan.load(str(folder), 0, BLOCKS)
    hidden = torch.randn(2, 6, 32)
    with LocalSwarm(folder, spans=[(0, 2), (0, 2), (2, 4)], mode=mode, update_period=300) as swarm:
        doomed, replica, tail = swarm.servers
        with WireClient(swarm.initial_peers) as client:
            (middle,) = client.forward(doomed.peer_id, chain("tiny", 0, 2), hidden)
            (output,) = client.forward(tail.peer_id, chain("tiny", 2, 4), middle)
            assert distance(output, local.forward(hidden)) < 1e-6

            doomed.kill()
            assert not doomed.is_alive()
            assert replica.is_alive() and tail.is_alive()
            with pytest.raises(Exception):  # noqa: B017 - hivemind raises what the daemon says
                client.forward(doomed.peer_id, "tiny.0", hidden)
            assert client.record("tiny.0")[doomed.peer_id][0] == 2, "a dead server's record outlives it"
            (again,) = client.forward(replica.peer_id, chain("tiny", 0, 2), hidden)
            assert torch.equal(again, middle)

            tail.stop()
            assert not tail.is_alive()
            assert client.record("tiny.2")[tail.peer_id][0] == 0, "it says so when it leaves in order"

            fresh = swarm.add_server((2, 4))
            (again,) = client.forward(fresh.peer_id, chain("tiny", 2, 4), middle)
            assert torch.equal(again, output)
            assert swarm.wait() is doomed

            doomed.kill(), doomed.stop(), tail.stop(), tail.kill()  # the second time nothing happens
    assert set(children()) <= set(before), "something is left of the swarm"
    assert not any(server.is_alive() for server in swarm.servers)
    swarm.stop()
    with pytest.raises(ConfigError, match="make another"):
        swarm.start()


def test_a_server_killed_from_outside_is_seen(folder):
    before = set(psutil.Process().children(recursive=True))  # swarms of other tests may live on
    with LocalSwarm(folder, servers=2) as swarm:
        below = set(psutil.Process().children(recursive=True)) - before
        daemons = [process for process in below if process.name() == "p2pd"]
        servers = {daemon.parent().pid for daemon in daemons} - {os.getpid()}
        assert len(servers) == 2
        for pid in servers:
            os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while any(server.is_alive() for server in swarm.servers) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(server.is_alive() for server in swarm.servers)


def test_a_server_that_cannot_start_says_why(folder, tmp_path):
    before = children()
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ModelError, match="holds no weights"), LocalSwarm(tmp_path, servers=1):
        pass
    with pytest.raises(MachineError, match=r"blocks 0:4 could not start: StringParseError: Invalid MultiAddr"):
        LocalSwarm(folder, servers=1, host_maddrs=("/ip4/127.0.0.1/tcp/99999",)).start()
    with pytest.raises(MachineError, match=r"did not serve in time|cannot be started"):
        LocalSwarm(folder, servers=1, startup_timeout=0.5).start()
    assert set(children()) <= set(before)
