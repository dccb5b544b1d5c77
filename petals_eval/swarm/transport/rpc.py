"""The calls of a Petals server as hivemind makes them, and whose fault it is when one fails."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from google.protobuf.message import DecodeError
from hivemind.p2p import ServicerBase
from hivemind.p2p.p2p_daemon import P2PContext
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError, P2PHandlerError
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure, DispatchFailure
from hivemind.proto import runtime_pb2

from petals_eval.errors import PeerError, PeerRefusedError, PeerTimeoutError, PeerUnreachableError
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.wire.span import Span
from petals_eval.text import printable

__all__ = ["Answer", "ServedHop", "TransformerConnectionHandler", "joined_answer", "one_line", "peer_errors"]


@dataclass(frozen=True, slots=True)
class Answer:
    """Hidden states (rows, positions, hidden size) in the server's dtype, and what it took to get them."""

    hidden: torch.Tensor
    seconds: float
    bytes_sent: int
    bytes_received: int


@dataclass(frozen=True, slots=True)
class ServedHop:
    """Who computed blocks, and in what: the server's own words on version and quantisation, the dtype of its answer."""

    peer_id: str
    span: Span
    version: str | None
    dtype: str
    quant: str | None

    @classmethod
    def of(cls, hop: Hop, hidden: torch.Tensor) -> "ServedHop":
        """Return a hop as it was served. hidden: what its server answered."""
        record = hop.server.record
        return cls(hop.peer_id, hop.span, record.version, str(hidden.dtype).removeprefix("torch."), record.quant_type)


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
        raise PeerRefusedError(one_line(error)) from error
    except (P2PDaemonError, ControlFailure, DispatchFailure, OSError, EOFError) as error:
        raise PeerUnreachableError(one_line(error)) from error
    except (DecodeError, ValueError, TypeError) as error:  # protobuf's own is no ValueError; hivemind raises TypeError
        raise PeerRefusedError(f"its answer is no message: {one_line(error)}") from error


def one_line(error: object) -> str:
    """Return a failure in one line that is safe to print, of at most 300 characters."""
    return printable(str(error) or type(error).__name__, longest=300)
