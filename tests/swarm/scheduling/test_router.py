"""Where a micro-batch goes next in a swarm of many servers, and that looking for it costs little there."""

import asyncio
import time
from dataclasses import dataclass

import pytest
import torch

from petals_eval.errors import DeadlineError, MissingBlocksError, PeerUnreachableError, RequestTooLargeError
from petals_eval.swarm.activations import Activations
from petals_eval.swarm.peers.session_cache import Wait
from petals_eval.swarm.scheduling.planned_routes import PlannedRoutes
from petals_eval.swarm.scheduling.router import HopDeadline, PlanPolicy
from petals_eval.swarm.wire.records import Snapshot
from petals_eval.swarm.wire.span import Span
from tests.support.fake_swarm import FakeDirectory, FakeTransport, pipeline, run, server, set_pace

BLOCKS = 12
HIDDEN = torch.zeros(2, 3, 4)
FEW = PlanPolicy.few
SPANS = [Span(start, start + 3) for start in range(0, BLOCKS, 3)]
MANY = [server(f"s{index}-{span.start}", span.start, span.stop) for index in range(FEW) for span in SPANS]


@dataclass
class Admits:
    """Refuses those who are not in `only`, if it is given; those in `full` are never to be asked now."""

    only: frozenset[str] | None = None
    full: frozenset[str] = frozenset()

    def refusal(self, server, rest):
        return None if self.only is None or server.peer_id in self.only else RequestTooLargeError("too long")

    def wait(self, server, rest):
        return Wait(0.05, f"{server.peer_id} has no room") if server.peer_id in self.full else None

    def is_ready(self, server, rest):
        return server.peer_id not in self.full


def find(pipe, start=0, tokens=16, admission=Admits(), seconds=0.5):  # noqa: B008 - it does not change
    give_up = time.monotonic() + seconds
    return asyncio.run(pipe._router.find(Span(start, BLOCKS), tokens, give_up, admission))


def test_the_quickest_of_many_is_found_and_what_it_was_found_slow_since_counts_at_once():
    pipe = pipeline(FakeDirectory(BLOCKS, *MANY), FakeTransport())
    for each in MANY:
        set_pace(pipe.peers, each.peer_id, 1e-3)
    set_pace(pipe.peers, "s7-0", 1e-4)
    assert find(pipe).peer_id == "s7-0"
    set_pace(pipe.peers, "s9-0", 1e-6)
    assert find(pipe).peer_id == "s9-0"  # by the same plan: the way on did not change


def test_the_way_on_counts_among_many_too():
    """A quick server that leads to a slow one is no bargain."""
    detour = server("quick", 0, 2), server("slow", 2, 3)
    pipe = pipeline(FakeDirectory(BLOCKS, *MANY, *detour), FakeTransport())
    for each in (*MANY, *detour):
        set_pace(pipe.peers, each.peer_id, 1e-4)
    set_pace(pipe.peers, "quick", 1e-6)
    set_pace(pipe.peers, "slow", 1.0)
    assert find(pipe).peer_id != "quick"


def test_servers_that_fail_or_do_not_take_it_are_passed_over():
    pipe = pipeline(FakeDirectory(BLOCKS, *MANY), FakeTransport(), min_backoff=30, max_backoff=30)
    for each in MANY:
        if each.peer_id != "s3-0" and each.span.start == 0:
            pipe.peers.of(each.peer_id).on_failed(PeerUnreachableError("gone"))
    assert find(pipe).peer_id == "s3-0"

    only = Admits(frozenset({"s5-3"}))
    assert find(pipe, start=3, admission=only).peer_id == "s5-3"
    with pytest.raises(RequestTooLargeError):
        find(pipe, start=6, admission=only)


@pytest.mark.parametrize("servers", [MANY, MANY[:8]], ids=["many", "few"])
def test_servers_without_room_in_their_caches_are_passed_over_and_where_there_is_no_other_waited_for(servers):
    pipe = pipeline(FakeDirectory(BLOCKS, *servers), FakeTransport())
    first = [each.peer_id for each in servers if each.span.start == 0]
    all_but_one = Admits(full=frozenset(first[1:]))
    assert find(pipe, admission=all_but_one).peer_id == first[0]
    with pytest.raises(DeadlineError, match=r"no server of blocks 0:12 has room for a session now: s0-0 has no room"):
        find(pipe, admission=Admits(full=frozenset(first)), seconds=0.2)
    assert pipe._router.waiting.for_caches == ()


