"""The transport over libp2p: calls of a Petals server, as one client makes them for one model."""

import asyncio
import logging
import time
from functools import partial

from hivemind.p2p import P2P, PeerID
from hivemind.proto import runtime_pb2

from petals_eval.errors import PeerUnreachableError
from petals_eval.swarm.activations import Activations
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.peers.peer import PeerBook
from petals_eval.swarm.peers.peer_text import short_peer
from petals_eval.swarm.transport.codec_negotiation import negotiate
from petals_eval.swarm.transport.hop_session import HopSession
from petals_eval.swarm.transport.raw_stream import MAX_ANSWER_OVERHEAD_BYTES, open_stream, streamed
from petals_eval.swarm.transport.rpc import Answer, TransformerConnectionHandler, peer_errors
from petals_eval.swarm.transport.transport import AskedInfo, kept_info
from petals_eval.swarm.wire import messages
from petals_eval.swarm.wire.codecs import LOSSY_CODES, LossyCode
from petals_eval.swarm.wire.server_info import ServerInfo, read_info
from petals_eval.swarm.wire.session_messages import session_metadata

__all__ = ["Libp2pTransport"]

_log = logging.getLogger(__name__)


class Libp2pTransport:
    """A `Transport` to the servers of one model. Used from the connection's event loop only."""

    def __init__(self, p2p: P2P, dht_prefix: str, peers: PeerBook):
        self._p2p = p2p
        self._prefix = dht_prefix
        self._settings = settings = peers.settings
        self._peers = peers
        self._code = None if settings.wire is None else LOSSY_CODES[settings.wire]
        self._metadata = {code: messages.forward_metadata(settings.active_adapter, code) for code in {None, self._code}}

    async def ask_info(self, peer_id: str, block: int) -> AskedInfo:
        request = runtime_pb2.ExpertUID(uid=messages.block_uid(self._prefix, block))
        started = time.monotonic()
        with peer_errors(self._settings.connect_timeout):
            answer = await self._stub(peer_id).rpc_info(request, timeout=self._settings.connect_timeout)
        seconds = time.monotonic() - started
        return AskedInfo(read_info(answer.serialized_info), seconds, request.ByteSize(), answer.ByteSize())

    async def call(self, hop: Hop, activations: Activations, *, lossless: bool = False) -> Answer:
        """Make one rpc_forward, or one rpc_forward_stream above 1 MiB of tensor bytes. Raises PeerError."""
        peer = self._peers.of(hop.peer_id)
        info = peer.info.answer or await kept_info(self, peer, hop.span.start, self._settings)
        code = None
        if self._code is not None and not lossless and activations.values:
            first = Activations(activations.hidden[:1, :1])  # a position is enough to see whether it takes the code
            code = await negotiate(peer, self._code, info, partial(self._forward, hop, info, first))
        return await self._forward(hop, info, activations, code)

    async def _forward(self, hop: Hop, info: ServerInfo, activations: Activations, code: LossyCode | None) -> Answer:
        started = time.monotonic()
        hidden = activations.hidden
        encode = partial(messages.encode_for, info, hidden, code)
        # Lossy codes are arithmetic: not in the thread that serves every other call.
        tensors = [
            encode() if code is None else await asyncio.to_thread(encode),
            messages.encode_for(info, activations.prompts),
        ]
        sent = sum(len(tensor.buffer) for tensor in tensors)
        metadata, uid = self._metadata[code], messages.chain_uid(self._prefix, hop.span)
        timeout = self._settings.request_timeout
        with peer_errors(timeout):
            if sent <= messages.MAX_UNARY_BYTES:
                request = runtime_pb2.ExpertRequest(uid=uid, tensors=tensors, metadata=metadata)
                response = await self._stub(hop.peer_id).rpc_forward(request, timeout=timeout)
                parts = list(response.tensors)
            else:
                async with asyncio.timeout(timeout):
                    stream = await open_stream(self._p2p, hop.peer_id, "rpc_forward_stream")
                    requests = messages.stream_parts(uid, tensors, metadata)
                    parts = await streamed(stream, requests, limit=4 * activations.values + MAX_ANSWER_OVERHEAD_BYTES)
                if not parts:
                    raise PeerUnreachableError("the connection ended before the answer came")
        read = partial(messages.read_answer, parts, tuple(hidden.shape), info.output_dtype, code)
        answer = read() if code is None else await asyncio.to_thread(read)
        received = sum(len(part.buffer) for part in parts)
        return Answer(answer, time.monotonic() - started, sent, received)

    async def open_session(self, hop: Hop, rows: int, positions: int) -> HopSession:
        peer = self._peers.of(hop.peer_id)
        session = HopSession(
            partial(open_stream, self._p2p, hop.peer_id, "rpc_inference"),
            messages.chain_uid(self._prefix, hop.span),
            await kept_info(self, peer, hop.span.start, self._settings),
            rows=rows,
            opening=session_metadata(positions, self._settings.active_adapter),
            timeout=self._settings.request_timeout,
        )
        try:
            await session.open(self._settings.connect_timeout)
        except BaseException:
            await session.close()
            raise
        _log.debug("%s: session of %d x %d positions, blocks %s", short_peer(hop.peer_id), rows, positions, hop.span)
        return session

    def _stub(self, peer_id: str):  # type: ignore[no-untyped-def]  # hivemind makes the stub's class at run time
        """Return hivemind's stub, kept: reading an identity from base58 takes longer than sending a small message."""
        peer = self._peers.of(peer_id)
        if peer.stub is None:
            peer.stub = TransformerConnectionHandler.get_stub(self._p2p, PeerID.from_base58(peer_id))
        return peer.stub
