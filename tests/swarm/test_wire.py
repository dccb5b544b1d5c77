"""Messages: what we send is what hivemind reads, and what strangers send is checked before it is used."""

import math

import pytest
import torch
from hivemind.compression.serialization import deserialize_torch_tensor, serialize_torch_tensor
from hivemind.proto import runtime_pb2
from hivemind.utils.serializer import MSGPackSerializer
from hivemind.utils.streaming import combine_from_streaming, split_for_streaming
from hivemind.utils.tensor_descr import BatchTensorDescriptor
from hypothesis import given
from hypothesis import strategies as st

from petals_eval.errors import PeerAnswerError, PeerRefusedError
from petals_eval.swarm.peers.limits import says_cache_is_full
from petals_eval.swarm.wire import messages as wire

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_hivemind_reads_what_we_send_and_we_read_what_it_sends(dtype):
    tensor = torch.randn(3, 4, 5).to(dtype)
    message = wire.encode_tensor(tensor)
    assert len(message.buffer) == tensor.numel() * dtype.itemsize
    assert torch.equal(deserialize_torch_tensor(message), tensor)
    assert torch.equal(wire.read_answer([serialize_torch_tensor(tensor)], (3, 4, 5), dtype), tensor)


def test_bfloat16_is_read_in_both_forms():
    tensor = torch.randn(2, 3).bfloat16()
    wide = runtime_pb2.Tensor(buffer=tensor.float().numpy().tobytes(), size=(2, 3), dtype="bfloat16")
    assert torch.equal(wire.decode_tensor(wide, (2, 3), torch.bfloat16), tensor)
    assert torch.equal(wire.decode_tensor(wire.encode_tensor(tensor), (2, 3), torch.bfloat16), tensor)


def test_streams_split_and_join():
    tensor = torch.randn(3, 1000, 1000)
    parts = list(wire.stream_parts("a.0", [wire.encode_tensor(tensor), wire.encode_tensor(torch.empty(0))], b"meta"))
    assert all(len(part.tensors) == 1 and part.ByteSize() < 4.2 * 2**20 for part in parts)
    headers = [index for index, part in enumerate(parts) if part.tensors[0].dtype]
    assert headers == [0, len(parts) - 1]
    joined = combine_from_streaming(part.tensors[0] for part in parts[:-1])
    assert torch.equal(deserialize_torch_tensor(joined), tensor)

    answer = list(split_for_streaming(serialize_torch_tensor(tensor), 2**20))
    assert torch.equal(wire.read_answer(answer, tuple(tensor.shape), torch.float32), tensor)


def good() -> runtime_pb2.Tensor:
    return wire.encode_tensor(torch.ones(2, 3))


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([], "found none"),
        ([good(), good()], "found 2"),
        ([wire.encode_tensor(torch.ones(3, 2))], "shape"),
        ([wire.encode_tensor(torch.ones(2, 3).half())], "expected float32"),
        ([wire.encode_tensor(torch.tensor([[1.0, math.nan, math.inf], [0, 0, 0]]))], "2 of 6 values are not finite"),
        ([runtime_pb2.Tensor(buffer=b"12", size=(2, 3), dtype="float32")], "found 2 bytes"),
        ([runtime_pb2.Tensor(buffer=b"", size=(2, 3), dtype="float32", compression=5)], "compression code 5"),
        ([runtime_pb2.Tensor(buffer=b"", size=(2**31 - 1, 2**31 - 1), dtype="float32")], "shape"),
        ([runtime_pb2.Tensor(buffer=b"", size=(2, 3), dtype="object")], "expected float32"),
    ],
)
def test_wrong_answers_are_refused_before_use(parts, reason):
    with pytest.raises(PeerAnswerError, match=reason):
        wire.read_answer(parts, (2, 3), torch.float32)


def test_nothing_wider_than_the_servers_dtype_travels():
    assert wire.wire_dtype(torch.float32, torch.bfloat16) is torch.bfloat16
    assert wire.wire_dtype(torch.bfloat16, torch.float32) is torch.bfloat16
    assert wire.wire_dtype(torch.bfloat16, torch.float16) is torch.float16
    assert wire.wire_dtype(torch.float32, torch.float32) is torch.float32


