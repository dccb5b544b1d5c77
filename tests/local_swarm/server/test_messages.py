"""The tensors of requests and answers: dtypes and compression codes."""

import pytest
import torch
from hivemind.p2p.p2p_daemon_bindings.control import P2PHandlerError
from hivemind.proto.runtime_pb2 import CompressionType

from petals_eval.model.blocks import BlockSpan
from petals_eval.swarm.wire import codecs
from tests.local_swarm.conftest import BLOCKS, HIDDEN
from tests.support.tensors import distance, hidden_states
from tests.support.wire_client import chain, request


def test_the_answer_is_in_the_servers_dtype(swarm, client, folder):
    whole = BlockSpan.load(str(folder), 0, BLOCKS, torch.bfloat16)
    hidden = hidden_states(2, 7)
    server, uid = swarm.servers[2].peer_id, chain("tiny-llama", 0, 5)
    (output,) = client.forward(server, uid, hidden)
    assert output.dtype is torch.bfloat16
    assert torch.equal(output, whole.forward(hidden))
    (same,) = client.forward(server, uid, hidden.bfloat16())
    assert torch.equal(output, same)


def test_bfloat16_travels_as_two_bytes(swarm, client):
    call = client.stub(swarm.servers[2].peer_id).rpc_forward(request("tiny-llama.0", hidden_states(2, 7)))
    (tensor,) = client.run(call).tensors
    assert (tensor.dtype, len(tensor.buffer)) == ("bfloat16", 2 * 7 * HIDDEN * 2)


def test_output_compression(swarm, client, local):
    hidden = hidden_states(2, 7)
    server = swarm.servers[0].peer_id
    (output,) = client.forward(server, "tiny-llama.0", hidden, output_compression=(int(CompressionType.FLOAT16),))
    assert 0 < distance(output, local.forward(hidden, stop=1)) < 1e-2
    with pytest.raises(P2PHandlerError, match="output_compression to be a tuple of one code"):
        client.forward(server, "tiny-llama.0", hidden, output_compression=(0, 0))


@pytest.mark.parametrize("method", ["forward", "forward_stream"])
@pytest.mark.parametrize("code", codecs.READABLE, ids=CompressionType.Name)
@pytest.mark.parametrize("index", [0, 2], ids=["float32", "bfloat16"])
def test_lossy_codes_are_taken_and_given_as_by_a_petals_server_with_bitsandbytes(swarm, client, method, code, index):
    """Its answer is what its encoder makes of the answer to what its decoder makes of the request."""
    server, hidden = swarm.servers[index].peer_id, hidden_states(2, 7)
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


def test_without_bitsandbytes_the_blockwise_code_is_refused_in_hiveminds_words(add_server, client):
    server = add_server((0, 1), has_bitsandbytes=False)
    with pytest.raises(P2PHandlerError, match="BlockwiseQuantization requires bitsandbytes"):
        client.forward(server.peer_id, "tiny-llama.0", hidden_states(1, 2), output_compression=(5,))
    message = request("tiny-llama.0", hidden_states(1, 2))
    message.tensors[0].CopyFrom(codecs.encode(hidden_states(1, 2), CompressionType.BLOCKWISE_8BIT))
    with pytest.raises(P2PHandlerError, match="BlockwiseQuantization requires bitsandbytes"):
        client.send(server.peer_id, message, "forward")
    message.tensors[0].CopyFrom(codecs.encode(hidden_states(1, 2), CompressionType.UNIFORM_8BIT))
    client.send(server.peer_id, message, "forward")
