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

from petals_eval.errors import PeerError
from petals_eval.swarm.activations import Activations
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.tasks import retrieve_exception
from petals_eval.swarm.transport.client import HopClient
from petals_eval.swarm.transport.hop_session import HopSession
from petals_eval.swarm.transport.opening import all_or_none
from petals_eval.swarm.transport.rpc import Answer, peer_errors
from petals_eval.swarm.wire.session_messages import NextServer

__all__ = ["Pushed", "push"]


@dataclass(frozen=True, slots=True)
class Pushed:
    """How far a micro-batch came.

    answers: of the first hops, in order; they count whatever befell the others.
    error: why that is not all of them, or None. at: the hop that it befell.
    """

    answers: tuple[Answer, ...]
    error: PeerError | None = None
    at: int | None = None


async def push(client: HopClient, hops: Sequence[Hop], activations: Activations, timeout: float) -> Pushed:
    """Run activations without prompts through all these hops, each server passing its answer on to the next.

    timeout: seconds for all of it, from when all sessions are open. Raises nothing: what is returned says how far it
    went, and why no further.
    """
    rows, positions = activations.rows, activations.positions
    sessions: list[HopSession] = []
    for at, hop in enumerate(hops):  # before anybody reserves cache for it
        try:
            await client.check_push(hop)
        except PeerError as error:
            return Pushed((), error, at)
    for at, opened in enumerate(await all_or_none([client.open_session(hop, rows, positions) for hop in hops])):
        if isinstance(opened, PeerError):
            return Pushed((), client.explain_push(hops[at], opened, rows, positions), at)
        sessions.append(opened)
    pushed = await _through(sessions, hops, activations, timeout)
    if pushed.error is None or pushed.at is None:
        return pushed
    return Pushed(pushed.answers, client.explain_push(hops[pushed.at], pushed.error, rows, positions), pushed.at)


async def _through(
    sessions: Sequence[HopSession], hops: Sequence[Hop], activations: Activations, timeout: float
) -> Pushed:
    """Push through fresh sessions that are open, one a hop, and close them."""
    answers: list[Answer] = []
    tasks: list[asyncio.Task[Answer]] = []
    at = 0
    try:
        with peer_errors(timeout):
            async with asyncio.timeout(timeout):
                route = [
                    NextServer(hop.peer_id, session.id, hop.span) for hop, session in zip(hops, sessions, strict=True)
                ]
                expected = activations.positions, activations.hidden_size
                tasks = [
                    asyncio.create_task(sessions[0].step(activations.hidden, next_servers=route[1:])),
                    *(asyncio.create_task(session.pushed_step(*expected)) for session in sessions[1:]),
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
    """Wait for all tasks, cancelled or not; the errors they end with were told, or are a session's that has ended."""
    for task in tasks:
        task.add_done_callback(retrieve_exception)
    try:
        if tasks and not at_once:
            await asyncio.wait(tasks)
    finally:
        for task in tasks:
            task.cancel()
    if tasks:
        await asyncio.wait(tasks)
