"""Reading requests and writing answers, for the blocks a server holds."""

from collections.abc import Sequence
from typing import Any

import torch
from hivemind.compression.serialization import deserialize_torch_tensor, serialize_torch_tensor
from hivemind.proto import runtime_pb2
from hivemind.utils.serializer import MSGPackSerializer

from petals_eval.local_swarm.server.settings import ServerSettings
from petals_eval.model.blocks import DTYPES, BlockSpan
from petals_eval.swarm.wire.messages import codecs, encode_tensor

__all__ = ["ServedBlocks", "decoded", "given", "read_metadata", "unpacked"]

_CODES = runtime_pb2.CompressionType
_NO_BITSANDBYTES = "BlockwiseQuantization requires bitsandbytes to function properly."  # hivemind's words


class ServedBlocks:
    """The blocks a server holds under their uids, and what calls may ask of them."""

    def __init__(self, settings: ServerSettings, span: BlockSpan):
        self.uids = {f"{settings.dht_prefix}.{block}": block for block in range(span.first, span.last)}
        self._adapters = settings.adapters
        self._dtype = span.dtype
        self._has_bitsandbytes = settings.has_bitsandbytes

    def requested(self, uid: str) -> tuple[int, int]:
        """The blocks first:last a chain of uids names; raises RuntimeError for those this server does not hold."""
        requested = (uid or "").split(" ")
        for one in requested:
            if one not in self.uids:
                raise RuntimeError(f"Remote peer does not serve {one}")
        blocks = [self.uids[one] for one in requested]
        if blocks != list(range(blocks[0], blocks[0] + len(blocks))):
            raise ValueError(f"expected consecutive blocks, found {uid}")
        return blocks[0], blocks[-1] + 1

    def active_adapter(self, metadata: dict[str, Any]) -> str:
        """The LoRA adapter a call names; raises KeyError for one this server did not announce."""
        name = metadata.get("active_adapter") or ""
        if name and name not in self._adapters:
            raise KeyError(f"adapter {name} not found")
        return name

    def encoded(self, output: torch.Tensor, metadata: dict[str, Any]) -> runtime_pb2.Tensor:
        """An answer in the span's dtype, under the compression the client asked for."""
        codes = metadata.get("output_compression")
        code: int = _CODES.NONE
        if codes is not None:
            if not isinstance(codes, (list, tuple)) or len(codes) != 1 or not isinstance(codes[0], int):
                raise ValueError(f"expected output_compression to be a tuple of one code, found {codes!r}")
            code = codes[0]
        output = output.to(self._dtype)
        # Uncompressed tensors go through our own encoder: hivemind's widens bfloat16 unless a global flag is turned.
        if code == _CODES.NONE:
            return encode_tensor(output)
        if code == _CODES.BLOCKWISE_8BIT:
            if not self._has_bitsandbytes:
                raise ImportError(_NO_BITSANDBYTES)
            answer = codecs.encode(output, code)
            answer.dtype = str(self._dtype).removeprefix("torch.")
            return answer
        return serialize_torch_tensor(output, code, allow_inplace=True)


def decoded(message: runtime_pb2.Tensor, settings: ServerSettings) -> torch.Tensor:
    """A tensor of a request. The 8-bit codes are read by our own decoder: hivemind's fail under NumPy 2.4."""
    code = message.compression
    if code not in (_CODES.UNIFORM_8BIT, _CODES.QUANTILE_8BIT, _CODES.BLOCKWISE_8BIT):
        return deserialize_torch_tensor(message)
    if code == _CODES.BLOCKWISE_8BIT and not settings.has_bitsandbytes:
        raise ImportError(_NO_BITSANDBYTES)
    return codecs.decode(message, tuple(message.size)).to(DTYPES[message.dtype])


def read_metadata(request: runtime_pb2.ExpertRequest) -> dict[str, Any]:
    """The request's metadata; raises ValueError when it is not a dictionary."""
    metadata = MSGPackSerializer.loads(request.metadata) if request.metadata else {}
    if not isinstance(metadata, dict):
        raise ValueError(f"expected metadata to be a dictionary, found {type(metadata).__name__}")
    return metadata


def unpacked(tensors: Sequence[torch.Tensor], metadata: dict[str, Any], count: int) -> Sequence[torch.Tensor]:
    """The call's first `count` arguments: `args_structure` says which tensor is which."""
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
    """An argument that may be left out: an empty tensor stands for None."""
    return tensor if tensor.numel() else None
