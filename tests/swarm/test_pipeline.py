"""The way of a micro-batch: hops, failures, waiting, deadlines, splitting. No network."""

import asyncio
import math
import time

import pytest
import torch

from petals_eval.errors import (
    DeadlineError,
    MissingBlocksError,
    PeerAnswerError,
    PeerCacheFullError,
    PeerRefusedError,
    PeerUnreachableError,
    RequestTooLargeError,
)
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.pipeline import ServedHop
from petals_eval.swarm.wire.records import Snapshot
from tests.swarm.fakes import FakeCalls, FakeDirectory, pipeline, server, set_pace

HIDDEN = torch.zeros(2, 3, 4)


def run(pipe, hidden=HIDDEN, prompts=None, first=0, last=4):
    return asyncio.run(pipe.forward(hidden, prompts, first, last))


def test_every_block_runs_once_and_in_order():
    calls = FakeCalls()
    servers = server("a", 0, 2, version="2.2.0"), server("b", 2, 4, quant_type="nf4")
    hidden, hops = run(pipeline(FakeDirectory(4, *servers), calls))
    assert torch.equal(hidden, torch.full_like(HIDDEN, 1111.0))
    assert hops == (ServedHop("a", 0, 2, "2.2.0", "float32", None), ServedHop("b", 2, 4, None, "float32", "nf4"))
    assert [call[:3] for call in calls.calls] == [("a", 0, 2), ("b", 2, 4)]


def test_overlapping_spans_run_no_block_twice():
    hidden, _ = run(pipeline(FakeDirectory(4, server("a", 0, 3), server("b", 1, 4)), FakeCalls()))
    assert torch.equal(hidden, torch.full_like(HIDDEN, 1111.0))


def test_a_slice_runs_its_blocks_alone():
    hidden, _ = run(pipeline(FakeDirectory(4, server("a", 0, 4)), FakeCalls()), first=1, last=3)
    assert torch.equal(hidden, torch.full_like(HIDDEN, 110.0))


def test_deep_prompts_are_sliced_per_span():
    prompts = torch.arange(4.0)[:, None, None, None] * torch.ones(4, 1, 1, 1)  # block b: prompt b
    calls = FakeCalls()
    hidden, _ = run(pipeline(FakeDirectory(4, server("a", 0, 3), server("b", 3, 4)), calls), prompts=prompts)
    assert torch.equal(hidden, torch.full_like(HIDDEN, 1 * 1 + 2 * 10 + 3 * 100 + 4 * 1000.0))


def test_prompts_per_row_follow_their_rows_when_a_batch_is_split():
    hidden = torch.zeros(4, 2, 1)
    prompts = torch.arange(4.0)[None, :, None, None]
    answer, _ = run(
        pipeline(FakeDirectory(1, server("a", 0, 1)), FakeCalls(), max_tokens_per_call=2), hidden, prompts, 0, 1
    )
    assert answer[:, 0, 0].tolist() == [1.0, 2.0, 3.0, 4.0]


def test_a_failed_server_is_left_at_once_and_its_work_moves_on():
    calls = FakeCalls()

    def fail(hop: Hop, hidden: torch.Tensor) -> None:
        if hop.server.peer_id == "bad":
            raise PeerUnreachableError("gone")

    calls.on_call = fail
    pipe = pipeline(FakeDirectory(4, server("bad", 0, 4), server("a", 0, 2), server("b", 2, 4)), calls, min_backoff=30)
    hidden, hops = run(pipe)
    assert torch.equal(hidden, torch.full_like(HIDDEN, 1111.0))
    assert [hop.peer_id for hop in hops] == ["a", "b"]
    assert [call[0] for call in calls.calls].count("bad") == 1
    assert pipe.peers.retries == 1


