"""Checks on strangers without a network: who is named, and who never is."""

import asyncio

import pytest
import torch
from petals_eval.swarm.trust.unequal import UnequalServer

from petals_eval.errors import MissingBlocksError, PeerNondeterministicError
from petals_eval.swarm.directory.routing import Hop
from tests.swarm.fakes import FakeDirectory, server, set_pace
from tests.swarm.verifying import BLOCKS, SIZE, Run, Servers, bfloat16, float32, noise, states


@pytest.mark.parametrize("name", ["a", "b", "c"])
@pytest.mark.parametrize("repeats", [True, False])
def test_noise_of_a_hundredth_is_named_whoever_of_three_it_is(name, repeats):
    for seed in range(10):
        calls = Servers()
        calls.spoil[name] = noise(seed=seed, repeats=repeats)
        run = Run(calls, float32("a"), float32("b"), float32("c"), seed=seed)
        for _ in range(3):  # work goes to whoever is quickest: let everybody have some
            run.go(8)
            for peer in ("a", "b", "c"):
                if not run.peers.of(peer).calls and not run.peers.is_left_out(peer):
                    set_pace(run.peers, peer, 1e-9)
        assert run.verdicts in ({name: "liar"}, {})
        if run.peers.of(name).calls:
            assert run.verdicts == {name: "liar"}
            assert run.peers.is_left_out(name)
            assert run.peers.of(name).last_error.startswith("is left out (it answered otherwise")


@pytest.mark.parametrize("spoil", ["noise", "bit", "row", "other", "swapped"])
@pytest.mark.parametrize("kinds", ["float32", "bfloat16", "mixed"])
def test_what_is_wrong_is_found_in_every_dtype_but_noise_below_rounding(spoil, kinds):
    calls, before = Servers(), []

    def wrong(answer, question):
        if spoil == "noise":
            return noise(0.5 if kinds != "float32" else 0.01)(answer, question)
        answer = answer.clone()
        if spoil == "bit":  # the highest of the exponent
            integers = torch.int32 if answer.dtype.itemsize == 4 else torch.int16
            answer.view(integers)[0, 3, 5] ^= 1 << (8 * answer.dtype.itemsize - 2)
        elif spoil == "row":
            answer[1] = answer[1].flip(0)
        elif spoil == "other":
            answer = (question + (answer - question).flip(-1)).to(answer.dtype)
        else:
            before.append(answer)
            answer = before[max(0, len(before) - 2)]
        return answer

    calls.spoil["a"] = wrong
    other = float32 if kinds == "float32" else bfloat16
    run = Run(calls, float32("a") if kinds == "mixed" else other("a"), other("b"), other("c"))
    set_pace(run.peers, "a", 1e-9)
    run.go(12)
    assert run.verdicts == {"a": "liar"}


def test_two_replicas_that_disagree_are_both_named_and_both_used():
    calls = Servers()
    calls.spoil["a"] = noise()
    run = Run(calls, float32("a", 0, 2), float32("b", 0, 2), float32("c", 2, 4))
    run.go(10)
    assert run.verdicts == {"a": "disputed", "b": "disputed"}
    assert all(each.is_used for each in run.pipe.status().unequal)
    (notice,) = run.notices
    assert "do not agree on blocks 0:2" in notice and "--verify-local 0:2" in notice
    assert not run.peers.is_left_out("a") and not run.peers.is_left_out("b")

    # One more of these blocks settles it.
    run.directory.snapshot = FakeDirectory(
        BLOCKS, float32("a", 0, 2), float32("b", 0, 2), float32("d", 0, 2), float32("c", 2, 4)
    ).snapshot
    for _ in range(40):
        run.go(5)
        if run.verdicts == {"a": "liar"}:
            break
    assert run.verdicts == {"a": "liar"}
    assert "answered otherwise than others" in run.notices[-1]


