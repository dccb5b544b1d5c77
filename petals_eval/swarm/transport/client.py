"""One RPC to one server: send, wait under a deadline, check the answer. Retries live elsewhere."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from hivemind.p2p import P2P, PeerID
from hivemind.proto import runtime_pb2

from petals_eval.config import SwarmSettings
from petals_eval.errors import PeerAnswerError, PeerError, PeerRefusedError, PeerUnreachableError
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.peers.caches import CacheBook
from petals_eval.swarm.transport.codec_negotiation import WireBook
from petals_eval.swarm.transport.hop_session import PROOF_TOKENS, HopSession, proves_rolling_back
from petals_eval.swarm.transport.opening import SessionOpener, all_or_none
from petals_eval.swarm.transport.push import Pushed, push_through
from petals_eval.swarm.transport.rpc import (
    MOST_WORDS,
    Answer,
    TransformerConnectionHandler,
    as_peer_errors,
    open_stream,
    streamed,
)
from petals_eval.swarm.wire import messages as wire

__all__ = ["Answer", "Asked", "BlockCalls", "RemoteCalls"]


@dataclass(frozen=True, slots=True)
class Asked:
    """A server's answer to rpc_info, the seconds it took and the bytes of the messages."""

    info: wire.ServerInfo
    seconds: float
    bytes_sent: int
    bytes_received: int


class BlockCalls(Protocol):
    """The seam between "which server next" and "send it": tests of routing and retries plug in here."""

    async def forward(
        self, hop: Hop, hidden: torch.Tensor, prompts: torch.Tensor | None, *, lossless: bool = False
    ) -> Answer:
        """Run hidden (batch, seq, hidden) through the hop's blocks.

        prompts: (blocks of the hop, batch or 1, prefix, hidden) or None. lossless: whatever the settings' wire is.
        Raises PeerError.
        """
        ...

    async def forward_in_steps(self, hop: Hop, hidden: torch.Tensor, prompts: torch.Tensor | None, step: int) -> Answer:
        """What `forward` answers, through a session and `step` positions at a time. Raises PeerError."""
        ...

    async def push(self, hops: Sequence[Hop], hidden: torch.Tensor, timeout: float) -> Pushed:
        """Run hidden (batch, seq, hidden) through all these hops, each server passing its answer on to the next.

        timeout: seconds for all of it. Raises nothing: what comes back says how far it went, and why no further.
        """
        ...

    async def session(self, hop: Hop, batch: int, max_length: int) -> HopSession:
        """A session on the hop's blocks with its cache reserved, to be closed by whoever asked for it.

        Raises PeerCacheFullError, PeerNoSessionError (what they say is known to the connection's cache book), and other
        PeerErrors.
        """
        ...

    async def rolls_back(self, hop: Hop, hidden_size: int) -> bool:
        """Whether the server's sessions go back to a position when told to. Raises PeerError."""
        ...

    def forget(self, peer_id: str) -> None:
        """Ask the server anew what it is before the next call: it may have come back as another."""
        ...