def info(**changes: object) -> bytes:
    descriptor = BatchTensorDescriptor(1, 64, dtype=torch.bfloat16)
    fields = {
        "version": "2.2.0",
        "dht_client_mode": False,
        "cache_tokens_available": 10,
        "forward_schema": ((descriptor,), {}),
        "outputs_schema": (descriptor,),
        "keyword_names": (),
        "inference_schema": ((descriptor,) * 3, {}),
    }
    return MSGPackSerializer.dumps({**fields, **changes})


def test_info_is_read():
    read = wire.read_info(info())
    assert read == wire.ServerInfo("2.2.0", torch.bfloat16, torch.bfloat16, 10, 64, 3)


@pytest.mark.parametrize(
    "changes",
    [{"forward_schema": None}, {"outputs_schema": 5}, {"forward_schema": ((), {})}, {"outputs_schema": ("x",)}],
)
def test_info_that_is_none_is_refused(changes):
    with pytest.raises(PeerAnswerError, match="rpc_info"):
        wire.read_info(info(**changes))


DESCRIPTOR = BatchTensorDescriptor(1, 64, dtype=torch.bfloat16)


@pytest.mark.parametrize("tensors", [0, 1, 3, 10])
def test_the_layout_of_sessions_is_read(tensors):
    read = wire.read_info(info(inference_schema=((DESCRIPTOR,) * tensors, {})))
    assert read.session_tensors == tensors
    said = wire.other_layout(read)
    assert said is None if tensors == 3 else f"({tensors} tensors in a step, expected 3)" in said


@pytest.mark.parametrize(
    "schema",
    [
        None,
        3,
        "xyz",
        b"xyz",
        (),
        ((),),
        [[]],
        (3, {}),
        ("xyz", {}),
        ((1, 2, 3), {}),
        ((DESCRIPTOR, None, DESCRIPTOR), {}),
    ],
)
def test_a_layout_that_cannot_be_read_is_none_of_ours(schema):
    read = wire.read_info(info(inference_schema=schema))
    assert read.session_tensors in (None, 0)
    assert "another layout" in wire.other_layout(read)


@pytest.mark.parametrize("tokens", [-1, None, "many", 1.5])
def test_room_in_a_cache_that_is_no_number_is_not_known(tokens):
    assert wire.read_info(info(cache_tokens_available=tokens)).cache_tokens_available is None


def test_a_server_is_never_to_wait_for_room():
    assert wire.session_metadata(100, None)["alloc_timeout"] == 0.0
    metadata = MSGPackSerializer.loads(wire.step_metadata("s", "1", wire.session_metadata(100, "lora")))
    assert (metadata["alloc_timeout"], metadata["max_length"], metadata["active_adapter"]) == (0.0, 100, "lora")


@pytest.mark.parametrize(
    ("words", "is_full"),
    [
        # as petals 2.2.0 was heard to say
        ("Could not allocate 3840 bytes immediately: out of memory", True),
        ("AllocationFailed('Could not allocate 3840 bytes immediately: out of memory')", True),
        ("Could not allocate 38400 within 1.0 seconds", True),
        ("Could not allocate 153600 bytes, max cache size = 98304 bytes", False),
        ("Cannot allocate KV cache for 300 tokens, max = 256", False),
        # as its source has it
        ("Could not allocate 38400 bytes within 1.0 seconds", True),
        ("Could not allocate 38400 (timeout=1.0)", True),
        ("Server's attention cache is full, failed to allocate 38400 bytes in 1.0 seconds", True),
        ("CUDA error: out of memory", False),
    ],
)
def test_a_full_cache_is_told_from_other_refusals(words, is_full):
    assert says_cache_is_full(PeerRefusedError(words)) is is_full


@given(st.binary(max_size=200))
def test_random_bytes_as_info_are_refused_and_nothing_else(serialized):
    with pytest.raises(PeerAnswerError):
        wire.read_info(serialized)


def test_uids_name_chains():
    assert wire.block_uid("m", 3) == "m.3"
    assert wire.block_uid("m", 0, 3) == "m.0 m.1 m.2"