def test_a_server_that_failed_is_asked_anew_what_it_is():
    """It may come back in another dtype: held to what it said before, it would answer wrongly for ever."""
    calls = FakeCalls()

    def change(hop: Hop, hidden: torch.Tensor) -> None:
        if not calls.forgotten:
            raise PeerAnswerError("expected float32, found bfloat16")

    calls.on_call = change
    run(pipeline(FakeDirectory(4, server("a", 0, 4)), calls))
    assert calls.forgotten == ["a"]


def test_work_goes_on_from_the_hop_that_failed():
    calls = FakeCalls()

    def fail_once(hop: Hop, hidden: torch.Tensor) -> None:
        if hop.first == 2 and sum(call[1] == 2 for call in calls.calls) == 1:
            raise PeerUnreachableError("gone")

    calls.on_call = fail_once
    directory = FakeDirectory(4, server("a", 0, 2), server("b1", 2, 4), server("b2", 2, 4))
    hidden, _ = run(pipeline(directory, calls, min_backoff=30))
    assert torch.equal(hidden, torch.full_like(HIDDEN, 1111.0))
    assert [call[1] for call in calls.calls] == [0, 2, 2]


def test_missing_blocks_end_at_the_deadline_and_are_named():
    pipe = pipeline(FakeDirectory(8, server("a", 0, 3), server("b", 6, 8)), FakeCalls())
    with pytest.raises(
        MissingBlocksError, match=r"deadline \(0.3 s\): no server holds blocks 3:6 \(since .* 2 servers"
    ):
        run(pipe, last=8)


def test_a_server_that_comes_back_ends_the_waiting():
    directory = FakeDirectory(4, server("a", 0, 2))

    def appear(directory: FakeDirectory) -> None:
        if directory.looks == 3:
            both = {one.peer_id: one for one in (server("a", 0, 2), server("b", 2, 4))}
            directory.snapshot = Snapshot(4, both)

    directory.on_look = appear
    hidden, _ = run(pipeline(directory, FakeCalls(), deadline=5.0))
    assert torch.equal(hidden, torch.full_like(HIDDEN, 1111.0))


def test_servers_that_all_fail_end_at_the_deadline_with_their_reason():
    calls = FakeCalls()

    def fail(hop: Hop, hidden: torch.Tensor) -> None:
        raise PeerRefusedError("out of memory")

    calls.on_call = fail
    pipe = pipeline(FakeDirectory(4, server("a", 0, 4)), calls)
    with pytest.raises(DeadlineError, match=r"every server of blocks 0:4 fails .*out of memory"):
        run(pipe)
    assert 2 <= len(calls.calls) < 40  # tried again, each time after a longer while


def test_what_is_waited_for_can_be_seen():
    pipe = pipeline(FakeDirectory(2, server("a", 0, 1)), FakeCalls(), deadline=0.3)

    async def look() -> str | None:
        task = asyncio.create_task(pipe.forward(HIDDEN, None, 0, 2))
        await asyncio.sleep(0.1)
        waiting = pipe.status().waiting
        with pytest.raises(MissingBlocksError):
            await task
        return waiting

    assert "no server holds blocks 1:2" in (asyncio.run(look()) or "")
    assert pipe.status().waiting is None


def test_batches_are_split_below_the_token_limit_and_travel_together():
    calls = FakeCalls()
    hidden = torch.arange(10.0)[:, None, None].expand(10, 3, 4)
    answer, _ = run(pipeline(FakeDirectory(4, server("a", 0, 4)), calls, max_tokens_per_call=9), hidden)
    assert torch.equal(answer, hidden + 1111.0)
    assert [call[3][0] for call in calls.calls] == [3, 3, 3, 1]
    assert calls.most_in_flight == 4


