"""One micro-batch through a whole route: sent once, and passed on from server to server. No retries, no other servers.

Each server has a session of its own, opened before anything is sent: a push to a session that is not open vanishes, and
what a session is opened with would be pushed again with every step.
The step to the first one names the others' sessions. Every server pushes its answer to the next and sends it to the
client as well, so that each can be checked. What a client saves is its uplink.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from petals_eval.errors import PeerError
from petals_eval.swarm.transport.hop_session import HopSession
from petals_eval.swarm.transport.rpc import Answer, as_peer_errors

__all__ = ["Pushed", "push_through"]


@dataclass(frozen=True, slots=True)
class Pushed:
    """How far a micro-batch came.

    answers: of the first hops, in order; they count whatever befell the others. error: why that is not all of them, or
    None. at: the hop that it befell.
    """

    answers: tuple[Answer, ...]
    error: PeerError | None = None
    at: int | None = None


async def push_through(
    sessions: Sequence[HopSession], ends: Sequence[tuple[str, int, int]], hidden: torch.Tensor, timeout: float
) -> Pushed:
    """Run hidden (batch, seq, hidden) through fresh sessions, one a hop and open, and close them.

    ends: of each hop its server's peer id, and its blocks first:last. timeout: seconds for all of it.
    """
    _, seq, size = hidden.shape
    answers: list[Answer] = []
    tasks: list[asyncio.Task[Answer]] = []
    at = 0
    try:
        with as_peer_errors(timeout):
            async with asyncio.timeout(timeout):
                rest = [(peer, sessions[hop].id, first, last) for hop, (peer, first, last) in enumerate(ends)][1:]
                tasks = [
                    asyncio.create_task(sessions[0].step(hidden, next_servers=rest)),
                    *(asyncio.create_task(session.pushed_step(seq, size)) for session in sessions[1:]),
                ]
                for at, task in enumerate(tasks):  # noqa: B007 - it says who failed
                    answers.append(await task)
    except PeerError as error:
        return Pushed(tuple(answers), error, at)
    finally:
        try:
            await _end(tasks)
        finally:
            await _end([asyncio.create_task(session.close()) for session in sessions], at_once=False)
    return Pushed(tuple(answers))


async def _end(tasks: Sequence[asyncio.Task[Any]], *, at_once: bool = True) -> None:
    """Wait for them all, cancelled or not; the errors they end with were told, or are a session's that has ended."""
    for task in tasks:
        task.add_done_callback(_look_at)
    try:
        if tasks and not at_once:
            await asyncio.wait(tasks)
    finally:
        for task in tasks:
            task.cancel()
    if tasks:
        await asyncio.wait(tasks)


def _look_at(task: asyncio.Task[Any]) -> None:
    """asyncio would complain of an error nobody looked at."""
    if not task.cancelled():
        task.exception()
