"""The calls of a Petals server as hivemind makes them, and whose fault it is when one fails."""

import asyncio
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, AsyncIterator  # noqa: UP035 - hivemind takes a call for a stream by typing's alias only

import torch
from hivemind.p2p import ServicerBase
from hivemind.p2p.p2p_daemon import P2PContext
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError, P2PHandlerError
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure, DispatchFailure
from hivemind.proto import runtime_pb2

from petals_eval.errors import PeerError, PeerRefusedError, PeerTimeoutError, PeerUnreachableError

__all__ = ["Answer", "TransformerConnectionHandler", "as_peer_errors", "together"]


@dataclass(frozen=True, slots=True)
class Answer:
    """Hidden states (batch, seq, hidden) in the server's dtype, and what it took to get them."""

    hidden: torch.Tensor
    seconds: float
    bytes_sent: int
    bytes_received: int


async def together(calls: Sequence[Coroutine[Any, Any, Answer]]) -> list[Answer]:
    """All of them, or the first error with the rest cancelled: asyncio.gather would let the rest run on."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


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

    def rpc_inference(
        self, requests: AsyncIterator[runtime_pb2.ExpertRequest], context: P2PContext
    ) -> AsyncIterator[runtime_pb2.ExpertResponse]:
        raise TypeError("this class only describes the calls; servers implement them")


@contextmanager
def as_peer_errors(timeout: float) -> Iterator[None]:
    """Turn what hivemind and asyncio raise during a call into whose fault it is.

    timeout: seconds the call was given, for the message.
    """
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
