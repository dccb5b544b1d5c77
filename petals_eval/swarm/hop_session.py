"""An inference session on one server: a stream of steps over a key-value cache. No retries, no other servers."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from anyio import CancelScope
from hivemind.proto import runtime_pb2

from petals_eval.errors import PeerError, PeerRefusedError, PeerUnreachableError
from petals_eval.swarm import wire
from petals_eval.swarm.rpc import Answer, as_peer_errors

__all__ = ["PROOF_TOKENS", "HopSession", "proves_rolling_back"]

PROOF_TOKENS = 18
"""Tokens of cache that `proves_rolling_back` needs."""

_GOODBYE_TIMEOUT = 2.0  # seconds for a server to end its side of the stream


class HopSession:
    """One stream to one server. An error of any kind ends it; `close` it in any case.

    position: positions of each row in the server's cache.
    """

    def __init__(
        self,
        stub: Any,
        uid: str,
        info: wire.ServerInfo,
        *,
        batch: int,
        opening: Mapping[str, object],
        timeout: float,
    ):
        """
        stub: hivemind's for the server. uid: of the blocks. opening: of `wire.session_metadata`.
        timeout: seconds for a step.
        """
        self.batch = batch
        self.position = 0
        self.before_first_step: Callable[[torch.Tensor], Awaitable[None]] | None = None
        """Awaited with the first hidden states before they are sent; may raise PeerError."""
        self._stub = stub
        self._uid = uid
        self._info = info
        self._opening = opening
        self._timeout = timeout
        self._id = str(uuid.uuid4())
        self._steps: asyncio.Queue[runtime_pb2.ExpertRequest] = asyncio.Queue()
        self._answers: AsyncGenerator[runtime_pb2.ExpertResponse] | None = None
        self._is_over = False
        self._start_from: int | None = None

    def roll_back(self, position: int) -> None:
        """Let the next step begin at this position. Only for servers that are known to do it."""
        self.position = self._start_from = position

    async def step(
        self, hidden: torch.Tensor, prompts: torch.Tensor | None = None, hypo_ids: torch.Tensor | None = None
    ) -> Answer:
        """Run hidden (batch, seq, hidden) after the positions so far; zero positions only reserve the cache.

        prompts: (blocks, batch or 1, prefix, hidden), added to the first `prefix` of these positions.
        hypo_ids: int64 (batch,): row i goes on from what row hypo_ids[i] was. Raises PeerError.
        """
        if self._is_over:
            raise PeerUnreachableError("the session is over")
        if self.before_first_step is not None and hidden.numel():
            await self.before_first_step(hidden)
            self.before_first_step = None
        self._is_over = True  # until the answer is there
        started = time.monotonic()
        tensors = [
            wire.encode_for(self._info, hidden),
            wire.encode_for(self._info, prompts if prompts is not None and prompts.numel() else None),
            wire.encode_tensor(torch.empty(0, dtype=torch.int64) if hypo_ids is None else hypo_ids),
        ]
        opening = self._opening if self._answers is None else {}
        metadata = wire.step_metadata(self._id, str(uuid.uuid4()), opening, self._start_from)
        with as_peer_errors(self._timeout):
            async with asyncio.timeout(self._timeout):
                self._steps.put_nowait(runtime_pb2.ExpertRequest(uid=self._uid, tensors=tensors, metadata=metadata))
                if self._answers is None:
                    self._answers = await self._stub.rpc_inference(self._requests())
                response = await anext(self._answers, None)
        if response is None:
            raise PeerUnreachableError("it ended the session")
        answer = wire.read_answer(response.tensors, tuple(hidden.shape), self._info.output_dtype)
        self._is_over = False
        self._start_from = None
        self.position += hidden.shape[1]
        return Answer(
            answer,
            time.monotonic() - started,
            sum(len(tensor.buffer) for tensor in tensors),
            sum(len(tensor.buffer) for tensor in response.tensors),
        )

    async def close(self) -> None:
        """End the session, so that the server frees its cache, and wait for that, but not for long."""
        self._is_over = True
        self._steps.put_nowait(runtime_pb2.ExpertRequest())  # an empty request ends a session
        answers, self._answers = self._answers, None
        if answers is None:
            return
        with CancelScope(shield=True):  # whoever is cancelled in mid-step still says goodbye
            try:
                with suppress(PeerError), as_peer_errors(_GOODBYE_TIMEOUT):
                    async with asyncio.timeout(_GOODBYE_TIMEOUT):
                        async for _ in answers:
                            pass
            finally:
                await answers.aclose()

    async def _requests(self) -> AsyncIterator[runtime_pb2.ExpertRequest]:
        while True:
            request = await self._steps.get()
            yield request
            if not request.tensors:
                return


async def proves_rolling_back(session: HopSession, hidden_size: int) -> bool:
    """Whether a server's sessions honour start_from_position; `session` is a fresh one of its, and closed here.

    Eight random positions are computed, then the last five once more after going back to the third, then the same
    five without going back. A server that goes back repeats its first answer there, and differs where they are
    appended; one that ignores the position appends them twice. Both are compared, so that no tolerance for the
    server's dtype is needed; a server whose answers are noise counts as one that does not.
    Raises PeerError when the server cannot be asked.
    """
    hidden = torch.randn(1, 8, hidden_size, generator=torch.Generator().manual_seed(0))
    try:
        first = (await session.step(hidden)).hidden[:, 3:].float()
        try:
            session.roll_back(3)
            again = (await session.step(hidden[:, 3:])).hidden.float()
            appended = (await session.step(hidden[:, 3:])).hidden.float()
        except PeerRefusedError:
            return False  # it knows the word, but not what to do
    finally:
        await session.close()
    return bool((again - first).abs().max() < 0.1 * (appended - first).abs().max())
