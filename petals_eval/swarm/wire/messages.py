"""The messages of the Petals wire: building and reading them. No I/O.

Facts: tensors travel as `runtime_pb2.Tensor`; a forward call names its blocks by uids joined with spaces and carries
`[hidden_states, prompts]`; metadata is msgpack with tuples as an extension type. Same in Petals 2.2.0 and 2.3.0.dev2.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hivemind.p2p.p2p_daemon_bindings.control import DEFAULT_MAX_MSG_SIZE, MAX_UNARY_PAYLOAD_SIZE
from hivemind.proto import runtime_pb2
from hivemind.utils.serializer import MSGPackSerializer

from petals_eval.errors import PeerAnswerError, PeerNotFiniteError
from petals_eval.swarm.wire import codecs
from petals_eval.swarm.wire import msgpack_reader as untrusted
from petals_eval.swarm.wire.records import shown

__all__ = [
    "LOSSY",
    "MAX_PUSH_BYTES",
    "MAX_UNARY_BYTES",
    "SESSION_TENSORS",
    "LossyCode",
    "ServerInfo",
    "block_uid",
    "decode_tensor",
    "dtype_name",
    "encode_for",
    "encode_tensor",
    "forward_metadata",
    "itemsize_of",
    "may_push",
    "may_roll_back",
    "other_layout",
    "read_answer",
    "read_info",
    "session_metadata",
    "step_metadata",
    "stream_parts",
    "wire_dtype",
]

MAX_UNARY_BYTES = MAX_UNARY_PAYLOAD_SIZE // 2
"""Raw tensor bytes above which both sides switch to the streaming call (1 MiB)."""
MAX_PUSH_BYTES = DEFAULT_MAX_MSG_SIZE - (64 << 10)
"""Raw tensor bytes that one server pushes to another: one message, with room for the words around them."""
SESSION_TENSORS = 3
"""Tensors in a step of a session: hidden states, deep prompts, hypo_ids (Petals 2.2.0, 2.3.0.dev2, DRIFT-LLM)."""

_CODES = runtime_pb2.CompressionType


@dataclass(frozen=True, slots=True)
class LossyCode:
    """How hidden states travel under one name of `SwarmSettings.wire`: compression codes there and back."""

    name: str
    request: int
    answer: int
    bytes_per_value: int


LOSSY: Mapping[str, LossyCode] = {
    code.name: code
    for code in (
        LossyCode("float16", _CODES.FLOAT16, _CODES.FLOAT16, 2),
        LossyCode("blockwise8", _CODES.BLOCKWISE_8BIT, _CODES.BLOCKWISE_8BIT, 1),
        # Petals lets hivemind's encoders work in place, and then UNIFORM_8BIT loses the tensor's mean (hivemind 1.1.12:
        # its codebook is made from values from which the mean was taken). So answers come in the other 8-bit code.
        LossyCode("uniform8", _CODES.UNIFORM_8BIT, _CODES.QUANTILE_8BIT, 1),
    )
}
"""By name."""

_NAMES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int64: "int64",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """A server's answer to rpc_info.

    input_dtype, output_dtype: what it computes in and answers with.
    version: of its petals package, as it says.
    cache_tokens_available: free now (`swarm.peers.caches` says what is counted); None where it does not say.
    hidden_size: of the hidden states it takes; None where its descriptor does not say.
    session_tensors: in a step of a session; None where it does not say.
    """

    version: str | None
    input_dtype: torch.dtype
    output_dtype: torch.dtype
    cache_tokens_available: int | None
    hidden_size: int | None = None
    session_tensors: int | None = None


def dtype_name(dtype: torch.dtype) -> str:
    """As the wire spells it: "float32"."""
    return _NAMES[dtype]


def block_uid(prefix: str, first: int, last: int | None = None) -> str:
    """The uid of block `first`, or of the chain first:last."""
    return " ".join(f"{prefix}.{block}" for block in range(first, first + 1 if last is None else last))


def wire_dtype(current: torch.dtype, server: torch.dtype) -> torch.dtype:
    """The dtype to send in: the server casts to its own anyway, so nothing wider than that need travel.

    A tensor already narrower (a bfloat16 answer on its way to a float32 server) goes as it is: widening it first gives
    the same bits for twice the bytes.
    """
    return server if server.itemsize <= current.itemsize else current


def itemsize_of(announced: str | None, current: torch.dtype) -> int:
    """Bytes of a value on its way to a server that announces this dtype; a name nobody knows says nothing.

    >>> itemsize_of("bfloat16", torch.float32), itemsize_of("float32", torch.bfloat16), itemsize_of(None, torch.float32)
    (2, 2, 4)
    """
    return wire_dtype(current, _DTYPES.get(announced or "", current)).itemsize


def encode_tensor(tensor: torch.Tensor) -> runtime_pb2.Tensor:
    """A tensor as it is (compression NONE). bfloat16 travels as two bytes, as between Petals peers."""
    tensor = tensor.detach().cpu().contiguous()
    raw = tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor
    return runtime_pb2.Tensor(
        compression=runtime_pb2.CompressionType.NONE,
        buffer=raw.numpy().tobytes(),
        size=tensor.shape,
        dtype=_NAMES[tensor.dtype],
    )


def encode_for(info: ServerInfo, tensor: torch.Tensor | None, code: LossyCode | None = None) -> runtime_pb2.Tensor:
    """A float tensor in the dtype to send this server, or under a lossy code; an empty one stands for None."""
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
    if message.dtype != _NAMES[dtype]:
        raise PeerAnswerError(f"expected {_NAMES[dtype]}, found {message.dtype!r:.40}")
    if compression != _CODES.NONE:
        return codecs.decode(message, shape).to(dtype)
    elements = math.prod(shape)
    if len(message.buffer) == elements * dtype.itemsize:
        stored = dtype
    elif dtype is torch.bfloat16 and len(message.buffer) == elements * 4:
        stored = torch.float32  # hivemind's legacy form of bfloat16: widened on the wire
    else:
        raise PeerAnswerError(f"expected {elements} {_NAMES[dtype]} values, found {len(message.buffer)} bytes")
    if elements == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(message.buffer), dtype=stored).to(dtype).reshape(shape)


def _code_name(compression: int) -> str:
    return "an uncompressed tensor" if compression == _CODES.NONE else f"one in {_CODES.Name(compression)}"


def forward_metadata(active_adapter: str | None, code: LossyCode | None = None) -> bytes:
    """Metadata of a forward call. It says how the answer is to travel, whatever the server's own default is."""
    return MSGPackSerializer.dumps(
        {
            "points": 0,
            "active_adapter": active_adapter or "",
            "args_structure": ((b"__T0", b"__T1"), {}),
            "output_compression": (int(_CODES.NONE if code is None else code.answer),),
        }
    )


