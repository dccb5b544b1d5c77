"""The forward path over real libp2p: what a server answers, and what it refuses in which words."""

import socket

import pytest
import torch
from hivemind.p2p.p2p_daemon_bindings.control import P2PHandlerError
from hivemind.proto.runtime_pb2 import CompressionType
from hivemind.utils.tensor_descr import BatchTensorDescriptor

from petals_eval.errors import ConfigError, ModelError
from petals_eval.local_swarm import LocalSwarm
from petals_eval.local_swarm.launcher import split_evenly
from petals_eval.model.blocks import BlockSpan
from petals_eval.swarm.wire.messages import codecs
from tests.support.tensors import distance
from tests.support.tiny_models import make_tiny
from tests.support.wire_client import WireClient, chain, request

BLOCKS = 5
HIDDEN = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny("llama", tmp_path_factory.mktemp("models") / "tiny.llama", blocks=BLOCKS)


@pytest.fixture(scope="module")
def swarm(folder):
    options = {"mode": "thread", "adapters": ("some/lora",), "throughput": 12.5, "max_batch_size": 40_000}
    with LocalSwarm(folder, servers=2, **options) as swarm:
        swarm.add_server((0, 5), dtype="bfloat16", public_name="whole", max_batch_size=64)
        yield swarm


@pytest.fixture(scope="module")
def client(swarm):
    with WireClient(swarm.initial_peers) as client:
        yield client


@pytest.fixture(scope="module")
def local(folder):
    return BlockSpan.load(str(folder), 0, BLOCKS)


def states(batch, seq, seed=0):
    return torch.randn(batch, seq, HIDDEN, generator=torch.Generator().manual_seed(seed))


def test_the_swarm_says_what_it_is(swarm):
    assert swarm.dht_prefix == "tiny-llama"
    assert swarm.num_blocks == BLOCKS
    assert [server.span for server in swarm.servers] == [(0, 3), (3, 5), (0, 5)]
    assert len({server.peer_id for server in swarm.servers}) == 3
    assert all(server.is_alive() for server in swarm.servers)
    # The address is the launcher's own node, not a server that a test may kill.
    assert not any(server.peer_id in maddr for server in swarm.servers for maddr in swarm.initial_peers)
    assert all(maddr.startswith("/ip4/127.0.0.1/tcp/") for maddr in swarm.initial_peers)


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
    hidden, prompts = states(4, 9), torch.randn(BLOCKS, 1, 3, HIDDEN)
    (middle,) = client.forward(swarm.servers[0].peer_id, chain("tiny-llama", 0, 3), hidden, prompts[:3])
    (output,) = client.forward(swarm.servers[1].peer_id, chain("tiny-llama", 3, 5), middle, prompts[3:])
    assert distance(output, local.forward(hidden, prompts)) < 1e-6


def test_any_run_of_blocks_of_a_server(swarm, client, local):
    hidden = states(2, 7)
    (output,) = client.forward(swarm.servers[0].peer_id, chain("tiny-llama", 1, 3), hidden)
    assert distance(output, local.forward(hidden, first=1, last=3)) < 1e-6


def test_stream_of_several_messages_each_way(swarm, client, local):
    hidden = states(600, 60)  # 4.6 MB: two parts
    assert hidden.numel() * 4 > 4 * 2**20
    prompts = torch.randn(3, 1, 3, HIDDEN)
    (output,) = client.forward_stream(swarm.servers[0].peer_id, chain("tiny-llama", 0, 3), hidden, prompts)
    assert distance(output, local.forward(hidden, prompts, last=3)) < 1e-6


def test_the_answer_is_in_the_servers_dtype(swarm, client, folder):
    whole = BlockSpan.load(str(folder), 0, BLOCKS, torch.bfloat16)
    hidden = states(2, 7)
    server, uid = swarm.servers[2].peer_id, chain("tiny-llama", 0, 5)
    (output,) = client.forward(server, uid, hidden)
    assert output.dtype is torch.bfloat16
    assert torch.equal(output, whole.forward(hidden))
    (same,) = client.forward(server, uid, hidden.bfloat16())
    assert torch.equal(output, same)


def test_bfloat16_travels_as_two_bytes(swarm, client):
    call = client.stub(swarm.servers[2].peer_id).rpc_forward(request("tiny-llama.0", states(2, 7)))
    (tensor,) = client.loop.run(call, 60).tensors
    assert (tensor.dtype, len(tensor.buffer)) == ("bfloat16", 2 * 7 * HIDDEN * 2)


def test_output_compression(swarm, client, local):
    hidden = states(2, 7)
    server = swarm.servers[0].peer_id
    (output,) = client.forward(server, "tiny-llama.0", hidden, output_compression=(int(CompressionType.FLOAT16),))
    assert 0 < distance(output, local.forward(hidden, last=1)) < 1e-2
    with pytest.raises(P2PHandlerError, match="output_compression to be a tuple of one code"):
        client.forward(server, "tiny-llama.0", hidden, output_compression=(0, 0))


