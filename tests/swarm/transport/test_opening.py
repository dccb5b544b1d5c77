"""Opening sessions on servers that have no room, that lost their lock, or whose sessions are of another kind."""

import asyncio
import contextlib
import random
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch

from petals_eval.errors import DeadlineError, MissingBlocksError, PeerRefusedError, RequestTooLargeError
from petals_eval.health import check_health
from petals_eval.local_swarm.faults import catalog as faults
from petals_eval.local_swarm.launcher import LocalSwarm
from petals_eval.local_swarm.server import sessions
from petals_eval.swarm.peers.limits import says_cache_is_full
from petals_eval.swarm.sessions import route_session
from petals_eval.swarm.transport.raw_stream import open_stream
from petals_eval.swarm.wire.span import Span
from tests.support import real_swarm
from tests.support.tiny_models import make_tiny
from tests.support.waiting import until
from tests.support.wire_client import WireClient, WireSession, chain

BLOCKS, HIDDEN = 4, 32
TIGHT = {"max_batch_size": 16, "inference_max_length": 64, "attn_cache_tokens": 64}
"""Rows of more than 16 positions go in steps, and the cache has room for one of 64."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny("llama", tmp_path_factory.mktemp("llama"), blocks=BLOCKS)


def start(model, spans, **options):
    return LocalSwarm(model, spans=spans, mode="thread", **{**TIGHT, **options})


def connect(swarm, **settings):
    quick = {"min_backoff": 0.05, "max_backoff": 0.2, "missing_update_period": 0.2, "deadline": 20.0, "verify": 0.0}
    return real_swarm.connect(swarm, **{**quick, **settings})


@contextlib.contextmanager
def blocks_over(swarm, **settings):
    with connect(swarm, **settings) as connection:
        yield connection.remote_sequential(swarm.dht_prefix, BLOCKS)


@contextlib.contextmanager
def somebody_else(swarm, server, tokens):
    """A session of somebody else's on all of a server's blocks, open until `finish` or the end."""
    with (
        WireClient(swarm.initial_peers) as client,
        WireSession(
            client, server.peer_id, chain(swarm.dht_prefix, server.span.start, server.span.stop), max_length=tokens
        ) as session,
    ):
        session.step(torch.empty(1, 0, HIDDEN))
        yield session


@pytest.fixture
def openings(monkeypatch):
    """The metadata that every session was opened with, by its id, as the servers of this process receive it."""
    received = {}
    read = sessions.read_metadata

    def noted(request):
        metadata = read(request)
        if "max_length" in metadata:
            received[metadata["session_id"]] = metadata
        return metadata

    monkeypatch.setattr(sessions, "read_metadata", noted)
    return received


def states(rows: int, seq: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, seq, HIDDEN, generator=torch.Generator().manual_seed(seed))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def used(swarm) -> list[int]:
    """Bytes of cache in use at each server."""
    return [server._server.budget.used_bytes for server in swarm.servers]


def test_no_session_of_ours_ever_lets_a_server_wait_for_room(model, openings):
    """Of whatever kind: rows in steps, checks of such rows, inference sessions, the proof of rolling back, pushes, and
    probes of the swarm's health."""
    with start(model, [(0, 2), (2, 4), (0, 2), (2, 4)]) as swarm:
        with blocks_over(swarm, verify=1.0) as blocks:
            blocks(states(1, 40))
            blocks.settle()
            assert blocks.audit_progress().done > 0
            kinds = [len(openings)]
            with blocks.inference_session(32) as session:
                session.step(states(1, 10))
                session.position = 4
                session.step(states(1, 3))
            kinds.append(len(openings))
        with blocks_over(swarm, push="always") as blocks:
            blocks(states(2, 8))
            kinds.append(len(openings))
        check_health(swarm.initial_peers)
        kinds.append(len(openings))
    assert kinds == [4, 8, 10, 14]
    assert [metadata["alloc_timeout"] for metadata in openings.values()] == [0.0] * 14


def test_a_row_in_steps_waits_for_room_while_others_go_on(model, openings):
    hidden = states(1, 40)
    with start(model, [(0, 4)]) as swarm, blocks_over(swarm) as blocks, ThreadPoolExecutor(1) as pool:
        expected = blocks(hidden)
        with somebody_else(swarm, swarm.servers[0], 64) as holder:
            openings.clear()
            waiting = pool.submit(blocks, hidden)
            until(lambda: blocks.status().waiting is not None)
            assert "no server of blocks 0:4 has room for a session now" in blocks.status().waiting
            started = time.monotonic()
            for _ in range(20):
                assert blocks(states(1, 8)).shape == (1, 8, HIDDEN)
            assert time.monotonic() - started < 2.0, "nobody stands in line behind it"
            time.sleep(1.0)
            assert not waiting.done()
            holder.finish()
            freed = time.monotonic()
            close(waiting.result(), expected)
            assert time.monotonic() - freed < 4.0
        assert len(openings) <= 2, "the server was not asked for a session while it said that it had no room"
        assert blocks.status().retries == 0 and blocks.status().waiting is None
        until(lambda: used(swarm) == [0])