def session_metadata(max_length: int, active_adapter: str | None) -> dict[str, object]:
    """What opens an inference session: it goes into the metadata of the first step.

    max_length: tokens of each row to reserve. The server is never to wait for room in its cache: two sessions that do
    so at once leave it where no session opens any more, for anybody (Petals 2.2.0, 2.3.0.dev2 and DRIFT-LLM alike).
    """
    return {
        "max_length": max_length,
        "alloc_timeout": 0.0,
        "points": 0,
        "active_adapter": active_adapter or "",
    }


def step_metadata(
    session_id: str,
    step_id: str,
    opening: Mapping[str, object],
    start_from_position: int | None = None,
    next_servers: Sequence[tuple[str, str, int, int]] = (),
) -> bytes:
    """Metadata of one step of a session.

    opening: `session_metadata` in the first step, nothing in the others.
    start_from_position: positions of the cache to go back to; only for servers that are known to do it.
    next_servers: where the server is to push its answer: peer id, session id and blocks first:last of all that follow.
    """
    metadata = {
        **opening,
        "session_id": session_id,
        "step_id": step_id,
        "args_structure": ((b"__T0", b"__T1", b"__T2"), {}),
    }
    if start_from_position is not None:
        metadata["start_from_position"] = start_from_position
    if next_servers:
        metadata["next_servers"] = tuple(next_servers)
    return MSGPackSerializer.dumps(metadata)