def test_a_servers_own_limit_is_learnt_from_its_refusal_and_is_no_failure():
    calls = FakeCalls()

    def refuse(hop: Hop, hidden: torch.Tensor) -> None:
        if math.prod(hidden.shape[:2]) > 6:
            raise PeerRefusedError("ValueError('Task size greater than max_batch_size (6), it can\\'t be processed')")

    calls.on_call = refuse
    pipe = pipeline(FakeDirectory(4, server("a", 0, 4)), calls)
    hidden = torch.zeros(5, 3, 4)
    answer, _ = run(pipe, hidden)
    assert torch.equal(answer, hidden + 1111.0)
    assert pipe.peers.retries == 0
    assert [call[3][0] for call in calls.calls] == [5, 2, 2, 1]


def test_rows_above_the_limit_go_in_steps_one_session_at_a_time():
    calls = FakeCalls()
    hidden = torch.arange(3.0)[:, None, None].expand(3, 7, 4)
    prompts = torch.arange(3.0)[None, :, None, None] * torch.ones(4, 1, 1, 1)
    answer, _ = run(pipeline(FakeDirectory(4, server("a", 0, 4)), calls, max_tokens_per_call=3), hidden, prompts)
    assert torch.equal(answer, hidden + 1111.0 * torch.arange(1.0, 4.0)[:, None, None])
    assert calls.in_steps == [("a", (1, 7, 4), 3)] * 3
    assert calls.most_sessions == 1


def test_a_limit_learnt_from_a_refusal_leads_to_steps():
    calls = FakeCalls()

    def refuse(hop: Hop, hidden: torch.Tensor) -> None:
        if not calls.sessions:
            raise PeerRefusedError("ValueError('Task size greater than max_batch_size (2), it can\\'t be processed')")

    calls.on_call = refuse
    pipe = pipeline(FakeDirectory(4, server("a", 0, 4)), calls)
    answer, _ = run(pipe)
    assert torch.equal(answer, HIDDEN + 1111.0)
    assert calls.in_steps == [("a", (1, 3, 4), 2)] * 2
    assert pipe.peers.retries == 0


@pytest.mark.parametrize(
    ("refusal", "cache"),
    [
        ("Failed to call handler: Cannot allocate KV cache for 7 tokens, max = 5", 5),
        ("Could not allocate 7000 bytes, max cache size = 4200 bytes", 4),
    ],
)
def test_rows_too_long_for_every_server_fail_at_once_with_both_numbers(refusal, cache):
    calls = FakeCalls()

    def refuse(hop: Hop, hidden: torch.Tensor) -> None:
        raise PeerRefusedError(refusal)

    calls.on_session = refuse
    pipe = pipeline(FakeDirectory(4, server("a", 0, 4), server("b", 0, 4)), calls, max_tokens_per_call=3, deadline=60)
    hidden = torch.zeros(2, 7, 4)
    text = rf"holds 7 tokens .*, but server \.\.\.[ab] takes 3 in one call and has a cache for {cache} "
    for _ in range(2):
        with pytest.raises(RequestTooLargeError, match=text):
            run(pipe, hidden)
    assert sorted(name for name, *_ in calls.in_steps) == ["a", "b"]  # each asked once, and no more
    assert pipe.peers.retries == 0


def test_a_row_too_long_for_one_server_goes_to_another():
    calls = FakeCalls()

    def refuse(hop: Hop, hidden: torch.Tensor) -> None:
        if hop.server.peer_id == "small":
            raise PeerRefusedError("Cannot allocate KV cache for 7 tokens, max = 5")

    calls.on_session = refuse
    pipe = pipeline(
        FakeDirectory(4, server("small", 0, 4), server("b", 0, 2), server("c", 2, 4)), calls, max_tokens_per_call=3
    )
    answer, hops = run(pipe, torch.zeros(1, 7, 4))
    assert torch.equal(answer, torch.full((1, 7, 4), 1111.0))
    assert [hop.peer_id for hop in hops] == ["b", "c"]
    assert pipe.peers.retries == 0
    _, hops = run(pipe, torch.zeros(1, 3, 4))  # what it takes in one call still goes there
    assert [hop.peer_id for hop in hops] == ["small"]


