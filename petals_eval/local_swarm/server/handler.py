"""The RPCs of a block server, as Petals' own servers answer them."""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any, AsyncIterator  # noqa: UP035 - hivemind reads the stream's type from typing's alias only

import torch
from hivemind.p2p.p2p_daemon import P2P, P2PContext
from hivemind.p2p.p2p_daemon_bindings.control import DEFAULT_MAX_MSG_SIZE
from hivemind.p2p.servicer import ServicerBase
from hivemind.proto import runtime_pb2
from hivemind.utils.serializer import MSGPackSerializer
from hivemind.utils.streaming import combine_from_streaming, split_for_streaming
from hivemind.utils.tensor_descr import BatchTensorDescriptor

from petals_eval.local_swarm.faults.catalog import OtherLayout, VersionLie
from petals_eval.local_swarm.faults.injector import wait_forever
from petals_eval.local_swarm.server.messages import given, read_metadata, unpacked
from petals_eval.local_swarm.server.served_span import ServedSpan
from petals_eval.local_swarm.server.sessions import Sessions
from petals_eval.local_swarm.work import Work
from petals_eval.swarm.transport.rpc import TransformerConnectionHandler

__all__ = ["BlockHandler"]

_ANNOUNCED_LENGTH = 2048
"""Tokens of the hidden states in rpc_info's schemas, as Petals writes them; no limit for anybody."""


