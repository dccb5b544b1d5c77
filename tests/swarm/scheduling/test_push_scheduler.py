"""Servers that push to each other: the same bits, sent once, and the ordinary way whenever that does not work."""

import asyncio
import contextlib
import itertools
import time

import pytest
import torch

from petals_eval.config import SwarmSettings
from petals_eval.errors import MissingBlocksError, PeerAnswerError, PeerRefusedError, PeerUnreachableError
from petals_eval.local_swarm.faults import catalog as faults
from petals_eval.local_swarm.launcher import LocalSwarm
from petals_eval.local_swarm.server.sessions import Sessions
from petals_eval.simulator.virtual_time import run_in_virtual_time
from petals_eval.swarm import SwarmConnection, Work
from petals_eval.swarm.scheduling.push_scheduler import PushSchedulerPolicy
from petals_eval.swarm.scheduling.router import PacePolicy
from petals_eval.swarm.trust.determinism import difference
from petals_eval.swarm.wire.span import Span
from tests.support.fake_swarm import FakeDirectory, FakeTransport, forward, info, pipeline, server
from tests.support.tensors import close

BLOCKS, HIDDEN = 5, 64
SPANS = [(0, 2), (2, 3), (3, 4), (4, 5)]
PUSHES = "2.3.0.dev2"
SMALL = torch.zeros(2, 3, 4)
FULL = "Could not allocate 7000 bytes immediately: out of memory"


@contextlib.contextmanager
def swarm_of(realdata, spans=SPANS, **options):
    with LocalSwarm(realdata / "stories260K-hf", spans=spans, mode="thread", **options) as swarm:
        yield swarm


@contextlib.contextmanager
def blocks_over(swarm, push="always", **settings):
    chosen = {"initial_peers": tuple(swarm.initial_peers), "deadline": 20.0, "verify": 0.0, **settings}
    with SwarmConnection.connect(SwarmSettings(push=push, **chosen)) as connection:
        yield connection.remote_sequential(swarm.dht_prefix, BLOCKS)


@pytest.fixture(scope="module")
def swarm(realdata):
    with swarm_of(realdata) as running:
        yield running


@pytest.fixture(scope="module")
def ordinary(swarm):
    with blocks_over(swarm, "never") as blocks:
        yield blocks


def hidden_states(batch: int, seq: int) -> torch.Tensor:
    return torch.randn(batch, seq, HIDDEN, generator=torch.Generator().manual_seed(batch * 1000 + seq))


def sent_to(blocks, swarm) -> list[int]:
    """Bytes of hidden states that left here in calls to each server."""
    seen = blocks.peers
    return [seen[server.peer_id].bytes_sent if server.peer_id in seen else 0 for server in swarm.servers]


def test_the_same_numbers_and_each_hidden_state_leaves_here_once(swarm, ordinary):
    shapes = [(1, 1), (3, 7), (16, 60), (20, 100)]
    with blocks_over(swarm) as blocks:
        for shape in shapes:
            hidden = hidden_states(*shape)
            assert close(blocks(hidden), ordinary(hidden))
        first, *rest = sent_to(blocks, swarm)
        assert first == sum(4 * HIDDEN * rows * seq for rows, seq in shapes)
        assert rest == [0, 0, 0]
        received = [blocks.peers[server.peer_id].bytes_received for server in swarm.servers]
        assert received == [first] * 4
        assert blocks.status().retries == 0


def test_many_at_once_come_back_each_with_its_own_and_leave_no_cache_behind(swarm, ordinary):
    inputs = [hidden_states(1 + number % 5, 3 + number % 17) for number in range(60)]
    with blocks_over(swarm) as blocks:
        found = {each.tag: each for each in blocks.stream(Work(*each, None) for each in enumerate(inputs))}
        assert sent_to(blocks, swarm)[1:] == [0, 0, 0]
        assert all(close(found[number].hidden, ordinary(hidden)) for number, hidden in enumerate(inputs))
        assert all([(hop.span.start, hop.span.stop) for hop in each.hops] == SPANS for each in found.values())
        assert all(peer.tokens_in_flight == 0 and peer.window.in_flight == 0 for peer in blocks.peers.values())
    end = time.monotonic() + 10
    while any(server._server.budget.used_bytes for server in swarm.servers) and time.monotonic() < end:
        time.sleep(0.05)
    assert [server._server.budget.used_bytes for server in swarm.servers] == [0] * 4


