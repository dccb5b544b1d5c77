"""What a run costs the servers, counted at real Petals 2.2.0 servers: the guide `costs`, each number within its bound.

`pytest -s` prints the numbers. Pushing has its bounds in tests/swarm/scheduling/test_push_scheduler.py, on the stub:
2.2.0 does not push. Killed clients are in test_harmless_on_real_servers.py.
"""

import contextlib
import functools
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hivemind.dht.protocol import DHTProtocol
from hivemind.p2p.p2p_daemon import P2PContext
from hivemind.proto import dht_pb2

from petals_eval.config import SwarmSettings
from petals_eval.health import check_health
from petals_eval.swarm import SwarmConnection, Work
from tests.interop.petals_folders import make_petals_tiny
from tests.interop.real_petals import RealPetalsSwarm
from tests.interop.server_side import ServerSide, connections_from, ports_of
from tests.support.wire_client import WireClient, WireSession, chain

BLOCKS, HIDDEN, TOKENS = 3, 32, 1024
PREFIX = "tiny-costs"
LIMITS = {"max_batch_size": 256, "inference_max_length": TOKENS, "flags": ("--attn_cache_tokens", str(TOKENS))}


@pytest.fixture(scope="module")
def swarm(tmp_path_factory):
    """Two servers of all blocks."""
    folder = make_petals_tiny("llama", tmp_path_factory.mktemp("costs") / "llama")
    with RealPetalsSwarm(folder, [(0, BLOCKS)] * 2, dht_prefix=PREFIX, **LIMITS) as running:
        yield running


@pytest.fixture(scope="module")
def looked_up():
    """Calls to the observer's DHT node, by peer."""
    return Counter()


@pytest.fixture(scope="module")
def observer(swarm, looked_up):
    find = DHTProtocol.rpc_find

    @functools.wraps(find)
    async def rpc_find(self: DHTProtocol, request: dht_pb2.FindRequest, context: P2PContext) -> dht_pb2.FindResponse:
        looked_up[context.remote_id.to_base58()] += 1
        return await find(self, request, context)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DHTProtocol, "rpc_find", rpc_find)
        with WireClient(swarm.initial_peers) as client:
            yield client


@contextlib.contextmanager
def connected(swarm, **settings):
    chosen = SwarmSettings(initial_peers=tuple(swarm.initial_peers), deadline=60, **settings)
    with SwarmConnection.connect(chosen) as connection:
        yield connection, connection.remote_sequential(PREFIX, BLOCKS)


@contextlib.contextmanager
def at_both(swarm, observer):
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(ServerSide(server, observer)) for server in swarm.servers]


def states(rows: int, seq: int) -> torch.Tensor:
    return torch.randn(rows, seq, HIDDEN, generator=torch.Generator().manual_seed(rows * 1000 + seq))


def wait_until(condition, seconds: float = 10.0) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.02)


def test_micro_batches_cost_little_more_than_themselves_and_no_cache(swarm, observer):
    micro_batches, tokens = 300, 8 * 16
    with at_both(swarm, observer) as seen:
        with connected(swarm) as (connection, blocks):
            for _ in blocks.stream(Work(number, states(8, 16), None) for number in range(micro_batches)):
                pass
            blocks.settle()
            ports = ports_of(connection.p2p._child.pid)
            assert [connections_from(ports, server) for server in swarm.servers] == [1, 1]
        wait_until(lambda: not any(connections_from(ports, server) for server in swarm.servers))
    beside = sum(each.calls["rpc_forward"] for each in seen) - micro_batches
    # Each server is asked in two calls whether it runs in training mode, and once more within so many tokens.
    questions = len(swarm.servers) * 4
    # Of each server's micro-batches two at least are checked, and 2%: more than 8% once in a hundred million runs.
    checks = len(swarm.servers) * 2 + 0.08 * micro_batches
    print(
        f"{micro_batches} micro-batches of {tokens} tokens: {beside} calls beside them, no session, one connection each"
    )
    assert 4 <= beside <= questions + checks
    assert [each.calls["rpc_info"] for each in seen] == [1, 1]
    assert all(each.calls["rpc_inference.open"] == each.most_reserved == 0 for each in seen)


def test_a_lossy_wire_costs_one_more_position_for_each_server(swarm, observer):
    with at_both(swarm, observer) as seen, connected(swarm, wire="float16") as (_, blocks):
        for _ in blocks.stream(Work(number, states(8, 16), None) for number in range(30)):
            pass
    beside = sum(each.calls["rpc_forward"] for each in seen) - 30
    assert beside <= len(swarm.servers) * (4 + 1), "the question, and one try of the code"


@pytest.mark.parametrize("verify", [0.0, 1.0])
def test_a_row_in_steps_reserves_what_it_uses_for_as_long_as_it_takes(swarm, observer, verify):
    rows, positions = 3, 600
    with at_both(swarm, observer) as seen, connected(swarm, verify=verify) as (_, blocks):
        started = time.monotonic()
        blocks(states(rows, positions))
        blocks.settle()
        seconds = time.monotonic() - started
        audited = blocks.audit_progress().done  # answers of a hop, each of a row
    need, sessions = positions * BLOCKS, sum(each.calls["rpc_inference.open"] for each in seen)
    reserved = sum(each.reserved for each in seen)
    print(f"{rows} rows of {positions} in {seconds:.2f} s: {sessions} sessions, {reserved:,.0f} tokens x seconds")
    assert audited == (rows if verify else 0)
    assert sessions == rows + audited == sum(each.calls["rpc_inference.close"] for each in seen)
    assert max(each.most_reserved for each in seen) == need, "one at a time on a server"
    assert reserved <= need * seconds * len(swarm.servers), "rows go to both, each to one"
    assert [free_tokens(observer, server) for server in swarm.servers] == [BLOCKS * TOKENS] * 2


