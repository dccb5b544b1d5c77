"""Who is asked twice and when, who is caught, and what it costs. No network."""

import asyncio

import pytest
import torch

from petals_eval.errors import MissingBlocksError, PeerNondeterministicError
from petals_eval.simulator.virtual_time import run_in_virtual_time
from petals_eval.swarm.activations import Activations
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.trust.acceptance import Acceptance
from petals_eval.swarm.trust.determinism_guard import ask_twice
from petals_eval.swarm.trust.tolerance import SAME_SERVER
from petals_eval.swarm.wire.span import Span
from tests.support.fake_swarm import (
    FakeDirectory,
    FakeTransport,
    ResidualBlocks,
    forward,
    pipeline,
    run,
    run_all,
    server,
)
from tests.support.tensors import hidden_states

SIZE = 64


def fake_transport(size=SIZE, **options):
    return FakeTransport(ResidualBlocks(size, nonlinear=False), **{"seconds": 0, **options})


def swarm(transport, *servers, runtime=None, **values):
    """A pipeline over these servers."""
    directory = FakeDirectory(max(one.span.stop for one in servers), *servers)
    return pipeline(directory, transport, runtime=runtime, **{"min_backoff": 0.001, "deadline": 2, **values})


def in_dtype(name, start, stop, dtype):
    return server(name, start, stop, torch_dtype=str(dtype).removeprefix("torch."))


def tokens_asked(transport):
    """What the probes have cost so far."""
    return sum(probe.tokens for probe in transport.probes)


def tokens_computed(pipe):
    """What the probes were for."""
    return sum(state.tokens for peer in pipe.peers.values() for state in peer.probes.values())


# -- who is asked when


def test_every_server_is_asked_once_before_its_first_micro_batch_however_many_wait():
    transport = fake_transport()
    pipe = swarm(transport, server("a", 0, 2), server("b", 2, 4))
    order = []
    transport.on_call = lambda hop, hidden: order.append((hop.peer_id, len(transport.probes)))
    run_all(pipe, [hidden_states(4, 20, SIZE)] * 10)
    probes = [(probe.peer_id, probe.span, probe.tokens) for probe in transport.probes]
    assert sorted(probes) == [("a", Span(0, 2), 96)] * 2 + [("b", Span(2, 4), 96)] * 2
    assert {call.tokens for call in transport.calls} == {80}
    assert order[0] == ("a", 2)  # both questions came first
    assert next(probes for peer, probes in order if peer == "b") == 4
    assert (tokens_asked(transport), tokens_computed(pipe)) == (4 * 96, 2 * 10 * 80)


def test_other_blocks_of_a_server_are_another_question():
    transport = fake_transport()
    pipe = swarm(transport, server("a", 0, 4))
    for start, stop in [(0, 4), (1, 3), (0, 4)]:
        run(pipe, hidden_states(1, 16, SIZE), None, start, stop)
    assert (len(transport.calls), len(transport.probes)) == (3, 2)
    transport = fake_transport()
    pipe = swarm(transport, server("a", 0, 4))
    for start, stop in [(0, 2), (1, 4), (1, 2)]:
        run(pipe, hidden_states(1, 16, SIZE), None, start, stop)
    assert (len(transport.calls), len(transport.probes)) == (3, 4)


def test_a_server_that_broke_off_is_asked_anew():
    transport = fake_transport()
    pipe = swarm(transport, server("a", 0, 4))
    run(pipe, hidden_states(1, 16, SIZE))
    transport.down.add("a")

    async def back_soon():
        call = asyncio.create_task(forward(pipe, hidden_states(1, 16, SIZE)))
        await asyncio.sleep(0.01)
        transport.down.clear()
        transport.blocks.dropout["a"] = {0: 0.1}  # somebody else's config this time
        return await call

    with pytest.raises(MissingBlocksError, match="training mode"):
        asyncio.run(back_soon())


@pytest.mark.parametrize("p", [0.01, 0.1])
@pytest.mark.parametrize("dtype", SAME_SERVER)
def test_dropout_is_caught_before_anything_is_computed(dtype, p):
    for _ in range(20):
        transport = fake_transport()
        transport.blocks.dropout["a"] = dict.fromkeys(range(4), p)
        pipe = swarm(transport, in_dtype("a", 0, 4, dtype))
        with pytest.raises(MissingBlocksError):
            run(pipe, hidden_states(4, 20, SIZE))
        assert tokens_computed(pipe) == 0
        assert transport.calls == []


@pytest.mark.parametrize("dtype", SAME_SERVER)
def test_nobody_honest_is_accused(dtype):
    """Not even who adds up in another order each time."""
    for _ in range(20):
        transport = fake_transport()
        transport.blocks.rounding.add("b")
        pipe = swarm(transport, in_dtype("a", 0, 4, dtype), in_dtype("b", 4, 12, dtype))
        run(pipe, hidden_states(4, 20, SIZE), stop=12)
        status = pipe.status()
        assert (status.findings, status.notices) == ((), ())


def test_dropout_in_one_block_of_many_is_found_where_rounding_could_explain_it():
    """In bfloat16 it is thinned below the tolerance by the other blocks: each block is then asked by itself."""
    caught = 0
    for _ in range(20):
        transport = fake_transport(640)
        transport.blocks.dropout["a"] = {9: 0.01}
        pipe = swarm(transport, server("a", 0, 16, torch_dtype="bfloat16"))
        with pytest.raises(MissingBlocksError):
            run(pipe, hidden_states(4, 20, 640), stop=16)
        caught += any(len(probe.span) == 1 for probe in transport.probes)
    assert caught > 10


