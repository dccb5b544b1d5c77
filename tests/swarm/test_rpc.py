"""The calls as hivemind sees them, and streams over a real swarm."""

import torch

from petals_eval.config import SwarmSettings
from petals_eval.local_swarm.launcher import LocalSwarm
from petals_eval.swarm import SwarmConnection
from petals_eval.swarm.rpc import TransformerConnectionHandler


def test_hivemind_takes_the_streams_for_streams():
    TransformerConnectionHandler._collect_rpc_handlers()
    handlers = {handler.method_name: handler for handler in TransformerConnectionHandler._rpc_handlers}
    assert sorted(handlers) == ["rpc_forward", "rpc_forward_stream", "rpc_inference", "rpc_info"]
    for name, handler in handlers.items():
        assert handler.stream_input == handler.stream_output == (name in ("rpc_forward_stream", "rpc_inference"))


def test_a_call_over_one_mebibyte_streams(realdata):
    hidden = torch.randn(10, 600, 64, generator=torch.Generator().manual_seed(0))
    with LocalSwarm(realdata / "stories260K-hf", spans=[(0, 5)], mode="thread", max_batch_size=6000) as swarm:
        peers = tuple(swarm.initial_peers)
        with SwarmConnection.connect(SwarmSettings(initial_peers=peers, max_tokens_per_call=6000)) as connection:
            streamed = connection.remote_sequential(swarm.dht_prefix, 5)(hidden)
        with SwarmConnection.connect(SwarmSettings(initial_peers=peers, max_tokens_per_call=600)) as connection:
            expected = connection.remote_sequential(swarm.dht_prefix, 5)(hidden)
    torch.testing.assert_close(streamed, expected, rtol=0, atol=1e-4)
