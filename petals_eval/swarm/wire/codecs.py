"""The lossy codes of hivemind's wire, written and read without hivemind's own codecs. No I/O.

Why our own: hivemind's blockwise code needs bitsandbytes, its 8-bit decoders fail under numpy 2.4, and all of its
decoders believe the sizes that a stranger wrote down. The formats, as hivemind 1.1.12 reads and writes them; `codebook`
is always 256 float32 values, numbers are little-endian, n is the number of values:

    FLOAT16        n float16, beyond which values are clamped
    UNIFORM_8BIT   int64 256, codebook, n uint8: value = codebook[index]
    QUANTILE_8BIT  the same bytes; the buckets hold equally many values, where UNIFORM_8BIT's are equally wide
    BLOCKWISE_8BIT int64 blocks, int64 256, blocks float32, codebook, n uint8: value = codebook[index] * the largest
                   magnitude of its block of 4,096 values; the codebook is `blockwise_codebook`
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from hivemind.proto import runtime_pb2

from petals_eval.errors import PeerAnswerError

__all__ = ["BLOCK", "LOSSY_CODES", "READABLE", "LossyCode", "blockwise_codebook", "decode", "encode"]

BLOCK = 4096
"""Values that share a scale in BLOCKWISE_8BIT."""

_CODES = runtime_pb2.CompressionType
_LEVELS = 256
_CODEBOOK = 4 * _LEVELS  # bytes
_SIGMAS = 6  # that UNIFORM_8BIT's levels span; what lies beyond falls into the outermost ones

READABLE = (_CODES.FLOAT16, _CODES.UNIFORM_8BIT, _CODES.QUANTILE_8BIT, _CODES.BLOCKWISE_8BIT)
"""The codes that `decode` reads; `encode` writes them but for QUANTILE_8BIT."""


@dataclass(frozen=True, slots=True)
class LossyCode:
    """How hidden states travel under one name of `SwarmSettings.wire`: compression codes there and back."""

    name: str
    request: int
    answer: int
    bytes_per_value: int


LOSSY_CODES: Mapping[str, LossyCode] = {
    code.name: code
    for code in (
        LossyCode("float16", _CODES.FLOAT16, _CODES.FLOAT16, 2),
        LossyCode("blockwise8", _CODES.BLOCKWISE_8BIT, _CODES.BLOCKWISE_8BIT, 1),
        # Petals lets hivemind's encoders work in place, and then UNIFORM_8BIT loses the tensor's mean (hivemind 1.1.12:
        # its codebook is made from values from which the mean was taken). So answers come in the other 8-bit code.
        LossyCode("uniform8", _CODES.UNIFORM_8BIT, _CODES.QUANTILE_8BIT, 1),
    )
}
"""The lossy codes by their names in the settings."""


def encode(tensor: torch.Tensor, code: int) -> runtime_pb2.Tensor:
    """Write a float tensor under a lossy code; it says it is float32, which servers cast to their own dtype.

    hivemind's FLOAT16 refuses bfloat16, and so does numpy: hence float32 whatever the tensor is.
    """
    values = tensor.detach().cpu().to(torch.float32).contiguous()
    flat = values.flatten()
    if code == _CODES.FLOAT16:
        limits = torch.finfo(torch.float16)
        content = _bytes(flat.clamp(limits.min, limits.max).to(torch.float16))
    elif code == _CODES.UNIFORM_8BIT:
        content = b"".join(_uniform(flat))
    elif code == _CODES.BLOCKWISE_8BIT:
        content = b"".join(_blockwise(flat))
    else:
        raise ValueError(f"expected FLOAT16, UNIFORM_8BIT or BLOCKWISE_8BIT, found code {code}")
    return runtime_pb2.Tensor(compression=code, buffer=content, size=tensor.shape, dtype="float32")


def decode(message: runtime_pb2.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the float32 values of a tensor that must have this shape.

    Raises PeerAnswerError for a code that is none of `READABLE`, and when the sizes in the message are not those that
    follow from the shape: nothing a peer wrote decides how much is read or allocated.
    """
    code, content = message.compression, memoryview(message.buffer)
    elements = math.prod(shape)
    blocks = -(-elements // BLOCK)
    expected = {
        _CODES.FLOAT16: 2 * elements,
        _CODES.UNIFORM_8BIT: 8 + _CODEBOOK + elements,
        _CODES.QUANTILE_8BIT: 8 + _CODEBOOK + elements,
        _CODES.BLOCKWISE_8BIT: 16 + 4 * blocks + _CODEBOOK + elements,
    }.get(code)
    if expected is None:
        raise PeerAnswerError(f"expected a compression code of {READABLE}, found {code}")
    if tuple(message.size) != shape:
        raise PeerAnswerError(f"expected a tensor of shape {shape}, found {tuple(message.size)}"[:200])
    if len(content) != expected:
        raise PeerAnswerError(
            f"expected {expected} bytes for {elements} values of {_CODES.Name(code)}, found {len(content)}"
        )
    if elements == 0:
        return torch.empty(shape, dtype=torch.float32)
    if code == _CODES.FLOAT16:
        return _read(content, torch.float16).float().reshape(shape)
    if code != _CODES.BLOCKWISE_8BIT:
        _check_counts(content[:8], (_LEVELS,))
        return _looked_up(content[8:]).reshape(shape)
    _check_counts(content[:16], (blocks, _LEVELS))
    scales = _read(content[16 : 16 + 4 * blocks], torch.float32)
    values = _looked_up(content[16 + 4 * blocks :])
    return (values * scales.repeat_interleave(BLOCK)[:elements]).reshape(shape)


@functools.cache
def blockwise_codebook() -> torch.Tensor:
    """The 256 levels in [-1, 1] of BLOCKWISE_8BIT, ascending: bitsandbytes' signed "dynamic map" (arXiv:1511.04561).

    A sign, up to seven bits that count decades, and the rest for the fraction. Of the seven decades below 1 each next
    one has twice as many levels: 1, 2, 4 ... 64, the centres of equal parts of 0.1 to 1 of it. With either sign that is
    254; 0 and 1 complete them.
    """
    levels = [torch.tensor([0.0, 1.0], dtype=torch.float32)]
    for decade in range(7):
        # In float32 throughout, for the bits that bitsandbytes has.
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        centres = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        levels += [centres, -centres]
    book = torch.cat(levels).sort().values
    book[0] = -1.0  # as its CPU encoder sends it: the lowest level would be -0.993
    return book


def _nearest_levels(relative: torch.Tensor) -> torch.Tensor:
    """Indices of `blockwise_codebook`, uint8, for float32 values in [-1, 1]; the lower one half-way between two.

    A table by the upper 16 bits of a value leaves two levels to choose from: four times as fast as a binary search.
    """
    table, borders = _levels_by_upper_bits()
    lower = table[(relative.view(torch.int32) >> 16) & 0xFFFF]
    return lower + (relative > borders[lower.int()])


@functools.cache
def _levels_by_upper_bits() -> tuple[torch.Tensor, torch.Tensor]:
    """The level of the smallest of all floats with the same upper 16 bits, and each level's border to the next."""
    levels = blockwise_codebook()
    borders = (levels[:-1] + levels[1:]) / 2
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    ends = torch.from_numpy(np.stack([upper, upper | 0xFFFF]).view(np.float32))
    first, last = torch.bucketize(ends.where(ends.isfinite(), 1.0), borders).sort(dim=0).values
    if (last - first).max() > 1:
        raise ValueError("floats with the same upper bits are near three levels: the table would be wrong")
    return first.to(torch.uint8), torch.cat([borders, borders.new_tensor([math.inf])])


def _blockwise(flat: torch.Tensor) -> list[bytes]:
    """The nearest level to each value, relative to the largest magnitude of its block."""
    blocks = -(-flat.numel() // BLOCK)
    padded = torch.nn.functional.pad(flat, (0, blocks * BLOCK - flat.numel())).reshape(blocks, BLOCK)
    scales = padded.abs().amax(dim=1, keepdim=True) if blocks else padded
    relative = padded / scales.where(scales > 0, 1.0)
    indices = _nearest_levels(relative.flatten()[: flat.numel()])
    return [
        _count(blocks),
        _count(_LEVELS),
        _bytes(scales.flatten()),
        _bytes(blockwise_codebook()),
        _bytes(indices),
    ]


def _uniform(flat: torch.Tensor) -> list[bytes]:
    """Levels of equal width around the mean; each stands for the mean of the values that fall into it."""
    mean = flat.mean() if flat.numel() else flat.new_tensor(0.0)
    centred = flat - mean
    deviation = float(centred.norm()) / math.sqrt(max(1, flat.numel() - 1))
    width = _SIGMAS * deviation / _LEVELS
    middle = _LEVELS // 2
    indices = torch.full(flat.shape, middle) if width == 0 else torch.round(centred * (1 / width)).long() + middle
    indices = indices.clamp(0, _LEVELS - 1)
    counts = torch.bincount(indices, minlength=_LEVELS).clamp(min=1)
    codebook = torch.bincount(indices, weights=flat.double(), minlength=_LEVELS) / counts
    return [_count(_LEVELS), _bytes(codebook.float()), _bytes(indices.to(torch.uint8))]


def _check_counts(content: memoryview, expected: tuple[int, ...]) -> None:
    found = tuple(_read(content, torch.int64).tolist())
    if found != expected:
        raise PeerAnswerError(f"expected counts {expected} before the values, found {found}")


def _looked_up(content: memoryview) -> torch.Tensor:
    """A codebook and one index for each value; 256 levels, so that no index can be beyond them."""
    codebook = _read(content[:_CODEBOOK], torch.float32)
    return codebook[_read(content[_CODEBOOK:], torch.uint8).int()]


def _read(content: memoryview, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=dtype)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()


def _count(number: int) -> bytes:
    return number.to_bytes(8, "little")
