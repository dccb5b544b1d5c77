"""A whole swarm: what it says of itself, how it splits the blocks, and what it refuses before anything starts."""

import pytest

from petals_eval.errors import ConfigError, ModelError
from petals_eval.local_swarm import LocalSwarm
from petals_eval.local_swarm.launcher import split_evenly
from petals_eval.swarm.wire.span import Span
from tests.local_swarm.conftest import BLOCKS


def test_the_swarm_says_what_it_is(swarm):
    assert swarm.dht_prefix == "tiny-llama"
    assert swarm.num_blocks == BLOCKS
    assert [server.span for server in swarm.servers] == [Span(0, 3), Span(3, 5), Span(0, 5)]
    assert len({server.peer_id for server in swarm.servers}) == 3
    assert all(server.is_alive() for server in swarm.servers)
    # The address is the launcher's own node, not a server that a test may kill.
    assert not any(server.peer_id in maddr for server in swarm.servers for maddr in swarm.initial_peers)
    assert all(maddr.startswith("/ip4/127.0.0.1/tcp/") for maddr in swarm.initial_peers)


@pytest.mark.parametrize(
    ("blocks", "servers", "spans"),
    [
        (6, 3, ((0, 2), (2, 4), (4, 6))),
        (5, 3, ((0, 2), (2, 4), (4, 5))),
        (5, 1, ((0, 5),)),
        (7, 3, ((0, 3), (3, 5), (5, 7))),
    ],
)
def test_blocks_are_split_evenly(blocks, servers, spans):
    assert split_evenly(blocks, servers) == tuple(Span(*span) for span in spans)


def test_impossible_settings_are_refused_before_anything_starts(folder, tmp_path):
    with pytest.raises(ConfigError, match="expected 1 to 5 servers for 5 blocks, found 6"):
        LocalSwarm(folder, servers=6)
    with pytest.raises(ConfigError, match=r"expected spans within 0:5.*found 3:6"):
        LocalSwarm(folder, spans=[(3, 6)])
    with pytest.raises(ConfigError, match=r"dtype.*found 'int3'"):
        LocalSwarm(folder, dtype="int3")
    with pytest.raises(ConfigError, match=r"bath_size"):
        LocalSwarm(folder, bath_size=3)
    with pytest.raises(ConfigError, match="without dots"):
        LocalSwarm(folder, dht_prefix="a.b")
    with pytest.raises(ModelError, match="no folder"):
        LocalSwarm(str(tmp_path / "nothing here"))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_layer": 2}')
    with pytest.raises(ModelError, match="gpt2"):
        LocalSwarm(tmp_path)
