"""The messages of a forward call on the Petals wire: building and reading them. No I/O.

Tensors travel as `runtime_pb2.Tensor`; a forward call names its blocks by uids joined with spaces and carries
`[hidden_states, prompts]`; metadata is msgpack with tuples as an extension type. The same holds for Petals 2.2.0 and
2.3.0.dev2 (PROTOCOL.md beside this file, sections 1 and 4).
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from hivemind.p2p.p2p_daemon_bindings.control import DEFAULT_MAX_MSG_SIZE, MAX_UNARY_PAYLOAD_SIZE
from hivemind.proto import runtime_pb2
from hivemind.utils.serializer import MSGPackSerializer

from petals_eval.errors import PeerAnswerError, PeerNotFiniteError
from petals_eval.swarm.wire import codecs
from petals_eval.swarm.wire.codecs import LossyCode
from petals_eval.swarm.wire.server_info import DTYPES_BY_NAME, NAMES_OF_DTYPES, ServerInfo
from petals_eval.swarm.wire.span import Span

__all__ = [
    "MAX_PUSH_BYTES",
    "MAX_UNARY_BYTES",
    "block_uid",
    "chain_uid",
    "decode_tensor",
    "encode_for",
    "encode_tensor",
    "forward_metadata",
    "itemsize_of",
    "read_answer",
    "stream_parts",
    "wire_dtype",
]

MAX_UNARY_BYTES = MAX_UNARY_PAYLOAD_SIZE // 2
"""Raw tensor bytes above which both sides switch to the streaming call (1 MiB)."""
MAX_PUSH_BYTES = DEFAULT_MAX_MSG_SIZE - (64 << 10)
"""Raw tensor bytes that one server may push to another: one message, with room for the metadata around them."""
_CODES = runtime_pb2.CompressionType


def block_uid(prefix: str, block: int) -> str:
    """Return the uid of a block: the key of its records in the DHT, and its name in calls."""
    return f"{prefix}.{block}"


def chain_uid(prefix: str, span: Span) -> str:
    """Return the uid of consecutive blocks in a call.

    >>> chain_uid("llama-2", Span(3, 5))
    'llama-2.3 llama-2.4'
    """
    return " ".join(block_uid(prefix, block) for block in range(span.start, span.stop))


def wire_dtype(current: torch.dtype, server: torch.dtype) -> torch.dtype:
    """Return the dtype to send in: the server casts to its own anyway, so nothing wider than that need travel.

    A tensor already narrower (a bfloat16 answer on its way to a float32 server) goes as it is: widening it first gives
    the same bits for twice the bytes.
    """
    return server if server.itemsize <= current.itemsize else current


def itemsize_of(announced: str | None, current: torch.dtype) -> int:
    """Return the bytes of a value on its way to a server that announces this dtype; an unknown name says nothing.

    >>> itemsize_of("bfloat16", torch.float32), itemsize_of("float32", torch.bfloat16), itemsize_of(None, torch.float32)
    (2, 2, 4)
    """
    return wire_dtype(current, DTYPES_BY_NAME.get(announced or "", current)).itemsize


def encode_tensor(tensor: torch.Tensor) -> runtime_pb2.Tensor:
    """Write a tensor as it is (compression NONE). bfloat16 travels as two bytes, as between Petals peers."""
    tensor = tensor.detach().cpu().contiguous()
    raw = tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor
    return runtime_pb2.Tensor(
        compression=runtime_pb2.CompressionType.NONE,
        buffer=raw.numpy().tobytes(),
        size=tensor.shape,
        dtype=NAMES_OF_DTYPES[tensor.dtype],
    )


def encode_for(info: ServerInfo, tensor: torch.Tensor | None, code: LossyCode | None = None) -> runtime_pb2.Tensor:
    """Write a float tensor in the dtype to send this server, or under a lossy code; an empty one stands for None."""
    if tensor is None:
        return encode_tensor(torch.empty(0, dtype=torch.float32))
    dtype = wire_dtype(tensor.dtype, info.input_dtype)
    if code is None or code.bytes_per_value >= dtype.itemsize:  # float16 of a bfloat16 answer would save nothing
        return encode_tensor(tensor.to(dtype))
    return codecs.encode(tensor, code.request)


def decode_tensor(
    message: runtime_pb2.Tensor, shape: tuple[int, ...], dtype: torch.dtype, compression: int = _CODES.NONE
) -> torch.Tensor:
    """Read a tensor that must have this shape, dtype and compression code.

    Raises PeerAnswerError before any byte is interpreted.
    """
    if message.compression != compression:
        raise PeerAnswerError(f"expected {_code_name(compression)}, found compression code {message.compression}")
    if tuple(message.size) != shape:
        raise PeerAnswerError(f"expected a tensor of shape {shape}, found {tuple(message.size)}"[:200])
    if message.dtype != NAMES_OF_DTYPES[dtype]:
        raise PeerAnswerError(f"expected {NAMES_OF_DTYPES[dtype]}, found {message.dtype!r:.40}")
    if compression != _CODES.NONE:
        return codecs.decode(message, shape).to(dtype)
    elements = math.prod(shape)
    if len(message.buffer) == elements * dtype.itemsize:
        stored = dtype
    elif dtype is torch.bfloat16 and len(message.buffer) == elements * 4:
        stored = torch.float32  # hivemind's legacy form of bfloat16: widened on the wire
    else:
        raise PeerAnswerError(f"expected {elements} {NAMES_OF_DTYPES[dtype]} values, found {len(message.buffer)} bytes")
    if elements == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(message.buffer), dtype=stored).to(dtype).reshape(shape)


def _code_name(compression: int) -> str:
    return "an uncompressed tensor" if compression == _CODES.NONE else f"one in {_CODES.Name(compression)}"


def forward_metadata(active_adapter: str | None, code: LossyCode | None = None) -> bytes:
    """Return the metadata of a forward call: it says how the answer is to travel, whatever the server's default is."""
    return MSGPackSerializer.dumps(
        {
            "points": 0,
            "active_adapter": active_adapter or "",
            "args_structure": ((b"__T0", b"__T1"), {}),
            "output_compression": (int(_CODES.NONE if code is None else code.answer),),
        }
    )


