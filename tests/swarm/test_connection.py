"""The connection to a swarm: refused with a reason, closed, and gone without a trace."""

import os
import subprocess
import sys
import threading

import psutil
import pytest
import torch

from petals_eval.config import SwarmSettings
from petals_eval.errors import ConfigError, SwarmError, SwarmUnreachableError
from petals_eval.swarm import SwarmConnection
from tests.support.real_swarm import connect, stories_swarm

BLOCKS, HIDDEN = 5, 64


@pytest.fixture(scope="module")
def swarm(realdata):
    with stories_swarm(realdata, [(0, BLOCKS)]) as running:
        yield running


def test_an_unreachable_swarm_is_said_with_its_addresses():
    gone = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWP1bRyizj6yjYNioEgopT6Q5r7Vht1o5Qb2dMbiXJ9byx"
    with pytest.raises(SwarmUnreachableError, match=r"no initial peer answered:\s+/ip4/127.0.0.1/tcp/9/"):
        SwarmConnection.connect(SwarmSettings(initial_peers=(gone,), startup_timeout=5))
    assert not [
        child
        for child in psutil.Process().children(recursive=True)
        if child.name() == "p2pd" and gone in " ".join(child.cmdline())
    ]


@pytest.mark.parametrize("address", ["localhost:31337", "/ip4/1.2.3.4/tcp/1", "", "/ip4/1.2.3.4/tcp/1/p2p/nonsense"])
def test_a_wrong_address_is_the_callers_mistake(address):
    with pytest.raises(ConfigError, match="multiaddress"):
        SwarmSettings(initial_peers=(address,))


def test_a_closed_connection_says_so(swarm):
    connection = connect(swarm)
    blocks = connection.remote_sequential(swarm.dht_prefix, BLOCKS)
    connection.close()
    connection.close()
    with pytest.raises(SwarmError, match="closed"):
        blocks(torch.zeros(1, 2, HIDDEN))


def test_leaving_without_close_leaves_no_daemon_and_no_traceback(swarm):
    """A script that forgets close(), or fails, ends at once all the same."""
    script = f"""
import torch
from petals_eval.config import SwarmSettings
from petals_eval.swarm import SwarmConnection
connection = SwarmConnection.connect(SwarmSettings(initial_peers={tuple(swarm.initial_peers)!r}))
blocks = connection.remote_sequential({swarm.dht_prefix!r}, {BLOCKS})
print(blocks(torch.zeros(1, 2, {HIDDEN})).shape)
print([child.pid for child in __import__("psutil").Process().children(recursive=True)])
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=os.environ)
    assert ended.returncode == 0
    assert "Traceback" not in ended.stderr, ended.stderr
    pids = eval(ended.stdout.splitlines()[-1])
    assert pids
    _, still = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=5)
    assert not still


def test_connections_end_their_threads_and_daemons(swarm):
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    threads = threading.active_count()
    for _ in range(3):
        with connect(swarm) as connection:
            connection.remote_sequential(swarm.dht_prefix, BLOCKS)(torch.zeros(1, 2, HIDDEN))
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
    assert threading.active_count() <= threads
