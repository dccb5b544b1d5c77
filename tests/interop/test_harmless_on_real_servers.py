"""What our sessions leave behind on a real Petals 2.2.0 server: nothing, whatever befalls them."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait

import psutil
import pytest
import torch
from hivemind.p2p.p2p_daemon_bindings.control import P2PHandlerError

from petals_eval.config import SwarmSettings
from petals_eval.errors import DeadlineError
from petals_eval.health import Verdict, check_health
from petals_eval.swarm import SwarmConnection
from tests.interop.petals_folders import make_petals_tiny
from tests.interop.real_petals import RealPetalsSwarm
from tests.support.fake_health import findings, server_of
from tests.support.wire_client import WireClient, WireSession, chain

BLOCKS, HIDDEN, TOKENS = 3, 32, 256
TINY = "tiny-harmless"
ALL = chain(TINY, 0, BLOCKS)
CACHE = {"inference_max_length": TOKENS, "flags": ("--attn_cache_tokens", str(TOKENS))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_petals_tiny("llama", tmp_path_factory.mktemp("harmless") / "llama")


@pytest.fixture(scope="module")
def swarm(folder):
    """One server, whose cache has room for one session of `TOKENS` positions through all blocks."""
    with RealPetalsSwarm(folder, [(0, BLOCKS)], dht_prefix=TINY, **CACHE) as running:
        yield running


@pytest.fixture(scope="module")
def third(swarm):
    """A third party: hivemind alone, without our client."""
    with WireClient(swarm.initial_peers) as client:
        yield client


def free(client: WireClient, server) -> int:
    """Tokens of its cache that the server says are free, in one block."""
    return client.info(server.peer_id)["cache_tokens_available"] // BLOCKS


def opened(client: WireClient, server, tokens: int) -> WireSession:
    """A session of the third party's that has its cache; raises TimeoutError where the server does not answer."""
    session = WireSession(client, server.peer_id, ALL, max_length=tokens)
    session.send(torch.empty(1, 0, HIDDEN))
    session.receive(10)
    return session


def wait_until_free(client: WireClient, server, seconds: float = 10.0) -> None:
    give_up = time.monotonic() + seconds
    while free(client, server) < TOKENS:
        assert time.monotonic() < give_up, f"{free(client, server)} of {TOKENS} tokens are free"
        time.sleep(0.02)


def test_two_of_ours_that_want_a_full_cache_at_once_leave_it_to_others(swarm, third):
    """Asked to wait, the server would leak the lock of its cache: no session would open there again, for anybody."""
    (server,) = swarm.servers
    holder = opened(third, server, TOKENS)
    settings = SwarmSettings(initial_peers=tuple(swarm.initial_peers), connect_timeout=1.0, deadline=20.0)

    def compute(connection: SwarmConnection) -> int:
        with connection.remote_sequential(TINY, BLOCKS).inference_session(TOKENS) as session:
            session.step(torch.zeros(1, 4, HIDDEN))
            return session.position

    with (
        SwarmConnection.connect(settings) as one,
        SwarmConnection.connect(settings) as other,
        ThreadPoolExecutor(2) as pool,
    ):
        both = [pool.submit(compute, connection) for connection in (one, other)]
        time.sleep(3)
        assert not any(each.done() for each in both)
        holder.finish()
        wait(both)
        wait_until_free(third, server)
        opened(third, server, TOKENS).finish()
        wait_until_free(third, server)
        assert [each.result() for each in both] == [4, 4]


