"""Every fault under its own name, and none of them green. At the seam: no network."""

import pytest
import torch

from petals_eval.errors import (
    PeerAnswerError,
    PeerCacheFullError,
    PeerNoSessionError,
    PeerNotFiniteError,
    PeerRefusedError,
    PeerTimeoutError,
    PeerUnreachableError,
)
from petals_eval.health import FINDINGS, Level, Verdict
from petals_eval.health.findings import finding, from_forward_error
from petals_eval.health.live import RouteTimes
from petals_eval.health.locked import LockedServers
from petals_eval.swarm.peers.session_cache import CachePolicy
from petals_eval.swarm.wire import messages as wire
from petals_eval.swarm.wire.records import Announcement
from petals_eval.swarm.wire.server_info import ServerInfo
from tests.support.fake_health import HIDDEN, FakeBlocks, FakeServer, FakeSwarm, findings, raising, report_on, server_of

WHOLE = {"good": (0, 4), "other": (0, 4)}


def good() -> dict[str, FakeServer]:
    return {name: FakeServer(*span) for name, span in WHOLE.items()}


def info_of(**fields: object):
    return lambda block: ServerInfo(
        **{
            "version": "2.2.0",
            "input_dtype": torch.float32,
            "output_dtype": torch.float32,
            "cache_tokens_available": 5,
            "hidden_size": HIDDEN,
            "session_tensors": 3,
            **fields,
        }
    )


def noisy(hidden: torch.Tensor) -> torch.Tensor:
    return hidden + 0.3 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))


