"""Inference sessions over real libp2p."""

import contextlib
import time

import pytest
import torch
from hivemind.p2p.p2p_daemon_bindings.control import P2PHandlerError

from petals_eval.local_swarm import LocalSwarm
from petals_eval.model.blocks import BlockSpan
from tests.support.tensors import distance, hidden_states
from tests.support.tiny_models import make_tiny
from tests.support.waiting import until
from tests.support.wire_client import WireClient, WireSession, chain

BLOCKS = 4
HIDDEN = 32
ALL = chain("tiny", 0, BLOCKS)
TOKENS = 200  # of the cache


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny("llama", tmp_path_factory.mktemp("models") / "tiny", blocks=BLOCKS)


@pytest.fixture(scope="module")
def swarm(folder):
    options = {"max_batch_size": 64, "inference_max_length": 100, "attn_cache_tokens": TOKENS}
    with LocalSwarm(folder, spans=[(0, 4), (0, 2), (2, 4)], mode="thread", **options) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def client(swarm):
    with WireClient(swarm.initial_peers) as client:
        yield client


@pytest.fixture(scope="module")
def local(folder):
    return BlockSpan.load(str(folder), 0, BLOCKS)


@pytest.fixture
def server(swarm, client):
    """The server of all blocks, its cache empty: a session that was hung up on ends a moment later."""
    peer_id = swarm.servers[0].peer_id
    until(lambda: client.tokens_left(peer_id) // BLOCKS == TOKENS)
    return peer_id


def test_steps_equal_one_forward(client, server, local):
    hidden = hidden_states(2, 12)
    with WireSession(client, server, ALL, max_length=12) as session:
        outputs = [session.step(part) for part in hidden.split((5, 1, 6), dim=1)]
        session.finish()
    assert distance(torch.cat(outputs, dim=1), local.forward(hidden)) < 1e-5


def test_part_of_a_servers_blocks(client, server, local):
    hidden = hidden_states(2, 6)
    with WireSession(client, server, chain("tiny", 1, 3), max_length=12) as session:
        outputs = [session.step(part) for part in hidden.split((4, 2), dim=1)]
    assert distance(torch.cat(outputs, dim=1), local.forward(hidden, start=1, stop=3)) < 1e-5


def test_deep_prompts_in_the_first_step(client, server, local):
    hidden, prompts = hidden_states(2, 9), torch.randn(BLOCKS, 1, 3, HIDDEN)
    with WireSession(client, server, ALL, max_length=12) as session:
        outputs = [session.step(hidden[:, :5], prompts), session.step(hidden[:, 5:])]
    assert distance(torch.cat(outputs, dim=1), local.forward(hidden, prompts)) < 1e-5


def test_a_step_of_no_tokens_reserves_the_cache(client, server, local):
    hidden = hidden_states(2, 4)
    with WireSession(client, server, ALL, max_length=50) as session:
        assert session.step(hidden[:, :0]).shape == (2, 0, HIDDEN)
        assert client.tokens_left(server) // BLOCKS == TOKENS - 2 * 50
        assert distance(session.step(hidden), local.forward(hidden)) < 1e-5
        session.finish()
    assert client.tokens_left(server) // BLOCKS == TOKENS


def test_rolling_back(client, server, local):
    hidden = hidden_states(2, 8)
    with WireSession(client, server, ALL, max_length=12) as session:
        session.step(hidden[:, :5])
        session.step(hidden_states(2, 4, seed=9))
        back = session.step(hidden[:, 5:], start_from_position=5)
        assert distance(back, local.forward(hidden)[:, 5:]) < 1e-5
        assert distance(session.step(hidden, start_from_position=0), local.forward(hidden)) < 1e-5
        with pytest.raises(P2PHandlerError, match=r"start_from_position within 0:8, found 9"):
            session.step(hidden[:, :1], start_from_position=9)


def test_a_server_of_the_older_line_goes_on_appending(folder, local):
    hidden = hidden_states(1, 6)
    with (
        LocalSwarm(folder, servers=1, mode="thread", rolls_back=False, version="2.2.0.post1") as swarm,
        WireClient(swarm.initial_peers) as client,
        WireSession(client, swarm.servers[0].peer_id, ALL, max_length=20) as session,
    ):
        assert client.info(swarm.servers[0].peer_id)["version"] == "2.2.0.post1"
        session.step(hidden)
        again = session.step(hidden[:, 3:], start_from_position=3)
        appended = local.forward(torch.cat([hidden, hidden[:, 3:]], dim=1))[:, 6:]
        assert distance(again, appended) < 1e-5
        assert distance(again, local.forward(hidden)[:, 3:]) > 1e-2, "wrong, and no error"


def test_hypo_ids_reorder_rows(client, server, local):
    hidden, rows = hidden_states(3, 7), torch.tensor([1, 1, 0])
    with WireSession(client, server, ALL, max_length=12) as session:
        session.step(hidden[:, :5])
        output = session.step(hidden[:, 5:], None, rows)
        expected = local.forward(torch.cat([hidden[rows, :5], hidden[:, 5:]], dim=1))[:, 5:]
        assert distance(output, expected) < 1e-5
        with pytest.raises(P2PHandlerError, match=r"expected hypo ids \(3,\) of rows 0:3"):
            session.step(hidden[:, :1], None, torch.tensor([0, 1, 3]))


def test_a_long_input_in_steps_within_the_batch_limit(client, server, local):
    hidden = hidden_states(1, 100)
    with pytest.raises(P2PHandlerError, match=r"greater than max_batch_size \(64\)"):
        client.forward(server, ALL, hidden)
    with WireSession(client, server, ALL, max_length=100) as session:
        outputs = [session.step(part) for part in hidden.split(50, dim=1)]
    assert distance(torch.cat(outputs, dim=1), local.forward(hidden)) < 1e-5


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([(hidden_states(1, 4), {"max_length": 101})], r"Cannot allocate KV cache for 101 tokens, max = 100"),
        ([(hidden_states(1, 4), {})], r"must contain int max_length, got None"),
        ([(hidden_states(1, 65), {"max_length": 100})], r"Task size greater than max_batch_size \(64\)"),
        ([(hidden_states(1, 4), {"max_length": 3})], r"Maximum length exceeded: prefix 0 \+ current 4 exceeds .* 3"),
        (
            [(hidden_states(1, 4), {"max_length": 9}), (hidden_states(2, 1), {})],
            r"expected hidden states \(1, seq, 32\), the session",
        ),
        ([(hidden_states(1, 4), {"max_length": 9, "active_adapter": "x"})], r"adapter x not found"),
        ([(hidden_states(3, 4), {"max_length": 99})], r"Could not allocate \d+ bytes immediately: out of memory"),
        (
            [(hidden_states(3, 4), {"max_length": 99, "alloc_timeout": 60.0})],
            r"Could not allocate \d+ bytes, max cache size",
        ),
    ],
)
def test_refusals(client, server, steps, message):
    with WireSession(client, server, ALL) as session, pytest.raises(P2PHandlerError, match=message):
        for hidden, metadata in steps:
            session.step(hidden, **metadata)
    until(lambda: client.tokens_left(server) // BLOCKS == TOKENS)


def test_wrong_blocks_and_wrong_number_of_prompts(client, server):
    with (
        WireSession(client, server, "tiny.9", max_length=9) as session,
        pytest.raises(P2PHandlerError, match=r"Remote peer does not serve tiny\.9"),
    ):
        session.step(hidden_states(1, 3))
    with (
        WireSession(client, server, ALL, max_length=9) as session,
        pytest.raises(P2PHandlerError, match="Received 2 prompts for 4 backends"),
    ):
        session.step(hidden_states(1, 3), torch.randn(2, 1, 3, HIDDEN))


def test_a_full_cache_is_refused_at_once_or_waited_for(client, server, local):
    with WireSession(client, server, ALL, max_length=90) as first:
        first.step(hidden_states(2, 1))  # 180 of 200
        with (
            WireSession(client, server, ALL, max_length=30) as second,
            pytest.raises(P2PHandlerError, match="bytes immediately: out of memory"),
        ):
            second.step(hidden_states(1, 1))
        with (
            WireSession(client, server, ALL, max_length=30, alloc_timeout=0.2) as second,
            pytest.raises(P2PHandlerError, match=r"Could not allocate \d+ within 0\.2 seconds"),
        ):
            second.step(hidden_states(1, 1))
        with WireSession(client, server, ALL, max_length=20) as second:
            second.step(hidden_states(1, 1))  # what is left is still to be had
        until(lambda: client.tokens_left(server) // BLOCKS == TOKENS - 180)
        with WireSession(client, server, ALL, max_length=30, alloc_timeout=30.0) as patient:
            hidden = hidden_states(1, 2)
            patient.send(hidden)
            time.sleep(0.3)
            first.finish()
            assert distance(patient.receive(), local.forward(hidden)) < 1e-5
    until(lambda: client.tokens_left(server) // BLOCKS == TOKENS)


def test_a_client_that_vanishes_frees_its_cache(client, server):
    session = WireSession(client, server, ALL, max_length=90)
    session.step(hidden_states(2, 1))
    assert client.tokens_left(server) // BLOCKS == TOKENS - 180
    session.hang_up()
    until(lambda: client.tokens_left(server) // BLOCKS == TOKENS)


def test_steps_and_sessions_time_out(folder):
    limits = {"step_timeout": 0.5, "session_timeout": 2.0}
    with (
        LocalSwarm(folder, servers=1, mode="thread", **limits) as swarm,
        WireClient(swarm.initial_peers) as client,
    ):
        server = swarm.servers[0].peer_id
        free = client.tokens_left(server)
        with WireSession(client, server, ALL, max_length=9) as slow:
            slow.step(hidden_states(1, 1))
            assert client.tokens_left(server) < free
            until(lambda: client.tokens_left(server) == free)
        started = time.monotonic()
        with WireSession(client, server, ALL, max_length=90) as endless, contextlib.suppress(P2PHandlerError):
            while endless.step(hidden_states(1, 1)) is not None:
                time.sleep(0.1)
        assert 1.5 < time.monotonic() - started < 8
        until(lambda: client.tokens_left(server) == free)


def test_a_server_pushes_its_output_to_the_next(swarm, client, local):
    _, head, tail = swarm.servers
    hidden = hidden_states(2, 6)
    expected = local.forward(hidden)
    with (
        WireSession(client, head.peer_id, chain("tiny", 0, 2), max_length=10) as first,
        WireSession(client, tail.peer_id, chain("tiny", 2, 4), max_length=10) as second,
    ):
        outputs = [second.step(first.step(hidden[:, :4]))]
        for position in (4, 5):
            part = hidden[:, position : position + 1]
            next_servers = [(tail.peer_id, second.session_id, 2, 4)]
            first.send(part, step_id=f"step {position}", next_servers=next_servers)
            # The second server's output comes without a word from the client.
            outputs.append(second.receive())
            middle = first.receive()
            second.send(middle, step_id=f"step {position}")  # its own copy comes late and is ignored
        assert distance(torch.cat(outputs, dim=1), expected) < 1e-5
        with pytest.raises(TimeoutError):
            second.receive(0.5)


def test_the_copy_that_comes_second_is_ignored(swarm, client, local):
    hidden = hidden_states(1, 3)
    with WireSession(client, swarm.servers[0].peer_id, ALL, max_length=10) as session:
        outputs = [session.step(hidden[:, :2], step_id="a")]
        session.send(hidden[:, :2], step_id="a")
        outputs.append(session.step(hidden[:, 2:], step_id="b"))
    assert distance(torch.cat(outputs, dim=1), local.forward(hidden)) < 1e-5


def test_nothing_is_pushed_where_deep_prompts_are(swarm, client):
    _, head, tail = swarm.servers
    with (
        WireSession(client, head.peer_id, chain("tiny", 0, 2), max_length=10) as first,
        WireSession(client, tail.peer_id, chain("tiny", 2, 4), max_length=10) as second,
    ):
        second.step(hidden_states(1, 1))
        next_servers = [(tail.peer_id, second.session_id, 2, 4)]
        first.step(hidden_states(1, 3), torch.randn(2, 1, 2, HIDDEN), next_servers=next_servers)
        with pytest.raises(TimeoutError):
            second.receive(0.5)


def test_a_push_to_nobody_vanishes(swarm, client):
    _, head, tail = swarm.servers
    with WireSession(client, head.peer_id, chain("tiny", 0, 2), max_length=10) as first:
        first.step(hidden_states(1, 3), next_servers=[(tail.peer_id, "no such session", 2, 4)])
        first.step(hidden_states(1, 3), next_servers=[(client.peer.peer_id, "not even a server", 2, 4)])
        assert first.step(hidden_states(1, 1)).shape == (1, 1, HIDDEN)


def test_a_session_id_is_taken_once(client, server):
    with WireSession(client, server, ALL, max_length=9, session_id="one") as first:
        first.step(hidden_states(1, 1))
        with (
            WireSession(client, server, ALL, max_length=9, session_id="one") as second,
            pytest.raises(P2PHandlerError, match="session id one is not unique"),
        ):
            second.step(hidden_states(1, 1))
        first.step(hidden_states(1, 1))


def test_sessions_side_by_side(client, server, local):
    one, other = hidden_states(1, 6, seed=1), hidden_states(1, 6, seed=2)
    with (
        WireSession(client, server, ALL, max_length=6) as first,
        WireSession(client, server, ALL, max_length=6) as second,
    ):
        ones, others = [], []
        for position in range(0, 6, 2):
            ones.append(first.step(one[:, position : position + 2]))
            others.append(second.step(other[:, position : position + 2]))
    assert distance(torch.cat(ones, dim=1), local.forward(one)) < 1e-5
    assert distance(torch.cat(others, dim=1), local.forward(other)) < 1e-5
