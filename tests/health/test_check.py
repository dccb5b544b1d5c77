"""From what servers do to the verdict on their model and on the swarm. At the seam: no network."""

import pytest
import torch

from petals_eval.health import Verdict
from petals_eval.health.findings import finding
from petals_eval.health.live import RouteTimes
from petals_eval.health.terminal import coverage_text
from petals_eval.swarm.wire.records import Announcement
from tests.support.fake_health import (
    REFUSED,
    FakeServer,
    FakeSwarm,
    findings,
    good,
    noisy,
    raising,
    report_on,
    server_of,
)


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


def test_a_model_is_not_healthy_while_nobody_says_how_many_blocks_it_has() -> None:
    swarm = FakeSwarm(4, **good())
    swarm.announced = []
    report = report_on(swarm, models="tiny")
    assert (report.verdict, report.exit_code, findings(report)) == (Verdict.UNKNOWN, 3, {"blocks-unknown"})
    assert "--num-blocks" in report.models[0].why and coverage_text(report.models[0]).startswith("4/4 or more blocks")
    told = report_on(swarm, models="tiny", num_blocks=4)
    assert told.verdict is Verdict.HEALTHY and "or more" not in coverage_text(told.models[0])
    assert report_on(swarm, models="tiny", num_blocks=5).verdict is Verdict.BROKEN


def test_records_that_cannot_be_read_are_counted() -> None:
    swarm = FakeSwarm(4, **good())
    swarm.more = [Announcement(0, "stranger", "words", 2000.0)]
    assert findings(report_on(swarm)) == {"malformed-records"}


def test_a_server_that_moved_has_left_records() -> None:
    swarm = FakeSwarm(6, a=FakeServer(2, 6), b=FakeServer(0, 6))
    swarm.more = [Announcement(0, "a", (2, 1.0, {"start_block": 0, "end_block": 2}), 1100.0)]
    report = report_on(swarm)
    assert findings(report) == {"stale-record"} == findings(report, "a")


def test_the_route_counts_only_where_it_was_asked_for() -> None:
    swarm = FakeSwarm(4, **good())
    assert report_on(swarm, level="route").verdict is Verdict.UNKNOWN  # the time ran out before
    assert report_on(swarm, level="route", route=RouteTimes(0.1, 100.0)).verdict is Verdict.HEALTHY
    failed = report_on(swarm, level="route", route=finding("route-fails", "stopped at the deadline"))
    assert failed.verdict is Verdict.BROKEN and failed.models[0].why == "stopped at the deadline"


@pytest.mark.parametrize("method", ["info", "answer"])
def test_a_fault_of_our_own_is_named_as_ours_and_leaves_the_rest_of_the_report_standing(method, caplog) -> None:
    broken = FakeServer(0, 4, **{method: raising(KeyError("ours"))})
    report = report_on(FakeSwarm(4, **good(), x=broken))
    assert findings(report) == {"probe-error"}
    assert server_of(report, "x").verdict is Verdict.UNKNOWN
    assert all(server_of(report, name).verdict is Verdict.HEALTHY for name in good())
    assert "KeyError: 'ours'" in caplog.text


def test_a_span_is_cut_into_few_calls() -> None:
    """However many borders other spans have, a server computes eight parts at most, and its whole span twice."""
    servers = {f"s{index}": FakeServer(index, index + 30) for index in range(31)}
    swarm = FakeSwarm(60, **servers)
    assert report_on(swarm).verdict is Verdict.HEALTHY
    asked = [swarm.forwards.count(call) for call in set(swarm.forwards)]
    assert max(asked) <= 2
    assert all(sum(name == peer for peer, _, _ in swarm.forwards) <= 10 for name in servers)