def test_in_bfloat16_within_its_rounding(realdata):
    hidden = hidden_states(4, 40)
    with swarm_of(realdata, dtype="bfloat16") as swarm, blocks_over(swarm) as blocks:
        with blocks_over(swarm, "never") as ordinary:
            expected = ordinary(hidden)
        found = blocks(hidden)
        assert sent_to(blocks, swarm) == [2 * hidden.numel(), 0, 0, 0]
        assert difference(hidden, found, expected) < 2e-2


def test_parts_of_the_model(swarm, ordinary):
    hidden = hidden_states(3, 9)
    with blocks_over(swarm) as blocks:
        assert close(blocks[1:4](hidden), ordinary[1:4](hidden))
        assert sent_to(blocks, swarm)[:2] == [4 * hidden.numel(), 0]


def test_one_hop_has_nobody_to_push_to(swarm, ordinary):
    hidden = hidden_states(3, 9)
    with blocks_over(swarm) as blocks:
        assert close(blocks[:2](hidden), ordinary[:2](hidden))
        assert blocks.status().retries == 0


def test_deep_prompts_a_lossy_wire_and_too_many_tokens_go_the_ordinary_way(swarm, ordinary):
    hidden = hidden_states(4, 20)
    prompts = 0.1 * torch.randn(BLOCKS, 1, 4, HIDDEN, generator=torch.Generator().manual_seed(0))
    with blocks_over(swarm) as blocks:
        assert close(blocks(hidden, prompts), ordinary(hidden, prompts))
        assert sent_to(blocks, swarm)[0] == 4 * hidden.numel() + 4 * prompts[:2].numel()
        assert all(sent > 0 for sent in sent_to(blocks, swarm))
        assert blocks.status().retries == 0
    with blocks_over(swarm, wire="float16") as blocks:
        assert torch.allclose(blocks(hidden), ordinary(hidden), rtol=0.02, atol=0.05)
        assert sent_to(blocks, swarm) == [2 * hidden.numel()] * 4
    with blocks_over(swarm, max_tokens_per_call=50) as blocks:
        long = hidden_states(1, 60)
        assert close(blocks(long), ordinary(long))
        assert all(sent > 0 for sent in sent_to(blocks, swarm))


def test_a_server_of_an_older_version_in_the_route(realdata, swarm, ordinary):
    hidden = hidden_states(3, 9)
    with swarm_of(realdata, SPANS[:3]) as older:
        older.add_server(SPANS[3], version="2.2.0.post1", rolls_back=False)
        with blocks_over(older) as blocks:
            assert close(blocks(hidden), ordinary(hidden))
            assert sent_to(blocks, older) == [4 * hidden.numel()] * 4
            assert blocks.status().retries == 0


def test_a_server_that_announces_a_newer_version_than_it_has(realdata, ordinary):
    hidden = hidden_states(3, 9)
    with swarm_of(realdata) as lying, blocks_over(lying) as blocks:  # the announcement is read
        lying.servers[2].switch(faults.VersionLie(version="2.2.0"))
        assert close(blocks(hidden), ordinary(hidden))
        assert sent_to(blocks, lying) == [4 * hidden.numel()] * 4


def test_a_full_cache_is_no_fault_of_the_server(realdata, ordinary):
    hidden = hidden_states(4, 16)
    with swarm_of(realdata, SPANS[:3]) as full:
        full.add_server(SPANS[3], attn_cache_tokens=40, inference_max_length=40)  # of 64 that it takes
        with blocks_over(full) as blocks:
            assert close(blocks(hidden), ordinary(hidden))
            assert sent_to(blocks, full) == [4 * hidden.numel()] * 4
            assert all(peer.failures == 0 for peer in blocks.peers.values())
            small = hidden_states(1, 8)
            assert close(blocks(small), ordinary(small))


@pytest.mark.sample(1)
@pytest.mark.parametrize("window", [None, 40])
def test_pushes_never_take_more_than_half_of_what_a_cache_has(realdata, ordinary, window):
    """Others have sessions, too; also where the number of micro-batches in flight is set by hand."""
    tokens = 400
    inputs = [hidden_states(2, 10) for _ in range(60)]
    with swarm_of(realdata, attn_cache_tokens=tokens, inference_max_length=tokens) as tight:
        last = tight.servers[3]
        last.switch(faults.Slow(delay=0.1))  # they pile up there
        most = 0
        with blocks_over(tight, window=window) as blocks:
            for computed in blocks.stream(Work(*each, None) for each in enumerate(inputs)):
                most = max(
                    most, *(each._server.budget.used_bytes / each._server.budget.total_bytes for each in tight.servers)
                )
                assert close(computed.hidden, ordinary(inputs[computed.tag]))
            assert sent_to(blocks, tight)[1:] == [0, 0, 0], "all were pushed"
        assert 0.1 < most <= 0.5


