"""The forward path over real libp2p: what a server answers, and what it refuses in which words."""

import pytest
import torch
from hivemind.p2p.p2p_daemon_bindings.control import P2PHandlerError
from hivemind.proto.runtime_pb2 import CompressionType
from hivemind.utils.tensor_descr import BatchTensorDescriptor

from tests.local_swarm.conftest import BLOCKS, HIDDEN
from tests.support.tensors import distance, hidden_states
from tests.support.wire_client import chain


def test_rpc_info_of_a_block(swarm, client):
    whole = swarm.servers[2]
    hidden = BatchTensorDescriptor(1, 2048, HIDDEN, dtype=torch.bfloat16, compression=CompressionType.NONE)
    assert client.info(whole.peer_id, "tiny-llama.4") == {
        "version": "2.3.0.dev2",
        "dht_client_mode": False,
        "cache_tokens_available": BLOCKS * 128,
        "forward_schema": ((hidden,), {}),
        "outputs_schema": (hidden,),
        "keyword_names": (),
        "inference_schema": (
            (
                hidden,
                BatchTensorDescriptor((), dtype=torch.bfloat16),
                BatchTensorDescriptor((), dtype=torch.int64),
            ),
            {},
        ),
    }


def test_rpc_info_of_a_server(swarm, client):
    assert set(client.info(swarm.servers[0].peer_id)) == {"version", "dht_client_mode", "cache_tokens_available"}
    with pytest.raises(P2PHandlerError, match=r"KeyError\('tiny-llama\.4'\)"):
        client.info(swarm.servers[0].peer_id, "tiny-llama.4")


def test_forward_through_two_servers(swarm, client, local):
    hidden, prompts = hidden_states(4, 9), torch.randn(BLOCKS, 1, 3, HIDDEN)
    (middle,) = client.forward(swarm.servers[0].peer_id, chain("tiny-llama", 0, 3), hidden, prompts[:3])
    (output,) = client.forward(swarm.servers[1].peer_id, chain("tiny-llama", 3, 5), middle, prompts[3:])
    assert distance(output, local.forward(hidden, prompts)) < 1e-6


def test_any_run_of_blocks_of_a_server(swarm, client, local):
    hidden = hidden_states(2, 7)
    (output,) = client.forward(swarm.servers[0].peer_id, chain("tiny-llama", 1, 3), hidden)
    assert distance(output, local.forward(hidden, start=1, stop=3)) < 1e-6


def test_stream_of_several_messages_each_way(swarm, client, local):
    hidden = hidden_states(600, 60)  # 4.6 MB: two parts
    assert hidden.numel() * 4 > 4 * 2**20
    prompts = torch.randn(3, 1, 3, HIDDEN)
    (output,) = client.forward_stream(swarm.servers[0].peer_id, chain("tiny-llama", 0, 3), hidden, prompts)
    assert distance(output, local.forward(hidden, prompts, stop=3)) < 1e-6


@pytest.mark.parametrize("method", ["backward", "backward_stream"])
def test_gradients(swarm, client, local, method):
    backward, server, uid = getattr(client, method), swarm.servers[1].peer_id, chain("tiny-llama", 3, 5)
    hidden, upwards, prompts = hidden_states(4, 9), hidden_states(4, 9, seed=1), torch.randn(2, 1, 3, HIDDEN)
    expected = local.backward(hidden, upwards, prompts, start=3, stop=5)
    for found, right in zip(backward(server, uid, hidden, upwards, prompts), expected, strict=True):
        assert distance(found, right) < 1e-6
    (alone,) = backward(server, uid, hidden, upwards)
    assert distance(alone, *local.backward(hidden, upwards, start=3, stop=5)) < 1e-6
    small = backward(server, uid, hidden, upwards, prompts, output_compression=(int(CompressionType.FLOAT16),) * 2)
    assert 0 < distance(small[0], expected[0]) < 1e-2


def test_gradients_in_several_messages_each_way(swarm, client, local):
    hidden = hidden_states(600, 60)
    prompts = torch.randn(1, 600, 3, HIDDEN)
    found = client.backward_stream(swarm.servers[0].peer_id, "tiny-llama.0", hidden, hidden, prompts)
    for one, right in zip(found, local.backward(hidden, hidden, prompts, stop=1), strict=True):
        assert distance(one, right) < 1e-6