def test_another_server_is_tried_meanwhile(model):
    hidden = states(1, 40)
    with start(model, [(0, 4)]) as swarm, blocks_over(swarm) as blocks:
        expected = blocks(hidden)
        (first,) = swarm.servers
        swarm.add_server((0, 4))
        blocks.refresh()
        with somebody_else(swarm, first, 64):
            started = time.monotonic()
            close(blocks(hidden), expected)
            with blocks.inference_session(64) as session:
                close(session.step(hidden[:, :16]), expected[:, :16])
                assert session.servers == (swarm.servers[1].peer_id,)
            assert time.monotonic() - started < 2.0
        assert blocks.status().retries == 0


def test_whoever_needs_less_than_is_left_need_not_wait(model):
    with start(model, [(0, 4)]) as swarm, blocks_over(swarm) as blocks, ThreadPoolExecutor(1) as pool:
        blocks(states(1, 18))
        with somebody_else(swarm, swarm.servers[0], 30) as holder:
            waiting = pool.submit(blocks, states(1, 60))
            until(lambda: blocks.status().waiting is not None)
            time.sleep(1.0)  # by now it is asked every two seconds
            started = time.monotonic()
            blocks(states(1, 20))
            assert time.monotonic() - started < 1.0
            assert not waiting.done()
            holder.finish()
            waiting.result()


def test_two_clients_that_want_all_of_two_caches_both_get_them(model):
    """Each would hold the first server's and wait for the second's, which the other holds, until the deadline."""

    def many(blocks):
        for number in range(6):
            with blocks.inference_session(64) as session:
                session.step(states(1, 16, seed=number))

    with (
        start(model, [(0, 2), (2, 4)]) as swarm,
        blocks_over(swarm) as one,
        blocks_over(swarm) as other,
        ThreadPoolExecutor(2) as pool,
    ):
        for done in [pool.submit(many, blocks) for blocks in (one, other[0:4])]:
            done.result()
        until(lambda: used(swarm) == [0, 0])


def test_no_cache_is_held_while_another_is_waited_for(model):
    with start(model, [(0, 2), (2, 4)]) as swarm, blocks_over(swarm) as blocks, ThreadPoolExecutor(1) as pool:
        with somebody_else(swarm, swarm.servers[1], 64) as holder, blocks.inference_session(64) as session:
            step = pool.submit(session.step, states(1, 4))
            until(lambda: blocks.status().waiting is not None)
            time.sleep(0.5)
            held = []
            for _ in range(50):
                held.append(used(swarm)[0])
                time.sleep(0.02)
            assert held.count(0) > 40, "it is opened now and then, and closed again at once"
            holder.finish()
            step.result()
        until(lambda: used(swarm) == [0, 0])


def test_a_hop_replaced_in_mid_session_waits_for_room_without_the_others_caches(model, monkeypatch):
    monkeypatch.setattr(route_session, "MAX_HELD_SECONDS", 0.5)
    hidden = states(1, 12)
    with start(model, [(0, 2), (2, 4)]) as swarm, blocks_over(swarm) as blocks, ThreadPoolExecutor(1) as pool:
        expected = blocks(hidden)
        with blocks.inference_session(64) as session:
            session.step(hidden[:, :4])
            victim = swarm.servers[1]
            other = swarm.add_server((2, 4))
            blocks.refresh()
            with somebody_else(swarm, other, 64) as holder:
                victim.kill()
                step = pool.submit(session.step, hidden[:, 4:8])
                until(lambda: swarm.servers[0]._server.budget.used_bytes == 0)
                assert not step.done()
                holder.finish()
                close(step.result(), expected[:, 4:8])
            close(session.step(hidden[:, 8:]), expected[:, 8:])


@pytest.mark.parametrize(
    ("words", "is_full"),
    [
        # as petals 2.2.0 was heard to say
        ("Could not allocate 3840 bytes immediately: out of memory", True),
        ("AllocationFailed('Could not allocate 3840 bytes immediately: out of memory')", True),
        ("Could not allocate 38400 within 1.0 seconds", True),
        ("Could not allocate 153600 bytes, max cache size = 98304 bytes", False),
        ("Cannot allocate KV cache for 300 tokens, max = 256", False),
        # as its source has it
        ("Could not allocate 38400 bytes within 1.0 seconds", True),
        ("Could not allocate 38400 (timeout=1.0)", True),
        ("Server's attention cache is full, failed to allocate 38400 bytes in 1.0 seconds", True),
        ("CUDA error: out of memory", False),
    ],
)
def test_a_full_cache_is_told_from_other_refusals(words, is_full):
    assert says_cache_is_full(PeerRefusedError(words)) is is_full


# -- a server that opens no session