@pytest.mark.parametrize("dispute_comes", ["before", "after"])
def test_a_dispute_with_a_server_that_was_caught_names_nobody_else(dispute_comes):
    """A check may end after the server in question was left out for training mode."""
    run = Run(Servers(), float32("caught", 0, 2), float32("honest", 0, 2), float32("third", 0, 2), float32("c", 2, 4))
    servers = run.directory.snapshot.servers
    disputes = [
        UnequalServer(servers["honest"], 0.1, is_used=True, verdict="disputed", others=("caught",), blocks=(0, 2)),
        UnequalServer(
            servers["third"], 0.1, is_used=True, verdict="disputed", others=("caught", "honest"), blocks=(0, 2)
        ),
    ]
    caught = PeerNondeterministicError("two answers", 0.5)
    if dispute_comes == "before":
        run.pipe.distrust.note(disputes[0])
    run.pipe.distrust.leave_out(Hop(servers["caught"], 0, 2), caught)
    run.pipe.distrust.note(disputes[0])
    assert run.verdicts == {"caught": "noisy"}
    run.pipe.distrust.note(disputes[1])  # with somebody else, too
    assert run.verdicts == {"caught": "noisy", "third": "disputed"}
    run.pipe.distrust.leave_out(Hop(servers["honest"], 0, 2), caught)
    assert run.verdicts == {"caught": "noisy", "honest": "noisy"}


def test_a_server_that_contradicts_itself_needs_no_third():
    calls = Servers()
    calls.spoil["a"] = noise(repeats=False)
    run = Run(calls, float32("a"), float32("b"))
    run.go(10)
    assert run.verdicts == {"a": "liar"}
    assert "otherwise again when it was asked once more" in run.notices[0]


@pytest.mark.parametrize("wrong", ["whole", "first", "second"])
def test_blocks_nobody_else_holds_alone_are_checked_by_two_in_a_row(wrong):
    for seed in range(10):
        calls = Servers()
        calls.spoil[wrong] = noise(seed=seed)
        run = Run(calls, float32("whole"), float32("first", 0, 2), float32("second", 2, 4), float32("third"), seed=seed)
        for peer in ("whole", "first", "second"):
            set_pace(run.peers, peer, 1e-7)
        run.go(20)
        if run.peers.of(wrong).calls:
            assert run.verdicts == {wrong: "liar"}, seed
        assert set(run.verdicts) <= {wrong}


def test_nobody_honest_is_ever_named():
    for seed in range(20):
        run = Run(
            Servers(),
            float32("a", 0, 3),
            bfloat16("b", 0, 3),
            server("c", 0, 4, torch_dtype="float16"),
            bfloat16("d"),
            float32("e", 3, 4),
            seed=seed,
            verify=0.5,
        )
        run.go(20)
        assert run.verdicts == {} and run.notices == ()
        assert run.verified.checks().done >= 4


def test_servers_of_the_same_kind_are_preferred():
    run = Run(Servers(), float32("a"), *(bfloat16(f"b{index}") for index in range(5)), float32("z"), verify=1.0)
    for peer in [f"b{index}" for index in range(5)] + ["z"]:
        set_pace(run.peers, peer, 1.0)  # work goes to "a"
    run.go(10)
    assert {name for name, _, _ in run.calls.calls} == {"a", "z"}


def test_a_liar_is_used_no_more_and_what_it_still_answers_is_computed_elsewhere():
    calls = Servers()
    calls.spoil["a"] = noise()
    run = Run(calls, float32("a"), float32("b"), float32("c"))
    set_pace(run.peers, "a", 1e-9)
    run.go(5)
    assert run.verdicts == {"a": "liar"}
    count = sum(name == "a" for name, _, _ in calls.calls)
    answers = run.go(5)
    assert sum(name == "a" for name, _, _ in calls.calls) == count
    for seed, (hidden, hops) in enumerate(answers):
        assert {hop.peer_id for hop in hops} <= {"b", "c"}
        assert torch.equal(hidden, calls.truth(states(seed), 0, BLOCKS))


@pytest.mark.parametrize("allow", [False, True])
def test_a_run_stops_where_a_liar_alone_is_left_whatever_is_allowed(allow):
    """--allow-nondeterministic is for training mode."""
    calls = Servers()
    calls.spoil["a"] = noise()
    run = Run(calls, float32("a"), float32("b"), float32("c"), allow_nondeterministic=allow)
    set_pace(run.peers, "a", 1e-9)
    run.go(5)
    run.directory.snapshot = FakeDirectory(BLOCKS, float32("a")).snapshot
    with pytest.raises(MissingBlocksError, match=r"no server that is trusted holds blocks 0:4") as stopped:
        run.go(1)
    assert "its answers are wrong" in str(stopped.value)
    assert "allow-nondeterministic" not in str(stopped.value)