def test_blocks_that_nobody_holds_are_said_before_caches_that_are_full():
    pipe = pipeline(FakeDirectory(BLOCKS, server("a", 0, 3)), FakeTransport())
    with pytest.raises(MissingBlocksError, match="no server holds blocks 3:12"):
        find(pipe, admission=Admits(full=frozenset("a")), seconds=0.2)


def test_a_new_look_at_the_directory_is_a_new_plan_and_a_hole_is_said():
    directory = FakeDirectory(BLOCKS, *MANY)
    pipe = pipeline(directory, FakeTransport())
    assert find(pipe).span.stop == 3
    left = {each.peer_id: each for each in MANY if each.span.start != 6}
    directory.snapshot = Snapshot(BLOCKS, left)
    with pytest.raises(MissingBlocksError, match="no server holds blocks 6:9"):
        find(pipe)


def test_every_block_runs_once_on_a_swarm_of_many():
    pipe = pipeline(FakeDirectory(BLOCKS, *MANY), FakeTransport())
    hidden, hops = run(pipe, torch.zeros(2, 3, 4), stop=BLOCKS)
    assert [hop.span for hop in hops] == SPANS
    assert torch.equal(hidden, torch.full_like(hidden, float("1" * BLOCKS)))


def test_a_search_looks_at_the_servers_of_one_block_and_plans_now_and_then():
    pipe = pipeline(FakeDirectory(BLOCKS, *MANY), FakeTransport())
    reckoned = 0
    seconds = pipe._router.seconds

    def counted(each, blocks, tokens):
        nonlocal reckoned
        reckoned += 1
        return seconds(each, blocks, tokens)

    pipe._router.seconds = counted
    searches = 200
    for _ in range(searches):
        find(pipe)
    behind = len(MANY) - FEW  # those that a plan looks at: all but the ones to pick from
    assert reckoned - searches * FEW <= searches * behind * 0.3, "as many as if each search had planned anew"
    pipe._router._planned = PlannedRoutes(pipe.peers.runtime)
    before = reckoned
    find(pipe)
    assert reckoned - before >= FEW + behind


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
    transport = FakeTransport()
    pipe = pipeline(
        FakeDirectory(4, server("slow", 0, 4, forward_rps=slow), server("fast", 0, 4, forward_rps=fast)), transport
    )
    run(pipe, HIDDEN)
    assert transport.calls[0].peer_id == chosen


def test_what_was_measured_counts_more_than_any_claim():
    transport = FakeTransport()
    pipe = pipeline(
        FakeDirectory(4, server("boasts", 0, 4, forward_rps=1e9), server("plain", 0, 4, forward_rps=1e5)), transport
    )
    set_pace(pipe.peers, "boasts", 1e-2)
    set_pace(pipe.peers, "plain", 1e-3)
    run(pipe, HIDDEN)
    assert transport.calls[0].peer_id == "plain"


@pytest.mark.parametrize(
    ("waiting", "has_more", "chosen"), [(1, True, "slow"), (1, False, "quick"), (8, False, "slow")]
)
def test_a_slow_replica_that_is_free_is_used_unless_the_run_ends_before_it_would_be_done(waiting, has_more, chosen):
    """The quick one is busy for now. A single micro-batch would be back sooner if it waited for it."""
    pipe = pipeline(FakeDirectory(BLOCKS, server("quick", 0, BLOCKS), server("slow", 0, BLOCKS)), FakeTransport())
    set_pace(pipe.peers, "quick", 1e-3)
    set_pace(pipe.peers, "slow", 4e-3)
    activations = Activations(HIDDEN)
    pipe.peers.of("quick").send(activations.tokens, BLOCKS)  # so that the next may leave somewhat later
    if has_more:
        pipe.queues.producing.add("somebody")

    async def admit():
        async def one():
            return (await pipe._router.admit(activations, Span(0, BLOCKS), HopDeadline())).peer_id

        async with pipe.queues.turn(0):
            calls = [asyncio.create_task(one()) for _ in range(waiting)]
            await asyncio.sleep(0)  # all of them are in the queue
        return await asyncio.gather(*calls)

    assert asyncio.run(admit())[0] == chosen


def test_a_free_replica_is_found_among_many_by_the_servers_of_its_block_alone():
    pipe = pipeline(FakeDirectory(BLOCKS, *MANY), FakeTransport())
    hop = find(pipe)
    replica = pipe._router.free_replica(hop, Activations(HIDDEN), {hop.peer_id})
    assert replica.span == hop.span and replica.peer_id != hop.peer_id
    assert len(pipe._router._planned.holders(pipe._directory.snapshot, 0)) == FEW
    assert len(pipe._router._planned.holders(Snapshot(BLOCKS, {}), 0)) == 0, "a plan of another snapshot"
