"""What is decoded from the network, each as a function of bytes that a stranger chose.

A target returns when the input was read or refused as it should be; anything else that it raises is a finding. Tests
give the targets inputs that hypothesis draws, `scripts/fuzz.py` millions that coverage leads to.
"""

import asyncio
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgpack
import torch
from hivemind.p2p import PeerID
from hivemind.proto import runtime_pb2
from hivemind.utils.multiaddr import Multiaddr
from hivemind.utils.serializer import MSGPackSerializer
from hivemind.utils.timed_storage import ValueWithExpiration

from petals_eval.errors import PeerError
from petals_eval.health.census import claims_in
from petals_eval.health.peer_routing import addresses_in
from petals_eval.swarm.directory.dht import read_announcements
from petals_eval.swarm.transport.raw_stream import receive, streamed
from petals_eval.swarm.transport.rpc import peer_errors
from petals_eval.swarm.wire import codecs, messages
from petals_eval.swarm.wire.codecs import READABLE
from petals_eval.swarm.wire.msgpack_reader import bound_hivemind
from petals_eval.swarm.wire.records import Announcement, read_snapshot
from petals_eval.swarm.wire.server_info import may_roll_back, other_layout, read_info
from tests.support.fake_dht import found
from tests.support.rpc_info import info as rpc_info

PEER = "12D3KooWHdduK3xuXojcDqUBywcuLzygJjMv9zAMFptPRwfLsKui"
SHAPE = (2, 3, 4)
LIMIT = 4096  # bytes of a frame
_VALUES = math.prod(SHAPE)
_CODES = (0, *READABLE, 99)
_NAMES = ("float32", "bfloat16", "float16", "int64", "float64", "", "object", "float32\n")


@dataclass(frozen=True)
class Target:
    """run: on an input. seeds: inputs that are read well, to start from."""

    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]
    longest: int = 4096  # bytes of an input


def _message(data: bytes) -> runtime_pb2.Tensor:
    """A tensor's message: its own bytes where the first one says so, else fields that are nearly right."""
    if data[:1] < b"\x40":
        return runtime_pb2.Tensor.FromString(data[1:])
    kind, name, cut, *_ = (*data[1:4], 0, 0, 0)
    sizes = (SHAPE, (2, 3), (2, 3, 5), (2**31 - 1,) * 3, (2**32 - 1, 3, 4), (0, 3, 4))
    return runtime_pb2.Tensor(
        compression=_CODES[kind % len(_CODES)],
        dtype=_NAMES[name % len(_NAMES)],
        size=sizes[cut % len(sizes) if cut < 64 else 0],
        buffer=data[4:],
    )


def tensor(data: bytes) -> None:
    """swarm.wire.messages.decode_tensor"""
    dtype = (torch.float32, torch.bfloat16, torch.float16)[len(data) % 3]
    try:
        with peer_errors(1):
            message = _message(data)
            code = _CODES[:5][data[-1] % 5] if data else 0
            found = messages.decode_tensor(message, SHAPE, dtype, code)
    except PeerError:
        return
    _expect(found.shape == SHAPE and found.dtype is dtype, "another tensor than was asked for")


def answer(data: bytes) -> None:
    """swarm.wire.messages.read_answer: unary, streamed and of a session."""
    try:
        with peer_errors(1):
            response = runtime_pb2.ExpertResponse.FromString(data)
            found = messages.read_answer(response.tensors, SHAPE, torch.float32)
    except PeerError:
        return
    _expect(found.shape == SHAPE and bool(found.isfinite().all()), "another tensor than was asked for")


