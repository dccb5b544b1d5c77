"""The lossy codes: what comes back, what hivemind makes of it here, and what strangers may not do with them.

tests/interop/test_codecs_against_the_real_ones.py holds them against hivemind's and bitsandbytes' own encoders.
"""

import math

import pytest
import torch
from hivemind.compression.serialization import deserialize_torch_tensor, serialize_torch_tensor
from hivemind.proto import runtime_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from petals_eval.errors import PeerAnswerError
from petals_eval.swarm.wire import codecs
from petals_eval.swarm.wire.codecs import LOSSY_CODES, READABLE
from petals_eval.swarm.wire.messages import encode_tensor, read_answer

CODES = runtime_pb2.CompressionType
SHAPES = [(1, 1, 1), (3, 5, 7), (2, 64, 32), (1, 1, 4097), (2, 0, 8)]


def values(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return 3 + torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("code", "most"), [(CODES.FLOAT16, 2e-3), (CODES.BLOCKWISE_8BIT, 0.05), (CODES.UNIFORM_8BIT, 0.02)]
)
def test_values_come_back_as_near_as_the_code_allows(code, most, shape):
    tensor = values(shape)
    found = codecs.decode(codecs.encode(tensor, code), shape)
    assert found.dtype is torch.float32 and found.shape == tensor.shape
    inside = (tensor - tensor.mean()).abs() < 2.9 if tensor.numel() > 1 else torch.ones(shape, dtype=torch.bool)
    assert torch.allclose(found[inside], tensor[inside], rtol=0, atol=most * 4)


@pytest.mark.parametrize("code", [CODES.FLOAT16, CODES.BLOCKWISE_8BIT, CODES.UNIFORM_8BIT])
@pytest.mark.parametrize("filling", [0.0, -2.5, 1e30, 1e-38])
def test_equal_values_stay_what_they_are(code, filling):
    tensor = torch.full((2, 3000), filling)
    expected = tensor.clamp(-65504, 65504).half().float() if code == CODES.FLOAT16 else tensor
    assert torch.equal(codecs.decode(codecs.encode(tensor, code), (2, 3000)), expected)


def test_eight_bit_codes_keep_the_scale_of_what_they_can():
    """Blockwise: an outlier spoils its own block of 4,096 only. Uniform: what lies beyond three deviations is
    averaged."""
    tensor = values((2, 4096))
    tensor[0, 0] = 1e6
    blockwise = codecs.decode(codecs.encode(tensor, CODES.BLOCKWISE_8BIT), (2, 4096))
    assert (blockwise[1] - tensor[1]).abs().max() < 0.2
    assert blockwise[0, 0] == 1e6
    uniform = codecs.decode(codecs.encode(values((2, 4096)), CODES.UNIFORM_8BIT), (2, 4096))
    assert uniform.mean() == pytest.approx(float(values((2, 4096)).mean()), abs=1e-5)


def test_the_codebook_has_256_ascending_levels_of_seven_decades():
    levels = codecs.blockwise_codebook()
    assert len(levels) == len(levels.unique()) == 256
    assert torch.equal(levels.sort().values, levels)
    assert (float(levels[0]), float(levels[127]), float(levels[-1])) == (-1.0, 0.0, 1.0)
    assert float(levels[128]) == pytest.approx(5.5e-7)
    assert [int(((levels > 10.0**-d / 10) & (levels < 10.0**-d)).sum()) for d in range(7)] == [64, 32, 16, 8, 4, 2, 1]


def test_every_value_goes_to_its_nearest_level():
    levels = codecs.blockwise_codebook()
    borders = (levels[:-1] + levels[1:]) / 2
    spread = torch.linspace(-1, 1, 4001) * torch.logspace(-9, 0, 19)[:, None]
    edges = [borders, borders.nextafter(torch.tensor(2.0)), borders.nextafter(torch.tensor(-2.0))]
    tensor = torch.cat([spread.flatten(), levels, *edges])
    tensor = torch.nn.functional.pad(tensor, (0, -len(tensor) % (codecs.BLOCK - 1))).reshape(-1, codecs.BLOCK - 1)
    tensor = torch.nn.functional.pad(tensor, (1, 0), value=1.0)  # the scale of every block
    content = codecs.encode(tensor, CODES.BLOCKWISE_8BIT).buffer[-tensor.numel() :]
    indices = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    assert torch.equal(indices.long(), torch.bucketize(tensor.flatten(), borders))


def test_what_hivemind_can_do_here_it_does_alike():
    """FLOAT16 both ways, and the encoders of the 8-bit codes that need neither bitsandbytes nor an old NumPy."""
    tensor = values((2, 50, 32)) * 1e5
    theirs = serialize_torch_tensor(tensor.clone(), CODES.FLOAT16)
    assert codecs.encode(tensor, CODES.FLOAT16) == theirs
    assert torch.equal(deserialize_torch_tensor(theirs), codecs.decode(theirs, (2, 50, 32)))
    tensor = values((2, 50, 32))
    for code, most in ((CODES.UNIFORM_8BIT, 0.02), (CODES.QUANTILE_8BIT, 0.02)):
        message = serialize_torch_tensor(tensor.clone(), code)
        assert float((codecs.decode(message, (2, 50, 32)) - tensor).abs().mean()) < most


