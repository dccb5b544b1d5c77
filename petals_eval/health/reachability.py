"""Tells Petals servers whether others can reach them: they ask at their start, by /api/v1/is_reachable/PEER_ID.

Whoever asks names a peer, never an address, and gets to know whether one of the peer's addresses could be connected to,
not why not. Addresses are what the bootstrap peers say, and a stranger may have announced anybody's: dialled are public
ones and those of networks that were configured, at ports of no system service, few a minute and few at once. So this is
no way to look into the network that it stands in, and a poor one to look at others.

Source of the question and of its answer: `petals.server.reachability.validate_reachability` of Petals 2.2.0 and
2.3.0.dev2, which waits 10 s for the answer and asks again after 15 s; app.py of the Petals health monitor.
"""

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address

from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError
from hivemind.utils.multiaddr import Multiaddr

from petals_eval.errors import PeerError, SwarmError, SwarmUnreachableError
from petals_eval.health.dialing import dial, dialling_daemon, split_address
from petals_eval.health.peer_routing import ask_for_addresses

__all__ = [
    "Dialled",
    "Network",
    "Reachability",
    "ReachabilityAnswer",
    "ReachabilityPolicy",
    "dial_in_swarm",
    "may_be_dialled",
]

Network = IPv4Network | IPv6Network

_PUBLIC_IPV6 = IPv6Network("2000::/3")  # beyond it lie addresses that stand for those of IPv4
_FIRST_PORT = 1024  # below it are a system's own services
_LONGEST_DIAL = 20.0  # seconds, with the start and the end of a daemon on a busy machine
_IDENTITY, _SHA256 = 0x00, 0x12  # kinds of hashes that identities are: of short keys the key itself


@dataclass(frozen=True)
class ReachabilityPolicy:
    """What is done for strangers at most.

    per_minute: peers that are dialled; visitor_per_minute: for one visitor. at_once: peers that are dialled.
    max_addresses: of a peer, that are. timeout: seconds for connecting; lookup_timeout: for what bootstrap peers say.
    rest: seconds in which a peer is not dialled again: the answer is that of before. max_visitors: that are remembered.
    """

    per_minute: int = 30
    visitor_per_minute: int = 8
    at_once: int = 4
    max_addresses: int = 8
    timeout: float = 5.0
    lookup_timeout: float = 3.0
    rest: float = 10.0
    max_visitors: int = 1000


@dataclass(frozen=True, slots=True)
class ReachabilityAnswer:
    """status: of HTTP. success: whether the peer can be reached. message: why there is no connection, or no answer.
    retry_after: seconds after which to ask again, where too much was asked."""

    status: HTTPStatus
    success: bool
    message: str | None = None
    retry_after: int | None = None


@dataclass(frozen=True, slots=True)
class Dialled:
    """What came of looking for a peer. known: its addresses that the swarm knows. tried: those that were dialled.
    is_connected: whether one of them was the peer's."""

    known: int
    tried: int = 0
    is_connected: bool = False


MayDial = Callable[[str], bool]
"""Whether an address is one to dial."""
Dial = Callable[[str, MayDial], Dialled]
"""Looks for a peer by its identity. Raises SwarmError and hivemind's errors where the swarm cannot be asked."""


class Reachability:
    """Answers visitors. Safe to use from several threads."""

    def __init__(self, dial: Dial, networks: Sequence[Network], clock: Callable[[], float] = time.monotonic):
        """networks: whose addresses may be dialled although they are not public."""
        self._dial = dial
        self._may_dial = partial(may_be_dialled, networks=tuple(networks))
        self._clock = clock
        self._lock = threading.Lock()
        self._places = threading.Semaphore(ReachabilityPolicy.at_once)
        self._all = _Bucket(ReachabilityPolicy.per_minute, clock())
        self._visitors: OrderedDict[str, _Bucket] = OrderedDict()
        self._answers: OrderedDict[str, tuple[float, ReachabilityAnswer]] = OrderedDict()

    def answer(self, peer_id: str, visitor: str) -> ReachabilityAnswer:
        """Return whether a peer can be reached. visitor: who asks, by the address that the question came from."""
        if not _is_identity(peer_id):
            return ReachabilityAnswer(HTTPStatus.BAD_REQUEST, False, "expected the identity of a peer, in base58")
        known = self._known(peer_id)
        if known is not None:
            return known
        wait = self._wait(visitor)
        if wait or not self._places.acquire(blocking=False):
            message = "too many questions at once: ask again later"
            return ReachabilityAnswer(HTTPStatus.TOO_MANY_REQUESTS, False, message, max(1, round(wait)))
        try:
            found = self._ask(peer_id)
        except (SwarmError, P2PDaemonError, OSError, TimeoutError):
            message = "the swarm could not be asked: ask again later"
            return ReachabilityAnswer(HTTPStatus.SERVICE_UNAVAILABLE, False, message, 60)
        finally:
            self._places.release()
        with self._lock:
            self._answers[peer_id] = self._clock(), found
            self._answers.move_to_end(peer_id)
        return found

    def close(self) -> None:
        """Dial nobody any more, and wait for those that are being dialled: each has a daemon, which must not stay."""
        until = time.monotonic() + _LONGEST_DIAL
        for _ in range(ReachabilityPolicy.at_once):
            self._places.acquire(timeout=max(0.0, until - time.monotonic()))

    def _ask(self, peer_id: str) -> ReachabilityAnswer:
        found = self._dial(peer_id, self._may_dial)
        message = None
        if not found.known:
            message = "nobody in the swarm knows an address of this peer"
        elif not found.tried:
            message = f"none of its {found.known} addresses is dialled: expected a public one, at a port from 1024"
        elif not found.is_connected:
            message = f"no connection within {ReachabilityPolicy.timeout:g} s: a firewall or a NAT may be in the way"
        return ReachabilityAnswer(HTTPStatus.OK, found.is_connected, message)

    def _known(self, peer_id: str) -> ReachabilityAnswer | None:
        """Return the answer of just now, and forget older ones."""
        with self._lock:
            while self._answers:
                at, _ = next(iter(self._answers.values()))
                if self._clock() - at < ReachabilityPolicy.rest:
                    break
                self._answers.popitem(last=False)
            return self._answers[peer_id][1] if peer_id in self._answers else None

    def _wait(self, visitor: str) -> float:
        """Count a question; return the seconds until there may be one, 0 for now."""
        with self._lock:
            now = self._clock()
            bucket = self._visitors.get(visitor) or _Bucket(ReachabilityPolicy.visitor_per_minute, now)
            self._visitors[visitor] = bucket
            self._visitors.move_to_end(visitor)
            if len(self._visitors) > ReachabilityPolicy.max_visitors:
                self._visitors.popitem(last=False)
            wait = max(bucket.wait(now), self._all.wait(now))
            if not wait:
                bucket.take()
                self._all.take()
            return wait


