"""How far the making of micro-batches runs ahead of the servers. No network."""

import asyncio
import time
from types import SimpleNamespace

import pytest
import torch
from anyio.from_thread import BlockingPortal, start_blocking_portal

from petals_eval.swarm.peers.window import LEAST_CALLS
from petals_eval.swarm.stream import AHEAD, MOST_WAITING, Flight, Work
from tests.swarm.fakes import FakeCalls, FakeDirectory, pipeline, server


class HeldUpCalls(FakeCalls):
    """Answers of one server wait until they are let go."""

    def __init__(self, held_up: str):
        super().__init__()
        self.held_up = held_up
        self.let_go = asyncio.Event()

    async def forward(self, hop, hidden, prompts, **options):
        if hop.server.peer_id == self.held_up:
            await self.let_go.wait()
        return await super().forward(hop, hidden, prompts, **options)

    def done_by(self, peer_id: str) -> int:
        return sum(call[0] == peer_id for call in self.calls)


@pytest.fixture
def loop():
    with start_blocking_portal("asyncio", name="flight") as portal:
        yield portal
        portal.call(portal.stop, True)


def flight_over(loop: BlockingPortal, calls: FakeCalls) -> Flight[int]:
    """Two servers in a row: `first` holds blocks 0:1, `second` 1:2."""
    directory = FakeDirectory(2, server("first", 0, 1), server("second", 1, 2))
    connection = SimpleNamespace(start=loop.start_task_soon)
    return Flight(connection, pipeline(directory, calls, deadline=60.0), 0, 2, None)


def send_all(flight: Flight[int], most: int) -> int:
    """Make micro-batches as a stream does, until there has been no room for half a second."""
    sent, since = 0, time.monotonic()
    while sent < most and time.monotonic() - since < 0.5:
        if flight.has_room():
            flight.send(Work(sent, torch.zeros(1, 2, 4), None))
            sent, since = sent + 1, time.monotonic()
        else:
            flight.next(0.05, _raise)
    return sent


def _raise(failure):
    raise failure.error


def test_few_are_made_ahead_of_the_first_server(loop):
    calls = HeldUpCalls("first")
    flight = flight_over(loop, calls)
    assert send_all(flight, 100) == LEAST_CALLS + AHEAD
    flight.close()


def test_the_first_server_goes_on_while_the_second_falls_behind(loop):
    calls = HeldUpCalls("second")
    flight = flight_over(loop, calls)
    sent = send_all(flight, 200)
    assert calls.done_by("first") == sent >= LEAST_CALLS + MOST_WAITING
    assert sent <= LEAST_CALLS + 2 * MOST_WAITING  # with those that were in flight at the first: memory is bounded
    flight.close()


def test_the_making_goes_on_when_a_line_gets_shorter(loop):
    calls = HeldUpCalls("second")
    flight = flight_over(loop, calls)
    sent = send_all(flight, 100)
    loop.start_task_soon(_set, calls.let_go).result(5.0)
    assert send_all(flight, 100 - sent) == 100 - sent
    flight.close()


async def _set(event: asyncio.Event) -> None:
    event.set()
