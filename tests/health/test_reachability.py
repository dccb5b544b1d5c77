"""Petals servers ask whether they can be reached. Whoever else asks gets little dialled, and what is public alone."""

import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus
from ipaddress import ip_network

import pytest
from anyio.from_thread import start_blocking_portal
from hivemind.p2p import PeerID

from petals_eval.errors import SwarmUnreachableError
from petals_eval.health import HealthSettings
from petals_eval.health.history import History
from petals_eval.health.reachability import Dialled, Reachability, ReachabilityPolicy, dial_in_swarm, may_be_dialled
from petals_eval.health.serving import HealthServer, Monitor
from petals_eval.local_swarm.peer import Peer
from tests.support.fake_health import clean_report
from tests.support.fake_swarm import PEER

PUBLIC = "/ip4/8.8.8.8/tcp/31337"
LOOPBACK = ip_network("127.0.0.0/8")


def peer(number: int) -> str:
    return PeerID(b"\x12\x20" + number.to_bytes(32, "big")).to_base58()


class FakeDialer:
    """Every peer is at the same addresses. connects: whether the connection succeeds; it may wait, or raise."""

    def __init__(self, *addresses: str, connects: Callable[[], bool] = lambda: True):
        self.addresses = addresses
        self.connects = connects
        self.dialled: list[Sequence[str]] = []

    def __call__(self, peer_id: str, may_dial: Callable[[str], bool]) -> Dialled:
        chosen = [address for address in self.addresses if may_dial(address)]
        if not chosen:
            return Dialled(len(self.addresses))
        self.dialled.append(chosen)
        return Dialled(len(self.addresses), len(chosen), self.connects())


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.mark.parametrize(
    "address",
    [
        "/ip4/127.0.0.1/tcp/31337",
        "/ip4/10.1.2.3/tcp/31337",
        "/ip4/192.168.0.1/tcp/31337",
        "/ip4/169.254.169.254/tcp/31337",
        "/ip4/100.64.0.1/tcp/31337",
        "/ip4/224.0.0.1/tcp/31337",
        "/ip4/0.0.0.0/tcp/31337",
        "/ip4/8.8.8.8/tcp/22",
        "/ip4/8.8.8.8/udp/53",
        "/ip4/8.8.8.8",
        "/ip6/::1/tcp/31337",
        "/ip6/fe80::1/tcp/31337",
        "/ip6/fd00::1/tcp/31337",
        "/ip6/::ffff:10.0.0.1/tcp/31337",
        "/ip6/::10.0.0.1/tcp/31337",
        "/ip6/64:ff9b::a00:1/tcp/31337",
        "/ip6/2002:a00:1::1/tcp/31337",
        "/ip6/2001:0:a00:1::1/tcp/31337",
        "/dns4/localhost/tcp/31337",
        "/dns/intranet/tcp/31337",
        "/unix/tmp/socket",
        "/p2p-circuit",
        "/ip4/8.8.8.8/tcp/31337/nonsense",
        "",
    ],
)
def test_addresses_that_are_dialled_for_no_stranger(address: str, clock: Clock) -> None:
    assert not may_be_dialled(address, ())
    dialer = FakeDialer(address, PUBLIC)
    Reachability(dialer, (), clock).answer(peer(1), "visitor")
    assert dialer.dialled == [[PUBLIC]]


def test_public_addresses_and_those_of_configured_networks_are_dialled() -> None:
    assert may_be_dialled(PUBLIC, ()) and may_be_dialled("/ip6/2606:4700::1111/udp/31337/quic", ())
    assert may_be_dialled(f"{PUBLIC}/p2p/{peer(1)}/p2p-circuit", ())
    networks = [ip_network("10.1.0.0/16"), ip_network("fd00::/8")]
    assert may_be_dialled("/ip4/10.1.2.3/tcp/31337", networks) and may_be_dialled("/ip6/fd00::1/tcp/31337", networks)
    assert not may_be_dialled("/ip4/10.2.2.3/tcp/31337", networks)