class BlockHandler(ServicerBase):
    """The RPCs over one server's blocks."""

    def __init__(self, served: ServedSpan, p2p: P2P):
        self._served = served
        self._sessions = Sessions(served, lambda peer, request: self.get_stub(p2p, peer).rpc_push(request))

    async def rpc_info(self, request: runtime_pb2.ExpertUID, context: P2PContext) -> runtime_pb2.ExpertInfo:
        """Return the version and the cache left; for the uid of a block also the tensors that it takes and gives."""
        blocks, budget, faults = self._served.blocks, self._served.budget, self._served.faults
        if request.uid and request.uid not in self._served.uids:
            raise KeyError(request.uid)
        lie = faults.active(VersionLie)
        info: dict[str, Any] = {
            "version": self._served.settings.version if lie is None else lie.version,
            "dht_client_mode": False,
            "cache_tokens_available": budget.bytes_left // blocks.cache_bytes_per_token,
        }
        if request.uid:
            hidden = BatchTensorDescriptor(
                1,
                _ANNOUNCED_LENGTH,
                blocks.hidden_size,
                dtype=blocks.dtype,
                compression=runtime_pb2.CompressionType.NONE,
            )
            prompts = BatchTensorDescriptor((), dtype=blocks.dtype)
            hypo_ids = BatchTensorDescriptor((), dtype=torch.int64)
            layout = faults.active(OtherLayout)
            step = (hidden, prompts, hypo_ids) if layout is None else (hidden,) * layout.tensors
            info |= {
                "forward_schema": ((hidden,), {}),
                "outputs_schema": (hidden,),
                "keyword_names": (),
                "inference_schema": (step, {}),
            }
        return runtime_pb2.ExpertInfo(serialized_info=MSGPackSerializer.dumps(info))

    async def rpc_forward(self, request: runtime_pb2.ExpertRequest, context: P2PContext) -> runtime_pb2.ExpertResponse:
        """Take hidden states and deep prompts in one message, and return hidden states in one."""
        with self._served.faults.call_in_flight():
            async with asyncio.timeout(self._served.settings.request_timeout):
                answer = await self._forward("rpc_forward", request, request.tensors, context)
                if self._served.faults.hangs("middle"):
                    await wait_forever()
                return runtime_pb2.ExpertResponse(tensors=[answer])

    async def rpc_forward_stream(
        self, requests: AsyncIterator[runtime_pb2.ExpertRequest], context: P2PContext
    ) -> AsyncIterator[runtime_pb2.ExpertResponse]:
        """Do what `rpc_forward` does, in messages of at most 4 MiB each way."""
        async with asyncio.timeout(self._served.settings.request_timeout):
            opening, tensors = await _gathered(requests)
            with self._served.faults.call_in_flight():
                answer = await self._forward("rpc_forward_stream", opening, tensors, context)
                hangs = self._served.faults.hangs("middle")
                for part in split_for_streaming(answer, len(answer.buffer) // 2 if hangs else DEFAULT_MAX_MSG_SIZE):
                    yield runtime_pb2.ExpertResponse(tensors=[part])
                    if hangs:
                        await wait_forever()

    async def _forward(
        self,
        method: str,
        request: runtime_pb2.ExpertRequest,
        messages: Sequence[runtime_pb2.Tensor],
        context: P2PContext,
    ) -> runtime_pb2.Tensor:
        """Return the answer to a request whose tensors came in `messages`."""
        served = self._served
        metadata = read_metadata(request)
        hidden, prompts = unpacked(served.read(messages), metadata, 2)
        work = self._work(method, request.uid, hidden, prompts, metadata, context)
        return await served.answer(await served.compute(work), metadata, work.remote)

    def _work(
        self,
        method: str,
        uid: str,
        hidden: torch.Tensor,
        prompts: torch.Tensor,
        metadata: dict[str, Any],
        context: P2PContext,
    ) -> Work:
        span, active_adapter = self._served.requested(uid), self._served.active_adapter(metadata)
        if hidden.ndim != 3:
            raise ValueError(f"expected hidden states (batch, seq, hidden), found {tuple(hidden.shape)}")
        if hidden.shape[0] == 0:
            raise RuntimeError("Batch should contain more than 0 samples")
        return Work(method, span, hidden, given(prompts), active_adapter, str(context.remote_id))

    async def rpc_backward(self, request: runtime_pb2.ExpertRequest, context: P2PContext) -> runtime_pb2.ExpertResponse:
        """Take hidden states, the gradient by those after the blocks and deep prompts; return the gradients by the
        hidden states and, where there are any, by the prompts."""
        async with asyncio.timeout(self._served.settings.request_timeout):
            gradients = await self._backward("rpc_backward", request, request.tensors, context)
            return runtime_pb2.ExpertResponse(tensors=gradients)

    async def rpc_backward_stream(
        self, requests: AsyncIterator[runtime_pb2.ExpertRequest], context: P2PContext
    ) -> AsyncIterator[runtime_pb2.ExpertResponse]:
        """Do what `rpc_backward` does, in messages of at most 4 MiB each way."""
        async with asyncio.timeout(self._served.settings.request_timeout):
            opening, tensors = await _gathered(requests)
            for gradient in await self._backward("rpc_backward_stream", opening, tensors, context):
                for part in split_for_streaming(gradient, DEFAULT_MAX_MSG_SIZE):
                    yield runtime_pb2.ExpertResponse(tensors=[part])

    async def _backward(
        self,
        method: str,
        request: runtime_pb2.ExpertRequest,
        messages: Sequence[runtime_pb2.Tensor],
        context: P2PContext,
    ) -> list[runtime_pb2.Tensor]:
        """Return the gradients that a request asks for, whose tensors came in `messages`."""
        served = self._served
        metadata = read_metadata(request)
        hidden, grad_outputs, prompts = unpacked(served.read(messages), metadata, 3)
        work = self._work(method, request.uid, hidden, prompts, metadata, context)
        if grad_outputs.shape != hidden.shape:
            raise ValueError(f"expected gradients {tuple(hidden.shape)}, found {tuple(grad_outputs.shape)}")
        return served.answer_gradients(await served.compute_gradients(work, grad_outputs), metadata)

    async def rpc_inference(
        self, requests: AsyncIterator[runtime_pb2.ExpertRequest], context: P2PContext
    ) -> AsyncIterator[runtime_pb2.ExpertResponse]:
        """Run a session with a key-value cache: a step in each message, a response to each step."""
        async with aclosing(self._sessions.infer(requests, str(context.remote_id))) as responses:
            async for response in responses:
                yield response

    async def rpc_push(self, request: runtime_pb2.ExpertRequest, context: P2PContext) -> runtime_pb2.ExpertResponse:
        """Take a step of one of this server's sessions from the server before it."""
        self._sessions.receive(request)
        return runtime_pb2.ExpertResponse()


async def _gathered(
    requests: AsyncIterator[runtime_pb2.ExpertRequest],
) -> tuple[runtime_pb2.ExpertRequest, list[runtime_pb2.Tensor]]:
    """Return the first message of a streamed request, and the tensors that all of them hold."""
    opening: runtime_pb2.ExpertRequest | None = None
    parts: list[list[runtime_pb2.Tensor]] = []  # of each tensor; the first of them carries its header
    async for request in requests:
        opening = opening or request
        if request.uid != opening.uid:
            raise ValueError("Block uids differ in one request")
        for part in request.tensors:
            if part.dtype or not parts:
                parts.append([])
            parts[-1].append(part)
    if opening is None:
        raise ValueError("expected a request, found an empty stream")
    return opening, [combine_from_streaming(each) for each in parts]


BlockHandler.__name__ = TransformerConnectionHandler.__name__
"""hivemind makes a class's name a part of the address of its RPCs, and clients ask for the name that Petals uses."""
