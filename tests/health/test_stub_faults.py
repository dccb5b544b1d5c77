"""The local swarm's own faults, switched on one after the other: each under its own name, and none green."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from petals_eval.health import Verdict, check_health
from petals_eval.local_swarm import LocalSwarm
from petals_eval.local_swarm.faults import catalog as f
from petals_eval.local_swarm.handles import LocalServer
from tests.health.conftest import STORIES
from tests.support.fake_health import findings, server_of

NAMES: dict[str, list] = {
    "info-ok-forward-fails": [f.InfoOnly(), f.Hang(), f.Refuse(reason="overload"), f.Reset()],
    "not-finite": [f.NotFinite()],
    "disagrees-with-replica": [f.Noise(size=0.01), f.OtherWeights()],
    "nondeterministic": [f.TrainingMode(), f.Noise(size=0.05, repeats=False)],
    "wrong-span": [f.ClaimsSpan(start=0, stop=5)],
    "wrong-shape": [f.WrongShape()],
    "wrong-answer": [f.WrongDtype(), f.Truncated(), f.Oversized()],
    "dtype-mismatch": [f.ClaimsDtype()],
    "joining": [f.JoiningForEver()],
    "opens-no-session": [f.LockedCache()],
}
FAULTS = [(name, fault) for name, each in NAMES.items() for fault in each]
QUICK = {"level": "forward", "connect_timeout": 3, "call_timeout": 2}


@pytest.fixture(scope="module")
def swarm(stories_model: Path) -> Iterator[LocalSwarm]:
    """Of servers that are well."""
    with LocalSwarm(stories_model, spans=[(0, 5)] * 3, mode="thread", dht_prefix=STORIES) as swarm:
        yield swarm


@pytest.fixture
def sick(swarm: LocalSwarm) -> Iterator[LocalServer]:
    """One more, which is about to have a fault. A new one each time: what it says of itself lives on in the DHT."""
    server = swarm.add_server((1, 4))
    yield server
    server.stop()


@pytest.mark.parametrize(("name", "fault"), FAULTS, ids=[f"{name}: {fault.name}" for name, fault in FAULTS])
def test_a_fault_of_the_stub_has_its_name_and_is_not_green(name, fault, sick, swarm: LocalSwarm) -> None:
    sick.switch(fault)
    report = check_health(swarm.initial_peers, **QUICK)
    assert findings(report, sick.peer_id) == {name}
    assert server_of(report, sick.peer_id).verdict is not Verdict.HEALTHY
    assert report.verdict is not Verdict.HEALTHY
    assert all(findings(report, other.peer_id) == set() for other in swarm.servers[:3])


def test_a_server_whose_sessions_are_of_another_layout_is_asked_for_none(sick, swarm: LocalSwarm) -> None:
    sick.switch(f.OtherLayout(tensors=10))
    report = check_health(swarm.initial_peers, **QUICK)
    assert findings(report) == set() and report.verdict is Verdict.HEALTHY
    assert "other_layout" not in sick.fault_counts()


def test_a_record_without_a_server_is_found_beside_the_server_that_left_it(sick, swarm: LocalSwarm) -> None:
    sick.switch(f.RecordWithoutServer())
    report = check_health(swarm.initial_peers, **QUICK)
    known = {server.peer_id for server in swarm.servers}
    (ghost,) = [server for server in report.models[0].servers if server.peer_id not in known]
    assert findings(report, ghost.peer_id) == {"record-without-server"}
    assert server_of(report, ghost.peer_id).verdict is Verdict.BROKEN and report.verdict is Verdict.DEGRADED
    assert findings(report, sick.peer_id) == set()


def test_a_server_that_is_gone_is_unreachable(swarm: LocalSwarm) -> None:
    gone = swarm.add_server((1, 4))
    gone.kill()
    report = check_health(swarm.initial_peers, **QUICK)
    assert findings(report, gone.peer_id) == {"unreachable"}
    assert server_of(report, gone.peer_id).verdict is Verdict.BROKEN and report.verdict is Verdict.DEGRADED