def test_a_server_without_sessions_serves_on_the_ordinary_way(realdata, ordinary):
    """The only one that holds its block: if that were held against its calls, the run would stop for half a minute."""
    hidden = hidden_states(3, 9)
    with swarm_of(realdata) as refusing:
        refusing.servers[1].switch(faults.Refuse(at_most=1))
        with blocks_over(refusing, min_backoff=30.0, deadline=10.0) as blocks:
            assert close(blocks(hidden), ordinary(hidden))
            assert sent_to(blocks, refusing) == [4 * hidden.numel()] * 4
            assert refusing.servers[1].fault_counts()["refuse"].times == 1
            assert blocks.status().retries == 1


def test_a_push_that_is_lost_holds_nothing_up_and_what_came_before_it_counts(realdata, ordinary, monkeypatch):
    monkeypatch.setattr(PacePolicy, "first_patience", 1.0)
    hidden = hidden_states(3, 9)
    hears = Sessions.receive

    def hear(self: Sessions, request: object) -> None:
        if self._served.settings.span.start != 3:
            hears(self, request)

    monkeypatch.setattr(Sessions, "receive", hear)
    with swarm_of(realdata) as deaf, blocks_over(deaf) as blocks:
        blocks._pipeline._pushes._policy = PushSchedulerPolicy(min_patience=1.0)
        started = time.monotonic()
        assert close(blocks(hidden), ordinary(hidden))
        assert time.monotonic() - started < 10
        once = 4 * hidden.numel()
        assert sent_to(blocks, deaf) == [once, 0, once, once]
        assert blocks.status().retries == 1
        assert close(blocks(hidden), ordinary(hidden))  # not pushed: that server rests
        assert sent_to(blocks, deaf) == [2 * once, once, 2 * once, 2 * once]


def test_a_server_that_dies_in_mid_push(realdata, ordinary):
    inputs = [hidden_states(2, 5 + number) for number in range(30)]
    with swarm_of(realdata, [*SPANS, SPANS[2]]) as dying, blocks_over(dying, min_backoff=0.1) as blocks:
        blocks(inputs[0])
        route = blocks._pipeline._router.plan(
            Span(0, 5), 12
        )  # which of the two replicas is used depends on their paces
        (victim,) = [each for each in dying.servers if each.peer_id == route[2].peer_id]
        victim.switch(faults.Crash(after=1))
        found = {each.tag: each.hidden for each in blocks.stream(Work(*each, None) for each in enumerate(inputs))}
        give_up = time.monotonic() + 10
        while victim.is_alive() and time.monotonic() < give_up:
            time.sleep(0.05)
        assert not victim.is_alive()
        assert all(close(found[number], ordinary(hidden)) for number, hidden in enumerate(inputs))
        assert blocks.status().retries > 0


def test_answers_that_are_wrong_are_refused_and_held_against_the_server(realdata, ordinary):
    hidden = hidden_states(3, 9)
    with swarm_of(realdata) as wrong, blocks_over(wrong, min_backoff=0.1) as blocks:
        blocks(hidden)
        wrong.servers[2].switch(faults.NotFinite(at_most=1))
        assert close(blocks(hidden), ordinary(hidden))
        peer = blocks.peers[wrong.servers[2].peer_id]
        assert peer.failures == 1 and "not finite" in peer.last_error


@pytest.mark.sample(1)
@pytest.mark.parametrize("place", [0, 1, 3])
def test_training_mode_is_caught_when_pushing(realdata, place):
    """Wherever in the route it stands; the others' answers do not hide it."""
    with swarm_of(realdata) as training:
        training.servers[place].switch(faults.TrainingMode(dropout=0.1))
        with blocks_over(training, deadline=5.0) as blocks:
            with pytest.raises(MissingBlocksError, match="two answers"):
                blocks(hidden_states(3, 9))
            assert blocks.peers[training.servers[place].peer_id].is_quarantined