@pytest.mark.parametrize("method", ["backward", "backward_stream"])
def test_refusals_of_gradients(swarm, client, method):
    call, first, hidden = getattr(client, method), swarm.servers[0].peer_id, hidden_states(2, 7)
    with pytest.raises(P2PHandlerError, match=r"Remote peer does not serve tiny-llama\.3"):
        call(first, chain("tiny-llama", 2, 4), hidden, hidden)
    with pytest.raises(P2PHandlerError, match=r"Task size greater than max_batch_size \(64\), it can't be processed"):
        call(swarm.servers[2].peer_id, "tiny-llama.0", hidden_states(5, 13), hidden_states(5, 13))
    with pytest.raises(P2PHandlerError, match=r"expected gradients \(2, 7, 32\), found \(2, 6, 32\)"):
        call(first, "tiny-llama.0", hidden, hidden[:, :6])
    with pytest.raises(P2PHandlerError, match="expected prompts for 1 blocks, found 2"):
        call(first, "tiny-llama.0", hidden, hidden, torch.zeros(2, 1, 3, HIDDEN))
    with pytest.raises(P2PHandlerError, match="expected output_compression to be a tuple of one code"):
        call(first, "tiny-llama.0", hidden, hidden, output_compression=(0, 0))
    with pytest.raises(P2PHandlerError, match="expected 3 tensors, found 2"):
        call(first, "tiny-llama.0", hidden, hidden, args_structure=((b"__T0", b"__T1"), {}))


@pytest.mark.parametrize("method", ["forward", "forward_stream"])
def test_refusals(swarm, client, method):
    call = getattr(client, method)
    first, whole = swarm.servers[0].peer_id, swarm.servers[2].peer_id
    hidden = hidden_states(2, 7)
    with pytest.raises(P2PHandlerError, match=r"Remote peer does not serve tiny-llama\.3"):
        call(first, chain("tiny-llama", 2, 4), hidden)
    with pytest.raises(P2PHandlerError, match="Remote peer does not serve other"):
        call(first, "other.0", hidden)
    with pytest.raises(P2PHandlerError, match=r"Remote peer does not serve ($|')"):
        call(first, "", hidden)
    with pytest.raises(P2PHandlerError, match="expected consecutive blocks"):
        call(first, "tiny-llama.0 tiny-llama.2", hidden)
    with pytest.raises(P2PHandlerError, match=r"Task size greater than max_batch_size \(64\), it can't be processed"):
        call(whole, "tiny-llama.0", hidden_states(5, 13))
    with pytest.raises(P2PHandlerError, match="adapter other/lora not found"):
        call(first, "tiny-llama.0", hidden, active_adapter="other/lora")
    with pytest.raises(P2PHandlerError, match="Batch should contain more than 0 samples"):
        call(first, "tiny-llama.0", hidden[:0])
    with pytest.raises(P2PHandlerError, match="expected hidden states"):
        call(first, "tiny-llama.0", hidden[0])
    with pytest.raises(P2PHandlerError, match=r"size|shape|match"):
        call(first, "tiny-llama.0", torch.randn(2, 7, HIDDEN - 1))


def test_unary_errors_are_repr_and_stream_errors_are_str(swarm, client):
    with pytest.raises(P2PHandlerError, match=r"RuntimeError\('Remote peer"):
        client.forward(swarm.servers[0].peer_id, "other.0", hidden_states(1, 2))
    with pytest.raises(P2PHandlerError, match=r": Remote peer"):
        client.forward_stream(swarm.servers[0].peer_id, "other.0", hidden_states(1, 2))


def test_an_announced_adapter_is_accepted(swarm, client):
    client.forward(swarm.servers[0].peer_id, "tiny-llama.0", hidden_states(1, 3), active_adapter="some/lora")
    client.forward(swarm.servers[0].peer_id, "tiny-llama.0", hidden_states(1, 3), active_adapter=None)


def test_a_batch_as_large_as_the_limit_is_taken(swarm, client):
    client.forward(swarm.servers[2].peer_id, "tiny-llama.0", hidden_states(4, 16))
