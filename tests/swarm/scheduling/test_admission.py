"""Who may enter a block now, which servers take what is to be computed, and what is told where none ever does."""

import asyncio

import pytest
import torch

from petals_eval.errors import MissingBlocksError, PeerRefusedError, RequestTooLargeError
from petals_eval.simulator.virtual_time import run_in_virtual_time
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.peers.peer import PeerBook
from petals_eval.swarm.runtime import Runtime
from petals_eval.swarm.scheduling.admission import Admission, AdmissionQueues
from petals_eval.swarm.wire.span import Span
from tests.support.fake_swarm import FakeDirectory, FakeTransport, pipeline, run, server, settings

A = server("a", 0, 4)
FULL = "Could not allocate 7000 bytes immediately: out of memory"
TOO_LONG = PeerRefusedError("Cannot allocate KV cache for 7 tokens, max = 5")


@pytest.fixture
def peers():
    return PeerBook(settings())


# -- through the pipeline


@pytest.mark.parametrize(
    ("refusal", "cache"),
    [
        ("Failed to call handler: Cannot allocate KV cache for 7 tokens, max = 5", 5),
        ("Could not allocate 7000 bytes, max cache size = 4200 bytes", 4),
    ],
)
def test_rows_too_long_for_every_server_fail_at_once_with_both_numbers(refusal, cache):
    transport, asked = FakeTransport(), []

    def refuse(hop: Hop, rows: int, positions: int) -> None:
        asked.append(hop.peer_id)
        raise PeerRefusedError(refusal)

    transport.on_session = refuse
    directory = FakeDirectory(4, server("a", 0, 4), server("b", 0, 4))
    pipe = pipeline(directory, transport, max_tokens_per_call=3, deadline=60)
    hidden = torch.zeros(2, 7, 4)
    text = rf"holds 7 tokens .*, but server \.\.\.[ab] takes 3 in one call and has a cache for {cache} "
    for _ in range(2):
        with pytest.raises(RequestTooLargeError, match=text):
            run(pipe, hidden)
    assert sorted(asked) == ["a", "b"]  # each asked once, and no more
    assert pipe.peers.retries == 0


def test_a_row_too_long_for_one_server_goes_to_another():
    transport = FakeTransport()

    def refuse(hop: Hop, rows: int, positions: int) -> None:
        if hop.peer_id == "small":
            raise PeerRefusedError("Cannot allocate KV cache for 7 tokens, max = 5")

    transport.on_session = refuse
    pipe = pipeline(
        FakeDirectory(4, server("small", 0, 4), server("b", 0, 2), server("c", 2, 4)), transport, max_tokens_per_call=3
    )
    answer, hops = run(pipe, torch.zeros(1, 7, 4))
    assert torch.equal(answer, torch.full((1, 7, 4), 1111.0))
    assert [hop.peer_id for hop in hops] == ["b", "c"]
    assert pipe.peers.retries == 0
    _, hops = run(pipe, torch.zeros(1, 3, 4))  # what it takes in one call still goes there
    assert [hop.peer_id for hop in hops] == ["small"]


def test_a_cache_that_is_full_for_the_moment_is_waited_for():
    transport, asked = FakeTransport(), []

    def refuse(hop: Hop, rows: int, positions: int) -> None:
        asked.append(hop.peer_id)
        if len(asked) < 3:
            raise PeerRefusedError("Could not allocate 7000 bytes immediately: out of memory")

    transport.on_session = refuse
    pipe = pipeline(FakeDirectory(4, server("a", 0, 4)), transport, max_tokens_per_call=3, deadline=5)
    answer, _ = run(pipe, torch.zeros(1, 7, 4))
    assert torch.equal(answer, torch.full((1, 7, 4), 1111.0))
    assert len(asked) == 3
    assert pipe.peers.retries == 0, "no failure of the server"


# -- rows


def test_a_row_that_fits_a_call_needs_no_room_in_a_cache(peers):
    peer, admission = peers.of("a"), Admission(peers, 2, 7)
    peer.cache.on_incompatible("its sessions have another layout")
    assert admission.refusal(A, Span(0, 4)) is None and admission.wait(A, Span(0, 4)) is None  # no limit is known
    peer.limits.per_call = 7
    assert admission.refusal(A, Span(0, 4)) is None and admission.wait(A, Span(0, 4)) is None
    peer.limits.per_call = 6
    with pytest.raises(
        RequestTooLargeError, match=r"holds 7 tokens .* takes 6 in one call, and its sessions have anoth"
    ):
        raise admission.refusal(A, Span(0, 4))


def test_a_row_in_steps_waits_for_the_cache_that_its_blocks_need(peers):
    peer, admission = peers.of("a"), Admission(peers, 2, 7)
    peer.limits.per_call = 3
    peer.cache.on_full(7 * 2, FULL)
    assert not admission.is_ready(A, Span(0, 2))
    assert admission.is_ready(A, Span(0, 1)), "one block takes half of it"
    assert admission.is_ready(A, Span(3, 8)), "of these it holds one"
    assert admission.is_ready(server("a", 4, 8), Span(0, 8)), "what it is to compute is not known yet"


