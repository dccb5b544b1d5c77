"""Inference sessions: rpc_inference and rpc_push, with a key-value cache that lives as long as the stream.

Source: what Petals 2.3.0.dev2 servers do (`petals_eval/swarm/wire/PROTOCOL.md`, rpc_inference). Where those go on with
wrong numbers, as when a roll-back goes forward, these refuse.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import torch
from hivemind.p2p.p2p_daemon_bindings.datastructures import PeerID
from hivemind.proto import runtime_pb2
from hivemind.utils.serializer import MSGPackSerializer

from petals_eval.local_swarm.faults.catalog import LockedCache, OtherLayout, WrongRollBack
from petals_eval.local_swarm.faults.injector import wait_forever
from petals_eval.local_swarm.server.messages import given, read_metadata, unpacked
from petals_eval.local_swarm.server.served_span import ServedSpan
from petals_eval.local_swarm.work import Work
from petals_eval.swarm.wire.messages import chain_uid
from petals_eval.swarm.wire.server_info import SESSION_TENSORS
from petals_eval.swarm.wire.span import Span

__all__ = ["Sessions"]

logger = logging.getLogger(__name__)

Push = Callable[[PeerID, runtime_pb2.ExpertRequest], Awaitable[object]]


class Sessions:
    """The open sessions of one server. push: sends a step's output to the session of the next server."""

    def __init__(self, served: ServedSpan, push: Push):
        self._served = served
        self._push = push
        self._pushed: dict[str, asyncio.Queue[runtime_pb2.ExpertRequest]] = {}  # by session id
        self._pushing: set[asyncio.Task[None]] = set()

    async def infer(
        self, requests: AsyncIterator[runtime_pb2.ExpertRequest], remote: str
    ) -> AsyncGenerator[runtime_pb2.ExpertResponse, None]:
        """Run one session: a response for each step, until an empty request, the end of the stream or a timeout.

        remote: peer id of the client. Raises AllocationFailed when the cache has no room, ValueError for what the
        session cannot do; the client gets the text.
        """
        settings, faults = self._served.settings, self._served.faults
        async with asyncio.timeout(settings.session_timeout):
            try:
                opening = await asyncio.wait_for(anext(requests), settings.step_timeout)
            except (TimeoutError, StopAsyncIteration):
                return  # as Petals: a client that says nothing hears nothing
            metadata = read_metadata(opening)
            session = _Session(self._served, opening, metadata, remote)
            timeout = min(float(metadata.get("alloc_timeout", 0.0)), settings.max_alloc_timeout)
            if layout := faults.hits_call(OtherLayout):
                raise ValueError(f"expected {layout[0].tensors} tensors in a step, found {len(opening.tensors)}")
            if faults.hits_call(LockedCache):
                await wait_forever()
            async with (
                self._served.budget.reserve(session.cache_bytes, timeout),
                aclosing(self._steps(opening, requests, metadata.get("session_id"))) as steps,
            ):
                async for request, step in steps:
                    work = session.work(request, step)
                    with faults.call_in_flight():
                        output = await self._served.compute(work) if work.hidden.numel() else work.hidden
                        answer = await self._served.answer(output, {}, remote)
                        if faults.hangs("middle"):
                            await wait_forever()
                    if work.prompts is None:
                        self._push_on(request, answer, step)
                    yield runtime_pb2.ExpertResponse(tensors=[answer])

    def receive(self, request: runtime_pb2.ExpertRequest) -> None:
        """Take a step that another server pushes; one for a session that is not open vanishes."""
        self._served.requested(request.uid)
        session_id = read_metadata(request).get("session_id")
        if (queue := self._pushed.get(session_id or "")) is not None:
            queue.put_nowait(request)
        else:
            logger.debug("ignored a push to unknown session %s", session_id)

    async def _steps(
        self,
        request: runtime_pb2.ExpertRequest,
        requests: AsyncIterator[runtime_pb2.ExpertRequest],
        session_id: str | None,
    ) -> AsyncGenerator[tuple[runtime_pb2.ExpertRequest, dict[str, Any]], None]:
        """Yield the session's steps with their metadata, from the client and from other servers, each step once."""
        seen: set[str] = set()
        with self._receiving(session_id) as pushed:
            waiting: dict[str, asyncio.Task[runtime_pb2.ExpertRequest]] = {}
            try:
                while request.tensors:
                    step = read_metadata(request)
                    step_id = step.get("step_id")
                    if step_id is None or step_id not in seen:
                        yield request, step
                    if step_id is not None:
                        seen.add(step_id)
                    if "client" not in waiting:
                        waiting["client"] = asyncio.create_task(_next(requests))
                    if "server" not in waiting:
                        waiting["server"] = asyncio.create_task(pushed.get())
                    done, _ = await asyncio.wait(
                        waiting.values(),
                        timeout=self._served.settings.step_timeout,
                        return_when=asyncio.FIRST_COMPLETED,
                    )
                    if not done:
                        return
                    source = "client" if waiting["client"] in done else "server"
                    request = waiting.pop(source).result()
            finally:
                for task in waiting.values():
                    task.cancel()

    @contextmanager
    def _receiving(self, session_id: str | None) -> Iterator[asyncio.Queue[runtime_pb2.ExpertRequest]]:
        """Yield the queue in which the steps of this session arrive that other servers push."""
        queue: asyncio.Queue[runtime_pb2.ExpertRequest] = asyncio.Queue()
        if session_id is None:
            yield queue  # nobody can name it
            return
        if session_id in self._pushed:
            raise ValueError(f"session id {session_id} is not unique")
        self._pushed[session_id] = queue
        try:
            yield queue
        finally:
            del self._pushed[session_id]

    def _push_on(self, request: runtime_pb2.ExpertRequest, output: runtime_pb2.Tensor, step: dict[str, Any]) -> None:
        """Send a step's output straight to the next server that the client named; the client gets it as well."""
        next_servers = step.get("next_servers")
        if not next_servers:
            return
        peer_id, session_id, start, stop = next_servers[0]
        metadata = {**step, "session_id": session_id, "next_servers": next_servers[1:], "pushed": True}
        message = runtime_pb2.ExpertRequest(
            uid=chain_uid(self._served.settings.dht_prefix, Span(start, stop)),
            tensors=[output, *request.tensors[1:]],
            metadata=MSGPackSerializer.dumps(metadata),
        )
        task = asyncio.create_task(self._send(PeerID.from_base58(peer_id), message))
        self._pushing.add(task)
        task.add_done_callback(self._pushed_on)

    async def _send(self, peer_id: PeerID, message: runtime_pb2.ExpertRequest) -> None:
        await asyncio.wait_for(self._push(peer_id, message), self._served.settings.request_timeout)

    def _pushed_on(self, task: "asyncio.Task[None]") -> None:
        """Forget a push that has ended. One that failed loses nothing: the client sends the step as well."""
        self._pushing.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.debug("a push failed: %r", error)