def test_a_server_whose_rows_are_equal_within_a_call_but_not_across_calls_is_caught():
    transport = fake_transport()
    transport.blocks.dropout["a"] = {0: 0.1}
    transport.blocks.seeded.add("a")
    pipe = swarm(transport, server("a", 0, 4))
    with pytest.raises(MissingBlocksError):
        run(pipe, hidden_states(4, 20, SIZE))


def test_after_being_caught_a_server_is_refused_whatever_was_decided_before():
    transport = fake_transport()
    transport.blocks.dropout["d"] = {0: 0.1}
    pipe = swarm(transport, server("d", 0, 4), max_tokens_per_call=96)
    acceptance = Acceptance(pipe._client, pipe.peers, pipe.guard)
    hop = Hop(server("d", 0, 4), Span(0, 4))

    async def twice():
        for _ in range(2):
            for rows, positions in [(4, 20), (1, 120)]:  # in one call, and in steps
                activations = Activations(hidden_states(rows, positions, SIZE))
                with pytest.raises(PeerNondeterministicError):
                    await acceptance.ready(hop, activations)
                with pytest.raises(PeerNondeterministicError):
                    await acceptance.run(hop, activations)

    asyncio.run(twice())
    assert (len(transport.probes), len(transport.calls)) == (2, 0)


def test_a_server_caught_while_it_computes_loses_the_answer():
    """Its probe was answered well before; what it is caught with comes from another call."""
    transport = fake_transport()
    pipe = swarm(transport, server("d", 0, 4))
    hop = Hop(server("d", 0, 4), Span(0, 4))
    transport.on_call = lambda hop, hidden: pipe.quarantine.add(hop, PeerNondeterministicError("two answers", 0.3))

    async def once():
        with pytest.raises(PeerNondeterministicError):
            await pipe._acceptance.run(hop, Activations(hidden_states(4, 20, SIZE)))

    asyncio.run(once())
    assert len(transport.calls) == 1
    assert tokens_computed(pipe) == 0
    assert not pipe.peers.of("d").calls


# -- what it costs


class Echo:
    """Blocks that do nothing, at once."""

    def forward(self, hop, activations):
        return activations.hidden


@pytest.mark.parametrize(("size", "replicas"), [(64, 1), (64, 3), (1024, 10), (4096, 40)], ids=lambda value: str(value))
def test_checks_cost_less_than_a_hundredth_of_the_tokens_of_ten_thousand_examples(size, replicas):
    """TREC's length: 10,000 questions of about 20 tokens with 8 prompt tokens, in micro-batches of 1,024."""
    servers = [server(f"{start}-{index}", start, start + 2) for start in (0, 2) for index in range(replicas)]
    transport = FakeTransport(Echo(), seconds=0)
    pipe = swarm(transport, *servers)
    hidden = torch.zeros(1, 1, 1).expand(36, 28, size)
    run_all(pipe, [hidden] * (10_000 // 36), at_once=3 * replicas)
    used = {peer_id for peer_id, peer in pipe.peers.items() if peer.calls}
    assert len(used) == 2 * replicas
    assert tokens_computed(pipe) >= 2 * 275_000
    share = tokens_asked(transport) / tokens_computed(pipe)
    print(f"hidden size {size}, {replicas} replicas: {share:.2%} of the tokens")
    assert 0.002 < share < 0.01


def test_no_server_is_probed_again_where_no_share_is_spent_on_that():
    transport = FakeTransport(Echo(), seconds=0)
    pipe = swarm(transport, server("a", 0, 4), recheck_share=0)
    run_all(pipe, [hidden_states(36, 28, SIZE)] * 10)
    assert len(transport.probes) == 2


def test_the_first_question_is_not_counted_as_work():
    """A server that loads before it answers anything would be taken for slow, and not be called again."""

    class Loads(FakeTransport):
        async def answer(self, hop, activations, *, is_probe=False, is_step=False):
            await asyncio.sleep(0.5 if is_probe else 0.0)
            return await super().answer(hop, activations, is_probe=is_probe, is_step=is_step)

    async def once(runtime):
        pipe = swarm(Loads(ResidualBlocks(SIZE)), server("a", 0, 4), runtime=runtime)
        await forward(pipe, hidden_states(4, 20, SIZE))
        return pipe.peers.of("a").window.rate

    rate, seconds = run_in_virtual_time(once)
    assert seconds >= 0.5
    assert rate > 4 * 20 * 4 / 0.4


# -- one question, asked twice


def test_what_is_asked_twice_is_cut_to_what_the_server_takes():
    transport = fake_transport()
    pipe = swarm(transport, server("a", 0, 4), max_tokens_per_call=12)
    hop = Hop(server("a", 0, 4), Span(0, 4))
    asked = asyncio.run(ask_twice(pipe._client, hop, Activations(hidden_states(6, 16, SIZE))))
    assert asked.question.hidden.shape == asked.answer.shape == (6, 12, SIZE)
    assert (asked.is_alike, asked.difference) == (True, 0.0)
    assert [probe.shape for probe in transport.probes] == [(1, 12, SIZE)] * 12
