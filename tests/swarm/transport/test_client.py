"""Hops on their servers: split below what they take, in steps where a row is too long, limits learned. No network."""

import asyncio
import math

import pytest
import torch

from petals_eval.errors import (
    PeerCacheFullError,
    PeerLimitError,
    PeerNoSessionError,
    PeerRefusedError,
    PeerUnreachableError,
)
from petals_eval.swarm.activations import Activations
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.peers.peer import PeerBook
from petals_eval.swarm.transport.client import HopClient
from petals_eval.swarm.wire.span import Span
from tests.support.fake_swarm import FakeDirectory, FakeTransport, ResidualBlocks, pipeline, run, server, settings
from tests.support.tensors import close, hidden_states

HIDDEN = torch.zeros(2, 3, 4)
HOP = Hop(server("a", 0, 4), Span(0, 4))
TOO_MANY = "ValueError('Task size greater than max_batch_size ({}), it can\\'t be processed')"


def in_steps(transport: FakeTransport) -> list[tuple[str, int, int, list[int]]]:
    """Server, rows, positions and the positions of each step of every session that was opened."""
    return [
        (each.hop.peer_id, each.rows, each.max_length, [step[1] for step in each.steps]) for each in transport.sessions
    ]


def client_over(transport: FakeTransport, **values: object) -> tuple[HopClient, PeerBook]:
    chosen = settings(**values)
    peers = PeerBook(chosen)
    return HopClient(transport, peers), peers


def compute(client: HopClient, hidden: torch.Tensor, prompts: torch.Tensor | None = None, **how: object):
    return asyncio.run(client.run(HOP, Activations(hidden, prompts), **how))


def test_prompts_per_row_follow_their_rows_when_a_batch_is_split():
    hidden = torch.zeros(4, 2, 1)
    prompts = torch.arange(4.0)[None, :, None, None]
    answer, _ = run(
        pipeline(FakeDirectory(1, server("a", 0, 1)), FakeTransport(), max_tokens_per_call=2), hidden, prompts, 0, 1
    )
    assert answer[:, 0, 0].tolist() == [1.0, 2.0, 3.0, 4.0]


def test_batches_are_split_below_the_token_limit_and_travel_together():
    transport = FakeTransport()
    hidden = torch.arange(10.0)[:, None, None].expand(10, 3, 4)
    client, _ = client_over(transport, max_tokens_per_call=9)
    answer = compute(client, hidden)
    assert torch.equal(answer.hidden, hidden + 1111.0)
    assert answer.seconds == transport.seconds, "they were out together"
    assert [call.shape[0] for call in transport.calls] == [3, 3, 3, 1]
    assert transport.max_in_flight == 4


def test_a_servers_own_limit_is_learnt_from_its_refusal_and_is_no_failure():
    transport = FakeTransport()

    def refuse(hop: Hop, hidden: torch.Tensor) -> None:
        if math.prod(hidden.shape[:2]) > 6:
            raise PeerRefusedError("ValueError('Task size greater than max_batch_size (6), it can\\'t be processed')")

    transport.on_call = refuse
    pipe = pipeline(FakeDirectory(4, server("a", 0, 4)), transport)
    hidden = torch.zeros(5, 3, 4)
    answer, _ = run(pipe, hidden)
    assert torch.equal(answer, hidden + 1111.0)
    assert pipe.peers.retries == 0
    assert [call.shape[0] for call in transport.calls] == [5, 2, 2, 1]


def test_rows_above_the_limit_go_in_steps_one_session_at_a_time():
    transport = FakeTransport()
    hidden = torch.arange(3.0)[:, None, None].expand(3, 7, 4)
    prompts = torch.arange(3.0)[None, :, None, None] * torch.ones(4, 1, 1, 1)
    answer, _ = run(pipeline(FakeDirectory(4, server("a", 0, 4)), transport, max_tokens_per_call=3), hidden, prompts)
    added = 1111.0 * torch.ones(3, 7, 1)
    added[:, :3] *= torch.arange(1.0, 4.0)[:, None, None]  # the step that has the prompts' positions has them
    assert torch.equal(answer, hidden + added)
    assert in_steps(transport) == [("a", 1, 7, [3, 3, 1])] * 3
    assert transport.max_sessions == 1