class _Session:
    """One session: what it was opened with, its cache and its position in it.

    Raises ValueError, RuntimeError or KeyError for an opening that the server does not take.
    """

    def __init__(self, served: ServedSpan, opening: runtime_pb2.ExpertRequest, metadata: dict[str, Any], remote: str):
        from petals_eval.local_swarm.server.kv_cache import SessionCache

        self._served, self._remote = served, remote
        self._span: Span = served.requested(opening.uid)
        self._max_length = self._checked_length(metadata.get("max_length"))
        self._active_adapter = served.active_adapter(metadata)
        self._batch = opening.tensors[0].size[0] if opening.tensors else 1
        self._structure = {"args_structure": metadata.get("args_structure")}
        self._cache = SessionCache(len(self._span), self._max_length, self._span.start)

    @property
    def cache_bytes(self) -> int:
        """The bytes that its keys and values take."""
        return self._batch * self._max_length * self._served.blocks.cache_bytes_per_token * len(self._span)

    def work(self, request: runtime_pb2.ExpertRequest, step: dict[str, Any]) -> Work:
        """Bring the cache to where the step starts, and return what is to be computed there."""
        tensors = self._served.read(request.tensors)
        hidden, prompts, hypo_ids = unpacked(tensors, self._structure | step, SESSION_TENSORS)
        size = self._served.blocks.hidden_size
        if hidden.ndim != 3 or hidden.shape[0] != self._batch or hidden.shape[2] != size:
            raise ValueError(
                f"expected hidden states ({self._batch}, seq, {size}), the session's batch and the "
                f"model's size, found {tuple(hidden.shape)}"
            )
        if given(prompts) is not None and len(prompts) != len(self._span):
            raise ValueError(f"Received {len(prompts)} prompts for {len(self._span)} backends")
        self._roll_back(step.get("start_from_position"))
        position, increment = self._cache.length, hidden.shape[1]
        if position + increment > self._max_length:
            raise ValueError(
                f"Maximum length exceeded: prefix {position} + current {increment}"
                f" exceeds pre-allocated maximum {self._max_length}"
            )
        if hidden.numel():  # a step of no tokens only reserves the cache
            self._reorder(given(hypo_ids))
        return Work(
            "rpc_inference", self._span, hidden, given(prompts), self._active_adapter, self._remote, self._cache
        )

    def _checked_length(self, max_length: Any) -> int:
        if not isinstance(max_length, int):
            raise ValueError(f"rpc_inference metadata must contain int max_length, got {max_length!r}")
        limit = self._served.settings.session_tokens
        if not 0 <= max_length <= limit:
            raise ValueError(f"Cannot allocate KV cache for {max_length} tokens, max = {limit}")
        return max_length

    def _roll_back(self, position: Any) -> None:
        if position is None or not self._served.settings.rolls_back:
            return
        if not isinstance(position, int) or not 0 <= position <= self._cache.length:
            raise ValueError(f"expected start_from_position within 0:{self._cache.length}, found {position!r}")
        if position and self._served.faults.hits_call(WrongRollBack):
            position -= 1
        self._cache.roll_back(position)

    def _reorder(self, hypo_ids: torch.Tensor | None) -> None:
        if hypo_ids is None:
            return
        if hypo_ids.dtype is not torch.int64:
            raise ValueError(f"hypo ids must be int64, got {hypo_ids.dtype}")
        if hypo_ids.shape != (self._batch,) or not all(0 <= row < self._batch for row in hypo_ids.tolist()):
            raise ValueError(f"expected hypo ids ({self._batch},) of rows 0:{self._batch}, found {hypo_ids.tolist()}")
        self._cache.reorder(hypo_ids)


async def _next(requests: AsyncIterator[runtime_pb2.ExpertRequest]) -> runtime_pb2.ExpertRequest:
    """Return the client's next request; an empty one, which ends the session, when its stream has ended."""
    return await anext(requests, runtime_pb2.ExpertRequest())