def test_the_answer_says_whether_and_not_why_not(clock: Clock) -> None:
    reachable = Reachability(FakeDialer(PUBLIC), (), clock).answer(peer(1), "visitor")
    assert (reachable.status, reachable.success, reachable.message) == (HTTPStatus.OK, True, None)
    closed = Reachability(FakeDialer(PUBLIC, connects=lambda: False), (), clock).answer(peer(1), "visitor")
    assert not closed.success and "no connection within 5 s" in closed.message
    hidden = Reachability(FakeDialer("/ip4/10.0.0.1/tcp/31337"), (), clock).answer(peer(1), "visitor")
    assert not hidden.success and hidden.message.startswith("none of its 1 addresses is dialled: expected a public one")
    nobody = Reachability(FakeDialer(), (), clock).answer(peer(1), "visitor")
    assert not nobody.success and "nobody in the swarm" in nobody.message


@pytest.mark.parametrize("name", ["", "x", "8.8.8.8", "0OIl", "../etc", "Q" * 200, "/ip4/8.8.8.8/tcp/22", "\u202e"])
def test_what_is_no_identity_is_not_looked_up(name: str, clock: Clock) -> None:
    dialer = FakeDialer(PUBLIC)
    assert Reachability(dialer, (), clock).answer(name, "visitor").status is HTTPStatus.BAD_REQUEST
    assert dialer.dialled == []


def test_a_peer_rests_before_it_is_dialled_again(clock: Clock) -> None:
    dialer = FakeDialer(PUBLIC)
    service = Reachability(dialer, (), clock)
    assert all(service.answer(peer(1), f"visitor {each}").success for each in range(50))
    assert len(dialer.dialled) == 1
    clock.now += ReachabilityPolicy.rest
    assert service.answer(peer(1), "visitor").success and len(dialer.dialled) == 2


def test_a_visitor_and_all_of_them_have_so_many_dials_a_minute(clock: Clock) -> None:
    dialer = FakeDialer(PUBLIC)
    service = Reachability(dialer, (), clock)
    answers = [service.answer(peer(each), "one") for each in range(20)]
    assert len(dialer.dialled) == ReachabilityPolicy.visitor_per_minute
    assert answers[-1].status is HTTPStatus.TOO_MANY_REQUESTS and 1 <= answers[-1].retry_after <= 60
    for each in range(20, 5000):
        service.answer(peer(each), f"visitor {each}")
    assert len(dialer.dialled) == ReachabilityPolicy.per_minute
    assert len(service._visitors) <= ReachabilityPolicy.max_visitors
    for _ in range(600):
        clock.now += 1.0
        service.answer(peer(int(clock.now) + 10_000), "two")
    later = len(dialer.dialled) - ReachabilityPolicy.per_minute
    assert 0 <= later - 10 * ReachabilityPolicy.visitor_per_minute <= ReachabilityPolicy.visitor_per_minute
    assert len(service._answers) < 20


def test_a_server_that_asks_every_15_seconds_is_answered_each_time(clock: Clock) -> None:
    """As Petals does for seven minutes, until a relay is found."""
    dialer = FakeDialer(PUBLIC, connects=lambda: False)
    service = Reachability(dialer, (), clock)
    for each in range(29):
        clock.now = 15.0 * each
        assert service.answer(peer(1), "server").status is HTTPStatus.OK
    assert len(dialer.dialled) == 29


def test_no_more_are_dialled_at_once_than_allowed(clock: Clock) -> None:
    started, go_on = threading.Semaphore(0), threading.Event()

    def wait() -> bool:
        started.release()
        return go_on.wait(30)

    service = Reachability(FakeDialer(PUBLIC, connects=wait), (), clock)
    threads = [
        threading.Thread(target=service.answer, args=(peer(each), f"visitor {each}"), daemon=True)
        for each in range(ReachabilityPolicy.at_once)
    ]
    for thread in threads:
        thread.start()
        assert started.acquire(timeout=30)
    assert service.answer(peer(99), "another").status is HTTPStatus.TOO_MANY_REQUESTS
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert service.answer(peer(100), "another").success


