"""One micro-batch through a whole route: what comes back, how far it went, and that no session is left. No network."""

import asyncio

import pytest
import torch

from petals_eval.errors import (
    PeerCacheFullError,
    PeerLimitError,
    PeerRefusedError,
    PeerTimeoutError,
    PeerUnreachableError,
)
from petals_eval.simulator.virtual_time import run_in_virtual_time
from petals_eval.swarm.activations import Activations
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.peers.peer import PeerBook
from petals_eval.swarm.transport.client import HopClient
from petals_eval.swarm.transport.push import Pushed, push
from petals_eval.swarm.wire.span import Span
from tests.support.fake_swarm import FakeTransport, info, server, settings

HOPS = tuple(Hop(server(name, block, block + 1), Span(block, block + 1)) for block, name in enumerate("abc"))
HIDDEN = torch.zeros(2, 3, 4)


@pytest.fixture
def transport():
    transport = FakeTransport()
    transport.info = info(version="2.3.0.dev2")
    return transport


def push_over(transport: FakeTransport, timeout: float = 10.0) -> tuple[Pushed, PeerBook]:
    """Push `HIDDEN` through all hops, in virtual time."""

    async def everything(runtime):
        chosen = settings()
        peers = PeerBook(chosen, runtime)
        pushed = await push(HopClient(transport, peers), HOPS, Activations(HIDDEN), timeout)
        await asyncio.sleep(60)
        return pushed, peers

    pushed, peers = run_in_virtual_time(everything)[0]
    assert transport.open_sessions == 0 and not transport.in_flight
    return pushed, peers


def at(name: str, error: Exception):
    """Return a hook that lets one server fail."""

    def fail(hop: Hop, *asked: object) -> None:
        if hop.peer_id == name:
            raise error

    return fail


def sums(pushed: Pushed) -> list[float]:
    return [float(answer.hidden[0, 0, 0]) for answer in pushed.answers]


def test_every_server_answers_and_is_given_what_the_one_before_it_computed(transport):
    pushed, _ = push_over(transport)
    assert sums(pushed) == [1.0, 11.0, 111.0]
    assert pushed.error is None and pushed.at is None
    assert [(call.peer_id, call.span, call.is_step) for call in transport.calls] == [
        (hop.peer_id, hop.span, True) for hop in HOPS
    ]
    assert [(each.rows, each.max_length, each.steps) for each in transport.sessions] == [
        (2, 3, [(2, 3, 4)]),
        (2, 3, []),  # it was pushed
        (2, 3, []),
    ]


@pytest.mark.parametrize(("name", "answered"), [("a", []), ("b", [1.0]), ("c", [1.0, 11.0])])
def test_what_came_before_a_failure_counts(transport, name, answered):
    transport.on_call = at(name, PeerUnreachableError("gone"))
    pushed, _ = push_over(transport)
    assert sums(pushed) == answered
    assert isinstance(pushed.error, PeerUnreachableError) and pushed.at == len(answered)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_nothing_is_sent_where_a_session_is_refused(transport, index):
    transport.on_session = at("abc"[index], PeerRefusedError("Could not allocate 7 bytes immediately: out of memory"))
    pushed, peers = push_over(transport)
    assert not pushed.answers and not transport.calls
    assert isinstance(pushed.error, PeerCacheFullError) and pushed.at == index
    assert len(transport.sessions) == 2
    peers.of("a").cache.observe_free(7)
    assert peers.of("a").cache.most_free == 7, "no session is thought to be open"


@pytest.mark.parametrize("version", ["2.2.0", None])
def test_servers_that_do_not_push_on_what_they_are_pushed_are_told_of(transport, version):
    transport.info = info(version=version)
    pushed, _ = push_over(transport)
    assert not pushed.answers and not transport.sessions and pushed.at == 0
    assert isinstance(pushed.error, PeerRefusedError) and "does not push on what it was pushed" in str(pushed.error)


def test_a_push_that_is_lost_is_waited_for_no_longer_than_told(transport):
    transport.on_call = lambda hop, hidden: asyncio.sleep(3600) if hop.peer_id == "b" else None
    pushed, _ = push_over(transport, timeout=5.0)
    assert sums(pushed) == [1.0] and pushed.at == 1
    assert isinstance(pushed.error, PeerTimeoutError)


@pytest.mark.parametrize(
    "words", ["Task size greater than max_batch_size (4)", "Cannot allocate KV cache for 3 tokens, max = 2"]
)
def test_a_refusal_for_the_size_teaches_it(transport, words):
    transport.on_call = at("b", PeerRefusedError(words))
    pushed, peers = push_over(transport)
    assert isinstance(pushed.error, PeerLimitError) and pushed.at == 1
    limits = peers.of("b").limits
    assert limits.per_call == 4 or limits.session_refusal(2, 3) is not None


def test_a_push_that_is_given_up_closes_its_sessions(transport):
    transport.on_call = lambda hop, hidden: asyncio.sleep(3600)

    async def everything(runtime):
        chosen = settings()
        client = HopClient(transport, PeerBook(chosen, runtime))
        pushing = asyncio.create_task(push(client, HOPS, Activations(HIDDEN), 600))
        await asyncio.sleep(1)
        assert transport.open_sessions == 3
        pushing.cancel()
        await asyncio.sleep(1)
        return pushing.cancelled()

    assert run_in_virtual_time(everything)[0]
    assert transport.open_sessions == 0 and not transport.in_flight