def training(hidden: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.dropout(hidden, 0.1)


REFUSED = PeerRefusedError("RuntimeError('boom')")
FAULTS = {
    "joining": (FakeServer(0, 4, state=1), Verdict.DEGRADED),
    "stale-record": (FakeServer(0, 4, remaining=70.0), Verdict.DEGRADED),
    "wrong-span": (FakeServer(0, 9), Verdict.BROKEN),
    "record-without-server": (
        FakeServer(0, 4, info=raising(PeerUnreachableError("routing: not found"))),
        Verdict.BROKEN,
    ),
    "unreachable": (FakeServer(0, 4, info=raising(PeerUnreachableError("connection refused"))), Verdict.BROKEN),
    "no-answer": (FakeServer(0, 4, info=raising(PeerTimeoutError("no answer within 1 s"))), Verdict.BROKEN),
    "not-a-server": (
        FakeServer(0, 4, info=raising(PeerUnreachableError("protocols not supported: [...]"))),
        Verdict.BROKEN,
    ),
    "info-refused": (FakeServer(0, 4, info=raising(REFUSED)), Verdict.BROKEN),
    "info-unreadable": (FakeServer(0, 4, info=raising(PeerAnswerError("its rpc_info cannot be read"))), Verdict.BROKEN),
    "dtype-mismatch": (FakeServer(0, 4, record={"torch_dtype": "torch.bfloat16"}), Verdict.DEGRADED),
    "version-mismatch": (FakeServer(0, 4, record={"version": "2.3.0"}), Verdict.DEGRADED),
    "hidden-size-mismatch": (FakeServer(0, 4, info=info_of(hidden_size=HIDDEN + 1)), Verdict.BROKEN),
    "info-ok-forward-fails": (FakeServer(0, 4, answer=raising(REFUSED)), Verdict.BROKEN),
    "not-finite": (
        FakeServer(0, 4, answer=raising(PeerNotFiniteError("3 of 9 values are not finite"))),
        Verdict.BROKEN,
    ),
    "wrong-shape": (
        FakeServer(0, 4, answer=raising(PeerAnswerError("expected a tensor of shape (1,)"))),
        Verdict.BROKEN,
    ),
    "wrong-answer": (FakeServer(0, 4, answer=raising(PeerAnswerError("expected float32, found int8"))), Verdict.BROKEN),
    "nondeterministic": (FakeServer(0, 4, answer=training), Verdict.BROKEN),
    "disagrees-with-replica": (FakeServer(0, 4, answer=noisy), Verdict.BROKEN),
    "opens-no-session": (
        FakeServer(0, 4, session=raising(PeerNoSessionError("it opens no session within 10 s"))),
        Verdict.DEGRADED,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_has_its_own_name_and_is_never_green(name: str) -> None:
    server, verdict = FAULTS[name]
    report = report_on(FakeSwarm(4, **good(), bad=server))
    assert findings(report) == findings(report, "bad") == {name}
    assert server_of(report, "bad").verdict is verdict
    assert server_of(report, "good").verdict is Verdict.HEALTHY
    assert report.verdict is Verdict.DEGRADED and report.exit_code == 1

    alone = report_on(FakeSwarm(4, bad=server))
    if name in ("disagrees-with-replica", "hidden-size-mismatch"):
        return  # it takes others to know
    assert alone.verdict is not Verdict.HEALTHY
    assert alone.models[0].verdict is (Verdict.BROKEN if name == "joining" else verdict)


def test_what_cannot_be_found_has_no_name() -> None:
    """Names are stable: each is given by a test here or in the tests of models below."""
    of_models = {"not-announced", "missing-blocks", "thin-blocks", "malformed-records", "route-fails"}
    elsewhere = {"disagrees-with-home", "adapter-not-announced", "adapter-fails", "disputed", "probe-error"}
    assert set(FINDINGS) == set(FAULTS) | of_models | elsewhere


def refusing(times: int):
    def session(number: int) -> None:
        if number <= times:
            raise PeerCacheFullError("Could not allocate 256 bytes immediately: out of memory")

    return session


@pytest.mark.parametrize(
    ("server", "asked", "found"),
    [
        (FakeServer(0, 4), 1, set()),
        (FakeServer(0, 4, session=refusing(2)), 3, set()),  # others asked at the same moment
        (FakeServer(0, 4, session=refusing(3)), 3, {"opens-no-session"}),
        (FakeServer(0, 4, session=raising(REFUSED)), 1, {"opens-no-session"}),
        # where nothing is known of its sessions, or there is no room, nothing is asked and nothing found
        (FakeServer(0, 4, session=refusing(9), info=info_of(cache_tokens_available=0)), 0, set()),
        (FakeServer(0, 4, session=refusing(9), info=info_of(cache_tokens_available=None)), 0, set()),
        (FakeServer(0, 4, session=refusing(9), info=info_of(session_tensors=10)), 0, set()),
        (FakeServer(0, 4, session=refusing(9), info=info_of(session_tensors=None)), 0, set()),
        (FakeServer(0, 4, session=refusing(9), answer=raising(REFUSED)), 0, {"info-ok-forward-fails"}),
    ],
)
def test_whether_a_session_opens_is_asked_where_it_should(server, asked, found) -> None:
    swarm = FakeSwarm(4, one=server)
    report = report_on(swarm, in_virtual_time=True)
    assert findings(report, "one") == found
    assert swarm.sessions["one"] == asked and swarm.open_sessions == 0
    report_on(swarm, level="info")
    assert swarm.sessions["one"] == asked


def test_a_server_that_opens_no_session_says_what_it_said() -> None:
    report = report_on(FakeSwarm(4, one=FakeServer(0, 4, session=refusing(9))), in_virtual_time=True)
    (found,) = server_of(report, "one").findings
    assert "100 tokens of its cache are free" in found.detail and "out of memory" in found.detail
    assert server_of(report, "one").probes["forward"] == "passed", "it computes all the same"


def test_a_server_that_opened_no_session_is_not_asked_again_for_a_while() -> None:
    now = 0.0
    locked = LockedServers(lambda: now)
    swarm = FakeSwarm(4, one=FakeServer(0, 4, session=raising(PeerNoSessionError("its cache may be locked"))))
    for _ in range(5):
        assert findings(report_on(swarm, locked=locked)) == {"opens-no-session"}
    assert swarm.sessions["one"] == 1
    now = CachePolicy.locked_rest
    swarm.servers["one"] = FakeServer(0, 4)  # restarted
    for _ in range(2):
        assert findings(report_on(swarm, locked=locked)) == set()
    assert swarm.sessions["one"] == 3


def test_a_clean_swarm_is_healthy_and_every_block_was_compared() -> None:
    servers = {"a": FakeServer(0, 3), "b": FakeServer(1, 4), "c": FakeServer(0, 4, dtype=torch.bfloat16)}
    report = report_on(FakeSwarm(4, **servers))
    assert report.verdict is Verdict.HEALTHY and report.exit_code == 0 and findings(report) == set()
    assert [server_of(report, name).compared for name in "abc"] == [3, 3, 4]
    assert report.models[0].replicas == (2, 3, 3, 2)


@pytest.mark.parametrize("level", ["record", "info"])
def test_words_alone_are_never_green(level: str) -> None:
    report = report_on(FakeSwarm(4, **good()), level=level)
    assert report.verdict is Verdict.UNKNOWN and report.exit_code == 3
    assert server_of(report, "good").probes["info"] == ("passed" if level == "info" else "not asked")
    assert report.models[0].has_route is (True if level == "info" else None)


def test_two_that_disagree_are_both_unknown() -> None:
    report = report_on(FakeSwarm(4, one=FakeServer(0, 4), other=FakeServer(0, 4, answer=noisy)))
    assert findings(report, "one") == findings(report, "other") == {"disputed"}
    assert report.verdict is Verdict.UNKNOWN


def test_a_liar_is_found_although_no_span_equals_another() -> None:
    servers = {
        "a": FakeServer(0, 3),
        "b": FakeServer(1, 4),
        "c": FakeServer(2, 4),
        "liar": FakeServer(0, 4, answer=noisy),
    }
    report = report_on(FakeSwarm(4, **servers))
    assert findings(report, "liar") >= {"disagrees-with-replica"}
    assert findings(report, "c") == set()


def test_time_that_ran_out_is_unknown_and_costs_no_more_than_the_limit() -> None:
    servers = {"slow": FakeServer(0, 4, delay=30.0), "quick": FakeServer(0, 4)}
    report = report_on(FakeSwarm(4, **servers), time_limit=0.3)
    slow = server_of(report, "slow")
    assert (slow.verdict, slow.probes["info"]) == (Verdict.UNKNOWN, "not asked")
    assert report.verdict is Verdict.UNKNOWN and findings(report) == set()


def test_no_more_servers_are_asked_at_once_than_allowed() -> None:
    swarm = FakeSwarm(1, **{f"s{index}": FakeServer(0, 1, delay=0.001) for index in range(40)})
    report_on(swarm, concurrency=5)
    assert swarm.most_in_flight == 5


def test_missing_blocks_break_a_model() -> None:
    report = report_on(FakeSwarm(4, a=FakeServer(0, 2), b=FakeServer(3, 4)))
    assert report.models[0].missing == ((2, 3),)
    assert findings(report) == {"missing-blocks"} and report.verdict is Verdict.BROKEN
    assert "2:3" in report.models[0].why


def test_blocks_that_only_a_broken_server_holds_are_missing() -> None:
    report = report_on(FakeSwarm(4, a=FakeServer(0, 2), b=FakeServer(2, 4, answer=raising(REFUSED))))
    model = report.models[0]
    assert (model.replicas, model.claimed, model.verdict) == ((1, 1, 0, 0), (1, 1, 1, 1), Verdict.BROKEN)


def test_thin_blocks_are_a_finding_only_below_what_was_asked_for() -> None:
    swarm = FakeSwarm(4, a=FakeServer(0, 4), b=FakeServer(0, 2))
    assert findings(report_on(swarm)) == set()
    report = report_on(swarm, min_replicas=2)
    assert findings(report) == {"thin-blocks"} and report.verdict is Verdict.DEGRADED
    assert "2:4" in report.models[0].findings[0].detail


def test_nobody_and_nothing() -> None:
    report = report_on(FakeSwarm(4))
    assert findings(report) == {"not-announced"} and report.verdict is Verdict.BROKEN
    swarm = FakeSwarm(4)
    swarm.announced = []
    empty = report_on(swarm)
    assert empty.verdict is Verdict.BROKEN and empty.exit_code == 3 and empty.notes


def test_records_that_cannot_be_read_are_counted() -> None:
    swarm = FakeSwarm(4, **good())
    swarm.more = [Announcement(0, "stranger", "words", 2000.0)]
    assert findings(report_on(swarm)) == {"malformed-records"}


def test_a_server_that_moved_has_left_records() -> None:
    swarm = FakeSwarm(6, a=FakeServer(2, 6), b=FakeServer(0, 6))
    swarm.more = [Announcement(0, "a", (2, 1.0, {"start_block": 0, "end_block": 2}), 1100.0)]
    report = report_on(swarm)
    assert findings(report) == {"stale-record"} == findings(report, "a")


def test_adapters_are_asked_for_and_tried() -> None:
    swarm = FakeSwarm(4, **good(), lora=FakeServer(0, 4, record={"adapters": ["me/lora"]}))
    assert findings(report_on(swarm)) == set() and "me/lora" in swarm.adapters
    report = report_on(swarm, active_adapter="me/lora")
    assert findings(report, "good") == {"adapter-not-announced"} and findings(report, "lora") == set()

    broken = FakeSwarm(4, **good(), lora=FakeServer(0, 4, record={"adapters": ["me/lora"]}))
    broken.refused_adapters = {"me/lora"}
    assert findings(report_on(broken)) == {"adapter-fails"}


def test_a_server_with_a_small_limit_is_asked_less_and_compared_all_the_same() -> None:
    def small(hidden: torch.Tensor) -> torch.Tensor:
        if hidden.shape[0] * hidden.shape[1] > 10:
            raise PeerRefusedError("Task size greater than max_batch_size (10)")
        return hidden

    report = report_on(FakeSwarm(4, **good(), small=FakeServer(0, 4, answer=small)))
    assert report.verdict is Verdict.HEALTHY and server_of(report, "small").compared == 4


def test_the_route_counts_only_where_it_was_asked_for() -> None:
    swarm = FakeSwarm(4, **good())
    assert report_on(swarm, level="route").verdict is Verdict.UNKNOWN  # the time ran out before
    assert report_on(swarm, level="route", route=RouteTimes(0.1, 100.0)).verdict is Verdict.HEALTHY
    failed = report_on(swarm, level="route", route=finding("route-fails", "stopped at the deadline"))
    assert failed.verdict is Verdict.BROKEN and failed.models[0].why == "stopped at the deadline"


@pytest.mark.parametrize("words", ["routing: not found", "length greater than remaining number of bytes in buffer"])
def test_a_peer_that_cannot_be_there_is_a_record_without_a_server(words) -> None:
    """No address of it, or an identity that is none."""
    ghost = FakeServer(0, 4, info=raising(PeerUnreachableError(words)))
    assert findings(report_on(FakeSwarm(4, **good(), ghost=ghost)), "ghost") == {"record-without-server"}


@pytest.mark.parametrize("method", ["info", "answer"])
def test_a_fault_of_our_own_is_named_as_ours_and_leaves_the_rest_of_the_report_standing(method, caplog) -> None:
    broken = FakeServer(0, 4, **{method: raising(KeyError("ours"))})
    report = report_on(FakeSwarm(4, **good(), x=broken))
    assert findings(report) == {"probe-error"}
    assert server_of(report, "x").verdict is Verdict.UNKNOWN
    assert all(server_of(report, name).verdict is Verdict.HEALTHY for name in good())
    assert "KeyError: 'ours'" in caplog.text


@pytest.mark.parametrize(
    ("tensor", "name"),
    [
        (torch.full((1, 2, 3), torch.nan), "not-finite"),
        (torch.zeros(1, 2, 4), "wrong-shape"),
        (torch.zeros(1, 2, 3, dtype=torch.float16), "wrong-answer"),
    ],
)
def test_the_names_follow_what_reading_an_answer_really_raises(tensor: torch.Tensor, name: str) -> None:
    with pytest.raises(PeerAnswerError) as caught:
        wire.read_answer([wire.encode_tensor(tensor)], (1, 2, 3), torch.float32)
    found = from_forward_error(caught.value, "0:4")
    assert (found.name, found.level) == (name, Level.FORWARD)


def test_a_span_is_cut_into_few_calls() -> None:
    """However many borders other spans have, a server computes eight parts at most, and its whole span twice."""
    servers = {f"s{index}": FakeServer(index, index + 30) for index in range(31)}
    swarm = FakeSwarm(60, **servers)
    assert report_on(swarm).verdict is Verdict.HEALTHY
    asked = [swarm.forwards.count(call) for call in set(swarm.forwards)]
    assert max(asked) <= 2
    assert all(sum(name == peer for peer, _, _ in swarm.forwards) <= 10 for name in servers)


def test_blocks_at_home_judge_a_server_that_has_no_replica() -> None:
    swarm = FakeSwarm(4, good=FakeServer(0, 2), liar=FakeServer(2, 4, answer=noisy))
    assert findings(report_on(swarm)) == set(), "nobody to hold it against"
    report = report_on(swarm, home=FakeBlocks(0, 4))
    assert findings(report) == {"disagrees-with-home", "missing-blocks"} and report.verdict is Verdict.BROKEN
    assert server_of(report, "liar").verdict is Verdict.BROKEN
    assert server_of(report, "good").verdict is Verdict.HEALTHY and server_of(report, "good").compared == 2


def test_blocks_at_home_are_right_whatever_most_servers_say() -> None:
    swarm = FakeSwarm(4, one=FakeServer(0, 4, answer=noisy), two=FakeServer(0, 4, answer=noisy), good=FakeServer(0, 4))
    assert server_of(report_on(swarm), "good").verdict is Verdict.BROKEN
    report = report_on(swarm, home=FakeBlocks(1, 3))
    assert server_of(report, "good").verdict is not Verdict.HEALTHY, "blocks 0 and 3 are still put to the vote"
    report = report_on(swarm, home=FakeBlocks(0, 4))
    assert server_of(report, "good").verdict is Verdict.HEALTHY
    assert {server_of(report, name).verdict for name in ("one", "two")} == {Verdict.BROKEN}
    assert findings(report) == {"disagrees-with-home"}


def test_blocks_at_home_settle_a_dispute_and_take_another_dtype_for_no_lie() -> None:
    disputed = FakeSwarm(4, liar=FakeServer(0, 4, answer=noisy), good=FakeServer(0, 4, dtype=torch.bfloat16))
    assert findings(report_on(disputed)) == {"disputed"}
    report = report_on(disputed, home=FakeBlocks(0, 4))
    assert server_of(report, "good").verdict is Verdict.HEALTHY
    assert server_of(report, "liar").verdict is Verdict.BROKEN


def test_servers_beside_the_blocks_at_home_are_compared_as_ever() -> None:
    swarm = FakeSwarm(4, a=FakeServer(0, 4), b=FakeServer(2, 4), c=FakeServer(2, 4, answer=noisy))
    report = report_on(swarm, home=FakeBlocks(0, 2))
    assert findings(report) == {"disagrees-with-replica"}
    assert server_of(report, "a").compared == 4
