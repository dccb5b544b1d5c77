"""What a server says of itself when it is asked (rpc_info), and what follows from that. No I/O.

Source: PROTOCOL.md beside this file, sections 3, 5 and 9.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from petals_eval.errors import PeerAnswerError
from petals_eval.swarm.wire import msgpack_reader
from petals_eval.swarm.wire.records import peer_text

__all__ = [
    "DTYPES_BY_NAME",
    "NAMES_OF_DTYPES",
    "SESSION_TENSORS",
    "ServerInfo",
    "dtype_name",
    "may_push",
    "may_roll_back",
    "other_layout",
    "read_info",
]

NAMES_OF_DTYPES: Mapping[torch.dtype, str] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int64: "int64",
}
"""The dtypes that travel, as the wire spells them."""
DTYPES_BY_NAME: Mapping[str, torch.dtype] = {name: dtype for dtype, name in NAMES_OF_DTYPES.items()}
SESSION_TENSORS = 3
"""Tensors in a step of a session: hidden states, deep prompts, hypo_ids (Petals 2.2.0, 2.3.0.dev2, DRIFT-LLM)."""


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype as the wire spells it: "float32"."""
    return NAMES_OF_DTYPES[dtype]


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """A server's answer to rpc_info.

    input_dtype, output_dtype: what it computes in and answers with.
    version: of its petals package, as it says.
    cache_tokens_available: free now (`swarm.peers.session_cache` says what is counted); None where it does not say.
    hidden_size: of the hidden states it takes; None where its descriptor does not say.
    session_tensors: in a step of a session; None where it does not say.
    """

    version: str | None
    input_dtype: torch.dtype
    output_dtype: torch.dtype
    cache_tokens_available: int | None
    hidden_size: int | None = None
    session_tensors: int | None = None


MAX_INFO_BYTES = 1 << 16
"""Bytes of an answer to rpc_info that are read; Petals' own have some hundreds."""


def read_info(serialized: bytes) -> ServerInfo:
    """Read an answer to rpc_info. Raises PeerAnswerError when it is not one."""
    if len(serialized) > MAX_INFO_BYTES:
        raise PeerAnswerError(f"expected an rpc_info of at most {MAX_INFO_BYTES} bytes, found {len(serialized)}")
    try:
        info: Any = msgpack_reader.loads(serialized)
        (inputs, _), output = info["forward_schema"], info["outputs_schema"]
        hidden = _descriptor(inputs)
        named = hidden.dtype, _descriptor(output).dtype
        size = hidden.size[-1] if isinstance(hidden.size, (tuple, list)) and len(hidden.size) > 1 else None
        version, cache = info.get("version"), info.get("cache_tokens_available")
        step = info.get("inference_schema")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        raise PeerAnswerError(
            f"its rpc_info cannot be read: {peer_text(f'{type(error).__name__}: {error}')}"
        ) from error
    input_dtype, output_dtype = (DTYPES_BY_NAME.get(str(name).removeprefix("torch.")) for name in named)
    if input_dtype is None or output_dtype is None or not input_dtype.is_floating_point:
        said = " and ".join(peer_text(str(name))[:40] for name in named)
        raise PeerAnswerError(f"its rpc_info names dtypes {said}, which no block computes in")
    return ServerInfo(
        version=peer_text(version) if isinstance(version, str) else None,
        input_dtype=input_dtype,
        output_dtype=output_dtype,
        cache_tokens_available=cache if isinstance(cache, int) and cache >= 0 else None,
        hidden_size=size if isinstance(size, int) and size > 0 else None,
        session_tensors=_count_of(step),
    )


def _count_of(schema: object) -> int | None:
    """Count the tensors among the positional arguments of a schema, `((descriptor, ...), {})`; None: it is none."""
    arguments = schema[0] if isinstance(schema, (tuple, list)) and schema else None
    if not isinstance(arguments, (tuple, list)) or not all(
        isinstance(one, msgpack_reader.Descriptor) for one in arguments
    ):
        return None
    return len(arguments)


def _descriptor(schema: Any) -> msgpack_reader.Descriptor:
    """Return the first tensor descriptor of a schema, which is one or a sequence of them."""
    first = schema[0] if isinstance(schema, (tuple, list)) else schema
    if not isinstance(first, msgpack_reader.Descriptor):
        raise TypeError(f"expected a tensor descriptor, found {type(first).__name__}")
    return first


def other_layout(info: ServerInfo) -> str | None:
    """Return how a server's sessions differ from those of Petals, so that none is opened there; None: they do not.

    No version tells: several forks announce the same one, and at least one of them (BloomBee, ten tensors) takes three
    tensors for other things than Petals does.
    """
    if info.session_tensors == SESSION_TENSORS:
        return None
    found = "it does not say how many" if info.session_tensors is None else f"{info.session_tensors} tensors"
    return f"its sessions have another layout ({found} in a step, expected {SESSION_TENSORS})"


def may_roll_back(version: str | None) -> bool:
    """Return whether sessions of this version of petals may honour start_from_position: from 2.3.0 on, or unknown.

    2.2.0 ignores it and appends, without an error.
    """
    return _line_of(version) is None or may_push(version)


@lru_cache(maxsize=256)  # asked of every server for every micro-batch
def may_push(version: str | None) -> bool:
    """Return whether a server of this version of petals, as it says, passes on what it is pushed: from 2.3.0 on.

    2.2.0 uses its session's first metadata for every push, the stale step_id included: a chain of three ends there.
    """
    line = _line_of(version)
    return line is not None and line >= (2, 3)


def _line_of(version: str | None) -> tuple[int, int] | None:
    found = re.match(r"(\d+)\.(\d+)", version or "")
    return None if found is None else (int(found[1]), int(found[2]))
