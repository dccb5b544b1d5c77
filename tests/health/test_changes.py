"""What is different between two looks, in words."""

from dataclasses import replace

from petals_eval.health.changes import changes
from petals_eval.health.results import BootstrapPeer
from tests.support.fake_health import FakeServer, FakeSwarm, noisy, report_on


def test_changes_between_two_looks() -> None:
    before = report_on(FakeSwarm(4, a=FakeServer(0, 4), b=FakeServer(0, 2), c=FakeServer(0, 4), d=FakeServer(0, 4)))
    servers = {"a": FakeServer(0, 4), "b": FakeServer(1, 4), "d": FakeServer(0, 4)}
    now = report_on(FakeSwarm(4, **servers, bad=FakeServer(0, 4, answer=noisy)))
    lines = changes(before, now)
    assert changes(now, now) == []
    assert any("healthy -> degraded" in line for line in lines)
    assert any("c left (blocks 0:4)" in line for line in lines)
    assert any("bad came (blocks 0:4), broken" in line for line in lines)
    assert any("b moved from blocks 0:2 to 1:4" in line for line in lines)
    assert any("bad disagrees-with-replica: " in line for line in lines)
    back = changes(now, before)
    assert any("degraded -> healthy" in line for line in back)


def test_a_bootstrap_peer_that_was_lost_is_told() -> None:
    report = report_on(FakeSwarm(4, a=FakeServer(0, 4)))
    here = replace(report, bootstrap=(BootstrapPeer("/a", "reachable", seconds=0.1), BootstrapPeer("/b", "reachable")))
    lost = replace(report, bootstrap=(BootstrapPeer("/a", "unreachable", "closed"), BootstrapPeer("/b", "reachable")))
    assert changes(here, lost) == ["bootstrap peer /a reachable -> unreachable"]
    assert changes(here, here) == changes(report, here) == []
