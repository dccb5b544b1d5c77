"""Can a peer be connected to at an address? Each question has a libp2p daemon of its own: one that was told of a peer
before tries all addresses that it ever knew of it, and one with a DHT asks others for more of them."""

import asyncio
import time
from collections.abc import Mapping, Sequence

from anyio import CancelScope
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError
from hivemind.utils.multiaddr import Multiaddr

from petals_eval.errors import PeerError
from petals_eval.health.results import BootstrapPeer
from petals_eval.swarm.peers.peer_text import error_text
from petals_eval.swarm.transport.daemon import end_daemon, start_daemon
from petals_eval.swarm.transport.rpc import one_line, peer_errors

__all__ = ["dial", "dial_bootstrap"]

_START_TIMEOUT = 15.0  # seconds
_END_TIMEOUT = 3.0  # seconds
_MAX_DAEMONS = 4  # at once, for the addresses of bootstrap peers


async def dial(addresses: Mapping[str, Sequence[str]], timeout: float) -> dict[str, float | PeerError]:
    """Connect to peers at these addresses and no others, and hang up.

    addresses: multiaddresses without the identity, by peer id. timeout: seconds for each peer. Returns the seconds that
    each connection took, its handshake included, or why there is none. Raises hivemind's errors where no daemon starts.
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
        made = await asyncio.gather(*(_connect(p2p, peer, maddrs, timeout) for peer, maddrs in addresses.items()))
    finally:
        with CancelScope(shield=True):
            await end_daemon(p2p, _END_TIMEOUT)
    return dict(zip(addresses, made, strict=True))


async def _connect(p2p: P2P, peer_id: str, maddrs: Sequence[str], timeout: float) -> float | PeerError:
    started = time.monotonic()
    try:
        with peer_errors(timeout):
            connecting = p2p._client.connect(PeerID.from_base58(peer_id), [Multiaddr(maddr) for maddr in maddrs])
            await asyncio.wait_for(connecting, timeout)
    except PeerError as error:
        return error
    return time.monotonic() - started


async def dial_bootstrap(addresses: Sequence[str], timeout: float) -> tuple[BootstrapPeer, ...]:
    """Return the state of each address of a bootstrap peer, in their order. timeout: seconds for each.

    A daemon dials one address of each peer: there are as many daemons as the peer with the most addresses has.
    """
    rounds: list[dict[str, str]] = []  # address by peer id
    for address in dict.fromkeys(addresses):
        peer_id = _split(address)[1]
        free = next((each for each in rounds if peer_id not in each), None)
        if free is None:
            rounds.append(free := {})
        free[peer_id] = address
    states = await asyncio.gather(*(_dial_round(each, timeout) for each in rounds[:_MAX_DAEMONS]))
    found = {peer.address: peer for each in states for peer in each}
    why = f"more than {_MAX_DAEMONS} addresses of one peer"
    return tuple(found.get(each) or BootstrapPeer(each, "not asked", why) for each in dict.fromkeys(addresses))


async def _dial_round(addresses: Mapping[str, str], timeout: float) -> list[BootstrapPeer]:
    try:
        made = await dial({peer_id: [_split(each)[0]] for peer_id, each in addresses.items()}, timeout)
    except (P2PDaemonError, OSError, TimeoutError) as error:
        why = f"no libp2p daemon could be started ({one_line(error)})"
        return [BootstrapPeer(address, "not asked", why) for address in addresses.values()]
    return [
        BootstrapPeer(addresses[peer_id], "unreachable", error_text(outcome))
        if isinstance(outcome, PeerError)
        else BootstrapPeer(addresses[peer_id], "reachable", seconds=outcome)
        for peer_id, outcome in made.items()
    ]


def _split(address: str) -> tuple[str, str]:
    """Return where a peer listens, and who it is."""
    where, _, peer_id = str(Multiaddr(address)).rpartition("/p2p/")
    return where, peer_id