def test_pushed_answers_are_checked_against_others(realdata, ordinary):
    spans = [*SPANS, SPANS[2], SPANS[2]]
    with swarm_of(realdata, spans) as lying:
        lying.servers[2].switch(faults.Noise(size=0.5, repeats=True))
        with blocks_over(lying, verify=1.0) as blocks:
            for number in range(8):
                blocks(hidden_states(2, 10 + number))
            blocks.settle()
            assert blocks.peers[lying.servers[2].peer_id].is_quarantined
            assert sent_to(blocks, lying)[1] == 0  # it was a pushed answer that was found out
            hidden = hidden_states(2, 30)
            assert close(blocks(hidden), ordinary(hidden))


def test_no_push_is_left_when_the_run_is_interrupted(realdata):
    with swarm_of(realdata) as slow, blocks_over(slow) as blocks:
        blocks(hidden_states(1, 3))
        slow.servers[1].switch(faults.Slow(delay=0.3))
        stream = blocks.stream(Work(number, hidden_states(1, 4), None) for number in range(20))
        next(stream)
        stream.close()
        end = time.monotonic() + 10
        while any(peer.tokens_in_flight for peer in blocks.peers.values()) and time.monotonic() < end:
            time.sleep(0.05)
        assert all(peer.tokens_in_flight == 0 for peer in blocks.peers.values())


# -- which routes push, and what is made of what goes wrong, without a network


def route(**fields):
    return [server(name, block, block + 1, version=PUSHES, **fields) for block, name in enumerate("abc")]


@pytest.fixture
def transport():
    transport = FakeTransport()
    transport.info = info(version=PUSHES)
    return transport


def simulate(transport, go, *, servers=None, **values):
    """Run `go(pipe)` in virtual time over three servers that push to each other; return the pipeline."""

    async def everything(runtime):
        directory = FakeDirectory(3, *(servers or route()))
        pipe = pipeline(directory, transport, runtime=runtime, **{"push": "always", "deadline": 60, **values})
        await go(pipe)
        return pipe

    return run_in_virtual_time(everything)[0]


async def push_one(pipe):
    hidden, hops = await forward(pipe, SMALL, stop=3)
    assert torch.equal(hidden, torch.full_like(SMALL, 111.0))
    assert [hop.peer_id for hop in hops] == ["a", "b", "c"]


def failing(name, error):
    def fail(hop, *asked):
        if hop.peer_id == name:
            raise error

    return fail


def test_a_route_on_which_all_push_is_given_one_micro_batch_once(transport):
    pipe = simulate(transport, push_one)
    assert [(each.peer_id, each.is_step) for each in transport.calls] == [("a", True), ("b", True), ("c", True)]
    assert all((peer.calls, peer.tokens) == (1, 6) for peer in pipe.peers.values())
    assert all(peer.tokens_in_flight == peer.push_tokens_reserved == 0 for peer in pipe.peers.values())
    assert all(peer.window.in_flight == 0 and peer.window.rate for peer in pipe.peers.values())


@pytest.mark.parametrize("unfit", ["limit", "session", "cache", "resting", "version", "one hop"])
def test_a_route_is_not_asked_to_push_what_one_of_it_does_not_take(transport, unfit):
    servers = route()
    if unfit == "version":
        servers[1] = server("b", 1, 2, version="2.2.0.post1")
    if unfit == "one hop":
        servers = [server("a", 0, 3, version=PUSHES)]

    async def go(pipe):
        peer = pipe.peers.of("b")
        if unfit == "limit":
            peer.limits.per_call = 5
        if unfit == "session":
            peer.limits.learn_per_session(PeerRefusedError("Cannot allocate KV cache for 3 tokens, max = 2"), 2, 3)
        if unfit == "cache":
            peer.cache.on_full(6, "out of memory")
        if unfit == "resting":
            peer.push_rest_until = 1.0
        hidden, _ = await forward(pipe, SMALL, stop=3)
        assert torch.equal(hidden, torch.full_like(SMALL, 111.0))

    simulate(transport, go, servers=servers)
    assert not transport.sessions and transport.calls


def test_pushes_wait_for_room_in_caches_that_others_use_too(transport):
    """Of `cache_tokens_left`, which counts keys and values apart, a quarter: here two micro-batches of six tokens."""

    async def go(pipe):
        await asyncio.gather(*(push_one(pipe) for _ in range(8)))

    simulate(transport, go, servers=route(cache_tokens_left=48), window=40)
    assert len(transport.sessions) == 3 * 8 and transport.max_sessions == 3 * 2
    assert all(call.is_step for call in transport.calls)