class RemoteCalls:
    """Calls over libp2p."""

    def __init__(
        self,
        p2p: P2P,
        dht_prefix: str,
        settings: SwarmSettings,
        wires: WireBook | None = None,
        caches: CacheBook | None = None,
    ):
        """
        wires: what the connection knows of servers and the lossy code of its settings; None: all is lossless.
        caches: what it knows of their caches; None: nothing yet.
        """
        self._p2p = p2p
        self._prefix = dht_prefix
        self._settings = settings
        self._wires = wires or WireBook(None)
        self._caches = caches or CacheBook()
        self._opener = SessionOpener(p2p, dht_prefix, settings, self._caches, self._look)
        codes = {None, self._wires.code}
        self._metadata = {code: wire.forward_metadata(settings.active_adapter, code) for code in codes}
        self._infos: dict[str, asyncio.Task[wire.ServerInfo]] = {}
        self._rolls_back: dict[str, bool] = {}
        self._stepping: dict[str, asyncio.Lock] = {}  # by server
        self._stubs: dict[str, Any] = {}

    async def info(self, hop: Hop) -> wire.ServerInfo:
        """What the server says of itself, asked once and kept; concurrent callers share the question."""
        peer_id = hop.server.peer_id
        task = self._infos.get(peer_id)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = asyncio.create_task(self._ask_info(peer_id, hop.first))
            self._infos[peer_id] = task
        return await asyncio.shield(task)

    def known_info(self, peer_id: str) -> wire.ServerInfo | None:
        """The answer to rpc_info when there is one already."""
        task = self._infos.get(peer_id)
        if task is None or not task.done() or task.cancelled() or task.exception() is not None:
            return None
        return task.result()

    def forget(self, peer_id: str) -> None:
        self._wires.forget(peer_id)
        self._caches.forget(peer_id)
        self._rolls_back.pop(peer_id, None)
        task = self._infos.get(peer_id)
        if task is not None and task.done():
            del self._infos[peer_id]

    async def ask_info(self, peer_id: str, block: int) -> Asked:
        """Ask now, whatever was asked before: what the server says of itself and of this block. Raises PeerError."""
        request = runtime_pb2.ExpertUID(uid=wire.block_uid(self._prefix, block))
        started = time.monotonic()
        with as_peer_errors(self._settings.connect_timeout):
            answer = await self._stub(peer_id).rpc_info(request, timeout=self._settings.connect_timeout)
        seconds = time.monotonic() - started
        info = wire.read_info(answer.serialized_info)
        self._caches.shown(peer_id, info.cache_tokens_available)
        return Asked(info, seconds, request.ByteSize(), answer.ByteSize())

    async def _look(self, peer_id: str, block: int) -> wire.ServerInfo:
        return (await self.ask_info(peer_id, block)).info

    async def _ask_info(self, peer_id: str, block: int) -> wire.ServerInfo:
        info = (await self.ask_info(peer_id, block)).info
        wanted = self._settings.require_dtype
        if wanted is not None and wire.dtype_name(info.output_dtype) != wanted:
            raise PeerAnswerError(f"it announces {wanted}, but computes in {wire.dtype_name(info.output_dtype)}")
        return info

    async def forward(
        self, hop: Hop, hidden: torch.Tensor, prompts: torch.Tensor | None, *, lossless: bool = False
    ) -> Answer:
        """One rpc_forward, or rpc_forward_stream above 1 MiB of tensor bytes. Raises PeerError."""
        info = await self.info(hop)
        code = None
        if self._wires.code is not None and not lossless and hidden.numel():
            first = hidden[:1, :1]  # a position is enough to see whether the server takes the code

            async def try_out(code: wire.LossyCode | None) -> Answer:
                return await self._forward(hop, info, first, None, code)

            code = await self._wires.code_for(hop.server.peer_id, info, try_out)
        return await self._forward(hop, info, hidden, prompts, code)

    async def _forward(
        self,
        hop: Hop,
        info: wire.ServerInfo,
        hidden: torch.Tensor,
        prompts: torch.Tensor | None,
        code: wire.LossyCode | None,
    ) -> Answer:
        started = time.monotonic()
        encode = partial(wire.encode_for, info, hidden, code)
        # Lossy codes are arithmetic: not in the thread that serves every other call.
        tensors = [encode() if code is None else await asyncio.to_thread(encode), wire.encode_for(info, prompts)]
        sent = sum(len(tensor.buffer) for tensor in tensors)
        metadata = self._metadata[code]

        uid = wire.block_uid(self._prefix, hop.first, hop.last)
        timeout = self._settings.request_timeout
        with as_peer_errors(timeout):
            if sent <= wire.MAX_UNARY_BYTES:
                request = runtime_pb2.ExpertRequest(uid=uid, tensors=tensors, metadata=metadata)
                response = await self._stub(hop.server.peer_id).rpc_forward(request, timeout=timeout)
                parts = list(response.tensors)
            else:
                async with asyncio.timeout(timeout):
                    stream = await open_stream(self._p2p, hop.server.peer_id, "rpc_forward_stream")
                    requests = wire.stream_parts(uid, tensors, metadata)
                    parts = await streamed(stream, requests, limit=4 * hidden.numel() + MOST_WORDS)
                if not parts:
                    raise PeerUnreachableError("the connection ended before the answer came")
        read = partial(wire.read_answer, parts, tuple(hidden.shape), info.output_dtype, code)
        answer = read() if code is None else await asyncio.to_thread(read)
        received = sum(len(part.buffer) for part in parts)
        return Answer(answer, time.monotonic() - started, sent, received)

    async def forward_in_steps(self, hop: Hop, hidden: torch.Tensor, prompts: torch.Tensor | None, step: int) -> Answer:
        """A session of its own for these hidden states; causal blocks give the same numbers as in one call.

        One at a time on a server, checks included: beside it another of this length may have no room.
        """
        batch, seq = hidden.shape[:2]
        async with self._stepping.setdefault(hop.server.peer_id, asyncio.Lock()):
            session = await self.session(hop, batch, seq)
            try:
                answers = []
                for start in range(0, seq, step):
                    part = slice(start, start + step)
                    some_prompts = None if prompts is None else prompts[:, :, part]
                    answers.append(await session.step(hidden[:, part], some_prompts))
            finally:
                await session.close()
        return Answer(
            torch.cat([answer.hidden for answer in answers], dim=1),
            sum(answer.seconds for answer in answers),
            sum(answer.bytes_sent for answer in answers),
            sum(answer.bytes_received for answer in answers),
        )

    async def push(self, hops: Sequence[Hop], hidden: torch.Tensor, timeout: float) -> Pushed:
        """`timeout` begins when all sessions are open, each within connect_timeout."""
        batch, seq = hidden.shape[:2]
        for index, hop in enumerate(hops):
            try:
                info = await self.info(hop)
                if not wire.may_push(info.version):
                    raise PeerRefusedError(
                        f"petals {info.version or 'of no version'} does not push on what it was pushed"
                    )
                self._opener.check(hop, info)
            except PeerError as error:
                return Pushed((), error, index)
        sessions = []
        for index, opened in enumerate(await all_or_none([self.session(hop, batch, seq) for hop in hops])):
            if isinstance(opened, PeerError):
                return Pushed((), opened, index)
            sessions.append(opened)
        ends = [(hop.server.peer_id, hop.first, hop.last) for hop in hops]
        return await push_through(sessions, ends, hidden, timeout)

    async def session(self, hop: Hop, batch: int, max_length: int) -> HopSession:
        return await self._opener.open(hop, await self.info(hop), batch, max_length)

    async def rolls_back(self, hop: Hop, hidden_size: int) -> bool:
        """Asked once per server: by its version first, and where that may, by trying it out."""
        peer_id = hop.server.peer_id
        if peer_id not in self._rolls_back:
            answer = False
            if wire.may_roll_back((await self.info(hop)).version):
                try:
                    answer = await proves_rolling_back(await self.session(hop, 1, PROOF_TOKENS), hidden_size)
                except PeerRefusedError:
                    return False  # no room in its cache now; asked again another time
            self._rolls_back[peer_id] = answer
        return self._rolls_back[peer_id]

    def _stub(self, peer_id: str):  # type: ignore[no-untyped-def]  # hivemind makes the stub's class at run time
        """Kept: reading an identity from base58 takes longer than sending a small message."""
        stub = self._stubs.get(peer_id)
        if stub is None:
            stub = TransformerConnectionHandler.get_stub(self._p2p, PeerID.from_base58(peer_id))
            self._stubs[peer_id] = stub
        return stub
