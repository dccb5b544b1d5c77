"""The whole pipeline in virtual time: streams, windows, retries and audits under a clock of the test's own."""

import asyncio
import time

import torch

from petals_eval.errors import PeerUnreachableError
from petals_eval.simulator.virtual_time import run_in_virtual_time
from petals_eval.swarm.micro_batch import Computed, Work
from petals_eval.swarm.stream import MicroBatchStream, Returned
from petals_eval.swarm.wire.span import Span
from tests.support.fake_swarm import FakeDirectory, FakeTransport, ResidualBlocks, pipeline, server

SECONDS = 0.25  # that a call takes
MICRO_BATCHES = 200


def simulate(*, seed=0, fails=(), until=100, **values):
    """Stream micro-batches through two pairs of replicas, from a producer in the same loop."""
    transport = FakeTransport(ResidualBlocks(8), seconds=SECONDS)
    servers = [server(name, start, start + 2) for name, start in (("a", 0), ("b", 0), ("c", 2), ("d", 2))]

    def fail(hop, hidden):
        if hop.peer_id in fails and len(transport.calls) < until:
            raise PeerUnreachableError("it fails at first")

    transport.on_call = fail

    async def everything(runtime):
        pipe = pipeline(FakeDirectory(4, *servers), transport, runtime=runtime, deadline=600, **values)
        back: asyncio.Queue[Returned | None] = asyncio.Queue()
        stream = MicroBatchStream(pipe, Span(0, 4), None, back.put_nowait)
        running = asyncio.create_task(stream.run())
        await asyncio.sleep(0)
        found, sent = [], 0
        while len(found) < MICRO_BATCHES:
            if sent < MICRO_BATCHES and stream.has_room():
                stream.send(Work(sent, torch.full((1, 4, 8), float(sent + 1)), None))
                sent += 1
            elif (returned := await back.get()) is not None:
                found.append(stream.take(returned))
        running.cancel()
        await pipe.audit.settle()
        return found, pipe.status(), pipe.audit.progress()

    return run_in_virtual_time(everything, seed=seed)


def test_a_stream_of_minutes_takes_a_moment():
    began = time.perf_counter()
    (found, status, _), seconds = simulate()
    assert sorted(each.tag for each in found) == list(range(MICRO_BATCHES))
    assert all(isinstance(each, Computed) for each in found)
    assert status.retries == 0
    assert seconds >= SECONDS * 2  # each goes through two servers
    assert time.perf_counter() - began < seconds + 10


def test_the_same_seed_gives_the_same_run():
    one, other = (simulate(seed=3, verify=0.2) for _ in range(2))
    assert one[1] == other[1]
    assert [each.tag for each in one[0][0]] == [each.tag for each in other[0][0]]
    assert one[0][2] == other[0][2]
    assert one[0][2].done > 10


def test_failures_back_off_by_the_clock_that_was_handed_in():
    (found, status, _), seconds = simulate(fails={"a", "b"}, until=30, min_backoff=5, max_backoff=60)
    assert sorted(each.tag for each in found) == list(range(MICRO_BATCHES))
    assert status.retries > 0
    assert seconds > simulate()[1] + 5, "nobody else holds their blocks"
