"""The wire book: which servers take the lossy code of the settings. Each is asked once, before its first call."""

import asyncio
from collections.abc import Awaitable, Callable

from petals_eval.errors import PeerAnswerError, PeerRefusedError
from petals_eval.swarm.transport.rpc import Answer
from petals_eval.swarm.wire.messages import LOSSY, LossyCode, ServerInfo, dtype_name

__all__ = ["WireBook"]

TryOut = Callable[[LossyCode | None], Awaitable[Answer]]


class WireBook:
    """What one connection learned of its servers and the lossy code `code`; None: all is lossless.

    A server says nowhere which codes it takes. One that lacks the library for a code, or whose NumPy broke hivemind's
    decoder, answers each call with that error: so each server is sent one position in the code, and where it refuses or
    answers wrongly the same position as it is. If that works it is the code's fault, and the server is spoken to
    lossless from then on.

    taken_by: peer ids that take the code. lossless: why others do not, by peer id. Safe to read from any thread.
    """

    def __init__(self, name: str | None):
        self.code = None if name is None else LOSSY[name]
        self.taken_by: set[str] = set()
        self.lossless: dict[str, str] = {}
        self._asked: dict[str, asyncio.Task[LossyCode | None]] = {}

    async def code_for(self, peer_id: str, info: ServerInfo, try_out: TryOut) -> LossyCode | None:
        """The code to speak to this server in; None: lossless. Concurrent callers share the question.

        try_out: sends one position under a code, or as it is for None. Raises what it raises, but for a refused code.
        """
        if self.code is None:
            return None
        task = self._asked.get(peer_id)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = asyncio.create_task(self._ask(peer_id, self.code, info, try_out))
            self._asked[peer_id] = task
        return await asyncio.shield(task)

    def forget(self, peer_id: str) -> None:
        """Ask the server anew before its next call: it may have come back as another."""
        task = self._asked.get(peer_id)
        if task is not None and task.done():
            del self._asked[peer_id]

    async def _ask(self, peer_id: str, code: LossyCode, info: ServerInfo, try_out: TryOut) -> LossyCode | None:
        reason = await _reason_against(code, info, try_out)
        if reason is None:
            self.lossless.pop(peer_id, None)
            self.taken_by.add(peer_id)
            return code
        self.taken_by.discard(peer_id)
        self.lossless[peer_id] = reason
        return None


async def _reason_against(code: LossyCode, info: ServerInfo, try_out: TryOut) -> str | None:
    """Why not to speak to a server in this code; None: it takes it."""
    if info.output_dtype.itemsize <= code.bytes_per_value:
        return f"it computes in {dtype_name(info.output_dtype)}: {code.name} saves nothing"
    try:
        await try_out(code)
    except (PeerRefusedError, PeerAnswerError) as error:
        await try_out(None)  # raises where it is not the code's fault
        return str(error) or type(error).__name__
    return None
