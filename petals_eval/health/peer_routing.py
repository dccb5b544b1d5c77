"""Ask one peer of the swarm for the addresses of another, without connecting to that other one.

The daemon's own search dials whoever it finds, at any address that was announced; this is one question of a search.

Source: FIND_NODE in https://github.com/libp2p/specs/blob/master/kad-dht/README.md, messages of protocol buffers behind
their length.
"""

import asyncio
from collections.abc import Iterator

from hivemind.p2p import P2P, PeerID
from hivemind.utils.multiaddr import Multiaddr

from petals_eval.errors import PeerAnswerError
from petals_eval.swarm.transport.rpc import peer_errors

__all__ = ["addresses_in", "ask_for_addresses"]

_PROTOCOL = "/ipfs/kad/1.0.0"
_TYPE, _KEY, _CLOSER_PEERS = 1, 2, 8  # fields of a message
_ID, _ADDRESS = 1, 2  # fields of a peer in it
_FIND_NODE = 4  # its type
_VARINT, _BYTES = 0, 2  # wire types
_MAX_ANSWER_BYTES = 1 << 20
_MAX_ADDRESSES = 64  # of a peer: it may announce as many as it likes


async def ask_for_addresses(p2p: P2P, asked: str, peer_id: str, timeout: float) -> tuple[str, ...]:
    """Return the addresses that a peer knows of another one, without its identity; none where it knows none.

    asked: the identity of the peer that is asked, which is connected. timeout: in seconds. Raises PeerError.
    """
    key = PeerID.from_base58(peer_id).to_bytes()
    question = _field(_TYPE, _VARINT) + _varint(_FIND_NODE) + _field(_KEY, _BYTES) + _varint(len(key)) + key
    with peer_errors(timeout):
        async with asyncio.timeout(timeout):
            _, reader, writer = await p2p._client.stream_open(PeerID.from_base58(asked), [_PROTOCOL])
            try:
                writer.write(_varint(len(question)) + question)
                await writer.drain()
                answer = await reader.readexactly(await _length(reader))
            finally:
                writer.close()
        return addresses_in(answer, key)


async def _length(reader: asyncio.StreamReader) -> int:
    prefix = b""
    while not prefix or prefix[-1] & 0x80:
        prefix += await reader.readexactly(1)
        if len(prefix) > 4:
            raise PeerAnswerError("its answer is longer than any that is read")
    length, _ = _read_varint(prefix, 0)
    if length > _MAX_ANSWER_BYTES:
        raise PeerAnswerError(f"expected an answer of at most {_MAX_ANSWER_BYTES} bytes, found {length}")
    return length


def addresses_in(answer: bytes, key: bytes) -> tuple[str, ...]:
    """Return the addresses of the peer with the identity `key` in an answer to FIND_NODE. Raises ValueError."""
    found: dict[str, None] = {}
    for number, peer in _fields(answer):
        fields = list(_fields(peer)) if number == _CLOSER_PEERS else []
        if (_ID, key) not in fields:
            continue
        for kind, content in fields:
            address = _address(content) if kind == _ADDRESS else None
            if address is not None and len(found) < _MAX_ADDRESSES:
                found[address] = None
    return tuple(found)


def _address(content: bytes) -> str | None:
    try:
        return str(Multiaddr(content))
    except (ValueError, LookupError):  # of a protocol that hivemind does not know
        return None


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield number and content of the fields that hold bytes; numbers are left out."""
    at = 0
    while at < len(message):
        tag, at = _read_varint(message, at)
        size, at = _read_varint(message, at)
        if tag & 7 == _VARINT:
            continue
        if tag & 7 != _BYTES or at + size > len(message):
            raise ValueError("expected a message of protocol buffers")
        yield tag >> 3, message[at : at + size]
        at += size


def _field(number: int, wire_type: int) -> bytes:
    return _varint(number << 3 | wire_type)


def _varint(value: int) -> bytes:
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    """Return the number at this place, and the place behind it. Raises ValueError."""
    value = 0
    for index, byte in enumerate(message[at : at + 10]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, at + index + 1
    raise ValueError("expected a varint")