def stream_parts(
    uid: str, tensors: Sequence[runtime_pb2.Tensor], metadata: bytes
) -> Iterator[runtime_pb2.ExpertRequest]:
    """Split a request for rpc_forward_stream: the first message of a tensor carries its header."""
    for tensor in tensors:
        buffer = memoryview(tensor.buffer)
        limit = DEFAULT_MAX_MSG_SIZE
        chunks = [buffer[start : start + limit] for start in range(0, len(buffer), limit)] or [buffer]
        for index, chunk in enumerate(chunks):
            part = runtime_pb2.Tensor(buffer=bytes(chunk))
            if index == 0:
                part.compression, part.dtype, part.chunks = tensor.compression, tensor.dtype, len(chunks)
                part.size.extend(tensor.size)
            yield runtime_pb2.ExpertRequest(uid=uid, tensors=[part], metadata=metadata)


def read_answer(
    parts: Iterable[runtime_pb2.Tensor], shape: tuple[int, ...], dtype: torch.dtype, code: LossyCode | None = None
) -> torch.Tensor:
    """Return the one tensor of an answer, joined from its parts and checked.

    Raises PeerAnswerError for a wrong count, code, dtype, shape or size, PeerNotFiniteError for NaN and infinity.
    """
    parts = list(parts)
    if not parts:
        raise PeerAnswerError("expected one tensor, found none")
    if any(part.dtype for part in parts[1:]):
        raise PeerAnswerError(f"expected one tensor, found {1 + sum(bool(part.dtype) for part in parts[1:])}")
    message = parts[0]
    if len(parts) > 1:
        message = runtime_pb2.Tensor(
            compression=message.compression,
            size=message.size,
            dtype=message.dtype,
            buffer=b"".join(part.buffer for part in parts),
        )
    tensor = decode_tensor(message, shape, dtype, _CODES.NONE if code is None else code.answer)
    # A sum is not finite where a value is not, and costs a fifth of looking at each; it may also just be too large.
    if not torch.isfinite(tensor.sum(dtype=torch.float32)) and not torch.isfinite(tensor).all():
        raise PeerNotFiniteError(f"{int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} values are not finite")
    return tensor