def test_bfloat16_and_float16_tensors_travel_as_float32():
    for dtype in (torch.bfloat16, torch.float16):
        tensor = values((2, 3, 8)).to(dtype)
        message = codecs.encode(tensor, CODES.FLOAT16)
        assert message.dtype == "float32"
        assert torch.equal(codecs.decode(message, (2, 3, 8)).to(dtype), tensor.half().to(dtype))


def changed(message: runtime_pb2.Tensor, at: int, content: bytes) -> runtime_pb2.Tensor:
    buffer = bytearray(message.buffer)
    buffer[at : at + len(content)] = content
    return runtime_pb2.Tensor(
        buffer=bytes(buffer), size=message.size, dtype=message.dtype, compression=message.compression
    )


@pytest.mark.parametrize("code", READABLE)
@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\0" * 1100, b"\xff" * 1052])
def test_too_few_or_too_many_bytes_are_refused(code, content):
    message = runtime_pb2.Tensor(buffer=content, size=(4, 5), dtype="float32", compression=code)
    with pytest.raises(PeerAnswerError, match="expected"):
        codecs.decode(message, (4, 5))


@pytest.mark.parametrize("at", [0, 8])
@pytest.mark.parametrize("count", [-1, 0, 2, 255, 257, 2**40, -(2**63)])
def test_counts_that_do_not_follow_from_the_shape_are_refused(at, count):
    message = codecs.encode(values((4, 5)), CODES.BLOCKWISE_8BIT)
    with pytest.raises(PeerAnswerError, match=r"expected counts \(1, 256\)"):
        codecs.decode(changed(message, at, count.to_bytes(8, "little", signed=True)), (4, 5))
    message = codecs.encode(values((4, 5)), CODES.UNIFORM_8BIT)
    with pytest.raises(PeerAnswerError, match=r"expected counts \(256,\)"):
        codecs.decode(changed(message, 0, count.to_bytes(8, "little", signed=True)), (4, 5))


@pytest.mark.parametrize("code", [CODES.FLOAT16, CODES.BLOCKWISE_8BIT, CODES.UNIFORM_8BIT])
def test_another_shape_dtype_or_code_is_refused(code):
    lossy = next(each for each in LOSSY_CODES.values() if each.request == code)
    answer = codecs.encode(values((4, 5)), code)
    answer.compression = lossy.answer
    assert read_answer([answer], (4, 5), torch.float32, lossy).shape == (4, 5)
    for shape in [(5, 4), (20,), (2**31 - 1, 2**31 - 1)]:
        with pytest.raises(PeerAnswerError, match="shape"):
            read_answer([answer], shape, torch.float32, lossy)
    with pytest.raises(PeerAnswerError, match="expected bfloat16"):
        read_answer([answer], (4, 5), torch.bfloat16, lossy)
    with pytest.raises(PeerAnswerError, match="expected an uncompressed tensor"):
        read_answer([answer], (4, 5), torch.float32)
    with pytest.raises(PeerAnswerError, match="found compression code 0"):
        read_answer([encode_tensor(values((4, 5)))], (4, 5), torch.float32, lossy)
    with pytest.raises(PeerAnswerError, match="compression code"):
        codecs.decode(encode_tensor(values((4, 5))), (4, 5))


@pytest.mark.parametrize(
    ("code", "at"), [(CODES.BLOCKWISE_8BIT, 16), (CODES.QUANTILE_8BIT, 8 + 4 * 3), (CODES.FLOAT16, 0)]
)
def test_scales_and_levels_that_are_not_finite_are_refused_where_they_are_used(code, at):
    made = CODES.UNIFORM_8BIT if code == CODES.QUANTILE_8BIT else code
    message = codecs.encode(torch.zeros(4, 5), made)
    message.compression = code
    if code == CODES.QUANTILE_8BIT:
        message = changed(message, 8 + 1024, b"\3")
    message = changed(
        message,
        at,
        (torch.tensor([math.nan]).half() if code == CODES.FLOAT16 else torch.tensor([math.nan])).numpy().tobytes(),
    )
    lossy = next(each for each in LOSSY_CODES.values() if each.answer == code)
    with pytest.raises(PeerAnswerError, match="not finite"):
        read_answer([message], (4, 5), torch.float32, lossy)


@settings(max_examples=300)
@given(st.binary(max_size=1100), st.sampled_from(READABLE), st.lists(st.integers(0, 9), min_size=1, max_size=3))
def test_random_bytes_are_refused_or_read_and_nothing_else(content, code, size):
    message = runtime_pb2.Tensor(buffer=content, size=size, dtype="float32", compression=code)
    try:
        assert codecs.decode(message, tuple(size)).shape == tuple(size)
    except PeerAnswerError:
        return
