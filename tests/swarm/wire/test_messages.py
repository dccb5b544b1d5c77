"""Messages: what we send is what hivemind reads, and what strangers send is checked before it is used."""

import math

import pytest
import torch
from hivemind.compression.serialization import deserialize_torch_tensor, serialize_torch_tensor
from hivemind.proto import runtime_pb2
from hivemind.utils.streaming import combine_from_streaming, split_for_streaming

from petals_eval.errors import PeerAnswerError
from petals_eval.swarm.wire import messages
from petals_eval.swarm.wire.span import Span

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_hivemind_reads_what_we_send_and_we_read_what_it_sends(dtype):
    tensor = torch.randn(3, 4, 5).to(dtype)
    message = messages.encode_tensor(tensor)
    assert len(message.buffer) == tensor.numel() * dtype.itemsize
    assert torch.equal(deserialize_torch_tensor(message), tensor)
    assert torch.equal(messages.read_answer([serialize_torch_tensor(tensor)], (3, 4, 5), dtype), tensor)


def test_bfloat16_is_read_in_both_forms():
    tensor = torch.randn(2, 3).bfloat16()
    wide = runtime_pb2.Tensor(buffer=tensor.float().numpy().tobytes(), size=(2, 3), dtype="bfloat16")
    assert torch.equal(messages.decode_tensor(wide, (2, 3), torch.bfloat16), tensor)
    assert torch.equal(messages.decode_tensor(messages.encode_tensor(tensor), (2, 3), torch.bfloat16), tensor)


def test_streams_split_and_join():
    tensor = torch.randn(3, 1000, 1000)
    parts = list(
        messages.stream_parts("a.0", [messages.encode_tensor(tensor), messages.encode_tensor(torch.empty(0))], b"meta")
    )
    assert all(len(part.tensors) == 1 and part.ByteSize() < 4.2 * 2**20 for part in parts)
    headers = [index for index, part in enumerate(parts) if part.tensors[0].dtype]
    assert headers == [0, len(parts) - 1]
    joined = combine_from_streaming(part.tensors[0] for part in parts[:-1])
    assert torch.equal(deserialize_torch_tensor(joined), tensor)

    answer = list(split_for_streaming(serialize_torch_tensor(tensor), 2**20))
    assert torch.equal(messages.read_answer(answer, tuple(tensor.shape), torch.float32), tensor)


def good() -> runtime_pb2.Tensor:
    return messages.encode_tensor(torch.ones(2, 3))


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([], "found none"),
        ([good(), good()], "found 2"),
        ([messages.encode_tensor(torch.ones(3, 2))], "shape"),
        ([messages.encode_tensor(torch.ones(2, 3).half())], "expected float32"),
        (
            [messages.encode_tensor(torch.tensor([[1.0, math.nan, math.inf], [0, 0, 0]]))],
            "2 of 6 values are not finite",
        ),
        ([runtime_pb2.Tensor(buffer=b"12", size=(2, 3), dtype="float32")], "found 2 bytes"),
        ([runtime_pb2.Tensor(buffer=b"", size=(2, 3), dtype="float32", compression=5)], "compression code 5"),
        ([runtime_pb2.Tensor(buffer=b"", size=(2**31 - 1, 2**31 - 1), dtype="float32")], "shape"),
        ([runtime_pb2.Tensor(buffer=b"", size=(2, 3), dtype="object")], "expected float32"),
    ],
)
def test_wrong_answers_are_refused_before_use(parts, reason):
    with pytest.raises(PeerAnswerError, match=reason):
        messages.read_answer(parts, (2, 3), torch.float32)


def test_nothing_wider_than_the_servers_dtype_travels():
    assert messages.wire_dtype(torch.float32, torch.bfloat16) is torch.bfloat16
    assert messages.wire_dtype(torch.bfloat16, torch.float32) is torch.bfloat16
    assert messages.wire_dtype(torch.bfloat16, torch.float16) is torch.float16
    assert messages.wire_dtype(torch.float32, torch.float32) is torch.float32


def test_uids_name_chains():
    assert messages.block_uid("m", 3) == "m.3"
    assert messages.chain_uid("m", Span(0, 3)) == "m.0 m.1 m.2"