class _Bucket:
    """A token bucket: so many a minute, and so many at first."""

    def __init__(self, per_minute: int, now: float):
        self._per_minute = per_minute
        self._left = float(per_minute)
        self._at = now

    def wait(self, now: float) -> float:
        """Return the seconds until one may be taken, 0 for now."""
        self._left = min(self._per_minute, self._left + (now - self._at) * self._per_minute / 60)
        self._at = now
        return max(0.0, (1 - self._left) * 60 / self._per_minute)

    def take(self) -> None:
        """Take one."""
        self._left -= 1


def may_be_dialled(address: str, networks: Sequence[Network]) -> bool:
    """Return whether a stranger's address is dialled: one of a public or a given network, no name, no low port.

    Where it leads through a relay that is the relay's address.

    >>> may_be_dialled("/ip4/8.8.8.8/tcp/31337", []), may_be_dialled("/ip4/10.0.0.1/tcp/31337", [])
    (True, False)
    >>> may_be_dialled("/ip4/10.0.0.1/tcp/31337", [IPv4Network("10.0.0.0/8")])
    True
    """
    kind, _, rest = address.lstrip("/").partition("/")
    where, _, rest = rest.partition("/")
    transport, _, rest = rest.partition("/")
    port = rest.partition("/")[0]
    if kind not in ("ip4", "ip6") or transport not in ("tcp", "udp") or not port.isdecimal() or int(port) < _FIRST_PORT:
        return False
    try:
        Multiaddr(address)
        ip = ip_address(where)
    except ValueError:
        return False
    if any(ip in network for network in networks):
        return True
    stands_for_another = isinstance(ip, IPv6Address) and (ip not in _PUBLIC_IPV6 or ip.sixtofour is not None)
    return ip.is_global and not ip.is_multicast and not stands_for_another


def _is_identity(text: str) -> bool:
    """Return whether a text is a hash with its kind and its length in front, in base58."""
    try:
        kind, size, *content = PeerID.from_base58(text).to_bytes() if len(text) <= 100 else b""
    except (ValueError, KeyError):
        return False
    return kind in (_SHA256, _IDENTITY) and size == len(content) > 0


def dial_in_swarm(initial_peers: Sequence[str]) -> Dial:
    """Return what looks for peers of a swarm: its bootstrap peers are asked for their addresses."""

    def dial(peer_id: str, may_dial: MayDial) -> Dialled:
        return asyncio.run(_dial_in_swarm(initial_peers, peer_id, may_dial))

    return dial


async def _dial_in_swarm(initial_peers: Sequence[str], peer_id: str, may_dial: MayDial) -> Dialled:
    bootstrap: dict[str, list[str]] = {}
    for address in initial_peers:
        where, asked = split_address(address)
        bootstrap.setdefault(asked, []).append(where)
    async with dialling_daemon() as p2p:
        asking = (_ask_bootstrap(p2p, asked, where, peer_id) for asked, where in bootstrap.items())
        answers = [each for each in await asyncio.gather(*asking) if each is not None]
        if not answers:
            raise SwarmUnreachableError("no initial peer answered")
        known = dict.fromkeys(address for addresses in answers for address in addresses)
        chosen = [address for address in known if may_dial(address)][: ReachabilityPolicy.max_addresses]
        if not chosen:
            return Dialled(len(known))
        try:
            await dial(p2p, peer_id, chosen, ReachabilityPolicy.timeout)
        except PeerError:
            return Dialled(len(known), len(chosen))
        return Dialled(len(known), len(chosen), True)


async def _ask_bootstrap(p2p: P2P, asked: str, where: Sequence[str], peer_id: str) -> tuple[str, ...] | None:
    """Return the addresses that a bootstrap peer knows; None where it does not answer."""
    timeout = ReachabilityPolicy.lookup_timeout
    try:
        async with asyncio.timeout(timeout):
            await dial(p2p, asked, where, timeout)
            return await ask_for_addresses(p2p, asked, peer_id, timeout)
    except (PeerError, TimeoutError):
        return None
