"""`petals-eval modes` on a swarm: which servers run their blocks in training mode, by the probe that runs go by."""

from pathlib import Path

from petals_eval.local_swarm import LocalSwarm
from petals_eval.local_swarm.faults import catalog as f
from petals_eval.swarm.peers.peer_text import short_peer
from tests.cli.invoking import invoke
from tests.health.conftest import STORIES


def test_a_server_in_training_mode_is_told_apart(stories_model: Path) -> None:
    with LocalSwarm(stories_model, spans=[(0, 5), (0, 5)], mode="thread", dht_prefix=STORIES) as swarm:
        sick, well = swarm.servers
        sick.switch(f.TrainingMode())
        outcome = invoke("modes", "--initial-peers", *swarm.initial_peers)
    assert outcome.code == 1
    lines = {line.split()[0]: line for line in outcome.out.splitlines()[1:]}
    assert "TRAINING MODE" in lines[short_peer(sick.peer_id)]
    assert "the same answer twice" in lines[short_peer(well.peer_id)]
