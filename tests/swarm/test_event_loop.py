"""The loop that a synchronous caller waits for: refused from within, given up with a reason, and ended."""

import asyncio
import threading

import pytest

from petals_eval.errors import SwarmError
from petals_eval.swarm.event_loop import EventLoop


async def nothing() -> None:
    """It is done at once."""


class Sleeper:
    """Something that takes long."""

    def __init__(self) -> None:
        self.has_begun, self.has_ended = threading.Event(), threading.Event()

    async def sleep(self) -> None:
        self.has_begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            self.has_ended.set()


@pytest.fixture
def loop():
    loop = EventLoop("tested")
    yield loop
    loop.close(nothing)


def test_the_loop_refuses_to_wait_for_itself(loop):
    async def inside():
        return loop.run(nothing)

    with pytest.raises(RuntimeError, match="event loop thread"):
        loop.run(inside)


def test_whatever_runs_fails_with_the_reason_when_the_loop_is_given_up(loop):
    async def give_up() -> None:
        loop.give_up("the daemon has ended")

    under_way = Sleeper()
    future = loop.start(under_way.sleep)
    assert under_way.has_begun.wait(5)
    loop.run(give_up)
    with pytest.raises(SwarmError, match="the daemon has ended"):
        future.result(5)
    with pytest.raises(SwarmError, match="the daemon has ended"):
        loop.run(nothing)


def test_a_future_that_is_cancelled_cancels_what_runs(loop):
    under_way = Sleeper()
    future = loop.start(under_way.sleep)
    assert under_way.has_begun.wait(5)
    future.cancel()
    assert under_way.has_ended.wait(5)


def test_closing_ends_the_thread_and_what_runs_in_the_background_and_runs_the_last_thing():
    threads = threading.active_count()
    loop = EventLoop("tested")
    background, ran = Sleeper(), []

    async def last() -> None:
        ran.append("last")

    loop.start_background(background.sleep)
    assert background.has_begun.wait(5)
    loop.close(last)
    loop.close(last)
    assert ran == ["last"]
    assert background.has_ended.is_set()
    assert threading.active_count() <= threads
    with pytest.raises(SwarmError, match="closed"):
        loop.run(nothing)