@contextlib.contextmanager
def clients_to_kill(swarm) -> Iterator[Callable[[], psutil.Process]]:
    """Starts a client that opens one session after the other, in a process of its own."""
    settings = {"initial_peers": swarm.initial_peers, "dht_prefix": TINY, "blocks": BLOCKS, "hidden": HIDDEN}
    fork_server = subprocess.Popen(
        [sys.executable, "-m", "tests.interop.session_clients", json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )

    def start() -> psutil.Process:
        fork_server.stdin.write("\n")
        fork_server.stdin.flush()
        return psutil.Process(int(fork_server.stdout.readline()))

    try:
        yield start
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(fork_server.pid, signal.SIGKILL)
        fork_server.communicate()


def test_a_client_killed_at_random_moments_leaves_no_cache_behind(swarm, third, request):
    """In mid-opening, in mid-step, in mid-upload; `--session-kills 200 --session-seed 7` for more."""
    kills = request.config.getoption("--session-kills")
    dice = random.Random(request.config.getoption("--session-seed"))
    (server,) = swarm.servers
    in_use, seconds, killed_with = 0, [], []
    with clients_to_kill(swarm) as start:
        for _ in range(kills):
            client = start()
            give_up = time.monotonic() + 30
            while free(third, server) == TOKENS:
                assert time.monotonic() < give_up and client.is_running(), "no session opened"
            time.sleep(dice.uniform(0.0, 0.5))
            in_use += free(third, server) < TOKENS
            killed_with += [client, *client.children(recursive=True)]
            client.kill()
            killed = time.monotonic()
            wait_until_free(third, server)
            seconds.append(time.monotonic() - killed)
            opened(third, server, TOKENS).finish()
            wait_until_free(third, server)
        assert psutil.wait_procs(killed_with, timeout=10)[1] == []
    assert in_use > 0, "no kill hit an open session"
    print(f"{kills} kills, {in_use} while a cache was in use; all of it free after {max(seconds):.2f} s at most")


def lose_the_lock(client: WireClient, other: WireClient, server) -> None:
    """What no client of ours does any more: let two sessions wait at once for a full cache."""

    def wait_in_vain(who: WireClient) -> None:
        metadata = {"max_length": 10, "alloc_timeout": 0.5}
        with WireSession(who, server.peer_id, ALL, **metadata) as session, pytest.raises(P2PHandlerError):
            session.step(torch.empty(1, 0, HIDDEN))

    for _ in range(10):  # it is a race between the two
        holder = opened(client, server, TOKENS)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(wait_in_vain, (client, other)))
        holder.finish()
        wait_until_free(client, server)
        with WireSession(client, server.peer_id, chain(TINY, 0, 1), max_length=1) as probe:
            probe.send(torch.empty(1, 0, HIDDEN))
            try:
                probe.receive(1.0)
            except TimeoutError:
                return
    pytest.fail("the server kept its lock")


def test_a_server_that_lost_its_lock_is_told_as_what_it_is_and_computes_on(swarm, third):
    """Whether its openings hang or, when enough of them do, are refused. The last test of this module: from here on no
    session opens on its server."""
    (server,) = swarm.servers
    with WireClient(swarm.initial_peers) as fourth:
        lose_the_lock(third, fourth, server)
        settings = {"connect_timeout": 2.0, "deadline": 5.0}
        with SwarmConnection.connect(SwarmSettings(initial_peers=tuple(swarm.initial_peers), **settings)) as ours:
            blocks = ours.remote_sequential(TINY, BLOCKS)
            with (
                blocks.inference_session(8) as session,
                pytest.raises(DeadlineError, match=r"opens no session within 2 s, .* its cache may be locked"),
            ):
                session.step(torch.zeros(1, 4, HIDDEN))
            assert blocks(torch.zeros(1, 4, HIDDEN)).shape == (1, 4, HIDDEN)
            assert blocks.status().retries == 0

        report = check_health(swarm.initial_peers, connect_timeout=2.0)
        assert findings(report) == {"opens-no-session"} and report.verdict is Verdict.DEGRADED
        # What the openings that hang asked for is counted for ever. With all of the cache asked for in vain the
        # rest is refused, although it says that all of it is free.
        left = BLOCKS * TOKENS - BLOCKS * 8 - 2
        for uid, tokens in ((ALL, left // BLOCKS), (chain(TINY, 0, 1), left % BLOCKS)):
            with WireSession(third, server.peer_id, uid, max_length=tokens) as hanging:
                hanging.send(torch.empty(1, 0, HIDDEN))
                with pytest.raises(TimeoutError):
                    hanging.receive(1.0)
        (found,) = server_of(check_health(swarm.initial_peers, level="forward"), server.peer_id).findings
        assert found.name == "opens-no-session"
        assert f"says that {BLOCKS * TOKENS} tokens of its cache are free" in found.detail
        assert "out of memory" in found.detail
