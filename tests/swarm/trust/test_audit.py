"""Audits are in nobody's way, and give a server what the work gave it. No network."""

import asyncio

import torch

from tests.support.audited_run import BLOCKS, SIZE, AuditedRun, PassesProbes, float32, states
from tests.support.fake_swarm import FakeTransport, forward, noise, set_pace


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