def codec(data: bytes) -> None:
    """swarm.wire.codecs.decode, with the right number of bytes more often than not."""
    code = _CODES[(data[0] if data else 0) % len(_CODES)]
    length = {1: 2 * _VALUES, 2: 2 * _VALUES}.get(code, 8 + 1024 + _VALUES + (12 if code == READABLE[3] else 0))
    content = data[1:]
    if data[1:2] < b"\xe0":
        content = (content * (length // max(1, len(content)) + 1))[:length]
        counts = {READABLE[3]: (1, 256)}.get(code, (256,)) if len(data) % 2 else ()
        content = b"".join(count.to_bytes(8, "little") for count in counts) + content[8 * len(counts) :]
    try:
        found = codecs.decode(runtime_pb2.Tensor(compression=code, size=SHAPE, buffer=content), SHAPE)
    except PeerError:
        return
    _expect(found.shape == SHAPE and found.dtype is torch.float32, "another tensor than was asked for")


def info(data: bytes) -> None:
    """swarm.wire.server_info.read_info, and what is made of it."""
    try:
        found = read_info(data)
    except PeerError as error:
        _expect(_is_plain(str(error)), "words that move the cursor")
        return
    _expect(found.version is None or _is_plain(found.version), "words that move the cursor")
    may_roll_back(found.version)
    other_layout(found)
    messages.encode_for(found, torch.zeros(1, 1, 4))


def record(data: bytes) -> None:
    """swarm.wire.records and health's reading of the same announcements, decoded by hivemind within our bounds."""
    try:
        value = MSGPackSerializer.loads(data)
    except Exception:  # noqa: BLE001 - hivemind decodes, and catches whatever it raises
        return
    found = [Announcement(block, peer, value, 2.0) for block, peer in ((0, "a"), (1, "a"), (2, "b"))]
    found.append(Announcement(1, "b", (2, 1.0, value), 1.5))
    snapshot = read_snapshot(found, 4)
    claims_in(found, now=0.0)
    for server in snapshot.servers.values():
        _expect(0 <= server.span.start < server.span.stop <= 4, "a span outside of the model")
        said = (server.record.version, server.record.public_name, server.record.torch_dtype, server.record.quant_type)
        _expect(all(word is None or _is_plain(word) for word in said), "words that move the cursor")


def announcements(data: bytes) -> None:
    """swarm.directory.dht.read_announcements: what lies in the DHT under a block's key."""
    try:
        value = MSGPackSerializer.loads(data)
    except Exception:  # noqa: BLE001 - hivemind decodes, and catches whatever it raises
        return
    entries = {
        "m.0": ValueWithExpiration(value, 5.0),
        "m.1": ValueWithExpiration({PEER: ValueWithExpiration(value, 5.0), "x": value}, 5.0),
        "m.2": None,
    }
    found, _ = _run(read_announcements(_Stored(entries), {"m.0": 0, "m.1": 1, "m.2": 2}))
    read_snapshot(found, 4)


def routing(data: bytes) -> None:
    """health.peer_routing.addresses_in: what a bootstrap peer says of the addresses of others."""
    try:
        found = addresses_in(data, _KEY)
    except ValueError:
        return
    _expect(len(found) <= 64 and all(each.startswith("/") and _is_plain(each) for each in found), "no addresses")


class _Stored:
    def __init__(self, entries: Mapping[str, Any]):
        self._entries = entries

    async def get_many(self, keys: object, *_: object, **__: object) -> Mapping[str, Any]:
        return found(self._entries)


def frame(data: bytes) -> None:
    """swarm.transport.rpc.receive and .streamed: hivemind's framing of messages."""

    async def read(receiving: Callable[[asyncio.StreamReader], Any]) -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        try:
            with peer_errors(1):
                await receiving(reader)
        except PeerError as error:
            _expect(_is_plain(str(error)), "words that move the cursor")

    _run(read(lambda reader: receive(reader, runtime_pb2.ExpertResponse, LIMIT)))
    _run(read(lambda reader: streamed((reader, _Nowhere()), (), LIMIT)))


class _Nowhere:
    def write(self, part: bytes) -> None:
        pass

    async def drain(self) -> None:
        pass

    def close(self) -> None:
        pass


def _is_plain(text: str) -> bool:
    return text.isprintable() and len(text) <= 400


_loop: list[asyncio.AbstractEventLoop] = []


def _run(coroutine: Any) -> Any:
    if not _loop:
        _loop.append(asyncio.new_event_loop())
    return _loop[0].run_until_complete(coroutine)


def _expect(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise AssertionError(otherwise)


def _framed(content: bytes, mark: bytes = b"\0") -> bytes:
    return mark + len(content).to_bytes(8, "big") + content


_ANSWER = runtime_pb2.ExpertResponse(tensors=[messages.encode_tensor(torch.ones(SHAPE))]).SerializeToString()
_RECORD = MSGPackSerializer.dumps(
    (2, 1.5, {"start_block": 0, "end_block": 2, "version": "2.2.0", "adapters": ("a",), "next_pings": {"x": 0.1}})
)
_CODED = [codecs.encode(torch.ones(SHAPE), code) for code in (READABLE[0], READABLE[1], READABLE[3])]

_KEY = PeerID.from_base58(PEER).to_bytes()
_WHERE = Multiaddr("/ip4/203.0.113.5/tcp/31337").to_bytes()
_PEER = b"\x0a%c" % len(_KEY) + _KEY + (b"\x12%c" % len(_WHERE) + _WHERE) * 2 + b"\x18\x01"
_CLOSER = b"\x08\x04" + b"\x42%c" % len(_PEER) + _PEER + b"\x50\x01"

bound_hivemind()  # as every connection does

TARGETS: dict[str, Target] = {
    "tensor": Target(
        tensor,
        (
            b"\0" + messages.encode_tensor(torch.ones(SHAPE)).SerializeToString(),
            b"\xff\0\0\x40" + bytes(4 * _VALUES),
            *(b"\0" + coded.SerializeToString() for coded in _CODED),
        ),
    ),
    "answer": Target(answer, (_ANSWER, _ANSWER * 2)),
    "codec": Target(
        codec, (*(bytes([kind]) + b"\xff" + each.buffer for kind, each in enumerate(_CODED, 1)), b"\1\0\0")
    ),
    "info": Target(info, (rpc_info(), msgpack.packb({}))),
    "record": Target(record, (_RECORD, MSGPackSerializer.dumps([0, 1.0]))),
    "announcements": Target(announcements, (_RECORD, MSGPackSerializer.dumps({PEER: (2, 1.0, {})}))),
    "routing": Target(routing, (_CLOSER, _CLOSER * 3)),
    "frame": Target(frame, (_framed(_ANSWER), _framed(b"\n\2no", b"\1"), _framed(_ANSWER) * 3)),
}

__all__ = ["TARGETS", "Target"]
