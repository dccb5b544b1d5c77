"""Which of the servers that differ is wrong, and who never is named. No network."""

import pytest
import torch

from petals_eval.errors import MissingBlocksError
from tests.support.audited_run import BLOCKS, SIZE, AuditedRun, bfloat16, float32
from tests.support.fake_swarm import noise, server, set_pace


@pytest.mark.parametrize("name", ["a", "b", "c"])
@pytest.mark.parametrize("repeats", [True, False])
def test_noise_of_a_hundredth_is_named_whoever_of_three_it_is(name, repeats):
    for seed in range(10):
        run = AuditedRun(float32("a"), float32("b"), float32("c"), seed=seed)
        run.blocks.spoil[name] = noise(seed=seed, repeats=repeats)
        for _ in range(3):  # work goes to whoever is quickest: let everybody have some
            run.go(8)
            for peer in map(run.peers.of, "abc"):
                if not peer.calls and not peer.is_quarantined:
                    set_pace(run.peers, peer.peer_id, 1e-9)
        assert run.statuses in ({name: "wrong"}, {})
        if run.peers.of(name).calls:
            assert run.statuses == {name: "wrong"}
            assert run.peers.of(name).is_quarantined
            assert run.peers.of(name).last_error.startswith("is left out (it answered otherwise")


@pytest.mark.parametrize("spoil", ["noise", "bit", "row", "other", "swapped"])
@pytest.mark.parametrize("kinds", ["float32", "bfloat16", "mixed"])
def test_what_is_wrong_is_found_in_every_dtype_but_noise_below_rounding(spoil, kinds):
    before = []

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

    other = float32 if kinds == "float32" else bfloat16
    run = AuditedRun(float32("a") if kinds == "mixed" else other("a"), other("b"), other("c"))
    run.blocks.spoil["a"] = wrong
    set_pace(run.peers, "a", 1e-9)
    run.go(12)
    assert run.statuses == {"a": "wrong"}


def test_two_replicas_that_disagree_are_both_named_and_both_used():
    run = AuditedRun(float32("a", 0, 2), float32("b", 0, 2), float32("c", 2, 4))
    run.blocks.spoil["a"] = noise()
    run.go(10)
    assert run.statuses == {"a": "disputed", "b": "disputed"}
    assert all(each.is_used for each in run.pipe.status().findings)
    (notice,) = run.notices
    assert "do not agree on blocks 0:2" in notice and "--verify-local 0:2" in notice
    assert not run.peers.of("a").is_quarantined and not run.peers.of("b").is_quarantined

    # One more of these blocks settles it.
    run.hold(float32("a", 0, 2), float32("b", 0, 2), float32("d", 0, 2), float32("c", 2, 4))
    for _ in range(40):
        run.go(5)
        if run.statuses == {"a": "wrong"}:
            break
    assert run.statuses == {"a": "wrong"}
    assert "answered otherwise than others" in run.notices[-1]


def test_a_server_that_contradicts_itself_needs_no_third():
    run = AuditedRun(float32("a"), float32("b"))
    run.blocks.spoil["a"] = noise(repeats=False)
    run.go(10)
    assert run.statuses == {"a": "wrong"}
    assert "otherwise again when it was asked once more" in run.notices[0]


@pytest.mark.parametrize("wrong", ["whole", "first", "second"])
def test_blocks_nobody_else_holds_alone_are_checked_by_two_in_a_row(wrong):
    for seed in range(10):
        servers = float32("whole"), float32("first", 0, 2), float32("second", 2, 4), float32("third")
        run = AuditedRun(*servers, seed=seed)
        run.blocks.spoil[wrong] = noise(seed=seed)
        for peer in ("whole", "first", "second"):
            set_pace(run.peers, peer, 1e-7)
        run.go(20)
        if run.peers.of(wrong).calls:
            assert run.statuses == {wrong: "wrong"}, seed
        assert set(run.statuses) <= {wrong}


def test_nobody_honest_is_ever_named():
    for seed in range(20):
        run = AuditedRun(
            float32("a", 0, 3),
            bfloat16("b", 0, 3),
            server("c", 0, 4, torch_dtype="float16"),
            bfloat16("d"),
            float32("e", 3, 4),
            seed=seed,
            verify=0.5,
        )
        run.go(20)
        assert run.statuses == {} and run.notices == ()
        assert run.pipe.audit.progress().done >= 4


def test_servers_of_the_same_kind_are_preferred():
    run = AuditedRun(float32("a"), *(bfloat16(f"b{index}") for index in range(5)), float32("z"), verify=1.0)
    for peer in [f"b{index}" for index in range(5)] + ["z"]:
        set_pace(run.peers, peer, 1.0)  # work goes to "a"
    run.go(10)
    assert {call.peer_id for call in run.transport.calls} == {"a", "z"}


class AtHome:
    """Blocks start:stop in this process, which compute what an honest server of this dtype does."""

    def __init__(self, blocks, start, stop, dtype=torch.float32):
        self.blocks, self.start, self.stop, self.dtype = blocks, start, stop, dtype

    def forward(self, hidden, prompts, *, start, stop):
        assert self.start <= start < stop <= self.stop
        return self.blocks.truth(hidden, start, stop, self.dtype, prompts)


@pytest.mark.parametrize(("start", "stop"), [(0, 4), (0, 1), (3, 4), (1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_at_home_name_the_only_server_there_is(start, stop, dtype):
    prompts = torch.randn(BLOCKS, 1, 3, SIZE, generator=torch.Generator().manual_seed(9))
    for size, statuses in [(0.5, {"a": "wrong"}), (None, {})]:
        run = AuditedRun(float32("a"))
        if size is not None:
            run.blocks.spoil["a"] = noise(size)
        run.pipe.audit.keep_at_home(AtHome(run.blocks, start, stop, dtype))
        if size is None:
            run.go(5, prompts=prompts)
            assert run.pipe.audit.progress().done >= 2
        else:
            with pytest.raises(MissingBlocksError, match="that is trusted") as stopped:
                run.go(5, prompts=prompts)
                run.go(1)
            assert "than the same blocks at home" in str(stopped.value)
        assert run.statuses == statuses
