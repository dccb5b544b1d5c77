"""The metadata of inference sessions on the Petals wire (PROTOCOL.md beside this file, sections 5 and 10). No I/O."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hivemind.utils.serializer import MSGPackSerializer

from petals_eval.swarm.wire.span import Span

__all__ = ["NextServer", "session_metadata", "step_metadata"]


@dataclass(frozen=True, slots=True)
class NextServer:
    """A server that a step's answer is to be pushed to: the session that is open there, and its blocks."""

    peer_id: str
    session_id: str
    span: Span


def session_metadata(max_length: int, active_adapter: str | None) -> dict[str, object]:
    """Return what opens an inference session: it goes into the metadata of the first step.

    max_length: tokens of each row to reserve. The server is never to wait for room in its cache: two sessions that do
    so at once leave it where no session opens any more, for anybody (Petals 2.2.0, 2.3.0.dev2 and DRIFT-LLM alike).
    """
    return {
        "max_length": max_length,
        "alloc_timeout": 0.0,
        "points": 0,
        "active_adapter": active_adapter or "",
    }


def step_metadata(
    session_id: str,
    step_id: str,
    opening: Mapping[str, object],
    start_from_position: int | None = None,
    next_servers: Sequence[NextServer] = (),
) -> bytes:
    """Return the metadata of one step of a session.

    opening: `session_metadata` in the first step, nothing in the others.
    start_from_position: positions of the cache to go back to; only for servers that are known to do it.
    next_servers: the servers to push the answer on to, in order.
    """
    metadata = {
        **opening,
        "session_id": session_id,
        "step_id": step_id,
        "args_structure": ((b"__T0", b"__T1", b"__T2"), {}),
    }
    if start_from_position is not None:
        metadata["start_from_position"] = start_from_position
    if next_servers:
        metadata["next_servers"] = tuple(
            (each.peer_id, each.session_id, each.span.start, each.span.stop) for each in next_servers
        )
    return MSGPackSerializer.dumps(metadata)