@pytest.mark.parametrize("method", ["forward", "forward_stream"])
@pytest.mark.parametrize("code", codecs.LOSSY, ids=CompressionType.Name)
@pytest.mark.parametrize("index", [0, 2], ids=["float32", "bfloat16"])
def test_lossy_codes_are_taken_and_given_as_by_a_petals_server_with_bitsandbytes(swarm, client, method, code, index):
    """Its answer is what its encoder makes of the answer to what its decoder makes of the request."""
    server, hidden = swarm.servers[index].peer_id, states(2, 7)
    sent = codecs.encode(hidden, CompressionType.UNIFORM_8BIT if code == CompressionType.QUANTILE_8BIT else code)
    (exact,) = client.forward(server, "tiny-llama.0", codecs.decode(sent, (2, 7, HIDDEN)))
    message = request("tiny-llama.0", hidden, output_compression=(int(code),))
    message.tensors[0].CopyFrom(sent)
    if index == 2 and code == CompressionType.FLOAT16:
        with pytest.raises(P2PHandlerError, match=r"Float16Compression does not support torch\.bfloat16"):
            client.send(server, message, method)
        return
    (answer,) = client.send(server, message, method)
    assert (answer.compression, answer.dtype) == (code, str(exact.dtype).removeprefix("torch."))
    found = codecs.decode(answer, (2, 7, HIDDEN))
    if code == CompressionType.UNIFORM_8BIT:
        found = found + (exact.float().mean() - found.mean())  # hivemind's encoder loses it, working in place
    assert 0 < float((found - exact.float()).abs().mean()) < 0.03 * float(exact.float().std())


def test_without_bitsandbytes_the_blockwise_code_is_refused_in_hiveminds_words(swarm, client):
    server = swarm.add_server((0, 1), has_bitsandbytes=False)
    with pytest.raises(P2PHandlerError, match="BlockwiseQuantization requires bitsandbytes"):
        client.forward(server.peer_id, "tiny-llama.0", states(1, 2), output_compression=(5,))
    message = request("tiny-llama.0", states(1, 2))
    message.tensors[0].CopyFrom(codecs.encode(states(1, 2), CompressionType.BLOCKWISE_8BIT))
    with pytest.raises(P2PHandlerError, match="BlockwiseQuantization requires bitsandbytes"):
        client.send(server.peer_id, message, "forward")
    message.tensors[0].CopyFrom(codecs.encode(states(1, 2), CompressionType.UNIFORM_8BIT))
    client.send(server.peer_id, message, "forward")
    server.stop()


@pytest.mark.parametrize("method", ["forward", "forward_stream"])
def test_refusals(swarm, client, method):
    call = getattr(client, method)
    first, whole = swarm.servers[0].peer_id, swarm.servers[2].peer_id
    hidden = states(2, 7)
    with pytest.raises(P2PHandlerError, match=r"Remote peer does not serve tiny-llama\.3"):
        call(first, chain("tiny-llama", 2, 4), hidden)
    with pytest.raises(P2PHandlerError, match="Remote peer does not serve other"):
        call(first, "other.0", hidden)
    with pytest.raises(P2PHandlerError, match=r"Remote peer does not serve ($|')"):
        call(first, "", hidden)
    with pytest.raises(P2PHandlerError, match="expected consecutive blocks"):
        call(first, "tiny-llama.0 tiny-llama.2", hidden)
    with pytest.raises(P2PHandlerError, match=r"Task size greater than max_batch_size \(64\), it can't be processed"):
        call(whole, "tiny-llama.0", states(5, 13))
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
        client.forward(swarm.servers[0].peer_id, "other.0", states(1, 2))
    with pytest.raises(P2PHandlerError, match=r": Remote peer"):
        client.forward_stream(swarm.servers[0].peer_id, "other.0", states(1, 2))


def test_an_announced_adapter_is_accepted(swarm, client):
    client.forward(swarm.servers[0].peer_id, "tiny-llama.0", states(1, 3), active_adapter="some/lora")
    client.forward(swarm.servers[0].peer_id, "tiny-llama.0", states(1, 3), active_adapter=None)


def test_a_batch_as_large_as_the_limit_is_taken(swarm, client):
    client.forward(swarm.servers[2].peer_id, "tiny-llama.0", states(4, 16))


def test_a_server_announces_the_address_it_is_told_to(swarm, client):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    listened, announced = f"/ip4/127.0.0.1/tcp/{port}", f"/ip4/127.0.0.2/tcp/{port}"
    server = swarm.add_server((0, 1), host_maddrs=(listened, announced), announce_maddrs=(announced,))
    assert server.maddrs == (f"{announced}/p2p/{server.peer_id}",)
    client.forward(server.peer_id, "tiny-llama.0", states(1, 2))
    server.stop()


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
    assert split_evenly(blocks, servers) == spans


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