def other_layout(info: ServerInfo) -> str | None:
    """How a server's sessions differ from those of Petals, so that none is to be opened there; None: they do not.

    No version tells: several forks announce the same one, and at least one of them (BloomBee, ten tensors) takes three
    tensors for other things than Petals does.
    """
    if info.session_tensors == SESSION_TENSORS:
        return None
    found = "it does not say how many" if info.session_tensors is None else f"{info.session_tensors} tensors"
    return f"its sessions have another layout ({found} in a step, expected {SESSION_TENSORS})"


def may_roll_back(version: str | None) -> bool:
    """Whether sessions of this version of petals may honour start_from_position: from 2.3.0 on; who knows otherwise.

    2.2.0 ignores it and appends, without an error.
    """
    return _line_of(version) is None or may_push(version)


def may_push(version: str | None) -> bool:
    """Whether a server of this version of petals, as it says, passes on what it is pushed: from 2.3.0 on.

    2.2.0 uses its session's first metadata for every push, the stale step_id included: a chain of three ends there.
    """
    line = _line_of(version)
    return line is not None and line >= (2, 3)


def _line_of(version: str | None) -> tuple[int, int] | None:
    found = re.match(r"(\d+)\.(\d+)", version or "")
    return None if found is None else (int(found[1]), int(found[2]))


def stream_parts(
    uid: str, tensors: Sequence[runtime_pb2.Tensor], metadata: bytes
) -> Iterator[runtime_pb2.ExpertRequest]:
    """Split a request for rpc_forward_stream: a part's first message carries its tensor's header."""
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
    """The one tensor of an answer, joined from its parts and checked: count, code, dtype, shape, size, finiteness."""
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


MOST_INFO_BYTES = 1 << 16
"""Of an answer to rpc_info; Petals' own have some hundreds."""


def read_info(serialized: bytes) -> ServerInfo:
    """Read an answer to rpc_info; raises PeerAnswerError when it is not one."""
    if len(serialized) > MOST_INFO_BYTES:
        raise PeerAnswerError(f"expected an rpc_info of at most {MOST_INFO_BYTES} bytes, found {len(serialized)}")
    try:
        info: Any = untrusted.loads(serialized)
        (inputs, _), output = info["forward_schema"], info["outputs_schema"]
        hidden = _descriptor(inputs)
        named = hidden.dtype, _descriptor(output).dtype
        size = hidden.size[-1] if isinstance(hidden.size, (tuple, list)) and len(hidden.size) > 1 else None
        version, cache = info.get("version"), info.get("cache_tokens_available")
        step = info.get("inference_schema")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        raise PeerAnswerError(f"its rpc_info cannot be read: {shown(f'{type(error).__name__}: {error}')}") from error
    input_dtype, output_dtype = (_DTYPES.get(str(name).removeprefix("torch.")) for name in named)
    if input_dtype is None or output_dtype is None or not input_dtype.is_floating_point:
        said = " and ".join(shown(str(name))[:40] for name in named)
        raise PeerAnswerError(f"its rpc_info names dtypes {said}, which no block computes in")
    return ServerInfo(
        version=shown(version) if isinstance(version, str) else None,
        input_dtype=input_dtype,
        output_dtype=output_dtype,
        cache_tokens_available=cache if isinstance(cache, int) and cache >= 0 else None,
        hidden_size=size if isinstance(size, int) and size > 0 else None,
        session_tensors=_count_of(step),
    )


def _count_of(schema: object) -> int | None:
    """Tensors among the positional arguments of a schema, `((descriptor, ...), {})`; None for anything else."""
    arguments = schema[0] if isinstance(schema, (tuple, list)) and schema else None
    if not isinstance(arguments, (tuple, list)) or not all(isinstance(one, untrusted.Descriptor) for one in arguments):
        return None
    return len(arguments)


def _descriptor(schema: Any) -> untrusted.Descriptor:
    """The first tensor descriptor of a schema, which is one or a sequence of them."""
    first = schema[0] if isinstance(schema, (tuple, list)) else schema
    if not isinstance(first, untrusted.Descriptor):
        raise TypeError(f"expected a tensor descriptor, found {type(first).__name__}")
    return first
