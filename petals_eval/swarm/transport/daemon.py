"""The libp2p daemon, which every call goes through: what hivemind 1.1 leaves to chance on our side of its line."""

import asyncio
from contextlib import suppress
from typing import Any
from uuid import UUID

from hivemind.p2p import P2P

from petals_eval.environment import environment_defaults

__all__ = ["end_daemon", "keep_reading", "start_daemon", "wait_until_lost"]

_GO = {"GOMAXPROCS": "1", "GOGC": "200"}
"""Environment variables of Go's runtime, unless the user has set them. The daemon only passes on messages of some
hundred KiB, and spent two fifths of its processor time on collecting them as garbage and on threads that look for work:
6.5 ms for each MB moved, 3.7 ms like this, on two cores, and 200 MB of memory, not 130."""


async def start_daemon(**options: Any) -> P2P:
    """A daemon as `P2P.create` starts it with these options, and a reader that late answers do not end.

    hivemind hands on the environment it finds: what other threads start meanwhile gets Go's variables too.
    """
    with environment_defaults(_GO):
        p2p = await P2P.create(**options)
    keep_reading(p2p)
    return p2p


class _OpenCalls(dict[UUID, "asyncio.Future[bytes]"]):
    """Calls on their way, by id. A call that a timeout or a cancellation has just ended is not `in` it any more."""

    def __contains__(self, call: object) -> bool:
        future = self.get(call)  # type: ignore[call-overload]  # any key may be asked for
        return future is not None and not future.done()


def keep_reading(p2p: P2P) -> None:
    """Let late answers pass; call this once, before the first call.

    hivemind's reader sets each answer on the future of its call, and does not ask whether the call has been cancelled
    in the same turn of the loop. Where it has, the reader ends with InvalidStateError, and every later call of this
    process waits for its timeout: seen within a second of calls that time out just as their answers come (Python 3.12,
    whose wait_for cancels at once; from 3.11 on with cancelled tasks). The reader asks `in` before it sets anything.
    """
    control = p2p._client.control
    control._pending_calls = _OpenCalls(control._pending_calls)
    for task in (control._read_task, control._write_task):
        task.add_done_callback(_look_at_error)


def _look_at_error(task: "asyncio.Task[None]") -> None:
    """A broken line is said by whoever waits for an answer, not by asyncio in a traceback about a forgotten task."""
    if not task.cancelled():
        task.exception()


async def wait_until_lost(p2p: P2P) -> None:
    """Return when the line to the daemon is broken: the daemon has ended, or what came from it cannot be read.

    From then on no call gets an answer, and hivemind raises nothing: whoever waits has to be told.
    """
    control = p2p._client.control
    await asyncio.wait({control._read_task, control._write_task}, return_when=asyncio.FIRST_COMPLETED)


async def end_daemon(p2p: P2P, timeout: float) -> None:
    """Shut the daemon down; kill it when it has not ended after `timeout` seconds."""
    try:
        await asyncio.wait_for(p2p.shutdown(), timeout)
    except TimeoutError:
        with suppress(ProcessLookupError):
            p2p._child.kill()
        await p2p._child.wait()
