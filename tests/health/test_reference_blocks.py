"""Blocks at home as a judge. At the seam: no network."""

import torch

from petals_eval.health import Verdict
from tests.support.fake_health import (
    FakeBlocks,
    FakeServer,
    FakeSwarm,
    findings,
    noisy,
    report_on,
    server_of,
)


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