def test_a_lost_lock_is_told_as_what_it_is_and_only_sessions_go_elsewhere(model):
    hidden = states(1, 40)
    with start(model, [(0, 4)]) as swarm, blocks_over(swarm, connect_timeout=1.0, deadline=3.0) as blocks:
        expected = blocks(hidden)
        (locked,) = swarm.servers
        locked.switch(faults.LockedCache())
        text = "opens no session within 1 s, and answers rpc_info all the while: its cache may be locked"
        started = time.monotonic()
        with pytest.raises(DeadlineError, match=text):
            blocks(hidden)
        assert time.monotonic() - started < 8.0
        with blocks.inference_session(32) as session, pytest.raises(DeadlineError, match=text):
            session.step(states(1, 4))
        close(blocks(hidden[:, :16]), expected[:, :16])
        assert locked.fault_counts()["locked_cache"].times == 1, "each try leaves a thread there that waits for ever"
        assert blocks.status().retries == 0
        swarm.add_server((0, 4))
        blocks.refresh()
        close(blocks(hidden), expected)
        with blocks.inference_session(32) as session:
            close(session.step(hidden[:, :4]), expected[:, :4])
            assert session.servers == (swarm.servers[1].peer_id,)
        assert locked.fault_counts()["locked_cache"].times == 1


def test_a_route_with_a_locked_server_is_not_pushed_through(model):
    hidden = states(2, 8)
    with start(model, [(0, 2), (2, 4)]) as swarm, blocks_over(swarm) as blocks:
        expected = blocks(hidden)
        swarm.servers[1].switch(faults.LockedCache())
        with blocks_over(swarm, connect_timeout=1.0, push="always") as other:
            for _ in range(3):
                close(other(hidden), expected)
            assert other.status().retries == 0
        assert swarm.servers[1].fault_counts()["locked_cache"].times == 1
        until(lambda: used(swarm) == [0, 0])


def test_a_server_that_does_not_answer_at_all_is_one_that_fails(model):
    with start(model, [(0, 4)]) as swarm, blocks_over(swarm, connect_timeout=1.0, deadline=3.0) as blocks:
        blocks(states(1, 4))
        swarm.servers[0].kill()
        with blocks.inference_session(32) as session, pytest.raises(DeadlineError, match="every server of blocks 0:4"):
            session.step(states(1, 4))
        assert blocks.status().retries > 0


@pytest.mark.parametrize("tensors", [0, 2, 10])
def test_sessions_of_another_layout_are_never_opened(model, openings, tensors):
    hidden = states(1, 40)
    with start(model, [(0, 2), (2, 4)], faults=(faults.OtherLayout(tensors=tensors),)) as swarm:
        layout = rf"another layout \({tensors} tensors in a step, expected 3\)"
        with blocks_over(swarm) as blocks:
            started = time.monotonic()
            with pytest.raises(RequestTooLargeError, match=rf"holds 40 tokens .* 16 in one call, and .*{layout}"):
                blocks(hidden)
            with blocks.inference_session(32) as session, pytest.raises(MissingBlocksError, match=layout):
                session.step(states(1, 4))
            expected = blocks(hidden[:, :8])
            assert time.monotonic() - started < 3.0
            assert blocks.status().retries == 0
        with blocks_over(swarm, push="always") as blocks:
            close(blocks(hidden[:, :8]), expected)
            assert blocks.status().retries == 0
        assert not openings
        for span in ((0, 2), (2, 4)):
            swarm.add_server(span, faults=())
        with blocks_over(swarm) as blocks:
            close(blocks(hidden)[:, :8], expected)
            with blocks.inference_session(32) as session:
                close(session.step(hidden[:, :8]), expected)
                assert session.servers == tuple(server.peer_id for server in swarm.servers[2:])
        assert openings and not any("other_layout" in server.fault_counts() for server in swarm.servers)


# -- what is cancelled


def test_streams_that_are_given_up_while_they_open_are_closed(model):
    dice = random.Random(1)

    def lines() -> int:
        return sum(".sock" in str(each.raddr) for each in psutil.Process().net_connections("unix"))

    async def streams() -> int:
        return sum("_handle_stream" in repr(task.get_coro()) for task in asyncio.all_tasks())

    with start(model, [(0, 4)]) as swarm, connect(swarm) as connection:
        connection.remote_sequential(swarm.dht_prefix, BLOCKS)(states(1, 4))
        peer_id = swarm.servers[0].peer_id

        async def give_up() -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(dice.uniform(0.0, 0.003)):
                    _, writer = await open_stream(connection.p2p, peer_id, "rpc_inference")
                    writer.close()

        before = lines(), swarm._portal.call(streams)
        for _ in range(200):
            connection.loop.run(give_up)
        until(lambda: (lines(), swarm._portal.call(streams)) == before)


def test_sessions_that_are_given_up_while_they_open_leave_their_caches(model):
    dice = random.Random(1)
    with start(model, [(0, 2), (2, 4)]) as swarm, blocks_over(swarm) as blocks:
        blocks(states(1, 4))

        async def give_up() -> None:
            session = blocks._pipeline.session(Span(0, BLOCKS), 1, 30)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(dice.uniform(0.0, 0.02)):
                    await session.step(states(1, 4))
            await session.close()

        for _ in range(100):
            blocks._loop.run(give_up)
        until(lambda: used(swarm) == [0, 0])
        with blocks.inference_session(64) as session:
            session.step(states(1, 4))
        assert [blocks.peers[server.peer_id].cache._open_sessions for server in swarm.servers] == [0, 0]
