"""What one peer says of the addresses of another; the bytes of strangers are in tests/hostile."""

import asyncio

import pytest
from hivemind.p2p import PeerID
from hivemind.utils.multiaddr import Multiaddr

from petals_eval.errors import PeerError
from petals_eval.health.dialing import dial, dialling_daemon, split_address
from petals_eval.health.peer_routing import addresses_in, ask_for_addresses
from petals_eval.local_swarm.peer import Peer

KEY = PeerID.from_base58("12D3KooWHdduK3xuXojcDqUBywcuLzygJjMv9zAMFptPRwfLsKui").to_bytes()
OTHER = KEY[:-1] + bytes([KEY[-1] ^ 1])


def peer(key: bytes, *addresses: bytes) -> bytes:
    """A peer in the answer, as go-libp2p-kad-dht writes one."""
    fields = b"\x0a%c" % len(key) + key + b"".join(b"\x12%c" % len(each) + each for each in addresses) + b"\x18\x01"
    return b"\x42%c" % len(fields) + fields


def test_the_addresses_of_the_one_that_was_asked_for_are_read() -> None:
    one, two = "/ip4/203.0.113.5/tcp/31337", "/ip6/2001:db8::1/udp/31337/quic"
    unknown = b"\xff\xff\x01"  # of a protocol that nobody has heard of
    good = peer(KEY, Multiaddr(one).to_bytes(), unknown, Multiaddr(two).to_bytes(), Multiaddr(one).to_bytes())
    wrong = peer(OTHER, Multiaddr("/ip4/8.8.8.8/tcp/1").to_bytes())
    assert addresses_in(b"\x08\x04" + wrong + good + b"\x50\x01", KEY) == (one, two)
    assert addresses_in(b"\x08\x04" + wrong, KEY) == addresses_in(b"", KEY) == ()


def test_no_more_addresses_are_read_than_anybody_has() -> None:
    many = b"".join(peer(KEY, Multiaddr(f"/ip4/203.0.113.5/tcp/{port}").to_bytes()) for port in range(1, 500))
    assert len(addresses_in(many, KEY)) == 64


@pytest.mark.parametrize("answer", [b"\x42\xff\x01x", b"\x41\x01", b"\xff" * 20, b"\x42", peer(KEY)[:-1]])
def test_what_is_no_message_is_refused(answer: bytes) -> None:
    with pytest.raises(ValueError):
        addresses_in(answer, KEY)


def test_real_peers_are_asked() -> None:
    async def ask() -> None:
        first = await Peer.open()
        second = await Peer.open(first.maddrs)
        try:
            where, asked = split_address(first.maddrs[0])
            async with dialling_daemon() as p2p:
                await dial(p2p, asked, [where], 10.0)
                found = await ask_for_addresses(p2p, asked, second.peer_id, 10.0)
                assert found == (split_address(second.maddrs[0])[0],)
                assert await ask_for_addresses(p2p, asked, PeerID(KEY).to_base58(), 10.0) == ()
                assert len(await p2p.list_peers()) == 1  # nobody but the one that was asked
                with pytest.raises(PeerError):  # it is not connected, and nobody is asked where it is
                    await ask_for_addresses(p2p, second.peer_id, asked, 10.0)
        finally:
            await second.close()
            await first.close()

    asyncio.run(ask())
