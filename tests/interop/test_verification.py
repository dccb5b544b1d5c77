"""Real Petals servers beside the stub's: a share of the work is computed on both, and nobody is accused."""

import torch

from petals_eval.local_swarm import LocalSwarm
from petals_eval.local_swarm.faults.catalog import Noise
from petals_eval.model.blocks import BlockSpan
from tests.interop.conftest import BOUNDED, STORIES
from tests.interop.petals_folders import block_states
from tests.interop.real_petals import RealPetalsSwarm
from tests.support.real_swarm import connect

RUNS = 20


def run(connection, prefix, hidden, home=None):
    """A run that has seen no server before; what it came to."""
    remote = connection.remote_sequential(prefix, 5)
    if home is not None:
        remote.verify_at_home(home)
    for part in hidden:
        remote(part)
    remote.settle()
    return remote.status().findings, remote.audit_progress()


def micro_batches(folder):
    ids = torch.randint(3, 320, (16, 20), generator=torch.Generator().manual_seed(7))
    return block_states(folder, ids)[0].split(2)


def test_petals_servers_and_the_stubs_do_not_accuse_each_other(stories_dir):
    """float32 of both, bfloat16 of both, and blocks at home."""
    hidden = micro_batches(stories_dir)
    home = BlockSpan.load(str(stories_dir), 1, 4)
    with (
        LocalSwarm(stories_dir, spans=[(0, 5)], dht_prefix=STORIES, mode="thread") as ours,
        RealPetalsSwarm(stories_dir, [(0, 3), (3, 5)], dht_prefix=STORIES, initial_peers=ours.initial_peers),
        RealPetalsSwarm(stories_dir, [(0, 5)], dht_prefix=STORIES, dtype="bfloat16", initial_peers=ours.initial_peers),
        connect(ours, verify=0.5, **BOUNDED) as connection,
    ):
        done = 0
        for number in range(RUNS):
            accused, audits = run(connection, STORIES, hidden, home if number % 2 else None)
            assert accused == ()
            done += audits.done
    assert done >= 2 * RUNS


def test_a_stub_that_adds_noise_is_named_by_petals_servers(stories_dir):
    noise = (Noise(size=0.01),)
    with (
        LocalSwarm(stories_dir, spans=[(0, 5)], dht_prefix=STORIES, mode="thread", faults=noise) as ours,
        RealPetalsSwarm(stories_dir, [(0, 5), (0, 5)], dht_prefix=STORIES, initial_peers=ours.initial_peers),
        connect(ours, verify=0.5, **BOUNDED) as connection,
    ):
        accused, _ = run(connection, STORIES, micro_batches(stories_dir))
        assert [(each.server.peer_id, each.status) for each in accused] == [(ours.servers[0].peer_id, "wrong")]
