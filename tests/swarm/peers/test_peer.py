"""What is known of one server: failures and back-off, what is asked anew, quarantine, and how it is told of."""

import asyncio
from dataclasses import dataclass

import pytest
import torch

from petals_eval.errors import (
    PeerAnswerError,
    PeerNondeterministicError,
    PeerRefusedError,
    PeerTimeoutError,
    PeerUnreachableError,
)
from petals_eval.simulator.virtual_time import run_in_virtual_time
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.peers.peer import Peer, PeerBook, ProbeState
from petals_eval.swarm.peers.peer_text import error_text, short_peer
from petals_eval.swarm.runtime import Runtime
from petals_eval.swarm.transport.transport import kept_info
from petals_eval.swarm.wire.span import Span
from tests.support.fake_swarm import FakeDirectory, FakeTransport, forward, pipeline, server, settings

HIDDEN = torch.zeros(2, 3, 4)
GONE = PeerUnreachableError("gone")


@dataclass
class Clock:
    now: float = 1000.0


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def peers(clock):
    return PeerBook(settings(min_backoff=1.0, max_backoff=5.0), Runtime(monotonic=lambda: clock.now))


@pytest.fixture
def peer(peers):
    return peers.of("QmThePeer")


def ended(peer: Peer, tokens: int = 6) -> None:
    peer.on_succeeded(Span(0, 4), tokens=tokens, sent=100, received=50)


def test_a_server_that_failed_is_asked_anew_what_it_is():
    """It may come back in another dtype: held to what it said before, it would answer wrongly for ever."""
    transport = FakeTransport()

    def change(hop: Hop, hidden: torch.Tensor) -> None:
        if len(transport.calls) == 2:
            raise PeerAnswerError("expected float32, found bfloat16")

    transport.on_call = change

    async def before_and_after(runtime: Runtime) -> None:
        pipe = pipeline(FakeDirectory(4, server("a", 0, 4)), transport, runtime=runtime)
        peer = pipe.peers.of("a")
        await kept_info(transport, peer, 0, settings())
        await forward(pipe, HIDDEN)
        assert peer.info.is_answered and len(transport.probes) == 2
        await forward(pipe, HIDDEN)
        assert not peer.info.is_answered and len(transport.probes) == 4

    run_in_virtual_time(before_and_after)
    assert len(transport.calls) == 3


def test_asking_anew_forgets_what_it_said_and_nothing_that_was_seen(peer, clock):
    async def know() -> None:
        for once in (peer.info, peer.codec, peer.rolls_back):
            await once.get(lambda: asyncio.sleep(0, "an answer"))
        state = peer.probes[Span(0, 4)] = ProbeState(due_at=1024, tokens=12)
        state.probes[Span(0, 4)] = peer.info

    asyncio.run(know())
    peer.cache.on_incompatible("its sessions have another layout")
    peer.limits.per_call = 7
    peer.window.on_delivered(peer.window.send(100, clock.now - 1), clock.now)
    peer.on_failed(GONE)
    peer.quarantine(PeerNondeterministicError("two answers", 0.5))
    blocked_until, rate = peer.blocked_until, peer.window.rate
    peer.ask_anew()
    assert not any(once.is_answered for once in (peer.info, peer.codec, peer.rolls_back))
    assert peer.cache.never_opens() is None
    state = peer.probes[Span(0, 4)]
    assert not state.probes and (state.tokens, state.due_at) == (12, 1024)
    assert (peer.failures, peer.failures_in_a_row, peer.blocked_until) == (1, 1, blocked_until)
    assert (peer.limits.per_call, peer.window.rate) == (7, rate)
    assert peer.is_quarantined


