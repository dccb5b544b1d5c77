"""The room for sessions: what becomes of it when clients wait for it together."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hivemind.p2p.p2p_daemon_bindings.control import P2PHandlerError

from petals_eval.local_swarm import LocalSwarm
from petals_eval.model.blocks import BlockSpan
from tests.support.tensors import distance, hidden_states
from tests.support.tiny_models import make_tiny
from tests.support.waiting import until
from tests.support.wire_client import WireClient, WireSession, chain

BLOCKS, HIDDEN = 4, 32
ALL = chain("tiny", 0, BLOCKS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny("llama", tmp_path_factory.mktemp("models") / "tiny", blocks=BLOCKS)


@pytest.fixture(scope="module")
def local(folder):
    return BlockSpan.load(str(folder), 0, BLOCKS)


@pytest.fixture
def small(folder):
    """A server with room for ten positions, and two clients of it."""
    with (
        LocalSwarm(folder, servers=1, mode="thread", inference_max_length=10, attn_cache_tokens=10) as swarm,
        WireClient(swarm.initial_peers) as one,
        WireClient(swarm.initial_peers) as other,
    ):
        yield swarm.servers[0].peer_id, one, other


def refused(client, server, tokens, **metadata):
    with WireSession(client, server, ALL, max_length=tokens, **metadata) as session, pytest.raises(P2PHandlerError):
        session.step(hidden_states(1, 0))


def test_two_that_wait_at_once_for_a_full_cache_lose_its_lock_for_everybody(small, local):
    """As real servers do, which `tests.interop.test_harmless_on_real_servers` shows."""
    server, one, other = small
    with WireSession(one, server, ALL, max_length=10) as holder:
        holder.step(hidden_states(1, 1))
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(refused, one, server, 5, alloc_timeout=1.0)
            time.sleep(0.3)  # it has the lock by then, and the other one gives up before it gives the lock back
            refused(other, server, 5, alloc_timeout=0.3)
            waiting.result()
        holder.finish()
    assert one.tokens_left(server) // BLOCKS == 10, "it says that there is room"
    for _ in range(2):
        with WireSession(other, server, ALL, max_length=4) as session:
            session.send(hidden_states(1, 0))
            with pytest.raises(TimeoutError):
                session.receive(0.5)
    refused(one, server, 4)  # what those ask for that wait in vain is counted for ever
    assert one.tokens_left(server) // BLOCKS == 10
    (found,) = one.forward(server, ALL, hidden_states(1, 3))
    assert distance(found, local.forward(hidden_states(1, 3))) < 1e-5


def test_one_that_waits_in_vain_harms_nobody(small):
    server, one, other = small
    with WireSession(one, server, ALL, max_length=10) as holder:
        holder.step(hidden_states(1, 1))
        refused(other, server, 5, alloc_timeout=0.3)
        with WireSession(other, server, ALL, max_length=5, alloc_timeout=60.0) as gone:
            gone.send(hidden_states(1, 0))
            with pytest.raises(TimeoutError):
                gone.receive(0.2)
        holder.finish()
    # Also where the one that waited has left, and is given room all the same.
    until(lambda: one.tokens_left(server) // BLOCKS == 10)
    with WireSession(one, server, ALL, max_length=10) as session:
        assert session.step(hidden_states(1, 1)).shape == (1, 1, HIDDEN)