def test_a_micro_batch_that_would_fill_a_cache_alone_is_pushed_alone(transport):
    async def go(pipe):
        await asyncio.gather(*(push_one(pipe) for _ in range(3)))

    simulate(transport, go, servers=route(cache_tokens_left=8), window=40)
    assert len(transport.sessions) == 3 * 3 and transport.max_sessions == 3


@pytest.mark.parametrize(
    ("error", "retries"),
    [(PeerUnreachableError("gone"), 1), (PeerRefusedError("no"), 1), (PeerRefusedError(FULL), 0)],
    ids=["unreachable", "refused", "full"],
)
def test_a_server_that_gives_no_session_is_asked_to_push_ever_more_seldom_and_computes_all_the_same(
    transport, error, retries
):
    asked = []

    def refuse(hop, rows, positions):
        if hop.peer_id == "b":
            asked.append(asyncio.get_running_loop().time())
            raise error

    transport.on_session = refuse

    async def go(pipe):
        for _ in range(80):
            await push_one(pipe)
            await asyncio.sleep(1.0)

    pipe = simulate(transport, go)
    gaps = [after - before for before, after in itertools.pairwise(asked)]
    assert gaps == pytest.approx([5, 10, 20, 40], abs=1.5)
    peer = pipe.peers.of("b")
    assert peer.failures == 0 and peer.calls == 80 and peer.retries == retries * len(asked)
    assert transport.open_sessions == 0


def test_a_push_that_works_again_ends_the_rest(transport):
    async def go(pipe):
        transport.on_session = failing("b", PeerRefusedError("no"))
        await push_one(pipe)
        peer = pipe.peers.of("b")
        assert (peer.push_rest, peer.push_rest_until > 0) == (5.0, True)
        transport.on_session = None
        await asyncio.sleep(6)
        await push_one(pipe)
        assert (peer.push_rest, peer.push_rest_until) == (0.0, 0.0)

    simulate(transport, go)


def test_those_that_fail_together_make_one_rest(transport):
    transport.on_session = failing("b", PeerRefusedError("no"))

    async def go(pipe):
        await asyncio.gather(*(push_one(pipe) for _ in range(4)))
        assert pipe.peers.of("b").push_rest == 5.0

    simulate(transport, go)


@pytest.mark.parametrize(
    ("words", "limit"),
    [("Task size greater than max_batch_size (4)", 4), ("Cannot allocate KV cache for 3 tokens, max = 2", None)],
)
def test_a_limit_learnt_from_a_push_is_no_reason_to_rest(transport, words, limit):
    def refuse(hop, hidden):
        if hop.peer_id == "b" and transport.calls[-1].is_step and hidden.shape[:2] == (2, 3):
            raise PeerRefusedError(words)

    transport.on_call = refuse

    async def go(pipe):
        await push_one(pipe)
        peer = pipe.peers.of("b")
        assert (peer.retries, peer.failures, peer.push_rest_until, peer.limits.per_call) == (0, 0, 0.0, limit)
        await forward(pipe, SMALL[:1], stop=3)
        assert [each.is_step for each in transport.calls[-3:]] == [True] * 3, "what is smaller is pushed"

    simulate(transport, go)


def test_an_answer_that_is_wrong_is_held_against_its_server(transport):
    wrong = [True]

    def answer(hop, hidden):
        if hop.peer_id == "b" and wrong:
            wrong.clear()
            raise PeerAnswerError("expected (2, 3, 4), found (2, 3, 5)")

    transport.on_call = answer
    pipe = simulate(transport, push_one, min_backoff=1.0)
    peer = pipe.peers.of("b")
    assert peer.failures == 1 and peer.push_rest == 0.0
    assert pipe.peers.of("a").calls == 1, "its answer counts"


def test_a_push_that_is_lost_is_given_up_after_three_times_what_it_should_take(transport):
    async def go(pipe):
        for _ in range(5):
            await push_one(pipe)
        transport.on_call = lambda hop, hidden: asyncio.sleep(3600) if transport.calls[-1].is_step else None
        began = asyncio.get_running_loop().time()
        await push_one(pipe)
        assert 3.0 <= asyncio.get_running_loop().time() - began < 3.5

    simulate(transport, go)
