"""Reading requests and writing answers.

Requests are read by hivemind's own deserialiser and not by `petals_eval.swarm.wire`, so that a mistake there cannot
agree with itself.
"""

from collections.abc import Sequence
from typing import Any

import torch
from hivemind.compression.serialization import deserialize_torch_tensor, serialize_torch_tensor
from hivemind.proto import runtime_pb2
from hivemind.utils.serializer import MSGPackSerializer

from petals_eval.local_swarm.server.settings import ServerSettings
from petals_eval.model.blocks import DTYPES
from petals_eval.swarm.wire import codecs
from petals_eval.swarm.wire.messages import encode_tensor
from petals_eval.swarm.wire.server_info import dtype_name

__all__ = ["decoded", "encoded", "given", "output_codes", "read_metadata", "unpacked"]

_CODES = runtime_pb2.CompressionType
_NO_BITSANDBYTES = "BlockwiseQuantization requires bitsandbytes to function properly."  # hivemind's words


def decoded(message: runtime_pb2.Tensor, settings: ServerSettings) -> torch.Tensor:
    """Return a tensor of a request. Our own decoder reads the 8-bit codes: hivemind's fails under NumPy 2.4."""
    code = message.compression
    if code not in (_CODES.UNIFORM_8BIT, _CODES.QUANTILE_8BIT, _CODES.BLOCKWISE_8BIT):
        return deserialize_torch_tensor(message)
    if code == _CODES.BLOCKWISE_8BIT and not settings.has_bitsandbytes:
        raise ImportError(_NO_BITSANDBYTES)
    return codecs.decode(message, tuple(message.size)).to(DTYPES[message.dtype])


def output_codes(metadata: dict[str, Any], count: int) -> Sequence[int]:
    """Return the compression that a request's metadata asks for, of each of the `count` tensors of its answer.

    Raises ValueError for another number of codes.
    """
    codes = metadata.get("output_compression")
    if codes is None:
        return (_CODES.NONE,) * count
    if not isinstance(codes, (list, tuple)) or len(codes) != count or not all(isinstance(code, int) for code in codes):
        wanted = "one code" if count == 1 else f"{count} codes"
        raise ValueError(f"expected output_compression to be a tuple of {wanted}, found {codes!r}")
    return codes


def encoded(output: torch.Tensor, code: int, settings: ServerSettings) -> runtime_pb2.Tensor:
    """Return the message of an answer's tensor under a compression."""
    # Our own encoder writes uncompressed tensors: hivemind's widens bfloat16 unless a global flag is turned.
    if code == _CODES.NONE:
        return encode_tensor(output)
    if code == _CODES.BLOCKWISE_8BIT:
        if not settings.has_bitsandbytes:
            raise ImportError(_NO_BITSANDBYTES)
        answer = codecs.encode(output, code)
        answer.dtype = dtype_name(output.dtype)
        return answer
    return serialize_torch_tensor(output, code, allow_inplace=True)


def read_metadata(request: runtime_pb2.ExpertRequest) -> dict[str, Any]:
    """Return the request's metadata; raises ValueError when it is not a dictionary."""
    metadata = MSGPackSerializer.loads(request.metadata) if request.metadata else {}
    if not isinstance(metadata, dict):
        raise ValueError(f"expected metadata to be a dictionary, found {type(metadata).__name__}")
    return metadata


def unpacked(tensors: Sequence[torch.Tensor], metadata: dict[str, Any], count: int) -> Sequence[torch.Tensor]:
    """Return the first `count` arguments of a call; its `args_structure` says which tensor is which."""
    structure = metadata.get("args_structure")
    if structure is not None:
        marks = structure[0]
        if not all(isinstance(mark, bytes) and mark.startswith(b"__T") for mark in marks):
            raise ValueError(f"expected args_structure to name tensors, found {structure!r}")
        tensors = [tensors[int(mark[3:])] for mark in marks]
    if len(tensors) < count:
        raise ValueError(f"expected {count} tensors, found {len(tensors)}")
    return tensors[:count]


def given(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return an argument that may be left out: an empty tensor stands for None."""
    return tensor if tensor.numel() else None
