"""A workaround for hivemind 1.1: an answer that comes as its call is cancelled must not end the reader of them all."""

import asyncio
from uuid import UUID

from hivemind.p2p import P2P

from petals_eval.swarm.tasks import retrieve_exception

__all__ = ["keep_reading"]


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
        task.add_done_callback(retrieve_exception)
