"""What a server announces in the DHT."""

import socket

from tests.local_swarm.conftest import BLOCKS
from tests.support.tensors import hidden_states


def test_records_in_the_dht(swarm, client):
    first, second, whole = (server.peer_id for server in swarm.servers)
    assert client.record("_petals.models") == {"tiny-llama": {"num_blocks": BLOCKS, "repository": None}}
    records = client.record("tiny-llama.1")
    assert set(records) == {first, whole}
    state, throughput, extra = records[first]
    assert (state, throughput) == (2, 12.5)
    assert extra == {
        "start_block": 0,
        "end_block": 3,
        "public_name": None,
        "version": "2.3.0.dev2",
        "network_rps": None,
        "forward_rps": None,
        "inference_rps": None,
        "adapters": ("some/lora",),
        "torch_dtype": "float32",
        "quant_type": "none",
        "using_relay": False,
        "cache_tokens_left": 2 * 3 * 80_000,
        "next_pings": None,
    }
    assert records[whole][2]["torch_dtype"] == "bfloat16"
    assert records[whole][2]["public_name"] == "whole"
    assert set(client.record("tiny-llama.4")) == {second, whole}
    assert client.record("tiny-llama.5") == {}
    assert all(200 < seconds <= 240 for seconds in client.lifetimes("tiny-llama.1").values())


def test_a_server_announces_the_address_it_is_told_to(add_server, client):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    listened, announced = f"/ip4/127.0.0.1/tcp/{port}", f"/ip4/127.0.0.2/tcp/{port}"
    server = add_server((0, 1), host_maddrs=(listened, announced), announce_maddrs=(announced,))
    assert server.maddrs == (f"{announced}/p2p/{server.peer_id}",)
    client.forward(server.peer_id, "tiny-llama.0", hidden_states(1, 2))
