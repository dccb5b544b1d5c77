"""`petals-eval health` on real Petals 2.2.0 servers, mixed with the stub's."""

from pathlib import Path

from petals_eval.health import Verdict, check_health
from tests.health import hostile
from tests.health.hostile import HostileSwarm
from tests.interop.conftest import STORIES
from tests.interop.real_petals import RealPetalsSwarm
from tests.support.fake_health import findings, server_of


def test_real_servers_alone_are_healthy(stories: RealPetalsSwarm) -> None:
    for _ in range(20):
        report = check_health(stories.initial_peers)
        assert (report.verdict, findings(report)) == (Verdict.HEALTHY, set())
    [model] = report.models
    assert (model.name, model.num_blocks, model.replicas) == (STORIES, 5, (1, 1, 1, 1, 1))
    assert {(server.version_seen, server.dtype_seen) for server in model.servers} == {("2.2.0.post1", "float32")}
    # Each tells how far those are that it pinged, if only that there are none.
    peers = {server.peer_id for server in model.servers}
    assert all(server.next_pings is not None and server.next_pings.keys() <= peers for server in model.servers)
    assert [each.state for each in report.bootstrap] == ["reachable"] * len(report.bootstrap) != []


def test_mixed_with_the_stub_they_agree_and_a_liar_stands_out(stories_dir: Path) -> None:
    """In a swarm of its own: records outlive their servers, and whoever comes later would meet the liar's."""
    with (
        RealPetalsSwarm(stories_dir, [(0, 2), (2, 4), (4, 5)], dht_prefix=STORIES) as real,
        HostileSwarm(stories_dir, STORIES, real.initial_peers) as ours,
    ):
        ours.add(0, 5)
        ours.add(1, 5, dtype="bfloat16")
        clean = check_health(real.initial_peers)
        assert (clean.verdict, findings(clean)) == (Verdict.HEALTHY, set())
        assert all(server.compared == server.end - server.start for server in clean.models[0].servers)

        liar = ours.add(0, 5, hostile.noise).peer.peer_id
        report = check_health(real.initial_peers)
        assert findings(report, liar) == {"disagrees-with-replica"}
        assert all(findings(report, server.peer_id) == set() for server in real.servers)
        assert server_of(report, real.servers[0].peer_id).verdict is Verdict.HEALTHY
        assert report.verdict is Verdict.DEGRADED