def test_a_cache_that_is_full_for_the_moment_is_waited_for():
    calls = FakeCalls()

    def refuse(hop: Hop, hidden: torch.Tensor) -> None:
        if len(calls.in_steps) < 3:
            raise PeerCacheFullError("Could not allocate 7000 bytes immediately: out of memory")

    calls.on_session = refuse
    pipe = pipeline(FakeDirectory(4, server("a", 0, 4)), calls, max_tokens_per_call=3, deadline=5)
    answer, _ = run(pipe, torch.zeros(1, 7, 4))
    assert torch.equal(answer, torch.full((1, 7, 4), 1111.0))
    assert len(calls.in_steps) == 3
    assert pipe.peers.retries == 0, "no failure of the server"


def test_servers_that_fail_in_turns_end_at_the_deadline_too():
    """Each is in good standing again by the time the other has failed."""
    calls = FakeCalls()

    def fail(hop: Hop, hidden: torch.Tensor) -> None:
        time.sleep(0.05)  # longer than the backoff
        raise PeerUnreachableError("gone")

    calls.on_call = fail
    pipe = pipeline(FakeDirectory(4, server("a", 0, 4), server("b", 0, 4)), calls, max_backoff=0.01, deadline=0.3)
    with pytest.raises(DeadlineError, match=r"every server of blocks 0:4 fails .*\.\.\.a: .*gone\); \.\.\.b: .*gone"):
        run(pipe)
    assert {call[0] for call in calls.calls} == {"a", "b"}


def test_a_call_that_hangs_ends_at_the_deadline():
    class Hanging(FakeCalls):
        async def forward(self, hop, hidden, prompts, *, lossless=False):
            await asyncio.sleep(60)

    started = time.monotonic()
    with pytest.raises(DeadlineError, match=r"every server of blocks 0:4 fails .*\(nothing by the deadline\)"):
        run(pipeline(FakeDirectory(4, server("a", 0, 4)), Hanging()))
    assert 0.3 <= time.monotonic() - started < 5


def test_blocks_that_nobody_holds_and_blocks_whose_servers_fail_are_told_apart():
    calls = FakeCalls()

    def fail(hop: Hop, hidden: torch.Tensor) -> None:
        raise PeerUnreachableError("gone")

    calls.on_call = fail
    directory = FakeDirectory(6, server("a", 0, 2), server("b", 2, 4), server("c", 4, 6))

    def lose(directory: FakeDirectory) -> None:
        directory.snapshot = Snapshot(6, {"a": server("a", 0, 2), "b": server("b", 2, 4)})

    directory.on_look = lose
    with pytest.raises(
        MissingBlocksError, match=r"no server holds blocks 4:6 .*; every server of blocks 0:2 fails: \.\.\.a: .*gone\)$"
    ) as caught:
        run(pipeline(directory, calls, min_backoff=30, max_backoff=30), last=6)
    assert caught.value.missing == ((4, 6),)


def test_a_server_that_failed_is_tried_with_one_micro_batch():
    calls = FakeCalls()
    tried = []

    def fail(hop: Hop, hidden: torch.Tensor) -> None:
        if hop.server.peer_id == "bad":
            tried.append(calls.in_flight)
            raise PeerUnreachableError("gone")

    calls.on_call = fail
    pipe = pipeline(FakeDirectory(4, server("bad", 0, 4)), calls, deadline=0.3)

    async def many():
        return await asyncio.gather(*[pipe.forward(HIDDEN, None, 0, 4) for _ in range(8)], return_exceptions=True)

    results = asyncio.run(many())
    assert all(isinstance(result, DeadlineError) for result in results)
    assert len(tried) > 9
    assert set(tried[8:]) == {1}, "after the first eight, which were in flight together, one at a time"