# -- that it is in nobody's way


def test_a_checker_that_is_gone_or_hangs_is_passed_over():
    calls = Servers()
    calls.spoil["a"] = noise()
    calls.down = {"b"}
    run = Run(calls, float32("a"), float32("b"), float32("c"), float32("d"))
    for peer in "bcd":
        set_pace(run.peers, peer, 1.0)
    run.go(10)
    assert run.verdicts == {"a": "liar"}
    assert run.peers.retries == 0

    calls = Servers()
    calls.hanging = {"b"}
    run = Run(calls, float32("a"), float32("b"), request_timeout=0.05)
    set_pace(run.peers, "b", 1.0)
    run.go(5)
    checks = run.verified.checks()
    assert checks.done == 0 and checks.impossible >= 1 and run.verdicts == {}


def test_no_answer_waits_for_a_check():
    """The checker hangs; every answer is there all the same."""
    calls = Servers()
    calls.hanging = {"b"}
    run = Run(calls, float32("a"), float32("b"), deadline=0.2)
    set_pace(run.peers, "b", 1.0)

    async def everything():
        answers = await asyncio.gather(*(run.pipe.forward(states(seed), None, 0, BLOCKS) for seed in range(30)))
        assert run.verified.checks().under_way > 0
        await run.verified.settle()  # gives up at the deadline
        return answers

    assert len(asyncio.run(everything())) == 30
    assert run.verified.checks().impossible > 0


def test_deep_prompts_go_to_the_checker_too():
    prompts = torch.randn(BLOCKS, 1, 3, SIZE, generator=torch.Generator().manual_seed(9))
    run = Run(Servers(), float32("a"), float32("b", 0, 1), float32("c", 1, 4), float32("d", 0, 4), verify=1.0)
    run.go(10, prompts=prompts)
    assert run.verdicts == {} and run.verified.checks().done >= 10


# -- blocks at home


class AtHome:
    def __init__(self, calls, first, last, dtype=torch.float32):
        self.calls, self.first, self.last, self.dtype = calls, first, last, dtype

    def forward(self, hidden, prompts, *, first, last):
        assert self.first <= first < last <= self.last
        return self.calls.truth(hidden, first, last, self.dtype, prompts)


@pytest.mark.parametrize(("first", "last"), [(0, 4), (0, 1), (3, 4), (1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_at_home_name_the_only_server_there_is(first, last, dtype):
    prompts = torch.randn(BLOCKS, 1, 3, SIZE, generator=torch.Generator().manual_seed(9))
    for size, verdicts in [(0.5, {"a": "liar"}), (None, {})]:
        calls = Servers()
        if size is not None:
            calls.spoil["a"] = noise(size)
        run = Run(calls, float32("a"))
        run.verified.keep_at_home(AtHome(calls, first, last, dtype))
        if size is None:
            run.go(5, prompts=prompts)
            assert run.verified.checks().done >= 2
        else:
            with pytest.raises(MissingBlocksError, match="that is trusted") as stopped:
                run.go(5, prompts=prompts)
                run.go(1)
            assert "than the same blocks at home" in str(stopped.value)
        assert run.verdicts == verdicts


def test_a_server_that_a_check_finds_in_training_mode_is_told_of():
    """It has computed something before, and is not called again but for the check."""
    calls, modes = Servers(), {"b": False}

    class Checked(Servers):
        async def forward(self, hop, hidden, prompts, *, lossless=False):
            if modes.get(hop.server.peer_id):
                raise PeerNondeterministicError("it gave two answers to one question", 0.3)
            return await calls.forward(hop, hidden, prompts)

    run = Run(Checked(), float32("a"), float32("b"), float32("c"), verify=1.0)
    run.verified.on_distrusted = run.pipe.distrust.leave_out
    for peer in "bc":
        set_pace(run.peers, peer, 1.0)
    modes["b"] = True
    run.go(6)
    assert run.verdicts == {"b": "noisy"}
    assert run.peers.is_left_out("b")
