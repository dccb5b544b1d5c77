"""Can a peer be connected to at an address? Each question has a libp2p daemon of its own: one that was told of a peer
before tries all addresses that it ever knew of it, and one with a DHT asks others for more of them."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

from anyio import CancelScope
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError
from hivemind.utils.multiaddr import Multiaddr

from petals_eval.errors import PeerError
from petals_eval.health.results import BootstrapPeer
from petals_eval.swarm.peers.peer_text import error_text
from petals_eval.swarm.transport.daemon import end_daemon, start_daemon
from petals_eval.swarm.transport.rpc import one_line, peer_errors

__all__ = ["dial", "dial_bootstrap", "dialling_daemon", "split_address"]

_START_TIMEOUT = 15.0  # seconds
_END_TIMEOUT = 3.0  # seconds
_MAX_DAEMONS = 4  # at once, for the addresses of bootstrap peers


@asynccontextmanager
async def dialling_daemon() -> AsyncIterator[P2P]:
    """Run a daemon that listens to nobody, knows nobody, and asks nobody for addresses.

    Raises hivemind's errors where it does not start.
    """
    p2p = await start_daemon(
        dht_mode="off",
        auto_nat=False,
        nat_port_map=False,
        no_listen=True,
        host_maddrs=None,
        startup_timeout=_START_TIMEOUT,
    )
    try:
        yield p2p
    finally:
        with CancelScope(shield=True):
            await end_daemon(p2p, _END_TIMEOUT)


async def dial(p2p: P2P, peer_id: str, addresses: Sequence[str], timeout: float) -> float:
    """Connect to a peer at these addresses and, with such a daemon, at no others. Return the seconds that it took.

    addresses: without the identity. timeout: in seconds. Raises PeerError where no connection can be made.
    """
    started = time.monotonic()
    with peer_errors(timeout):
        connecting = p2p._client.connect(PeerID.from_base58(peer_id), [Multiaddr(each) for each in addresses])
        await asyncio.wait_for(connecting, timeout)
    return time.monotonic() - started


async def dial_bootstrap(addresses: Sequence[str], timeout: float) -> tuple[BootstrapPeer, ...]:
    """Return the state of each address of a bootstrap peer, in their order. timeout: seconds for each.

    A daemon dials one address of each peer: there are as many daemons as the peer with the most addresses has.
    """
    rounds: list[dict[str, str]] = []  # address by peer id
    for address in dict.fromkeys(addresses):
        peer_id = split_address(address)[1]
        free = next((each for each in rounds if peer_id not in each), None)
        if free is None:
            rounds.append(free := {})
        free[peer_id] = address
    states = await asyncio.gather(*(_dial_round(each, timeout) for each in rounds[:_MAX_DAEMONS]))
    found = {peer.address: peer for each in states for peer in each}
    why = f"more than {_MAX_DAEMONS} addresses of one peer"
    return tuple(found.get(each) or BootstrapPeer(each, "not asked", why) for each in dict.fromkeys(addresses))


async def _dial_round(addresses: Mapping[str, str], timeout: float) -> list[BootstrapPeer]:
    """addresses: one by each peer id."""
    try:
        async with dialling_daemon() as p2p:
            states = (_dial_one(p2p, peer_id, address, timeout) for peer_id, address in addresses.items())
            return await asyncio.gather(*states)
    except (P2PDaemonError, OSError, TimeoutError) as error:
        why = f"no libp2p daemon could be started ({one_line(error)})"
        return [BootstrapPeer(address, "not asked", why) for address in addresses.values()]


async def _dial_one(p2p: P2P, peer_id: str, address: str, timeout: float) -> BootstrapPeer:
    try:
        seconds = await dial(p2p, peer_id, [split_address(address)[0]], timeout)
    except PeerError as error:
        return BootstrapPeer(address, "unreachable", error_text(error))
    return BootstrapPeer(address, "reachable", seconds=seconds)


def split_address(address: str) -> tuple[str, str]:
    """Return where a peer listens, and who it is.

    >>> split_address("/ip4/127.0.0.1/tcp/1/p2p/12D3KooWHdduK3xuXojcDqUBywcuLzygJjMv9zAMFptPRwfLsKui")
    ('/ip4/127.0.0.1/tcp/1', '12D3KooWHdduK3xuXojcDqUBywcuLzygJjMv9zAMFptPRwfLsKui')
    """
    where, _, peer_id = str(Multiaddr(address)).rpartition("/p2p/")
    return where, peer_id