def test_a_server_that_fails_is_left_alone_for_twice_as_long_each_time(peer, clock):
    delays = []
    for _ in range(5):
        assert peer.may_be_called
        peer.on_failed(GONE)
        delays.append(peer.blocked_until - clock.now)
        assert peer.is_backing_off and not peer.is_usable and not peer.may_be_called
        clock.now = peer.blocked_until
    assert delays == [1.0, 2.0, 4.0, 5.0, 5.0]
    assert peer.is_usable and peer.is_failing, "until it has answered"
    ended(peer)
    assert not peer.is_failing
    peer.on_failed(GONE)
    assert peer.blocked_until - clock.now == 1.0


def test_calls_that_fail_together_are_one_failure_in_a_row(peer, clock):
    for _ in range(8):
        peer.on_failed(GONE)
    assert (peer.failures, peer.retries, peer.failures_in_a_row) == (8, 8, 1)
    assert peer.blocked_until - clock.now == 1.0


def test_what_failures_began_with_is_kept(peer, clock):
    peer.on_failed(GONE)
    clock.now = peer.blocked_until
    peer.on_failed(PeerTimeoutError("nothing by the deadline"))
    assert peer.first_error_in_a_row == "cannot be reached (gone)"
    assert peer.last_error == "does not answer (nothing by the deadline)"


def test_after_a_failure_it_is_tried_with_one_micro_batch(peer, clock):
    peer.on_failed(GONE)
    clock.now = peer.blocked_until
    assert peer.may_be_called
    peer.tokens_in_flight = 6
    assert peer.is_usable and not peer.may_be_called
    ended(peer)
    assert peer.may_be_called


def test_a_server_in_quarantine_stays_there(peer, clock):
    peer.quarantine(PeerNondeterministicError("it gave two answers", 0.5))
    clock.now += 1e6
    ended(peer)
    assert peer.is_quarantined and not peer.is_usable and not peer.may_be_called and not peer.is_backing_off
    assert peer.last_error == "is left out (it gave two answers)"
    assert peer.failures == peer.retries == 0


def test_what_it_did_is_counted(peer, peers):
    ended(peer)
    ended(peer, tokens=4)
    assert (peer.calls, peer.tokens, peer.bytes_sent, peer.bytes_received) == (2, 10, 200, 100)
    assert peer.spans == {Span(0, 4)}
    peers.of("other").on_failed(GONE)
    peer.on_failed(GONE)
    assert peers.retries == 2


def test_a_straggler_is_given_less_once(peer, clock):
    """What was in flight together is overtaken together."""
    peer.window.on_delivered(peer.window.send(300, clock.now - 1), clock.now)
    peer.on_overtaken()
    peer.on_overtaken()
    assert peer.overtaken == 2 and peer.window.rate == pytest.approx(100)
    assert peer.is_backing_off and (peer.failures, peer.retries) == (0, 0)
    clock.now = peer.blocked_until + 1
    peer.on_overtaken()
    assert peer.window.rate == pytest.approx(100)


def test_the_book_knows_those_that_were_met(peers):
    assert "a" not in peers and peers.get("a") is None and len(peers) == 0
    assert peers.of("a") is peers.of("a") is peers["a"]
    for peer_id in peers:  # while it is read, another may be met
        peers.of(f"{peer_id}b")
    assert list(peers) == ["a", "ab"]
    peers.model_limits.steps_alike = 5
    assert all(each.limits.session_refusal(1, 6) is not None for each in peers.values())


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (PeerUnreachableError("Connect failed. msg=failed to dial: a b"), "cannot be reached (a b)"),
        (PeerUnreachableError("failed to dial QmA: all dials failed"), "cannot be reached (all dials failed)"),
        (PeerRefusedError("ValueError('no\n  such block')"), "refuses (ValueError('no such block'))"),
        (OSError("no route"), "OSError: no route"),
    ],
)
def test_errors_are_told_as_what_the_server_does(error, text):
    assert error_text(error) == text


def test_a_peer_is_named_by_its_last_letters(peer):
    assert peer.name == short_peer("QmThePeer") == "...hePeer"
