"""The way of a micro-batch: hops, failures, waiting, deadlines, stragglers. No network."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest
import torch

from petals_eval.errors import DeadlineError, MissingBlocksError, PeerRefusedError, PeerUnreachableError
from petals_eval.simulator.virtual_time import run_in_virtual_time
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.pipeline import Pipeline, ServedHop
from petals_eval.swarm.runtime import Runtime
from petals_eval.swarm.wire.records import Snapshot
from petals_eval.swarm.wire.span import Span
from tests.support.fake_swarm import FakeDirectory, FakeTransport, forward, pipeline, run, server

T = TypeVar("T")
HIDDEN = torch.zeros(2, 3, 4)


def simulate(
    directory: FakeDirectory, transport: FakeTransport, go: Callable[[Pipeline], Awaitable[T]], **values: object
) -> tuple[T, Pipeline]:
    """Run `go` over a pipeline in virtual time; return what it returns, and the pipeline."""

    async def everything(runtime: Runtime) -> tuple[T, Pipeline]:
        pipe = pipeline(directory, transport, runtime=runtime, **values)
        return await go(pipe), pipe

    return run_in_virtual_time(everything)[0]


async def forward_hidden(pipe: Pipeline) -> tuple[torch.Tensor, tuple[ServedHop, ...]]:
    return await forward(pipe, HIDDEN)


def test_every_block_runs_once_and_in_order():
    transport = FakeTransport()
    servers = server("a", 0, 2, version="2.2.0"), server("b", 2, 4, quant_type="nf4")
    hidden, hops = run(pipeline(FakeDirectory(4, *servers), transport), HIDDEN)
    assert torch.equal(hidden, torch.full_like(HIDDEN, 1111.0))
    assert hops == (
        ServedHop("a", Span(0, 2), "2.2.0", "float32", None),
        ServedHop("b", Span(2, 4), None, "float32", "nf4"),
    )
    assert [(call.peer_id, call.span) for call in transport.calls] == [("a", Span(0, 2)), ("b", Span(2, 4))]


def test_overlapping_spans_run_no_block_twice():
    hidden, _ = run(pipeline(FakeDirectory(4, server("a", 0, 3), server("b", 1, 4)), FakeTransport()), HIDDEN)
    assert torch.equal(hidden, torch.full_like(HIDDEN, 1111.0))


def test_a_slice_runs_its_blocks_alone():
    hidden, _ = run(pipeline(FakeDirectory(4, server("a", 0, 4)), FakeTransport()), HIDDEN, start=1, stop=3)
    assert torch.equal(hidden, torch.full_like(HIDDEN, 110.0))


def test_deep_prompts_are_sliced_per_span():
    prompts = torch.arange(4.0)[:, None, None, None] * torch.ones(4, 1, 1, 1)  # block b: prompt b
    hidden, _ = run(
        pipeline(FakeDirectory(4, server("a", 0, 3), server("b", 3, 4)), FakeTransport()), HIDDEN, prompts=prompts
    )
    assert torch.equal(hidden, torch.full_like(HIDDEN, 1 * 1 + 2 * 10 + 3 * 100 + 4 * 1000.0))


def test_a_failed_server_is_left_at_once_and_its_work_moves_on():
    transport = FakeTransport()

    def fail(hop: Hop, hidden: torch.Tensor) -> None:
        if hop.peer_id == "bad":
            raise PeerUnreachableError("gone")

    transport.on_call = fail
    pipe = pipeline(
        FakeDirectory(4, server("bad", 0, 4), server("a", 0, 2), server("b", 2, 4)), transport, min_backoff=30
    )
    hidden, hops = run(pipe, HIDDEN)
    assert torch.equal(hidden, torch.full_like(HIDDEN, 1111.0))
    assert [hop.peer_id for hop in hops] == ["a", "b"]
    assert [call.peer_id for call in transport.calls].count("bad") == 1
    assert pipe.peers.retries == 1


def test_work_goes_on_from_the_hop_that_failed():
    transport = FakeTransport()

    def fail_once(hop: Hop, hidden: torch.Tensor) -> None:
        if hop.span.start == 2 and sum(call.span.start == 2 for call in transport.calls) == 1:
            raise PeerUnreachableError("gone")

    transport.on_call = fail_once
    directory = FakeDirectory(4, server("a", 0, 2), server("b1", 2, 4), server("b2", 2, 4))
    hidden, _ = run(pipeline(directory, transport, min_backoff=30), HIDDEN)
    assert torch.equal(hidden, torch.full_like(HIDDEN, 1111.0))
    assert [call.span.start for call in transport.calls] == [0, 2, 2]


def test_missing_blocks_end_at_the_deadline_and_are_named():
    directory = FakeDirectory(8, server("a", 0, 3), server("b", 6, 8))
    with pytest.raises(
        MissingBlocksError, match=r"deadline \(0.3 s\): no server holds blocks 3:6 \(since .* 2 servers"
    ):
        simulate(directory, FakeTransport(), lambda pipe: forward(pipe, HIDDEN, stop=8))


def test_a_server_that_comes_back_ends_the_waiting():
    directory = FakeDirectory(4, server("a", 0, 2))

    def appear(directory: FakeDirectory) -> None:
        if directory.looks == 3:
            both = {one.peer_id: one for one in (server("a", 0, 2), server("b", 2, 4))}
            directory.snapshot = Snapshot(4, both)

    directory.on_refresh = appear
    (hidden, _), _ = simulate(directory, FakeTransport(), forward_hidden, deadline=5.0)
    assert torch.equal(hidden, torch.full_like(HIDDEN, 1111.0))


def test_servers_that_all_fail_end_at_the_deadline_with_their_reason():
    transport = FakeTransport()

    def fail(hop: Hop, hidden: torch.Tensor) -> None:
        raise PeerRefusedError("out of memory")

    transport.on_call = fail
    with pytest.raises(DeadlineError, match=r"every server of blocks 0:4 fails .*out of memory"):
        simulate(FakeDirectory(4, server("a", 0, 4)), transport, forward_hidden)
    assert 2 <= len(transport.calls) < 40  # tried again, each time after a longer while


def test_what_is_waited_for_can_be_seen():
    async def look(pipe: Pipeline) -> tuple[str | None, str | None]:
        task = asyncio.create_task(forward(pipe, HIDDEN, stop=2))
        await asyncio.sleep(0.1)
        waiting = pipe.status().waiting
        with pytest.raises(MissingBlocksError):
            await task
        return waiting, pipe.status().waiting

    during, after = simulate(FakeDirectory(2, server("a", 0, 1)), FakeTransport(), look, deadline=0.3)[0]
    assert "no server holds blocks 1:2" in (during or "")
    assert after is None


def test_servers_that_fail_in_turns_end_at_the_deadline_too():
    """Each is in good standing again by the time the other has failed."""
    transport = FakeTransport(seconds=0.05)  # longer than the backoff

    def fail(hop: Hop, hidden: torch.Tensor) -> None:
        raise PeerUnreachableError("gone")

    transport.on_call = fail
    directory = FakeDirectory(4, server("a", 0, 4), server("b", 0, 4))
    with pytest.raises(DeadlineError, match=r"every server of blocks 0:4 fails .*\.\.\.a: .*gone\); \.\.\.b: .*gone"):
        simulate(directory, transport, forward_hidden, max_backoff=0.01, deadline=1.0)
    assert {call.peer_id for call in transport.calls} == {"a", "b"}


@pytest.mark.parametrize("hook", ["on_call", "on_probe"])
def test_a_call_that_hangs_ends_at_the_deadline(hook):
    transport = FakeTransport()
    setattr(transport, hook, lambda hop, hidden: asyncio.sleep(60))

    async def until_then(pipe: Pipeline) -> float:
        with pytest.raises(DeadlineError, match=r"every server of blocks 0:4 fails .*\(nothing by the deadline\)"):
            await forward(pipe, HIDDEN)
        return asyncio.get_running_loop().time()

    assert 0.3 <= simulate(FakeDirectory(4, server("a", 0, 4)), transport, until_then)[0] < 0.4


def test_blocks_that_nobody_holds_and_blocks_whose_servers_fail_are_told_apart():
    transport = FakeTransport()

    def fail(hop: Hop, hidden: torch.Tensor) -> None:
        raise PeerUnreachableError("gone")

    transport.on_call = fail
    directory = FakeDirectory(6, server("a", 0, 2), server("b", 2, 4), server("c", 4, 6))

    def lose(directory: FakeDirectory) -> None:
        directory.snapshot = Snapshot(6, {"a": server("a", 0, 2), "b": server("b", 2, 4)})

    directory.on_refresh = lose
    with pytest.raises(
        MissingBlocksError, match=r"no server holds blocks 4:6 .*; every server of blocks 0:2 fails: \.\.\.a: .*gone\)$"
    ) as caught:
        simulate(directory, transport, lambda pipe: forward(pipe, HIDDEN, stop=6), min_backoff=30, max_backoff=30)
    assert caught.value.missing == ((4, 6),)


def test_a_server_that_failed_is_tried_with_one_micro_batch():
    transport = FakeTransport()
    tried = []

    def fail(hop: Hop, hidden: torch.Tensor) -> None:
        if hop.peer_id == "bad":
            tried.append(transport.in_flight)
            raise PeerUnreachableError("gone")

    transport.on_call = fail

    async def many(pipe: Pipeline) -> list[object]:
        return await asyncio.gather(*[forward(pipe, HIDDEN) for _ in range(8)], return_exceptions=True)

    results, _ = simulate(FakeDirectory(4, server("bad", 0, 4)), transport, many)
    assert all(isinstance(result, DeadlineError) for result in results)
    assert len(tried) > 9
    assert set(tried[8:]) == {1}, "after the first eight, which were in flight together, one at a time"


def test_a_stragglers_work_is_done_elsewhere_and_it_is_given_less():
    transport = FakeTransport()

    async def run_both(pipe: Pipeline) -> tuple[list[str], float]:
        held = asyncio.Event()
        while not all(pipe.peers.of(name).window.rate for name in "ab"):
            await asyncio.gather(*(forward(pipe, HIDDEN, stop=1) for _ in range(4)))
        transport.on_call = lambda hop, hidden: held.wait() if hop.peer_id == "a" else None
        started = asyncio.get_running_loop().time()
        done = await asyncio.gather(*(forward(pipe, HIDDEN, stop=1) for _ in range(8)))
        seconds = asyncio.get_running_loop().time() - started
        assert all(torch.equal(hidden, torch.ones_like(HIDDEN)) for hidden, _ in done)
        assert pipe.peers.of("a").overtaken > 0
        await asyncio.sleep(0.05)  # what was cancelled ends
        assert pipe.peers.of("a").tokens_in_flight == 0
        assert pipe.peers.retries == 0
        return [hops[0].peer_id for _, hops in done], seconds

    directory = FakeDirectory(1, server("a", 0, 1), server("b", 0, 1))
    (servers, seconds), _ = simulate(directory, transport, run_both, deadline=30.0)
    assert set(servers) == {"b"}
    assert seconds < 10


def hanging(transport: FakeTransport, *names: str) -> Callable[[Hop, torch.Tensor], object]:
    """What lets calls to these servers hang."""
    return lambda hop, hidden: asyncio.sleep(1e6) if hop.peer_id in names else None


def test_where_a_replica_hangs_or_fails_as_well_the_next_one_is_asked():
    transport = FakeTransport()

    async def after_all_were_measured(pipe: Pipeline) -> tuple[set[str], float]:
        while not all(pipe.peers.of(name).window.rate for name in "abcd"):
            await asyncio.gather(*(forward(pipe, HIDDEN, stop=1) for _ in range(8)))
        hung = hanging(transport, "a", "b")

        def on_call(hop: Hop, hidden: torch.Tensor) -> object:
            if hop.peer_id == "c":
                raise PeerUnreachableError("gone")
            return hung(hop, hidden)

        transport.on_call = on_call
        began = asyncio.get_running_loop().time()
        done = await asyncio.gather(*(forward(pipe, HIDDEN, stop=1) for _ in range(6)))
        return {hops[0].peer_id for _, hops in done}, asyncio.get_running_loop().time() - began

    servers = [server(name, 0, 1) for name in "abcd"]
    (served, seconds), _ = simulate(FakeDirectory(1, *servers), transport, after_all_were_measured, deadline=60.0)
    assert served == {"d"} and seconds < 10


def test_a_server_that_hangs_is_left_alone_for_longer_each_time():
    """Each micro-batch that it was given waited for it, and three times as long as the one before."""
    transport = FakeTransport()

    async def one_after_the_other(pipe: Pipeline) -> float:
        while not all(pipe.peers.of(name).window.rate for name in "ab"):
            await asyncio.gather(*(forward(pipe, HIDDEN, stop=1) for _ in range(4)))
        transport.on_call = hanging(transport, "a")
        longest = 0.0
        for _ in range(60):
            began = asyncio.get_running_loop().time()
            await asyncio.gather(*(forward(pipe, HIDDEN, stop=1) for _ in range(4)))
            longest = max(longest, asyncio.get_running_loop().time() - began)
        return longest

    directory = FakeDirectory(1, server("a", 0, 1), server("b", 0, 1))
    longest, pipe = simulate(
        directory, transport, one_after_the_other, deadline=600.0, min_backoff=1.0, max_backoff=60.0
    )
    assert longest < 10
    assert pipe.peers.of("a").overtaken < 30


def test_a_micro_batch_that_waits_its_turn_again_has_its_deadline_all_the_same():
    """With every failure it goes to the end of the queue, where each of the others waits for a server, too."""
    transport = FakeTransport()
    transport.down = {"a"}

    async def many(pipe: Pipeline) -> float:
        began = asyncio.get_running_loop().time()
        done, _ = await asyncio.wait(
            [asyncio.create_task(forward_hidden(pipe)) for _ in range(40)], return_when=asyncio.FIRST_COMPLETED
        )
        assert all(isinstance(each.exception(), DeadlineError) for each in done)
        return asyncio.get_running_loop().time() - began

    directory = FakeDirectory(4, server("a", 0, 4))
    seconds, _ = simulate(directory, transport, many, deadline=20.0, min_backoff=1.0, max_backoff=8.0)
    assert seconds == pytest.approx(20.0, abs=0.1)


def test_a_stragglers_answer_counts_where_nobody_else_holds_its_blocks():
    transport = FakeTransport()
    transport.on_call = lambda hop, hidden: asyncio.sleep(1.5) if len(transport.calls) > 3 else None

    async def several(pipe: Pipeline) -> list[str]:
        return [(await forward(pipe, HIDDEN, stop=1))[1][0].peer_id for _ in range(4)]

    served, pipe = simulate(FakeDirectory(1, server("a", 0, 1)), transport, several, deadline=30.0)
    assert served == ["a"] * 4
    assert pipe.peers.of("a").overtaken == 0


def test_a_server_that_speaks_of_its_cache_though_none_is_needed_fails_as_any_other():
    """It was asked again at once, thousands of times until the deadline, which then named no reason."""
    transport = FakeTransport()

    def refuse(hop: Hop, hidden: torch.Tensor) -> None:
        raise PeerRefusedError("Could not allocate 1073741824 bytes, max cache size = 1024 bytes, 1024 in use")

    transport.on_call = refuse
    with pytest.raises(DeadlineError, match=r"every server of blocks 0:4 fails .*refuses \(Could not allocate"):
        simulate(FakeDirectory(4, server("a", 0, 4)), transport, forward_hidden)
    assert len(transport.calls) < 20
