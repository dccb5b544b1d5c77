"""Which answers are audited, how likely a server is caught, and that audits are in nobody's way. No network."""

import asyncio
import math
import random

import pytest
import torch

from petals_eval.errors import PeerTimeoutError
from petals_eval.swarm.trust.audit import catch_probability
from tests.support.audited_run import BLOCKS, SIZE, AuditedRun, PassesProbes, float32, states
from tests.support.fake_swarm import FakeTransport, forward, noise, set_pace


@pytest.mark.parametrize(("n", "p", "share"), [(12, 0.3, 0.05), pytest.param(30, 0.1, 0.1, marks=pytest.mark.soak)])
def test_the_formula_holds_through_the_seam(n, p, share):
    """A server is wrong in some of its micro-batches, and is asked about nobody else's."""
    caught, rounds = 0, 200
    for seed in range(rounds):
        draws = random.Random(seed)
        run = AuditedRun(float32("wrong"), seed=seed, verify=share)
        # It is asked once more where it differs, honestly this time or not: it is named either way.
        run.blocks.spoil["wrong"] = lambda answer, question, d=draws: (
            noise(0.1)(answer, question) if d.random() < p else answer
        )

        async def everything(run=run):
            for index in range(n):
                run.hold(float32("wrong"))  # nobody else to route to
                task = asyncio.ensure_future(forward(run.pipe, states(index), stop=BLOCKS))
                await asyncio.sleep(0)
                run.hold(float32("wrong"), float32("a"), float32("b"))
                await asyncio.wait([task])
                while run.pipe.audit.progress().under_way:  # they must see everybody
                    await asyncio.sleep(0.001)
                if run.pipe.quarantine.findings:
                    break
            await run.pipe.audit.settle()

        asyncio.run(everything())
        assert set(run.statuses) <= {"wrong"}
        caught += run.statuses == {"wrong": "wrong"}
    expected = catch_probability(p, n, share)
    assert abs(caught / rounds - expected) < 4 * math.sqrt(expected * (1 - expected) / rounds)


def test_every_server_is_checked_twice_and_the_first_time_early():
    for seed in range(20):
        servers = float32("a", 0, 2), float32("a2", 0, 2), float32("b", 2, 4), float32("b2", 2, 4)
        run = AuditedRun(*servers, seed=seed)
        run.go(10)
        progress = run.pipe.audit.progress()
        used = [peer for peer in ("a", "a2", "b", "b2") if run.peers.of(peer).calls]
        at_least = sum(min(2, run.peers.of(peer).calls) for peer in used)
        assert progress.computed == 20
        assert at_least <= progress.done <= at_least + 4
        assert progress.under_way == progress.impossible == 0
        assert run.statuses == {}


def test_nothing_is_checked_where_nobody_else_holds_the_blocks_or_it_is_turned_off():
    for values, servers in [({}, [float32("a")]), ({"verify": 0}, [float32("a"), float32("b")])]:
        run = AuditedRun(*servers, **values)
        run.go(5)
        assert len(run.transport.calls) == 5
        assert run.pipe.audit.progress().done == 0


def test_a_replica_that_comes_later_finds_the_server_checked_at_once():
    run = AuditedRun(float32("a"))
    run.blocks.spoil["a"] = noise()
    run.go(5)
    assert run.statuses == {}
    run.hold(float32("a"), float32("b"), float32("c"))
    run.go(3)
    assert run.statuses == {"a": "wrong"}


# -- that they are in nobody's way


def test_a_checker_that_is_gone_or_hangs_is_passed_over():
    run = AuditedRun(float32("a"), float32("b"), float32("c"), float32("d"))
    run.blocks.spoil["a"] = noise()
    run.transport.down = {"b"}
    for peer in "bcd":
        set_pace(run.peers, peer, 1.0)
    run.go(10)
    assert run.statuses == {"a": "wrong"}
    assert run.peers.retries == 0

    run = AuditedRun(float32("a"), float32("b"), request_timeout=0.05)
    run.transport.hanging = {"b"}
    set_pace(run.peers, "b", 1.0)
    run.go(5)
    progress = run.pipe.audit.progress()
    assert progress.done == 0 and progress.impossible >= 1 and run.statuses == {}


def test_what_only_servers_hold_that_are_left_alone_for_a_moment_is_checked_afterwards():
    run = AuditedRun(float32("a"), float32("b"), float32("c"), verify=1.0, min_backoff=0.2)
    run.blocks.spoil["a"] = noise()
    for peer in "bc":
        run.peers.of(peer).on_failed(PeerTimeoutError("no answer"))
    run.go(3)
    assert run.statuses == {"a": "wrong"}


def test_a_check_does_not_wait_long_for_a_server_that_is_left_alone():
    run = AuditedRun(float32("a"), float32("b"), verify=1.0, min_backoff=60.0, max_backoff=60.0)
    run.peers.of("b").on_failed(PeerTimeoutError("no answer"))
    run.go(3)
    assert run.pipe.audit.progress().done == 0


def test_no_answer_waits_for_a_check():
    """The checker hangs; every answer is there all the same."""
    run = AuditedRun(float32("a"), float32("b"), deadline=0.2)
    run.transport.hanging = {"b"}
    set_pace(run.peers, "b", 1.0)

    async def everything():
        answers = await asyncio.gather(*(forward(run.pipe, states(seed), stop=BLOCKS) for seed in range(30)))
        assert run.pipe.audit.progress().under_way > 0
        await run.pipe.audit.settle()  # gives up at the deadline
        return answers

    assert len(asyncio.run(everything())) == 30
    assert run.pipe.audit.progress().impossible > 0


def test_deep_prompts_go_to_the_checker_too():
    prompts = torch.randn(BLOCKS, 1, 3, SIZE, generator=torch.Generator().manual_seed(9))
    run = AuditedRun(float32("a"), float32("b", 0, 1), float32("c", 1, 4), float32("d", 0, 4), verify=1.0)
    run.go(10, prompts=prompts)
    assert run.statuses == {} and run.pipe.audit.progress().done >= 10


def test_a_server_that_a_check_finds_in_training_mode_is_told_of():
    """It has computed something before, and is not called again but for the check."""
    run = AuditedRun(float32("b"), transport=FakeTransport(seconds=0), verify=1.0)
    run.go(1)
    assert run.peers.of("b").calls
    run.peers.of("b").ask_anew()  # as after a failure: it may have come back as another
    run.blocks.dropout["b"] = {0: 0.5}
    run.hold(float32("a"), float32("b"), float32("c"))
    for peer in "bc":
        set_pace(run.peers, peer, 1.0)
    run.go(6)
    assert run.statuses == {"b": "nondeterministic"}
    assert run.peers.of("b").is_quarantined
    assert run.peers.of("b").calls == 1


def test_an_audit_goes_the_way_of_the_work():
    """A server that could tell an audit from the work would answer it well: nothing about the two calls differs."""
    run = AuditedRun(float32("a"), float32("b"), transport=PassesProbes(seconds=0), verify=1.0)
    set_pace(run.peers, "b", 1.0)
    run.go(3)
    asked, audited = ([call for call in run.transport.calls if call.peer_id == peer] for peer in "ab")
    assert [(call.span, call.shape, call.is_step) for call in asked] == [
        (call.span, call.shape, call.is_step) for call in audited
    ]
