"""An inference session on one server: a stream of steps over a key-value cache. No retries, no other servers."""

import asyncio
import math
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress

import torch
from anyio import CancelScope
from hivemind.p2p import P2P
from hivemind.proto import runtime_pb2

from petals_eval.errors import PeerError, PeerRefusedError, PeerUnreachableError
from petals_eval.swarm.transport.rpc import MOST_WORDS, Answer, as_peer_errors, receive
from petals_eval.swarm.wire import messages as wire

__all__ = ["PROOF_TOKENS", "HopSession", "proves_rolling_back"]

PROOF_TOKENS = 18
"""Tokens of cache that `proves_rolling_back` needs."""

_GOODBYE_TIMEOUT = 2.0  # seconds for a server to end its side of the stream
_OPENINGS = 3  # times a session is opened: when a server refuses one, its reason now and then is lost on the way

_WITHOUT_A_WORD = "it ended the session without a word"

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]
OpenStream = Callable[[], Awaitable[Stream]]


class HopSession:
    """One stream to one server. `open` it first, and `close` it in any case; an error of any kind ends it.

    position: positions of each row in the server's cache.
    """

    def __init__(
        self,
        open_stream: OpenStream,
        uid: str,
        info: wire.ServerInfo,
        *,
        batch: int,
        opening: Mapping[str, object],
        timeout: float,
        on_end: Callable[[], object] = lambda: None,
    ):
        """
        open_stream: to the server's rpc_inference. uid: of the blocks. opening: of `wire.session_metadata`.
        timeout: seconds for a step. on_end: called once when a session that was opened is over.
        """
        self.batch = batch
        self.position = 0
        self.before_first_step: Callable[[torch.Tensor], Awaitable[None]] | None = None
        """Awaited with the first hidden states before they are sent; may raise PeerError."""
        self._open_stream = open_stream
        self._uid = uid
        self._info = info
        self._opening = opening
        self._timeout = timeout
        self._on_end = on_end
        self._id = ""
        self._stream: Stream | None = None
        self._is_over = True
        self._has_cache = False
        self._start_from: int | None = None

    @property
    def id(self) -> str:
        """By which other servers push into it; known once it is open."""
        return self._id

    async def open(self, timeout: float) -> None:
        """Have the server reserve the cache, by a step of no positions. timeout: seconds. Raises PeerError."""
        nothing = torch.empty(self.batch, 0, self._info.hidden_size or 1, dtype=torch.float32)
        started = time.monotonic()
        with as_peer_errors(timeout):
            async with asyncio.timeout(timeout):
                response = await self._reserve(self._tensors(nothing, None, None))
        self._answer(response, tuple(nothing.shape), started, sent=0)
        self._has_cache = True

    def roll_back(self, position: int) -> None:
        """Let the next step begin at this position. Only for servers that are known to do it."""
        self.position = self._start_from = position

    async def step(
        self,
        hidden: torch.Tensor,
        prompts: torch.Tensor | None = None,
        hypo_ids: torch.Tensor | None = None,
        next_servers: Sequence[tuple[str, str, int, int]] = (),
    ) -> Answer:
        """Run hidden (batch, seq, hidden) after the positions so far.

        prompts: (blocks, batch or 1, prefix, hidden), added to the first `prefix` of these positions.
        hypo_ids: int64 (batch,): row i goes on from what row hypo_ids[i] was.
        next_servers: of `wire.step_metadata`. Raises PeerError.
        """
        stream = self._running()
        if self.before_first_step is not None and hidden.numel():
            await self.before_first_step(hidden)
            self.before_first_step = None
        self._is_over = True  # until the answer is there
        started = time.monotonic()
        tensors = self._tensors(hidden, prompts, hypo_ids)
        metadata = wire.step_metadata(self._id, str(uuid.uuid4()), {}, self._start_from, next_servers)
        with as_peer_errors(self._timeout):
            async with asyncio.timeout(self._timeout):
                response = await self._ask(stream, tensors, metadata)
        sent = sum(len(tensor.buffer) for tensor in tensors)
        return self._answer(response, tuple(hidden.shape), started, sent)

    async def pushed_step(self, seq: int, hidden_size: int) -> Answer:
        """The answer to a step of `seq` positions that another server pushes. Raises PeerError."""
        reader, _ = self._running()
        self._is_over = True  # until the answer is there
        started = time.monotonic()
        shape = (self.batch, seq, hidden_size)
        with as_peer_errors(self._timeout):
            async with asyncio.timeout(self._timeout):
                response = await _hear(reader, 4 * math.prod(shape) + MOST_WORDS)
        return self._answer(response, shape, started, sent=0)

    def _running(self) -> Stream:
        """The stream of a session that goes on."""
        if self._is_over or self._stream is None:
            raise PeerUnreachableError("the session is over")
        return self._stream

    def _tensors(
        self, hidden: torch.Tensor, prompts: torch.Tensor | None, hypo_ids: torch.Tensor | None
    ) -> list[runtime_pb2.Tensor]:
        return [
            wire.encode_for(self._info, hidden),
            wire.encode_for(self._info, prompts if prompts is not None and prompts.numel() else None),
            wire.encode_tensor(torch.empty(0, dtype=torch.int64) if hypo_ids is None else hypo_ids),
        ]

    def _answer(
        self, response: runtime_pb2.ExpertResponse, shape: tuple[int, ...], started: float, sent: int
    ) -> Answer:
        """A step's answer, checked; the session goes on from there."""
        answer = wire.read_answer(response.tensors, shape, self._info.output_dtype)
        self._is_over = False
        self._start_from = None
        self.position += shape[1]
        received = sum(len(tensor.buffer) for tensor in response.tensors)
        return Answer(answer, time.monotonic() - started, sent, received)

    async def _reserve(self, tensors: list[runtime_pb2.Tensor]) -> runtime_pb2.ExpertResponse:
        """Open the stream with a first step."""
        openings = 0
        while True:
            openings += 1
            self._id = str(uuid.uuid4())  # a server takes no id twice
            self._stream = await self._open_stream()
            metadata = wire.step_metadata(self._id, str(uuid.uuid4()), self._opening)
            try:
                return await self._ask(self._stream, tensors, metadata)
            except PeerUnreachableError:
                self._stream[1].close()
                if openings == _OPENINGS:
                    raise

    async def _ask(
        self,
        stream: Stream,
        tensors: list[runtime_pb2.Tensor],
        metadata: bytes,
    ) -> runtime_pb2.ExpertResponse:
        reader, writer = stream
        request = runtime_pb2.ExpertRequest(uid=self._uid, tensors=tensors, metadata=metadata)
        # At most four bytes for a value of two (bfloat16 as old hivemind sends it), and room for the words around it.
        limit = 2 * len(tensors[0].buffer) + MOST_WORDS
        try:
            await P2P.send_protobuf(request, writer)
        except ConnectionError as error:
            raise PeerUnreachableError(_WITHOUT_A_WORD) from error
        return await _hear(reader, limit)

    async def close(self) -> None:
        """End the session, so that the server frees its cache; where all is well, wait for that, but not for long."""
        stream, self._stream = self._stream, None
        is_well, self._is_over = not self._is_over, True
        had_cache, self._has_cache = self._has_cache, False
        if stream is None:
            return
        reader, writer = stream
        try:
            if is_well:
                with CancelScope(shield=True), suppress(PeerError), as_peer_errors(_GOODBYE_TIMEOUT):
                    async with asyncio.timeout(_GOODBYE_TIMEOUT):
                        await P2P.send_protobuf(runtime_pb2.ExpertRequest(), writer)  # an empty one ends a session
                        await P2P.send_protobuf(P2P.END_OF_STREAM, writer)
                        await reader.read()
        finally:
            writer.close()
            if had_cache:
                self._on_end()


async def _hear(reader: asyncio.StreamReader, limit: int) -> runtime_pb2.ExpertResponse:
    try:
        return await receive(reader, runtime_pb2.ExpertResponse, limit)
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        raise PeerUnreachableError(_WITHOUT_A_WORD) from error


async def proves_rolling_back(session: HopSession, hidden_size: int) -> bool:
    """Whether a server's sessions honour start_from_position; `session` is a fresh one of its, open, and closed here.

    Eight random positions are computed, then the last five once more after going back to the third, then the same
    five without going back. A server that goes back repeats its first answer there, and differs where they are
    appended; one that ignores the position appends them twice. Both are compared, so that no tolerance for the
    server's dtype is needed; a server whose answers are noise counts as one that does not.
    Raises PeerError when the server cannot be asked.
    """
    hidden = torch.randn(1, 8, hidden_size, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
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
