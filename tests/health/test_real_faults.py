"""The same faults on real peers over libp2p, and clean swarms of the stub."""

from pathlib import Path

import pytest

from petals_eval.health import Verdict, check_health
from petals_eval.local_swarm import LocalSwarm
from petals_eval.swarm.wire.records import ServerState
from tests.health import hostile
from tests.health.conftest import STORIES
from tests.health.hostile import UNKNOWN_PEER, HostileSwarm
from tests.support.fake_health import findings, server_of


def test_twenty_looks_at_a_clean_swarm_find_nothing(clean_swarm: LocalSwarm) -> None:
    """Through the route level, two dtypes among the servers, a fresh connection each time."""
    for _ in range(20):
        report = check_health(clean_swarm.initial_peers)
        assert (report.verdict, findings(report)) == (Verdict.HEALTHY, set())
    model = report.models[0]
    assert (model.name, model.num_blocks, model.replicas) == (STORIES, 5, (2, 3, 4, 3, 3))
    assert model.has_route and 0 < model.route_seconds < 30
    assert all(server.round_trip > 0 and server.tokens_per_second > 0 for server in model.servers)
    assert all(server.compared >= 3 and server.probes["forward"] == "passed" for server in model.servers)


def test_every_fault_of_real_servers_is_named_and_the_good_ones_are_not(stories_model: Path) -> None:
    with HostileSwarm(stories_model, STORIES) as swarm:
        good = [swarm.add(0, 5).peer.peer_id, swarm.add(0, 3).peer.peer_id, swarm.add(2, 5).peer.peer_id]
        bad = {
            "not-finite": swarm.add(0, 5, hostile.nan).peer.peer_id,
            "disagrees-with-replica": swarm.add(0, 5, hostile.noise).peer.peer_id,
            "wrong-shape": swarm.add(0, 5, hostile.shorter).peer.peer_id,
            "info-ok-forward-fails": swarm.add(0, 5, hostile.failing).peer.peer_id,
            "nondeterministic": swarm.add(0, 5, dropout=0.1).peer.peer_id,
            "stale-record": swarm.add(0, 5, update_period=30.0).peer.peer_id,
            "record-without-server": UNKNOWN_PEER,
        }
        swarm.store(UNKNOWN_PEER, range(5), (2, 10.0, {"start_block": 0, "end_block": 5}))
        narrow = swarm.add(2, 4)
        swarm.claim(narrow.peer, 1, 5)
        bad["wrong-span"] = narrow.peer.peer_id
        for name, answer in (
            ("info-unreadable", b"garbage"),
            ("info-refused", RuntimeError("no")),
            ("no-answer", None),
        ):
            peer = swarm.answering(answer)
            swarm.claim(peer, 0, 5)
            bad[name] = peer.peer_id
        nobody = swarm.bare()
        swarm.claim(nobody, 0, 5)
        bad["not-a-server"] = nobody.peer_id
        joining = swarm.bare()
        swarm.claim(joining, 0, 5, ServerState.JOINING)
        bad["joining"] = joining.peer_id
        gone = swarm.add(1, 4)
        bad["unreachable"] = gone.peer.peer_id
        swarm.kill(gone)

        report = check_health(swarm.initial_peers, connect_timeout=5)
        assert {name: findings(report, peer) for name, peer in bad.items()} == {name: {name} for name in bad}
        assert [findings(report, peer) for peer in good] == [set()] * 3
        assert all(server_of(report, peer).verdict is Verdict.HEALTHY for peer in good)
        assert all(server_of(report, peer).verdict is not Verdict.HEALTHY for peer in bad.values())
        assert report.verdict is Verdict.DEGRADED and report.models[0].route_seconds is not None


def test_several_models_are_found_and_one_can_be_named(clean_swarm: LocalSwarm, stories_model: Path) -> None:
    with HostileSwarm(stories_model, "_private", clean_swarm.initial_peers) as private:
        private.add(0, 5)
        other = HostileSwarm(stories_model, "another", clean_swarm.initial_peers)
        of_drift = {"dht_prefix": "of-drift", "index_key": "_drift.models", "initial_peers": clean_swarm.initial_peers}
        with other, LocalSwarm(stories_model, servers=1, mode="thread", **of_drift):
            other.add(0, 4)
            report = check_health(clean_swarm.initial_peers, level="info")
            assert {model.name for model in report.models} == {STORIES, "another", "of-drift"}
            broken = next(model for model in report.models if model.name == "another")
            assert (broken.verdict, broken.missing) == (Verdict.BROKEN, ((4, 5),))

            named = check_health(clean_swarm.initial_peers, models="_private")
            assert [(model.name, model.num_blocks) for model in named.models] == [("_private", 5)]
            assert named.verdict is Verdict.UNKNOWN and findings(named) == {"blocks-unknown"}
            with_the_model = check_health(clean_swarm.initial_peers, models="_private", model=str(stories_model))
            assert with_the_model.verdict is Verdict.HEALTHY


def test_a_model_nobody_serves(clean_swarm: LocalSwarm) -> None:
    report = check_health(clean_swarm.initial_peers, models=["nobody"])
    assert report.verdict is Verdict.BROKEN and findings(report) == {"not-announced"}
    assert "announced here: " in report.models[0].why and "stories260K-hf (5 blocks)" in report.models[0].why


@pytest.mark.parametrize("fault", [hostile.nan, hostile.failing])
def test_a_route_that_only_a_liar_completes_is_broken(fault, stories_model: Path) -> None:
    with HostileSwarm(stories_model, STORIES) as swarm:
        swarm.add(0, 3)
        swarm.add(3, 5, fault)
        report = check_health(swarm.initial_peers)
        assert report.verdict is Verdict.BROKEN
        assert report.models[0].missing == ((3, 5),) and report.models[0].has_route is False
