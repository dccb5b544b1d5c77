"""Answers that are not finite: whose fault it is, and that no run waits for an input that overflows everywhere."""

import re

import pytest
import torch

from petals_eval.errors import DeadlineError, NotFiniteError, PeerNotFiniteError, PetalsEvalError
from petals_eval.simulator.virtual_time import run_in_virtual_time
from tests.support.fake_swarm import FakeDirectory, FakeTransport, forward, pipeline, server

LARGE = torch.full((2, 3, 4), 60_000.0)
USUAL = torch.zeros(2, 3, 4)


def not_finite(*args, **kwargs):
    raise PeerNotFiniteError("1 of 24 values are not finite")


def overflows(hop, hidden):
    if hidden.abs().max() >= 60_000:
        not_finite()


def compute(names, hooks, *micro_batches, **settings):
    """Run micro-batches one after the other over servers of all blocks, in virtual time; return each one's answer, or
    the error it failed with, and the transport."""
    transport = FakeTransport()
    transport.on_call, transport.on_probe = hooks

    async def everything(runtime):
        directory = FakeDirectory(4, *(server(name, 0, 4) for name in names))
        pipe = pipeline(directory, transport, runtime=runtime, **settings)
        results = []
        for hidden in micro_batches:
            try:
                results.append(await forward(pipe, hidden))
            except PetalsEvalError as error:
                results.append(error)
        return results

    results, seconds = run_in_virtual_time(everything)
    return results, transport, seconds


@pytest.mark.parametrize("names", ["a", "ab", "abc", "abcdef"])
def test_an_input_that_overflows_everywhere_fails_alone_and_at_once(names):
    (error, (found, _)), transport, seconds = compute(names, (overflows, None), LARGE, USUAL, deadline=30.0)
    text = r"after blocks 0:4, found NaN .* overflows their dtype.*--require-dtype"
    assert isinstance(error, NotFiniteError) and re.search(text, str(error))
    assert seconds < 3
    asked = [call.peer_id for call in transport.calls if call.shape == LARGE.shape][:-1]
    assert len(set(asked)) == min(3, len(names)) and len(asked) == max(2, min(3, len(names)))
    assert torch.equal(found, torch.full_like(USUAL, 1111.0))


@pytest.mark.parametrize("liars", ["a", "ab", "bc"])
def test_one_server_that_computes_it_is_enough(liars):
    def on_call(hop, hidden):
        if hop.peer_id in liars:
            not_finite()

    results, _, _ = compute("abc", (on_call, None), *[USUAL] * 5)
    for found, hops in results:
        assert torch.equal(found, torch.full_like(USUAL, 1111.0)) and hops[0].peer_id not in liars


@pytest.mark.parametrize("names", ["a", "abc"])
def test_servers_that_compute_nothing_else_either_are_at_fault(names):
    asked = []

    def on_probe(hop, hidden):
        if hidden.shape == (1, 3, 4):  # the other question, and none of the determinism guard's
            asked.append(hop.peer_id)
            not_finite()

    (error,), _, _ = compute(names, (not_finite, on_probe), USUAL, deadline=0.5)
    assert isinstance(error, DeadlineError)
    assert "answers wrongly (1 of 24 values are not finite" in str(error)
    assert asked


def test_a_slip_is_asked_again():
    slips = [True]

    def on_call(hop, hidden):
        if slips:
            slips.pop()
            not_finite()

    ((found, _),), transport, _ = compute("a", (on_call, None), USUAL)
    assert torch.equal(found, torch.full_like(USUAL, 1111.0)) and len(transport.calls) == 2