def test_a_limit_learnt_from_a_refusal_leads_to_steps():
    transport = FakeTransport()

    def refuse(hop: Hop, hidden: torch.Tensor) -> None:
        if not transport.open_sessions:
            raise PeerRefusedError("ValueError('Task size greater than max_batch_size (2), it can\\'t be processed')")

    transport.on_call = refuse
    pipe = pipeline(FakeDirectory(4, server("a", 0, 4)), transport)
    answer, _ = run(pipe, HIDDEN)
    assert torch.equal(answer, HIDDEN + 1111.0)
    assert in_steps(transport) == [("a", 1, 3, [2, 1])] * 2
    assert pipe.peers.retries == 0


def test_steps_and_rows_of_their_own_compute_what_one_call_does():
    """Deep prompts that reach beyond the first step among it."""
    blocks = ResidualBlocks(32)
    hidden, prompts = hidden_states(3, 10), 0.1 * hidden_states(4 * 3, 5).reshape(4, 3, 5, 32)
    client, _ = client_over(FakeTransport(blocks), max_tokens_per_call=4)
    answer = compute(client, hidden, prompts)
    assert close(answer.hidden, blocks.truth(hidden, 0, 4, prompts=prompts))
    assert (answer.bytes_sent, answer.bytes_received) == (3 * 3 * 8, 3 * 3 * 8), "those of all steps of all rows"
    assert answer.seconds == pytest.approx(3 * 3 * 0.001), "one after the other"


def test_without_a_known_limit_a_row_above_the_usual_one_is_tried_in_one_call():
    """Servers of grouped-query models take more than the usual number."""
    transport = FakeTransport()
    client, _ = client_over(transport)
    compute(client, torch.zeros(2, 3000, 1))
    assert [call.shape[:2] for call in transport.calls] == [(1, 3000)] * 2 and not transport.sessions


def test_steps_can_be_asked_for_and_are_no_longer_than_the_server_takes():
    transport = FakeTransport()
    client, _ = client_over(transport, max_tokens_per_call=5)
    compute(client, torch.zeros(1, 7, 4), positions_per_step=3)
    compute(client, torch.zeros(1, 7, 4), positions_per_step=6)
    compute(client, torch.zeros(1, 3, 4), positions_per_step=6)
    assert in_steps(transport) == [("a", 1, 7, [3, 3, 1]), ("a", 1, 7, [5, 2]), ("a", 1, 3, [3])]


def test_a_row_that_may_not_go_in_steps_is_refused_for_its_length():
    transport = FakeTransport()
    client, _ = client_over(transport, max_tokens_per_call=5)
    with pytest.raises(PeerLimitError, match="takes 5 tokens in one call"):
        compute(client, torch.zeros(1, 7, 4), may_step=False)
    assert not transport.calls and not transport.sessions


def test_a_limit_learnt_in_the_middle_of_a_session_makes_shorter_steps():
    transport = FakeTransport()

    def refuse(hop: Hop, hidden: torch.Tensor) -> None:
        if hidden.shape[1] > 2:
            raise PeerRefusedError(TOO_MANY.format(2))

    transport.on_call = refuse
    client, peers = client_over(transport, max_tokens_per_call=5)
    assert torch.equal(compute(client, torch.zeros(1, 7, 4)).hidden, torch.full((1, 7, 4), 1111.0))
    assert in_steps(transport) == [("a", 1, 7, [5]), ("a", 1, 7, [2, 2, 2, 1])]
    assert peers.of("a").limits.per_call == client.max_tokens(HOP) == 2
    assert transport.open_sessions == 0


@pytest.mark.parametrize("told", [6, 7, 0, 10**12])
def test_a_refusal_that_names_no_smaller_number_is_a_failure(told):
    """It would be asked again at once, and for ever."""
    transport = FakeTransport()

    def refuse(hop: Hop, hidden: torch.Tensor) -> None:
        raise PeerRefusedError(TOO_MANY.format(told))

    transport.on_call = refuse
    client, _ = client_over(transport)
    with pytest.raises(PeerRefusedError, match="greater than") as caught:
        compute(client, HIDDEN)
    assert not isinstance(caught.value, PeerLimitError) and len(transport.calls) == 1