def test_a_row_that_never_fits_is_refused_with_both_numbers(peers):
    peer, admission = peers.of("a"), Admission(peers, 2, 7)
    peer.limits.per_call = 3
    assert admission.refusal(A, Span(0, 4)) is None
    assert peer.limits.learn_per_session(TOO_LONG, 1, 7)
    assert "has a cache for 5" in str(admission.refusal(A, Span(0, 4)))
    assert Admission(peers, 2, 5).refusal(A, Span(0, 4)) is None


# -- sessions


def test_a_session_is_refused_where_its_server_opens_none_or_none_so_large(peers):
    peer = peers.of("a")
    assert Admission(peers, 2, 7, in_session=True).refusal(A, Span(0, 4)) is None
    peer.limits.learn_per_session(TOO_LONG, 2, 7)
    assert isinstance(Admission(peers, 2, 7, in_session=True).refusal(A, Span(0, 4)), RequestTooLargeError)
    assert Admission(peers, 1, 7, in_session=True).refusal(A, Span(0, 4)) is None, "limits are known by rows"
    peer.cache.on_incompatible("its sessions have another layout")
    error = Admission(peers, 1, 7, in_session=True).refusal(A, Span(2, 8))
    assert isinstance(error, MissingBlocksError) and error.missing == ((2, 4),)
    assert "no server of blocks 2:4 opens a session for this client" in str(error)


def test_a_session_that_never_had_room_is_refused_after_half_a_minute_of_asking():
    now = 1000.0
    peers = PeerBook(settings(), Runtime(monotonic=lambda: now))
    cache, admission = peers.of("a").cache, Admission(peers, 2, 7, in_session=True)
    cache.observe_free(30)  # of 56 that it needs
    while now < 1031:
        assert admission.refusal(A, Span(0, 4)) is None
        cache.on_full(56, FULL)
        now += 1
    with pytest.raises(
        RequestTooLargeError, match=r"56 tokens .* 30 are the most .* with a smaller max_length or batch"
    ):
        raise admission.refusal(A, Span(0, 4))
    assert admission.refusal(A, Span(0, 2)) is None, "of two blocks it would fit"


def test_a_session_waits_for_room_for_all_its_rows(peers):
    peers.of("a").cache.on_full(2 * 7 * 4, FULL)
    assert not Admission(peers, 2, 7, in_session=True).is_ready(A, Span(0, 4))
    assert Admission(peers, 1, 7, in_session=True).is_ready(A, Span(0, 4))
    assert "out of memory" in Admission(peers, 2, 7, in_session=True).wait(A, Span(0, 4)).why


# -- queues


def test_first_come_is_first_served_and_queues_before_other_blocks_do_not_wait():
    queues, order, left = AdmissionQueues(), [], []
    queues.listeners.add(lambda: left.append(queues.waiting))

    async def enter(name: str, block: int, seconds: float) -> None:
        async with queues.turn(block):
            order.append(name)
            await asyncio.sleep(seconds)

    async def everything(runtime):
        tasks = [asyncio.create_task(enter(name, 0, 1.0)) for name in "abc"]
        tasks.append(asyncio.create_task(enter("other", 3, 0.1)))
        await asyncio.sleep(0.01)
        lengths = queues.length(0), queues.length(3), queues.length(7), queues.waiting
        await asyncio.gather(*tasks)
        return lengths

    lengths, seconds = run_in_virtual_time(everything)
    assert lengths == (3, 1, 0, 4)
    assert order == ["a", "other", "b", "c"]
    assert left == [3, 2, 1, 0]
    assert 3.0 <= seconds < 3.1
    assert queues.length(0) == queues.waiting == 0 and not queues._queues, "no queue is kept that nobody waits in"


def test_one_that_is_cancelled_leaves_the_queue():
    async def everything(runtime):
        queues = AdmissionQueues()

        async def enter(seconds: float) -> float:
            async with queues.turn(0):
                await asyncio.sleep(seconds)
            return runtime.monotonic()

        first, second, third = (asyncio.create_task(enter(seconds)) for seconds in (2.0, 3600.0, 0.0))
        await asyncio.sleep(1.0)
        second.cancel()
        await asyncio.sleep(0)
        assert queues.length(0) == 2
        return await first, await third

    assert run_in_virtual_time(everything)[0] == (2.0, 2.0)


def test_whoever_waits_for_capacity_hears_of_the_next_call_that_ends_and_waits_no_longer_than_told():
    async def everything(runtime):
        queues = AdmissionQueues()

        async def wait(timeout: float) -> float:
            await queues.wait_for_capacity(timeout)
            return runtime.monotonic()

        waiting = [asyncio.create_task(wait(timeout)) for timeout in (1.0, 60.0, 60.0)]
        await asyncio.sleep(2.0)
        queues.notify_capacity()
        woken = await asyncio.gather(*waiting)
        return [*woken, await wait(5.0)]

    assert run_in_virtual_time(everything)[0] == [1.0, 2.0, 2.0, 7.0]
