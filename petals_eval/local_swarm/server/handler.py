"""The RPCs of a block server, as Petals' own servers answer them."""

import asyncio
from collections.abc import Awaitable, Sequence
from contextlib import aclosing
from typing import Any, AsyncIterator  # noqa: UP035 - hivemind reads the stream's type from typing's alias only

import torch
from hivemind.p2p.p2p_daemon import P2P, P2PContext
from hivemind.p2p.p2p_daemon_bindings.control import DEFAULT_MAX_MSG_SIZE
from hivemind.p2p.p2p_daemon_bindings.datastructures import PeerID
from hivemind.p2p.servicer import ServicerBase
from hivemind.proto import runtime_pb2
from hivemind.utils.serializer import MSGPackSerializer
from hivemind.utils.streaming import combine_from_streaming, split_for_streaming
from hivemind.utils.tensor_descr import BatchTensorDescriptor

from petals_eval.local_swarm.faults.catalog import OtherLayout, VersionLie
from petals_eval.local_swarm.faults.injector import Switchboard
from petals_eval.local_swarm.server.cache_budget import CacheBudget
from petals_eval.local_swarm.server.compute import Compute, Work
from petals_eval.local_swarm.server.messages import ServedBlocks, decoded, given, read_metadata, unpacked
from petals_eval.local_swarm.server.sessions import Sessions
from petals_eval.local_swarm.server.settings import ServerSettings
from petals_eval.model.blocks import BlockSpan

__all__ = ["TransformerConnectionHandler"]


class TransformerConnectionHandler(ServicerBase):
    """Named as Petals names it: the class name is part of the RPC's address."""

    def __init__(
        self,
        settings: ServerSettings,
        span: BlockSpan,
        compute: Compute,
        budget: CacheBudget,
        p2p: P2P,
        faults: Switchboard,
    ):
        self._settings = settings
        self._span = span
        self._blocks = ServedBlocks(settings, span)
        self._compute = compute
        self._budget = budget
        self._faults = faults

        def push(peer_id: PeerID, request: runtime_pb2.ExpertRequest) -> Awaitable[object]:
            return self.get_stub(p2p, peer_id).rpc_push(request)

        self._sessions = Sessions(settings, span, compute, budget, push, faults)

    async def rpc_info(self, request: runtime_pb2.ExpertUID, context: P2PContext) -> runtime_pb2.ExpertInfo:
        """Version and cache left; for the uid of a block also the tensors it takes and gives."""
        if request.uid and request.uid not in self._blocks.uids:
            raise KeyError(request.uid)
        lie = self._faults.of(VersionLie)
        info: dict[str, Any] = {
            "version": self._settings.version if lie is None else lie.version,
            "dht_client_mode": False,
            "cache_tokens_available": self._budget.bytes_left // self._span.cache_bytes_per_token,
        }
        if request.uid:
            hidden = BatchTensorDescriptor(
                1, 2048, self._span.hidden_size, dtype=self._span.dtype, compression=runtime_pb2.CompressionType.NONE
            )
            prompts = BatchTensorDescriptor((), dtype=self._span.dtype)
            hypo_ids = BatchTensorDescriptor((), dtype=torch.int64)
            layout = self._faults.of(OtherLayout)
            step = (hidden, prompts, hypo_ids) if layout is None else (hidden,) * layout.tensors
            info |= {
                "forward_schema": ((hidden,), {}),
                "outputs_schema": (hidden,),
                "keyword_names": (),
                "inference_schema": (step, {}),
            }
        return runtime_pb2.ExpertInfo(serialized_info=MSGPackSerializer.dumps(info))

    async def rpc_forward(self, request: runtime_pb2.ExpertRequest, context: P2PContext) -> runtime_pb2.ExpertResponse:
        """Hidden states and deep prompts in one message, hidden states in one message back."""
        with self._faults.under_way():
            async with asyncio.timeout(self._settings.request_timeout):
                tensors = [decoded(tensor, self._settings) for tensor in request.tensors]
                metadata = read_metadata(request)
                output = await self._forward("rpc_forward", request.uid, tensors, metadata, context)
                answer = await self._faults.sending(self._blocks.encoded(output, metadata), str(context.remote_id))
                if self._faults.hangs_in_mid_answer():
                    await self._faults.for_ever()
                return runtime_pb2.ExpertResponse(tensors=[answer])

    async def rpc_forward_stream(
        self, requests: AsyncIterator[runtime_pb2.ExpertRequest], context: P2PContext
    ) -> AsyncIterator[runtime_pb2.ExpertResponse]:
        """The same in parts of at most 4 MiB, each way."""
        async with asyncio.timeout(self._settings.request_timeout):
            first: runtime_pb2.ExpertRequest | None = None

            parts: list[list[runtime_pb2.Tensor]] = []  # of each tensor; the first of them carries its header
            async for request in requests:
                first = first or request
                if request.uid != first.uid:
                    raise ValueError("Block uids differ in one request")
                for part in request.tensors:
                    if part.dtype or not parts:
                        parts.append([])
                    parts[-1].append(part)
            tensors = [decoded(combine_from_streaming(each), self._settings) for each in parts]
            if first is None:
                raise ValueError("expected a request, found an empty stream")
            metadata = read_metadata(first)
            with self._faults.under_way():
                output = await self._forward("rpc_forward_stream", first.uid, tensors, metadata, context)
                answer = await self._faults.sending(self._blocks.encoded(output, metadata), str(context.remote_id))
                hangs = self._faults.hangs_in_mid_answer()
                most = len(answer.buffer) // 2 if hangs else DEFAULT_MAX_MSG_SIZE
                for part in split_for_streaming(answer, most):
                    yield runtime_pb2.ExpertResponse(tensors=[part])
                    if hangs:
                        await self._faults.for_ever()

    async def _forward(
        self, method: str, uid: str, tensors: Sequence[torch.Tensor], metadata: dict[str, Any], context: P2PContext
    ) -> torch.Tensor:
        first, last = self._blocks.requested(uid)
        active_adapter = self._blocks.active_adapter(metadata)
        hidden, prompts = unpacked(tensors, metadata, 2)
        if hidden.ndim != 3:
            raise ValueError(f"expected hidden states (batch, seq, hidden), found {tuple(hidden.shape)}")
        if hidden.shape[0] == 0:
            raise RuntimeError("Batch should contain more than 0 samples")
        work = Work(method, first, last, hidden, given(prompts), active_adapter, str(context.remote_id))
        return await self._compute(work)

    async def rpc_inference(
        self, requests: AsyncIterator[runtime_pb2.ExpertRequest], context: P2PContext
    ) -> AsyncIterator[runtime_pb2.ExpertResponse]:
        """A session with a key-value cache: a step in each message, a response for each step."""
        async with aclosing(self._sessions.infer(requests, str(context.remote_id))) as responses:
            async for response in responses:
                yield response

    async def rpc_push(self, request: runtime_pb2.ExpertRequest, context: P2PContext) -> runtime_pb2.ExpertResponse:
        """A step of a session of this server's, from the server before it."""
        self._sessions.receive(request)
        return runtime_pb2.ExpertResponse()
