"""The calls of a Petals server as hivemind makes them, and whose fault it is when one fails."""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from google.protobuf.message import DecodeError, Message
from hivemind.p2p import P2P, PeerID, ServicerBase
from hivemind.p2p.p2p_daemon import P2PContext
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError, P2PHandlerError
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure, DispatchFailure
from hivemind.proto import runtime_pb2
from hivemind.proto.p2pd_pb2 import RPCError

from petals_eval.errors import PeerAnswerError, PeerError, PeerRefusedError, PeerTimeoutError, PeerUnreachableError
from petals_eval.swarm.tasks import retrieve_exception
from petals_eval.text import printable

__all__ = [
    "MAX_ANSWER_OVERHEAD_BYTES",
    "Answer",
    "TransformerConnectionHandler",
    "joined_answer",
    "open_stream",
    "peer_errors",
    "receive",
    "streamed",
]

M = TypeVar("M", bound=Message)

MAX_ANSWER_OVERHEAD_BYTES = 1 << 16
"""Bytes that an answer may have beyond its tensor's values."""
_PART_OVERHEAD_BYTES = 64
"""Bytes that a part counts for beyond what it says: an answer of nothing but empty ones must end, too."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Hidden states (rows, positions, hidden size) in the server's dtype, and what it took to get them."""

    hidden: torch.Tensor
    seconds: float
    bytes_sent: int
    bytes_received: int


def joined_answer(answers: Sequence[Answer], dim: int, *, at_once: bool = False) -> Answer:
    """Return the answers to parts as one, joined along rows (`dim` 0) or positions (1).

    at_once: whether they were asked for together, and not one after the other.
    """
    if len(answers) == 1:
        return answers[0]
    seconds = [answer.seconds for answer in answers]
    return Answer(
        torch.cat([answer.hidden for answer in answers], dim=dim),
        max(seconds) if at_once else sum(seconds),
        sum(answer.bytes_sent for answer in answers),
        sum(answer.bytes_received for answer in answers),
    )


class TransformerConnectionHandler(ServicerBase):
    """The calls of a Petals server, for hivemind to make a stub of.

    Servers register their handlers under this very class name: under another one they answer "protocol not supported".
    """

    async def rpc_info(self, request: runtime_pb2.ExpertUID, context: P2PContext) -> runtime_pb2.ExpertInfo:
        raise TypeError("this class only describes the calls; servers implement them")

    async def rpc_forward(self, request: runtime_pb2.ExpertRequest, context: P2PContext) -> runtime_pb2.ExpertResponse:
        raise TypeError("this class only describes the calls; servers implement them")


async def open_stream(p2p: P2P, peer_id: str, method: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A bare stream to a server's streaming call; messages go over it by `P2P.send_protobuf` and `receive`.

    For calls that wait for an answer before they send on. hivemind's own stub reads requests from an iterator in a task
    of its own, and where the server ends the stream it waits for that task, which waits for the next request.
    """
    name = f"{TransformerConnectionHandler.__name__}.{method}"
    _, reader, writer = await p2p.call_binary_stream_handler(PeerID.from_base58(peer_id), name)
    return reader, writer


async def receive(reader: asyncio.StreamReader, message: type[M], limit: int) -> M:
    """The next message of a bare stream, in hivemind's framing: a mark, eight bytes of length, and the message.

    limit: bytes it may have; hivemind's own reader takes whatever a peer says.
    Raises PeerRefusedError for an error, PeerAnswerError for anything else, asyncio.IncompleteReadError at the end.
    """
    mark = await reader.readexactly(1)
    if mark not in (P2P.MESSAGE_MARKER, P2P.ERROR_MARKER):
        raise PeerAnswerError(f"expected a message, found the mark {mark!r}")
    length = int.from_bytes(await reader.readexactly(P2P.HEADER_LEN), P2P.BYTEORDER)
    if length > limit:
        raise PeerAnswerError(f"expected an answer of at most {limit} bytes, found one of {length}")
    content = await reader.readexactly(length)
    if mark == P2P.ERROR_MARKER:
        raise PeerRefusedError(_one_line(RPCError.FromString(content).message))
    return message.FromString(content)


async def streamed(
    stream: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    requests: Iterable[runtime_pb2.ExpertRequest],
    limit: int,
) -> list[runtime_pb2.Tensor]:
    """Send a request in parts over a bare stream; the tensors of the answer, in parts.

    Not by hivemind's own stub: that one reads a message whole, whatever length a peer gives it.
    Raises PeerAnswerError as soon as the answer is above `limit` bytes, PeerRefusedError, EOFError.
    """
    reader, writer = stream
    sending = asyncio.create_task(_send(requests, writer))
    sending.add_done_callback(retrieve_exception)  # where it fails, reading ends, too
    parts: list[runtime_pb2.Tensor] = []
    try:
        while True:
            try:
                response = await receive(reader, runtime_pb2.ExpertResponse, limit)
            except asyncio.IncompleteReadError as ended:
                if ended.partial:
                    raise
                return parts
            limit -= response.ByteSize() + _PART_OVERHEAD_BYTES * (1 + len(response.tensors))
            parts.extend(response.tensors)
            if limit < 0:
                raise PeerAnswerError("its answer goes on after the bytes that it may have")
    finally:
        sending.cancel()
        writer.close()


async def _send(requests: Iterable[runtime_pb2.ExpertRequest], writer: asyncio.StreamWriter) -> None:
    for request in requests:
        await P2P.send_protobuf(request, writer)
    await P2P.send_protobuf(P2P.END_OF_STREAM, writer)


@contextmanager
def peer_errors(timeout: float) -> Iterator[None]:
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
    except (DecodeError, ValueError, TypeError) as error:  # protobuf's own is no ValueError; hivemind raises TypeError
        raise PeerRefusedError(f"its answer is no message: {_one_line(error)}") from error


def _one_line(error: object) -> str:
    return printable(str(error) or type(error).__name__, longest=300)
