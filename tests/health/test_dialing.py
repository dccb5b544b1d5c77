"""Which addresses of a peer can be connected to: over real libp2p daemons."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from petals_eval.errors import PeerUnreachableError
from petals_eval.health import HealthSettings
from petals_eval.health.check import check
from petals_eval.health.dialing import dial, dial_bootstrap, dialling_daemon, split_address
from petals_eval.local_swarm.peer import Peer

NOBODY = "12D3KooWHdduK3xuXojcDqUBywcuLzygJjMv9zAMFptPRwfLsKui"
CLOSED = "/ip4/127.0.0.1/tcp/1"


async def on_a_swarm(ask: Callable[[Peer], Awaitable[Any]]) -> Any:
    peer = await Peer.open()
    try:
        return await ask(peer)
    finally:
        await peer.close()


def test_each_address_of_a_bootstrap_peer_is_told_apart() -> None:
    """The good address of a peer must not make its dead one look alive, nor the other way round."""

    async def ask(peer: Peer):
        [good] = peer.maddrs
        addresses = (f"{CLOSED}/p2p/{peer.peer_id}", good, good.replace(peer.peer_id, NOBODY), good)
        return addresses, await dial_bootstrap(addresses, 10.0)

    addresses, found = asyncio.run(on_a_swarm(ask))
    assert [each.address for each in found] == list(addresses[:3])
    assert [each.state for each in found] == ["unreachable", "reachable", "unreachable"]
    assert found[1].seconds > 0 and found[1].detail is None
    assert "connection refused" in found[0].detail and "peer id mismatch" in found[2].detail


def test_more_addresses_of_one_peer_than_daemons_are_not_asked() -> None:
    addresses = [f"/ip4/127.0.0.1/tcp/{port}/p2p/{NOBODY}" for port in range(1, 6)]
    found = asyncio.run(dial_bootstrap(addresses, 10.0))
    assert [each.state for each in found] == ["unreachable"] * 4 + ["not asked"]


def test_nobody_is_asked_for_other_addresses() -> None:
    """The peer is up, and this daemon connected to it a moment ago: still it is told nothing of that address."""

    async def ask(peer: Peer):
        where = split_address(peer.maddrs[0])[0]
        async with dialling_daemon() as p2p:
            assert await dial(p2p, peer.peer_id, [where], 10.0) > 0
        async with dialling_daemon() as p2p:
            for addresses in ([CLOSED], []):
                with pytest.raises(PeerUnreachableError):
                    await dial(p2p, peer.peer_id, addresses, 10.0)

    asyncio.run(on_a_swarm(ask))


def test_a_look_has_the_state_of_its_bootstrap_peers(clean_swarm) -> None:
    peers = (*clean_swarm.initial_peers, f"{CLOSED}/p2p/{NOBODY}")
    asked = check(HealthSettings(initial_peers=peers, level="info"))
    assert [each.state for each in asked.bootstrap] == ["reachable"] * (len(peers) - 1) + ["unreachable"]
    silent = check(HealthSettings(initial_peers=peers, level="record"))
    assert {each.state for each in silent.bootstrap} == {"not asked"}