def test_one_part_that_fails_ends_the_others():
    transport = FakeTransport()

    async def fail(hop: Hop, hidden: torch.Tensor) -> None:
        if hidden[0, 0, 0] == 1:
            raise PeerUnreachableError("gone")
        await asyncio.sleep(3600)

    transport.on_call = fail
    client, _ = client_over(transport, max_tokens_per_call=3)
    with pytest.raises(PeerUnreachableError):
        compute(client, torch.arange(3.0)[:, None, None].expand(3, 3, 4))
    assert transport.in_flight == 0


def test_rows_that_wait_for_their_turn_in_steps_do_not_go_to_a_server_that_failed_meanwhile():
    transport = FakeTransport()
    client, peers = client_over(transport, max_tokens_per_call=3, min_backoff=30, max_backoff=30)

    def fail(hop: Hop, hidden: torch.Tensor) -> None:
        peers.of("a").on_failed(PeerUnreachableError("gone"))
        raise PeerUnreachableError("gone")

    transport.on_call = fail

    async def two() -> list[object]:
        long = Activations(torch.zeros(1, 7, 4))
        return await asyncio.gather(client.run(HOP, long), client.run(HOP, long), return_exceptions=True)

    first, second = asyncio.run(two())
    assert isinstance(first, PeerUnreachableError) and str(first) == "gone"
    assert isinstance(second, PeerUnreachableError) and "waited for its turn" in str(second)
    assert len(transport.sessions) == 1 and transport.open_sessions == 0


def test_a_session_refused_for_its_size_is_not_asked_for_again():
    transport, asked = FakeTransport(), []

    def refuse(hop: Hop, rows: int, positions: int) -> None:
        asked.append((rows, positions))
        if rows * positions > 5:
            raise PeerRefusedError("Cannot allocate KV cache for 7 tokens, max = 5")

    transport.on_session = refuse
    client, _ = client_over(transport)

    async def open_all() -> None:
        for _ in range(2):
            with pytest.raises(PeerLimitError, match=r"Cannot allocate|has a cache for 5"):
                await client.open_session(HOP, 1, 7)
        await (await client.open_session(HOP, 1, 5)).close()

    asyncio.run(open_all())
    assert asked == [(1, 7), (1, 5)] and transport.open_sessions == 0


@pytest.mark.parametrize(
    ("refusal", "kind"),
    [
        ("Could not allocate 7000 bytes immediately: out of memory", PeerCacheFullError),
        ("something else", PeerRefusedError),
    ],
)
def test_other_refusals_of_a_session_are_told_as_what_they_are(refusal, kind):
    transport = FakeTransport()

    def refuse(hop: Hop, rows: int, positions: int) -> None:
        raise PeerRefusedError(refusal)

    transport.on_session = refuse
    client, peers = client_over(transport)
    with pytest.raises(PeerRefusedError) as caught:
        asyncio.run(client.open_session(HOP, 1, 7))
    assert type(caught.value) is kind
    assert peers.of("a").limits.session_refusal(1, 7) is None


def test_a_step_that_holds_more_than_a_call_may_teaches_the_limit():
    transport = FakeTransport()

    def refuse(hop: Hop, hidden: torch.Tensor) -> None:
        raise PeerRefusedError(TOO_MANY.format(2) if hidden.shape[1] > 2 else "out of memory")

    transport.on_call = refuse
    client, peers = client_over(transport)

    async def steps() -> None:
        session = await client.open_session(HOP, 1, 7)
        with pytest.raises(PeerLimitError):
            await client.step(session, HOP, torch.zeros(1, 3, 4))
        with pytest.raises(PeerRefusedError, match="out of memory"):
            await client.step(session, HOP, torch.zeros(1, 2, 4))
        await session.close()

    asyncio.run(steps())
    assert peers.of("a").limits.per_call == 2


def test_what_ended_a_push_is_told_as_a_limit_where_it_is_one():
    client, peers = client_over(FakeTransport())
    per_call = client.explain_push(HOP, PeerRefusedError(TOO_MANY.format(4)), 2, 3)
    assert isinstance(per_call, PeerLimitError) and peers.of("a").limits.per_call == 4
    of_a_session = client.explain_push(HOP, PeerRefusedError("Cannot allocate KV cache for 3 tokens, max = 2"), 2, 3)
    assert isinstance(of_a_session, PeerLimitError) and peers.of("a").limits.session_refusal(2, 3) is not None
    for other in (PeerUnreachableError("gone"), PeerNoSessionError("locked"), PeerRefusedError("out of memory")):
        assert client.explain_push(HOP, other, 2, 3) is other