def test_an_inference_session_reserves_what_was_asked_for_until_it_is_closed(swarm, observer):
    """Rolling back, which 2.2.0 cannot, takes another session in the place of the first, and not beside it."""
    with at_both(swarm, observer) as seen, connected(swarm) as (_, blocks):
        blocks(states(1, 4))
        session = blocks.inference_session(200, batch=2)
        time.sleep(0.2)
        assert all(each.most_reserved == 0 for each in seen), "nothing before its first step"
        started = time.monotonic()
        with session:
            session.step(states(2, 20))
            session.position = 10
            session.step(states(2, 5))
            time.sleep(0.3)
        seconds = time.monotonic() - started
        time.sleep(0.2)
    need = 2 * 200 * BLOCKS
    reserved = sum(each.reserved for each in seen)
    print(f"a session of 2 x 200 positions, open for {seconds:.2f} s: {reserved:,.0f} tokens x seconds")
    assert max(each.most_reserved for each in seen) == need
    assert 0.3 * need * 0.9 <= reserved <= need * seconds
    assert sum(each.calls["rpc_inference.open"] for each in seen) == 2
    assert [free_tokens(observer, server) for server in swarm.servers] == [BLOCKS * TOKENS] * 2


def test_a_run_that_is_given_up_leaves_nothing(swarm, observer):
    """As Ctrl-C gives it up: in mid-step, with another row in line, and a session that nobody closed."""
    with at_both(swarm, observer) as seen:
        with connected(swarm) as (connection, blocks):
            open_still = blocks.inference_session(100)
            open_still.step(states(1, 4))
            stream = blocks.stream(Work(number, states(1, 600), None) for number in range(4))
            next(stream)
            stream.close()
            ports = ports_of(connection.p2p._child.pid)
        ended = time.monotonic()
        wait_until(lambda: [free_tokens(observer, each) for each in swarm.servers] == [BLOCKS * TOKENS] * 2)
        wait_until(lambda: not any(connections_from(ports, server) for server in swarm.servers))
        print(f"all free and no connection left after {time.monotonic() - ended:.2f} s")
    assert sum(each.calls["rpc_inference.open"] for each in seen) >= 2


def test_waiting_for_a_full_cache_costs_a_question_now_and_then(swarm, observer):
    with contextlib.ExitStack() as held, connected(swarm) as (_, blocks):
        for server in swarm.servers:
            uid = chain(PREFIX, 0, BLOCKS)
            holder = held.enter_context(WireSession(observer, server.peer_id, uid, max_length=TOKENS))
            holder.step(torch.empty(1, 0, HIDDEN))
        with at_both(swarm, observer) as seen, ThreadPoolExecutor(1) as pool:
            row = pool.submit(blocks, states(1, 600))
            time.sleep(4)
            assert not row.done()
            held.close()
            row.result()
    print(f"four seconds of waiting for two full caches, and then a row: {[dict(each.calls) for each in seen]}")
    for each in seen:
        assert each.calls["rpc_inference.open"] <= 2, "once when nothing is known, and once when there is room"
        # After 0.1 s, then twice as long each time: six questions in the first four seconds, and what came before.
        assert each.calls["rpc_info"] <= 9


@pytest.mark.parametrize(
    ("level", "most"),
    [
        ("record", {}),
        ("info", {"rpc_info": 2}),
        ("forward", {"rpc_info": 4, "rpc_forward": 2, "rpc_inference.open": 1, "rpc_inference.close": 1}),
        # the question in training mode, and the canary twice all the way: on one of the two
        ("route", {"rpc_info": 5, "rpc_forward": 6, "rpc_inference.open": 1, "rpc_inference.close": 1}),
    ],
)
def test_a_look_at_the_swarms_health(swarm, observer, level, most):
    with at_both(swarm, observer) as seen:
        check_health(swarm.initial_peers, level=level)
    print(f"health, level {level}: {[dict(each.calls) for each in seen]}")
    for each in seen:
        assert all(count <= most.get(method, 0) for method, count in each.calls.items()), each.calls
        assert each.most_reserved <= 1
    assert [free_tokens(observer, server) for server in swarm.servers] == [BLOCKS * TOKENS] * 2


def test_a_look_at_the_directory_is_some_calls_to_each_node_and_none_while_nobody_uses_it(swarm, looked_up, observer):
    with connected(swarm, update_period=1.0) as (connection, blocks):
        peer_id = connection.p2p.peer_id.to_base58()
        at_start = looked_up[peer_id]
        blocks.refresh()
        of_a_look = looked_up[peer_id] - at_start
        blocks(states(1, 4))
        time.sleep(1.5)
        idle_since = looked_up[peer_id]
        time.sleep(2.5)
        assert looked_up[peer_id] == idle_since
    print(f"joining and a first look: {at_start} calls at a node of the DHT; each further look: {of_a_look}")
    assert at_start <= 8 and of_a_look <= 1 + BLOCKS


def free_tokens(observer: WireClient, server) -> int:
    """Tokens of one block that the server says are free, in all."""
    return observer.info(server.peer_id)["cache_tokens_available"]
