"""How far the making of micro-batches runs ahead of the servers, and what comes back. No network."""

import asyncio
import time

import pytest
import torch

from petals_eval.errors import SwarmError
from petals_eval.simulator.virtual_time import run_in_virtual_time
from petals_eval.swarm.event_loop import EventLoop
from petals_eval.swarm.micro_batch import Computed, Failed, Work
from petals_eval.swarm.peers.window import WindowPolicy
from petals_eval.swarm.stream import BlockingStream, MicroBatchStream, StreamPolicy
from petals_eval.swarm.wire.span import Span
from tests.support.fake_swarm import FakeDirectory, FakeTransport, pipeline, server

MIN_CALLS, POLICY = WindowPolicy.min_calls, StreamPolicy()
SERVERS = server("first", 0, 1), server("second", 1, 2)


class HeldUpTransport(FakeTransport):
    """Answers of one server wait until they are let go."""

    def __init__(self, held_up: str):
        super().__init__()
        self.held_up = held_up
        self.let_go = asyncio.Event()

    async def call(self, hop, activations, *, lossless=False):
        if hop.peer_id == self.held_up and not lossless:
            await self.let_go.wait()
        return await super().call(hop, activations, lossless=lossless)

    def done_by(self, peer_id: str) -> int:
        return sum(call.peer_id == peer_id for call in self.calls)


async def nothing() -> None:
    """There is nothing to close."""


@pytest.fixture
def loop():
    loop = EventLoop("stream")
    yield loop
    loop.close(nothing)


def stream_over(loop: EventLoop, transport: FakeTransport, window: int | None = None) -> BlockingStream[int]:
    """Two servers in a row: `first` holds blocks 0:1, `second` 1:2."""
    pipe = pipeline(FakeDirectory(2, *SERVERS), transport, deadline=60.0)
    return BlockingStream(loop, pipe, Span(0, 2), window)


def send_all(stream: BlockingStream[int], most: int) -> int:
    """Make micro-batches as a stream does, until there has been no room for half a second."""
    sent, since = 0, time.monotonic()
    while sent < most and time.monotonic() - since < 0.5:
        if stream.has_room():
            stream.send(Work(sent, torch.zeros(1, 2, 4), None))
            sent, since = sent + 1, time.monotonic()
        else:
            stream.next(0.05, _raise)
    return sent


def _raise(failure):
    raise failure.error


def test_few_are_made_ahead_of_the_first_server(loop):
    stream = stream_over(loop, HeldUpTransport("first"))
    assert send_all(stream, 100) == MIN_CALLS + POLICY.max_queued_first
    stream.close()


def test_the_first_server_goes_on_while_the_second_falls_behind(loop):
    transport = HeldUpTransport("second")
    stream = stream_over(loop, transport)
    sent = send_all(stream, 200)
    assert transport.done_by("first") == sent >= MIN_CALLS + POLICY.max_queued_total
    assert sent <= MIN_CALLS + 2 * POLICY.max_queued_total  # with those in flight at the first: memory is bounded
    stream.close()


def test_the_making_goes_on_when_a_line_gets_shorter(loop):
    transport = HeldUpTransport("second")
    stream = stream_over(loop, transport)
    sent = send_all(stream, 100)
    loop.run(_set, transport.let_go)
    assert send_all(stream, 100 - sent) == 100 - sent
    stream.close()


async def _set(event: asyncio.Event) -> None:
    event.set()


def test_a_window_set_by_hand_is_all_that_counts(loop):
    stream = stream_over(loop, HeldUpTransport("second"), window=3)
    assert send_all(stream, 100) == stream.in_flight == 3
    stream.close()


def test_what_fails_is_told_with_its_tag_and_the_rest_comes_back(loop):
    stream, failed, found = stream_over(loop, FakeTransport()), [], []
    for number in range(3):
        prompts = torch.ones(1, 1, 1, 4) if number == 1 else None  # one is missing
        stream.send(Work(number, torch.zeros(1, 2, 4), prompts))
    end = time.monotonic() + 10
    while stream.in_flight and time.monotonic() < end:
        found += stream.next(0.05, failed.append)
    assert [type(each) for each in failed] == [Failed] and failed[0].tag == 1
    assert isinstance(failed[0].error, ValueError)
    assert sorted(each.tag for each in found) == [0, 2]
    stream.close()


def test_a_connection_that_ends_ends_the_waiting(loop):
    stream = stream_over(loop, HeldUpTransport("first"))
    send_all(stream, 1)
    loop.run(_give_up, loop)
    with pytest.raises(SwarmError, match="the daemon died"):
        while True:
            stream.next(5.0, _raise)


async def _give_up(loop: EventLoop) -> None:
    loop.give_up("the daemon died")


@pytest.mark.parametrize(
    ("policy", "made"),
    [
        (StreamPolicy(max_micro_batches=7, max_queued_first=100, max_queued_total=100), 7),
        (StreamPolicy(max_bytes=3 * 32, max_queued_first=100, max_queued_total=100), 3),
        (StreamPolicy(max_bytes=1, max_queued_first=100, max_queued_total=100), 1),  # one must always do
    ],
    ids=["micro-batches", "bytes", "one"],
)
def test_memory_is_bounded_whatever_the_servers_take(policy, made):
    """In virtual time: nothing is back before the first call's second is over."""

    async def everything(runtime):
        transport = FakeTransport(seconds=1.0)
        pipe = pipeline(FakeDirectory(2, *SERVERS), transport, runtime=runtime, deadline=600, window=100)
        back: asyncio.Queue = asyncio.Queue()
        stream = MicroBatchStream(pipe, Span(0, 2), None, back.put_nowait, policy)
        running = asyncio.create_task(stream.run())
        await asyncio.sleep(0.1)
        sent = 0
        while stream.has_room():
            stream.send(Work(sent, torch.zeros(1, 2, 4), None))  # 32 bytes
            sent += 1
        while stream.in_flight:
            if (returned := await back.get()) is not None:
                assert isinstance(stream.take(returned), Computed)
        assert stream.has_room()
        running.cancel()
        return sent

    assert run_in_virtual_time(everything)[0] == made


def test_what_is_in_flight_ends_with_its_stream():
    async def everything(runtime):
        transport = HeldUpTransport("second")
        pipe = pipeline(FakeDirectory(2, *SERVERS), transport, runtime=runtime, deadline=600)
        stream = MicroBatchStream(pipe, Span(0, 2), None, lambda returned: None)
        running = asyncio.create_task(stream.run())
        await asyncio.sleep(0)
        for number in range(5):
            stream.send(Work(number, torch.zeros(1, 2, 4), None))
        await asyncio.sleep(1)
        in_flight = pipe.peers.of("second").tokens_in_flight
        running.cancel()
        await asyncio.sleep(1)
        assert not pipe.queues.listeners
        return in_flight, pipe.peers.of("second").tokens_in_flight, pipe.peers.of("second").window.in_flight

    (before, after, work), _ = run_in_virtual_time(everything)
    assert before == MIN_CALLS * 2 and after == work == 0
