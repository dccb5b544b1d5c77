"""An inference session on one server: a stream of steps over a key-value cache. It makes no retries."""

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

from petals_eval.errors import PeerError, PeerUnreachableError
from petals_eval.swarm.transport.raw_stream import MAX_ANSWER_OVERHEAD_BYTES, receive
from petals_eval.swarm.transport.rpc import Answer, peer_errors
from petals_eval.swarm.wire import messages
from petals_eval.swarm.wire.server_info import ServerInfo
from petals_eval.swarm.wire.session_messages import NextServer, step_metadata

__all__ = ["HopSession"]

_GOODBYE_TIMEOUT = 2.0  # seconds for a server to end its side of the stream
_MAX_OPENINGS = 3  # when a server refuses a session, its reason now and then is lost on the way

_WITHOUT_A_WORD = "it ended the session without a word"

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]
OpenStream = Callable[[], Awaitable[Stream]]


class HopSession:
    """One stream to one server. `open` it first, and `close` it in any case: an error of any kind ends it.

    info: what the server says of itself. position: positions of each row in the server's cache.
    """

    def __init__(
        self,
        open_stream: OpenStream,
        uid: str,
        info: ServerInfo,
        *,
        rows: int,
        opening: Mapping[str, object],
        timeout: float,
    ):
        """
        open_stream: to the server's rpc_inference. uid: of the blocks. opening: of `session_metadata`.
        timeout: seconds for a step.
        """
        self.info = info
        self.rows = rows
        self.position = 0
        self._open_stream = open_stream
        self._uid = uid
        self._opening = opening
        self._timeout = timeout
        self._close_callbacks: list[Callable[[], object]] = []
        self._id = ""
        self._stream: Stream | None = None
        self._is_over = True
        self._has_cache = False
        self._start_from: int | None = None

    @property
    def id(self) -> str:
        """The id by which other servers push into it; known once it is open."""
        return self._id

    async def open(self, timeout: float) -> None:
        """Have the server reserve the cache, by a step of no positions. timeout: seconds. Raises PeerError."""
        nothing = torch.empty(self.rows, 0, self.info.hidden_size or 1, dtype=torch.float32)
        started = time.monotonic()
        with peer_errors(timeout):
            async with asyncio.timeout(timeout):
                response = await self._reserve(self._tensors(nothing, None, None))
        self._answer(response, tuple(nothing.shape), started, sent=0)
        self._has_cache = True

    def add_close_callback(self, callback: Callable[[], object]) -> None:
        """Call this once when the session, which has been opened, is over."""
        self._close_callbacks.append(callback)

    def roll_back(self, position: int) -> None:
        """Let the next step begin at this position. Only for servers that are known to do it."""
        self.position = self._start_from = position

    async def step(
        self,
        hidden: torch.Tensor,
        prompts: torch.Tensor | None = None,
        hypo_ids: torch.Tensor | None = None,
        next_servers: Sequence[NextServer] = (),
    ) -> Answer:
        """Run hidden (rows, positions, hidden size) after the positions so far. Raises PeerError.

        prompts: (blocks, rows or 1, prefix, hidden size), added to the first `prefix` of these positions.
        hypo_ids: int64 (rows,): row i goes on from what row hypo_ids[i] was.
        next_servers: those to push the answer on to.
        """
        stream = self._running()
        self._is_over = True  # until the answer is there
        started = time.monotonic()
        tensors = self._tensors(hidden, prompts, hypo_ids)
        metadata = step_metadata(self._id, str(uuid.uuid4()), {}, self._start_from, next_servers)
        with peer_errors(self._timeout):
            async with asyncio.timeout(self._timeout):
                response = await self._ask(stream, tensors, metadata)
        sent = sum(len(tensor.buffer) for tensor in tensors)
        return self._answer(response, tuple(hidden.shape), started, sent)

    async def pushed_step(self, positions: int, hidden_size: int) -> Answer:
        """Return the answer to a step of `positions` positions that another server pushes. Raises PeerError."""
        reader, _ = self._running()
        self._is_over = True  # until the answer is there
        started = time.monotonic()
        shape = (self.rows, positions, hidden_size)
        with peer_errors(self._timeout):
            async with asyncio.timeout(self._timeout):
                response = await _receive_step(reader, 4 * math.prod(shape) + MAX_ANSWER_OVERHEAD_BYTES)
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
            messages.encode_for(self.info, hidden),
            messages.encode_for(self.info, prompts if prompts is not None and prompts.numel() else None),
            messages.encode_tensor(torch.empty(0, dtype=torch.int64) if hypo_ids is None else hypo_ids),
        ]

    def _answer(
        self, response: runtime_pb2.ExpertResponse, shape: tuple[int, ...], started: float, sent: int
    ) -> Answer:
        """A step's answer, checked; the session goes on from there."""
        answer = messages.read_answer(response.tensors, shape, self.info.output_dtype)
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
            metadata = step_metadata(self._id, str(uuid.uuid4()), self._opening)
            try:
                return await self._ask(self._stream, tensors, metadata)
            except PeerUnreachableError:
                self._stream[1].close()
                if openings == _MAX_OPENINGS:
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
        limit = 2 * len(tensors[0].buffer) + MAX_ANSWER_OVERHEAD_BYTES
        try:
            await P2P.send_protobuf(request, writer)
        except ConnectionError as error:
            raise PeerUnreachableError(_WITHOUT_A_WORD) from error
        return await _receive_step(reader, limit)

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
                with CancelScope(shield=True), suppress(PeerError), peer_errors(_GOODBYE_TIMEOUT):
                    async with asyncio.timeout(_GOODBYE_TIMEOUT):
                        await P2P.send_protobuf(runtime_pb2.ExpertRequest(), writer)  # an empty one ends a session
                        await P2P.send_protobuf(P2P.END_OF_STREAM, writer)
                        await reader.read()
        finally:
            writer.close()
            if had_cache:
                for callback in self._close_callbacks:
                    callback()


async def _receive_step(reader: asyncio.StreamReader, limit: int) -> runtime_pb2.ExpertResponse:
    try:
        return await receive(reader, runtime_pb2.ExpertResponse, limit)
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        raise PeerUnreachableError(_WITHOUT_A_WORD) from error
