"""One RPC to one server: send, wait under a deadline, check the answer. Retries live elsewhere."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from hivemind.p2p import P2P, PeerID, ServicerBase
from hivemind.p2p.p2p_daemon import P2PContext
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError, P2PHandlerError
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure, DispatchFailure
from hivemind.proto import runtime_pb2

from petals_eval.config import SwarmSettings
from petals_eval.errors import PeerAnswerError, PeerError, PeerRefusedError, PeerTimeoutError, PeerUnreachableError
from petals_eval.swarm import wire
from petals_eval.swarm.routing import Hop

__all__ = ["Answer", "BlockCalls", "RemoteCalls", "TransformerConnectionHandler"]


class TransformerConnectionHandler(ServicerBase):
    """The calls of a Petals server, for hivemind to make a stub of.

    Servers register their handlers under this very class name: under another one they answer "protocol not supported".
    """

    async def rpc_info(self, request: runtime_pb2.ExpertUID, context: P2PContext) -> runtime_pb2.ExpertInfo:
        raise TypeError("this class only describes the calls; servers implement them")

    async def rpc_forward(self, request: runtime_pb2.ExpertRequest, context: P2PContext) -> runtime_pb2.ExpertResponse:
        raise TypeError("this class only describes the calls; servers implement them")

    def rpc_forward_stream(
        self, requests: AsyncIterator[runtime_pb2.ExpertRequest], context: P2PContext
    ) -> AsyncIterator[runtime_pb2.ExpertResponse]:
        raise TypeError("this class only describes the calls; servers implement them")


@dataclass(frozen=True, slots=True)
class Answer:
    """Hidden states (batch, seq, hidden) in the server's dtype, and what it took to get them."""

    hidden: torch.Tensor
    seconds: float
    bytes_sent: int
    bytes_received: int


class BlockCalls(Protocol):
    """The seam between "which server next" and "send it": tests of routing and retries plug in here."""

    async def forward(self, hop: Hop, hidden: torch.Tensor, prompts: torch.Tensor | None) -> Answer:
        """Run hidden (batch, seq, hidden) through the hop's blocks.

        prompts: (blocks of the hop, batch or 1, prefix, hidden) or None. Raises PeerError.
        """
        ...


class RemoteCalls:
    """Calls over libp2p."""

    def __init__(self, p2p: P2P, dht_prefix: str, settings: SwarmSettings):
        self._p2p = p2p
        self._prefix = dht_prefix
        self._settings = settings
        self._metadata = wire.forward_metadata(settings.active_adapter)
        self._infos: dict[str, asyncio.Task[wire.ServerInfo]] = {}

    async def info(self, hop: Hop) -> wire.ServerInfo:
        """What the server says of itself, asked once and kept; concurrent callers share the question."""
        peer_id = hop.server.peer_id
        task = self._infos.get(peer_id)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = asyncio.create_task(self._ask_info(peer_id, hop.first))
            self._infos[peer_id] = task
        return await asyncio.shield(task)

    def known_info(self, peer_id: str) -> wire.ServerInfo | None:
        """The answer to rpc_info when there is one already."""
        task = self._infos.get(peer_id)
        if task is None or not task.done() or task.cancelled() or task.exception() is not None:
            return None
        return task.result()

    def forget(self, peer_id: str) -> None:
        """Ask the server again before the next call: it may have come back as another."""
        task = self._infos.get(peer_id)
        if task is not None and task.done():
            del self._infos[peer_id]

    async def _ask_info(self, peer_id: str, block: int) -> wire.ServerInfo:
        request = runtime_pb2.ExpertUID(uid=wire.block_uid(self._prefix, block))
        with _as_peer_errors(self._settings.connect_timeout):
            answer = await self._stub(peer_id).rpc_info(request, timeout=self._settings.connect_timeout)
        return wire.read_info(answer.serialized_info)

    async def forward(self, hop: Hop, hidden: torch.Tensor, prompts: torch.Tensor | None) -> Answer:
        """One rpc_forward, or rpc_forward_stream above 1 MiB of tensor bytes. Raises PeerError."""
        info = await self.info(hop)
        wanted = self._settings.require_dtype
        if wanted is not None and wire.dtype_name(info.output_dtype) != wanted:
            raise PeerAnswerError(f"it announces {wanted}, but computes in {wire.dtype_name(info.output_dtype)}")
        started = time.monotonic()
        tensors = [wire.encode_tensor(hidden.to(wire.wire_dtype(hidden.dtype, info.input_dtype)))]
        if prompts is None:
            tensors.append(wire.encode_tensor(torch.empty(0)))
        else:
            tensors.append(wire.encode_tensor(prompts.to(wire.wire_dtype(prompts.dtype, info.input_dtype))))
        sent = sum(len(tensor.buffer) for tensor in tensors)

        uid = wire.block_uid(self._prefix, hop.first, hop.last)
        stub = self._stub(hop.server.peer_id)
        timeout = self._settings.request_timeout
        with _as_peer_errors(timeout):
            if sent <= wire.MAX_UNARY_BYTES:
                request = runtime_pb2.ExpertRequest(uid=uid, tensors=tensors, metadata=self._metadata)
                response = await stub.rpc_forward(request, timeout=timeout)
                parts = list(response.tensors)
            else:
                async with asyncio.timeout(timeout):
                    responses = await stub.rpc_forward_stream(self._send(uid, tensors))
                    parts = [part async for response in responses for part in response.tensors]
        answer = wire.read_answer(parts, tuple(hidden.shape), info.output_dtype)
        received = sum(len(part.buffer) for part in parts)
        return Answer(answer, time.monotonic() - started, sent, received)

    async def _send(self, uid: str, tensors: list[runtime_pb2.Tensor]) -> AsyncIterator[runtime_pb2.ExpertRequest]:
        for part in wire.stream_parts(uid, tensors, self._metadata):
            yield part

    def _stub(self, peer_id: str):  # type: ignore[no-untyped-def]  # hivemind makes the stub's class at run time
        return TransformerConnectionHandler.get_stub(self._p2p, PeerID.from_base58(peer_id))


@contextmanager
def _as_peer_errors(timeout: float) -> Iterator[None]:
    """Turn what hivemind and asyncio raise during a call into whose fault it is."""
    try:
        yield
    except PeerError:
        raise
    except TimeoutError as error:
        raise PeerTimeoutError(f"no answer within {timeout:g} s") from error
    except P2PHandlerError as error:
        raise PeerRefusedError(_one_line(error)) from error
    except (P2PDaemonError, ControlFailure, DispatchFailure, OSError, EOFError) as error:
        raise PeerUnreachableError(_one_line(error)) from error
    except (ValueError, TypeError) as error:  # protobuf's DecodeError is a ValueError; hivemind raises TypeError
        raise PeerRefusedError(f"its answer is no message: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    """A peer's words, made safe to print: one line, printable, short."""
    text = str(error) or type(error).__name__
    return "".join(character if character.isprintable() else " " for character in text)[:300]
