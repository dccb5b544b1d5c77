"""The RPCs of a block server, as Petals' own servers answer them."""

import asyncio
from collections.abc import Sequence
from typing import Any, AsyncIterator  # noqa: UP035 - hivemind reads the stream's type from typing's alias only

import torch
from hivemind.compression.serialization import (
    deserialize_tensor_stream,
    deserialize_torch_tensor,
    serialize_torch_tensor,
)
from hivemind.p2p.p2p_daemon import P2PContext
from hivemind.p2p.p2p_daemon_bindings.control import DEFAULT_MAX_MSG_SIZE
from hivemind.p2p.servicer import ServicerBase
from hivemind.proto import runtime_pb2
from hivemind.utils.serializer import MSGPackSerializer
from hivemind.utils.streaming import split_for_streaming
from hivemind.utils.tensor_descr import BatchTensorDescriptor

from petals_eval.local_swarm.blocks import BlockSpan
from petals_eval.local_swarm.cache import CacheBudget
from petals_eval.local_swarm.compute import Compute, Work
from petals_eval.local_swarm.settings import ServerSettings
from petals_eval.swarm.wire import encode_tensor

__all__ = ["TransformerConnectionHandler", "given", "read_metadata", "unpacked"]


class TransformerConnectionHandler(ServicerBase):
    """Named as Petals names it: the class name is part of the RPC's address."""

    def __init__(self, settings: ServerSettings, span: BlockSpan, compute: Compute, budget: CacheBudget):
        self.settings = settings
        self.span = span
        self.compute = compute
        self.budget = budget

    async def rpc_info(self, request: runtime_pb2.ExpertUID, context: P2PContext) -> runtime_pb2.ExpertInfo:
        """Version and cache left; for the uid of a block also the tensors it takes and gives."""
        if request.uid and request.uid not in self._uids():
            raise KeyError(request.uid)
        info: dict[str, Any] = {
            "version": self.settings.version,
            "dht_client_mode": False,
            "cache_tokens_available": self.budget.bytes_left // self.span.cache_bytes_per_token,
        }
        if request.uid:
            hidden = BatchTensorDescriptor(
                1, 2048, self.span.hidden_size, dtype=self.span.dtype, compression=runtime_pb2.CompressionType.NONE
            )
            prompts = BatchTensorDescriptor((), dtype=self.span.dtype)
            hypo_ids = BatchTensorDescriptor((), dtype=torch.int64)
            info |= {
                "forward_schema": ((hidden,), {}),
                "outputs_schema": (hidden,),
                "keyword_names": (),
                "inference_schema": ((hidden, prompts, hypo_ids), {}),
            }
        return runtime_pb2.ExpertInfo(serialized_info=MSGPackSerializer.dumps(info))

    async def rpc_forward(self, request: runtime_pb2.ExpertRequest, context: P2PContext) -> runtime_pb2.ExpertResponse:
        """Hidden states and deep prompts in one message, hidden states in one message back."""
        async with asyncio.timeout(self.settings.request_timeout):
            tensors = [deserialize_torch_tensor(tensor) for tensor in request.tensors]
            metadata = read_metadata(request)
            output = await self._forward("rpc_forward", request.uid, tensors, metadata, context)
            return runtime_pb2.ExpertResponse(tensors=[self.encoded(output, metadata)])

    async def rpc_forward_stream(
        self, requests: AsyncIterator[runtime_pb2.ExpertRequest], context: P2PContext
    ) -> AsyncIterator[runtime_pb2.ExpertResponse]:
        """The same in parts of at most 4 MiB, each way."""
        async with asyncio.timeout(self.settings.request_timeout):
            first: runtime_pb2.ExpertRequest | None = None

            async def parts() -> AsyncIterator[Sequence[runtime_pb2.Tensor]]:
                nonlocal first
                async for request in requests:
                    first = first or request
                    if request.uid != first.uid:
                        raise ValueError("Block uids differ in one request")
                    yield request.tensors

            tensors = await deserialize_tensor_stream(parts())
            if first is None:
                raise ValueError("expected a request, found an empty stream")
            metadata = read_metadata(first)
            output = await self._forward("rpc_forward_stream", first.uid, tensors, metadata, context)
            for part in split_for_streaming(self.encoded(output, metadata), DEFAULT_MAX_MSG_SIZE):
                yield runtime_pb2.ExpertResponse(tensors=[part])

    async def _forward(
        self, method: str, uid: str, tensors: Sequence[torch.Tensor], metadata: dict[str, Any], context: P2PContext
    ) -> torch.Tensor:
        first, last = self.requested_blocks(uid)
        active_adapter = self.active_adapter(metadata)
        hidden, prompts = unpacked(tensors, metadata, 2)
        if hidden.ndim != 3:
            raise ValueError(f"expected hidden states (batch, seq, hidden), found {tuple(hidden.shape)}")
        if hidden.shape[0] == 0:
            raise RuntimeError("Batch should contain more than 0 samples")
        work = Work(method, first, last, hidden, given(prompts), active_adapter, str(context.remote_id))
        return await self.compute(work)

    def encoded(self, output: torch.Tensor, metadata: dict[str, Any]) -> runtime_pb2.Tensor:
        """The answer in the span's dtype, under the compression the client asked for."""
        codes = metadata.get("output_compression")
        code = runtime_pb2.CompressionType.NONE
        if codes is not None:
            if not isinstance(codes, (list, tuple)) or len(codes) != 1 or not isinstance(codes[0], int):
                raise ValueError(f"expected output_compression to be a tuple of one code, found {codes!r}")
            code = codes[0]
        output = output.to(self.span.dtype)
        # Uncompressed tensors go through our own encoder: hivemind's widens bfloat16 unless a global flag is turned.
        if code == runtime_pb2.CompressionType.NONE:
            return encode_tensor(output)
        return serialize_torch_tensor(output, code, allow_inplace=True)

    def requested_blocks(self, uid: str) -> tuple[int, int]:
        """The blocks first:last a chain of uids names; raises RuntimeError for those this server does not hold."""
        served = self._uids()
        requested = (uid or "").split(" ")
        for one in requested:
            if one not in served:
                raise RuntimeError(f"Remote peer does not serve {one}")
        blocks = [served[one] for one in requested]
        if blocks != list(range(blocks[0], blocks[0] + len(blocks))):
            raise ValueError(f"expected consecutive blocks, found {uid}")
        return blocks[0], blocks[-1] + 1

    def active_adapter(self, metadata: dict[str, Any]) -> str:
        """The LoRA adapter a call names; raises KeyError for one this server did not announce."""
        name = metadata.get("active_adapter") or ""
        if name and name not in self.settings.adapters:
            raise KeyError(f"adapter {name} not found")
        return name

    def _uids(self) -> dict[str, int]:
        return {f"{self.settings.dht_prefix}.{block}": block for block in range(self.span.first, self.span.last)}


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
