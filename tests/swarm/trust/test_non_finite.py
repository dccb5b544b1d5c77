"""Answers that are not finite: whose fault it is, and that no run waits for an input that overflows everywhere."""

import time

import pytest
import torch

from petals_eval.errors import DeadlineError, NotFiniteError, PeerNotFiniteError
from tests.support.fake_swarm import FakeDirectory, FakeTransport, pipeline, run, server

LARGE = torch.full((2, 3, 4), 60_000.0)
USUAL = torch.zeros(2, 3, 4)


def not_finite(*args, **kwargs):
    raise PeerNotFiniteError("1 of 24 values are not finite")


def overflows(hop, hidden):
    if hidden.abs().max() >= 60_000:
        not_finite()


def swarm(names, on_call, **settings):
    transport = FakeTransport()
    transport.on_call = on_call
    return pipeline(FakeDirectory(4, *(server(name, 0, 4) for name in names)), transport, **settings), transport


@pytest.mark.parametrize("names", ["a", "ab", "abc", "abcdef"])
def test_an_input_that_overflows_everywhere_fails_alone_and_at_once(names):
    pipe, transport = swarm(names, overflows, deadline=30.0)
    started = time.monotonic()
    with pytest.raises(NotFiniteError, match=r"after blocks 0:4, found NaN .* overflows their dtype.*--require-dtype"):
        run(pipe, LARGE)
    assert time.monotonic() - started < 3
    asked = [call.peer_id for call in transport.calls if call.shape == LARGE.shape]
    assert len(set(asked)) == min(3, len(names)) and len(asked) == max(2, min(3, len(names)))
    found, _ = run(pipe, USUAL)
    assert torch.equal(found, torch.full_like(USUAL, 1111.0))


@pytest.mark.parametrize("liars", ["a", "ab", "bc"])
def test_one_server_that_computes_it_is_enough(liars):
    def on_call(hop, hidden):
        if hop.peer_id in liars:
            not_finite()

    pipe, _ = swarm("abc", on_call)
    for _ in range(5):
        found, hops = run(pipe, USUAL)
        assert torch.equal(found, torch.full_like(USUAL, 1111.0)) and hops[0].peer_id not in liars


@pytest.mark.parametrize("names", ["a", "abc"])
def test_servers_that_compute_nothing_else_either_are_at_fault(names):
    pipe, transport = swarm(names, not_finite, deadline=0.5)
    asked = []

    def on_probe(hop, hidden):
        if hidden.shape == (1, 3, 4):  # the other question, and none of the determinism guard's
            asked.append(hop.peer_id)
            not_finite()

    transport.on_probe = on_probe
    with pytest.raises(DeadlineError, match=r"answers wrongly \(1 of 24 values are not finite"):
        run(pipe, USUAL)
    assert asked


def test_a_slip_is_asked_again():
    slips = [True]

    def on_call(hop, hidden):
        if slips:
            slips.pop()
            not_finite()

    pipe, transport = swarm("a", on_call)
    found, _ = run(pipe, USUAL)
    assert torch.equal(found, torch.full_like(USUAL, 1111.0)) and len(transport.calls) == 2
