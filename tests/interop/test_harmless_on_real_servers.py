"""What our sessions leave behind on a real Petals 2.2.0 server: nothing, whatever befalls them."""

import time
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import torch

from petals_eval.config import SwarmSettings
from petals_eval.swarm import SwarmConnection
from tests.interop.petals_folders import make_petals_tiny
from tests.interop.real_petals import RealPetalsSwarm
from tests.local_swarm.wire_client import WireClient, WireSession, chain

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