def test_a_stragglers_work_is_done_elsewhere_and_it_is_given_less():
    calls = FakeCalls()

    async def run_both() -> tuple[list[str], float]:
        held = asyncio.Event()
        slow = {"on": False}
        forward = calls.forward

        async def slow_forward(hop, hidden, prompts, **how):
            if hop.server.peer_id == "a" and slow["on"]:
                await held.wait()
            return await forward(hop, hidden, prompts, **how)

        calls.forward = slow_forward
        pipe = pipeline(FakeDirectory(1, server("a", 0, 1), server("b", 0, 1)), calls, deadline=30.0)
        while not all(pipe.peers.of(name).flow.rate for name in "ab"):
            await asyncio.gather(*(pipe.forward(HIDDEN, None, 0, 1) for _ in range(4)))
        slow["on"] = True
        started = time.monotonic()
        done = await asyncio.gather(*(pipe.forward(HIDDEN, None, 0, 1) for _ in range(8)))
        assert all(torch.equal(hidden, torch.ones_like(HIDDEN)) for hidden, _ in done)
        assert pipe.peers.of("a").overtaken > 0
        await asyncio.sleep(0.05)  # what was cancelled ends
        assert pipe.peers.of("a").in_flight == 0
        assert pipe.peers.retries == 0
        return [hops[0].peer_id for _, hops in done], time.monotonic() - started

    servers, seconds = asyncio.run(run_both())
    assert set(servers) == {"b"}
    assert seconds < 10


def test_a_stragglers_answer_counts_where_nobody_else_holds_its_blocks():
    calls = FakeCalls()
    forward = calls.forward

    async def slow_forward(hop, hidden, prompts, **how):
        if len(calls.calls) > 2:
            await asyncio.sleep(1.5)
        return await forward(hop, hidden, prompts, **how)

    calls.forward = slow_forward
    pipe = pipeline(FakeDirectory(1, server("a", 0, 1)), calls, deadline=30.0)

    async def several() -> list[str]:
        return [(await pipe.forward(HIDDEN, None, 0, 1))[1][0].peer_id for _ in range(4)]

    assert asyncio.run(several()) == ["a"] * 4
    assert pipe.peers.of("a").overtaken == 0


def test_a_server_that_speaks_of_its_cache_though_none_is_needed_fails_as_any_other():
    """It was asked again at once, thousands of times until the deadline, which then named no reason."""
    calls = FakeCalls()

    def refuse(hop: Hop, hidden: torch.Tensor) -> None:
        raise PeerRefusedError("Could not allocate 1073741824 bytes, max cache size = 1024 bytes, 1024 in use")

    calls.on_call = refuse
    with pytest.raises(DeadlineError, match=r"every server of blocks 0:4 fails .*refuses \(Could not allocate"):
        run(pipeline(FakeDirectory(4, server("a", 0, 4)), calls))
    assert len(calls.calls) < 20


@pytest.mark.parametrize(
    ("slow", "fast", "chosen"),
    [
        (30_000.0, 400_000.0, "fast"),  # what the directory claims
        (30_000.0, None, "fast"),  # no claim: a pace that lets it be tried
        (1e12, 1e9, "slow"),  # claims beyond belief are all the same
        (0.0, 400_000.0, "fast"),
        (1e-9, None, "fast"),
    ],
)
def test_before_anything_is_measured_work_goes_by_what_the_directory_claims(slow, fast, chosen):
    calls = FakeCalls()
    pipe = pipeline(
        FakeDirectory(4, server("slow", 0, 4, forward_rps=slow), server("fast", 0, 4, forward_rps=fast)), calls
    )
    run(pipe)
    assert calls.calls[0][0] == chosen


def test_what_was_measured_counts_more_than_any_claim():
    calls = FakeCalls()
    pipe = pipeline(
        FakeDirectory(4, server("boasts", 0, 4, forward_rps=1e9), server("plain", 0, 4, forward_rps=1e5)), calls
    )
    set_pace(pipe.peers, "boasts", 1e-2)
    set_pace(pipe.peers, "plain", 1e-3)
    run(pipe)
    assert calls.calls[0][0] == "plain"
