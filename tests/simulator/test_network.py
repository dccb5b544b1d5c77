"""Simulated connections, against what can be reckoned by hand."""

import asyncio

import pytest

from petals_eval.local_swarm.relays import MAX_QUEUE_SECONDS, Link
from petals_eval.simulator.network import STREAM_WINDOW_BYTES, Direction
from petals_eval.simulator.virtual_time import run_in_virtual_time

RATE = 1e6  # bytes a second


def arrivals(*sends, links=(RATE,), delay=0.05):
    """When each message arrives; sends: seconds at which it is sent, and its bytes."""

    async def carry(runtime):
        loop = asyncio.get_running_loop()
        there = Direction([Link(rate) for rate in links], delay)
        there.back = Direction([Link(None)], delay)
        found = {}
        for number, (at, nbytes) in enumerate(sends):

            def arrived(number=number):
                found[number] = loop.time()

            loop.call_at(at, there.send, nbytes, arrived)
        await asyncio.sleep(100)
        return [found[number] for number in range(len(sends))]

    return run_in_virtual_time(carry)[0]


def test_a_message_takes_its_bytes_and_the_delay():
    assert arrivals((0, 200_000)) == pytest.approx([0.25])


def test_a_free_link_takes_the_delay_alone():
    assert arrivals((0, 200_000), links=(None,)) == pytest.approx([0.05])


def test_what_is_sent_together_arrives_together():
    """But for the short queue before the link, which the first one fills."""
    first, last = arrivals((0, 200_000), (0, 200_000))
    assert (first, last) == (pytest.approx(0.45 - MAX_QUEUE_SECONDS, abs=0.02), pytest.approx(0.45))


def test_what_is_sent_one_after_the_other_arrives_so():
    assert arrivals((0, 200_000), (0.2, 200_000)) == pytest.approx([0.25, 0.45], rel=0.03)


def test_the_slowest_of_several_links_decides():
    assert arrivals((0, 200_000), links=(RATE, RATE / 2)) == pytest.approx([0.45], rel=0.05)


def test_a_message_above_the_stream_window_waits_a_round_trip():
    just_below, above = arrivals((0, STREAM_WINDOW_BYTES))[0], arrivals((0, STREAM_WINDOW_BYTES + 1000))[0]
    assert above - just_below == pytest.approx(0.1 + 0.001, rel=0.05)


def test_what_shares_a_link_shares_it_across_connections():
    async def carry(runtime):
        shared, loop = Link(RATE), asyncio.get_running_loop()
        found = []
        for _ in range(4):
            Direction([shared, Link(None)], 0.0).send(100_000, lambda: found.append(loop.time()))
        await asyncio.sleep(10)
        return found

    found = run_in_virtual_time(carry)[0]
    assert found[1:] == pytest.approx([0.4] * 3, rel=0.1)
    assert found[0] > 0.2, "whoever was there first has the short queue before the link to itself"