def test_no_dial_is_left_behind(clock: Clock) -> None:
    started, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def wait() -> bool:
        started.set()
        return go_on.wait(30)

    service = Reachability(FakeDialer(PUBLIC, connects=wait), (), clock)
    threading.Thread(target=service.answer, args=(peer(1), "visitor"), daemon=True).start()
    assert started.wait(30)
    threading.Thread(target=lambda: (service.close(), ended.set()), daemon=True).start()
    assert not ended.wait(0.2)
    go_on.set()
    assert ended.wait(30)
    assert service.answer(peer(3), "visitor").status is HTTPStatus.TOO_MANY_REQUESTS


def test_a_swarm_that_cannot_be_asked_is_no_answer_about_the_peer(clock: Clock) -> None:
    def fail() -> bool:
        raise SwarmUnreachableError("no initial peer answered")

    dialer = FakeDialer(PUBLIC, connects=fail)
    service = Reachability(dialer, (), clock)
    assert service.answer(peer(1), "visitor").status is HTTPStatus.SERVICE_UNAVAILABLE
    dialer.connects = lambda: True
    assert service.answer(peer(1), "visitor").success


def _get(url: str) -> tuple[int, dict]:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read()) if error.code != HTTPStatus.NOT_FOUND else {}


@pytest.fixture
def serve() -> Iterator[Callable[[Reachability | None], str]]:
    servers = []

    def start(reachability: Reachability | None) -> str:
        monitor = Monitor(HealthSettings(initial_peers=(PEER,)), 60.0, History(None), print, lambda _: clean_report())
        servers.append(HealthServer(("127.0.0.1", 0), monitor, reachability))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_address[1]}/api/v1/is_reachable/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_over_http_it_is_off_unless_it_was_turned_on(serve) -> None:
    assert _get(serve(None) + peer(1))[0] == HTTPStatus.NOT_FOUND
    dialer = FakeDialer(PUBLIC)
    url = serve(Reachability(dialer, ()))
    assert _get(url + peer(1)) == (200, {"success": True, "message": None, "your_ip": "127.0.0.1"})
    assert _get(url + "8.8.8.8")[0] == HTTPStatus.BAD_REQUEST
    answers = [_get(url + peer(each)) for each in range(2, 20)]
    assert answers[-1][0] == HTTPStatus.TOO_MANY_REQUESTS and answers[-1][1]["success"] is False
    assert len(dialer.dialled) == ReachabilityPolicy.visitor_per_minute


def test_over_a_real_swarm() -> None:
    """A peer that is up, one at whose address somebody else listens, one that is not there; and no connection to an
    address of this machine where its network was not configured."""
    with socket.create_server(("127.0.0.1", 0)) as listener, start_blocking_portal() as portal:
        listener.settimeout(0.5)
        port = listener.getsockname()[1]
        first = portal.call(Peer.open)
        hidden = portal.call(lambda: Peer.open(first.maddrs, announce_maddrs=(f"/ip4/127.0.0.1/tcp/{port}",)))
        dialer = dial_in_swarm(first.maddrs)
        try:
            here, strict = Reachability(dialer, [LOOPBACK]), Reachability(dialer, ())
            assert here.answer(first.peer_id, "visitor").success
            assert "expected a public one" in strict.answer(first.peer_id, "visitor").message
            assert "nobody in the swarm" in here.answer(peer(1), "visitor").message
            _hang_up_on_all(listener)  # nodes of the DHT try the addresses of those they meet
            assert "expected a public one" in strict.answer(hidden.peer_id, "visitor").message
            assert _hang_up_on_all(listener) == 0
            threading.Thread(target=_hang_up_on_all, args=(listener,), daemon=True).start()
            assert "no connection within" in here.answer(hidden.peer_id, "visitor").message
        finally:
            for each in (hidden, first):
                portal.call(each.close)


def _hang_up_on_all(listener: socket.socket) -> int:
    """Return how many there were."""
    count = 0
    while True:
        try:
            listener.accept()[0].close()
        except (TimeoutError, OSError):
            return count
        count += 1
