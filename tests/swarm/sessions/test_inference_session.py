"""Inference sessions over a real swarm on loopback: in steps, rolled back, reordered, carried on elsewhere, closed."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from petals_eval.errors import CallerError, DeadlineError, GradientError, RequestTooLargeError
from petals_eval.local_swarm.faults.catalog import Hang, Slow
from petals_eval.local_swarm.launcher import LocalSwarm
from petals_eval.remote_model import RemoteModel
from petals_eval.swarm.peers.session_cache import CachePolicy
from petals_eval.swarm.transport.rolling_back import proves_rolling_back
from petals_eval.tasks.requests import Request
from tests.model.reference import classifier, full_logits, make_adapter
from tests.support import real_swarm
from tests.support.tiny_models import make_tiny
from tests.support.waiting import until

BLOCKS, HIDDEN, PREFIX = 4, 32, 3

# What a server says of its version, and whether its sessions roll back: 2.3.0, 2.2.0, one that lies, and one of which
# nothing is known.
LINES = {
    "2.3.0": {"version": "2.3.0.dev2"},
    "2.2.0": {"version": "2.2.0.post1", "rolls_back": False},
    "lies": {"version": "2.3.0.dev2", "rolls_back": False},
    "newer": {"version": "3.1"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny("llama", tmp_path_factory.mktemp("llama"), blocks=BLOCKS)


@pytest.fixture(scope="module", params=LINES)
def line(request):
    return request.param


@pytest.fixture(scope="module")
def swarm(model, line):
    with start(model, [(0, 2), (1, 4)], **LINES[line]) as running:
        yield running


@pytest.fixture(scope="module")
def blocks(swarm):
    with connect(swarm) as connection:
        yield connection.remote_sequential(swarm.dht_prefix, BLOCKS)


def start(model, spans, **options):
    return LocalSwarm(model, spans=spans, mode="thread", **options)


def connect(swarm, **settings):
    quick = {"min_backoff": 0.05, "max_backoff": 0.2, "missing_update_period": 0.2, "deadline": 10.0}
    return real_swarm.connect(swarm, **{**quick, **settings})


def hidden_states(batch: int, seq: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, seq, HIDDEN, generator=torch.Generator().manual_seed(seed))


def deep_prompts(rows: int) -> torch.Tensor:
    return torch.randn(BLOCKS, rows, PREFIX, HIDDEN, generator=torch.Generator().manual_seed(rows))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def in_steps(session, hidden: torch.Tensor, *lengths: int, prompts=None) -> torch.Tensor:
    """The answers of a session to `hidden`, step by step; prompts come with the first step."""
    answers = []
    for part in hidden.split(lengths, dim=1):
        answers.append(session.step(part, prompts))
        prompts = None
    return torch.cat(answers, dim=1)


def cache_in_use(swarm) -> int:
    return sum(server._server.budget.used_bytes for server in swarm.servers if server.is_alive())


def test_many_steps_are_one_forward(blocks):
    hidden = hidden_states(3, 12)
    with blocks.inference_session(12, batch=3) as session:
        assert session.position == 0
        close(in_steps(session, hidden, 5, 1, 1, 5), blocks(hidden))
        assert (session.position, session.max_length, session.batch) == (12, 12, 3)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("lengths", [(7, 2), (2, 1, 6)], ids=["whole prefix", "split prefix"])
def test_deep_prompts_reach_the_first_positions_and_no_others(blocks, rows, lengths):
    hidden, prompts = hidden_states(3, 9), deep_prompts(rows)
    with blocks.inference_session(16, batch=3) as session:
        close(in_steps(session, hidden, *lengths, prompts=prompts), blocks(hidden, prompts))


def test_a_slice_of_the_blocks(blocks):
    hidden, prompts = hidden_states(1, 6), deep_prompts(1)[1:3]
    with blocks[1:3].inference_session(6) as session:
        close(in_steps(session, hidden, 4, 2, prompts=prompts), blocks[1:3](hidden, prompts))


@pytest.mark.parametrize("rows", [None, 1, 2])
@pytest.mark.parametrize("position", [0, 2, 5, 7])
def test_rolling_back_equals_a_fresh_computation(blocks, position, rows):
    prompts = None if rows is None else deep_prompts(rows)
    hidden, other = hidden_states(2, 8), hidden_states(2, 6, seed=1)
    with blocks.inference_session(20, batch=2) as session:
        in_steps(session, hidden, 5, 3, prompts=prompts)
        session.position = position
        found = session.step(other, None if position else prompts)
        expected = blocks(torch.cat([hidden[:, :position], other], dim=1), prompts)
        close(found, expected[:, position:])
        assert session.position == position + 6
        session.roll_back(position + 4)
        again = session.step(hidden[:, :2])
        expected = blocks(torch.cat([hidden[:, :position], other[:, :4], hidden[:, :2]], dim=1), prompts)
        close(again, expected[:, position + 4 :])


def test_whether_a_server_rolls_back_is_found_out_once(swarm, line, monkeypatch):
    proofs = []

    async def prove(session, hidden_size):
        proofs.append(await proves_rolling_back(session, hidden_size))
        return proofs[-1]

    monkeypatch.setattr("petals_eval.swarm.transport.rolling_back.proves_rolling_back", prove)
    with connect(swarm) as connection:
        blocks = connection.remote_sequential(swarm.dht_prefix, BLOCKS)
        for _ in range(2):
            with blocks.inference_session(20) as session:
                session.step(hidden_states(1, 4))
                session.position = 2
                session.step(hidden_states(1, 1))
    assert proofs == {"2.3.0": [True] * 2, "newer": [True] * 2, "lies": [False] * 2, "2.2.0": []}[line]  # two servers


def test_hypo_ids_reorder_the_rows(blocks):
    """As beam search does: row i goes on from what row hypo_ids[i] was, prompts of its own included."""
    hidden, prompts = hidden_states(3, 8), deep_prompts(3)
    first, second = torch.tensor([2, 0, 0]), torch.tensor([1, 1, 2])
    with blocks.inference_session(16, batch=3) as session:
        session.step(hidden[:, :5], prompts)
        session.step(hidden[:, 5:6], hypo_ids=first)
        found = session.step(hidden[:, 6:8], hypo_ids=second)
        rows = torch.cat([hidden[first, :5], hidden[:, 5:6]], dim=1)[second]
        rows = torch.cat([rows, hidden[:, 6:8]], dim=1)
        prompts = prompts[:, first][:, second]
        close(found, blocks(rows, prompts)[:, 6:])
        session.position = 4  # within the reordered past
        other = hidden_states(3, 3, seed=1)
        close(session.step(other), blocks(torch.cat([rows[:, :4], other], dim=1), prompts)[:, 4:])


def test_rolling_back_and_reordering_in_one_step(blocks):
    hidden, order = hidden_states(2, 6), torch.tensor([1, 1])
    with blocks.inference_session(16, batch=2) as session:
        session.step(hidden)
        session.position = 4
        found = session.step(hidden[:, :2], hypo_ids=order)
        close(found, blocks(torch.cat([hidden[order, :4], hidden[:, :2]], dim=1))[:, 4:])


def test_steps_above_the_token_limit_are_split(swarm):
    hidden = hidden_states(2, 50)
    with connect(swarm, max_tokens_per_call=16) as connection:
        blocks = connection.remote_sequential(swarm.dht_prefix, BLOCKS)
        with blocks.inference_session(64, batch=2) as session:
            close(in_steps(session, hidden, 30, 20, prompts=deep_prompts(2)), blocks(hidden, deep_prompts(2)))
        with (
            pytest.raises(RequestTooLargeError, match="each of the session's 17 rows"),
            blocks.inference_session(4, batch=17) as session,
        ):
            session.step(hidden_states(17, 2))


def test_mistakes_are_said_at_once_and_change_nothing(blocks):
    hidden = hidden_states(2, 5)
    with blocks.inference_session(8, batch=2) as session:
        session.step(hidden)
        for wrong in (
            hidden[:1],
            hidden[0],
            torch.zeros(2, 1, HIDDEN + 1),
            torch.zeros(2, 1, HIDDEN, dtype=torch.int64),
        ):
            with pytest.raises(CallerError, match="expected hidden states"):
                session.step(wrong)
        with pytest.raises(CallerError, match="at position 0"):
            session.step(hidden[:, :3], deep_prompts(1))
        with pytest.raises(CallerError, match="hypo_ids"):
            session.step(hidden[:, :1], hypo_ids=torch.tensor([0, 2]))
        with pytest.raises(RequestTooLargeError, match=r"at most 8 positions.*found 10"):
            session.step(hidden)
        with pytest.raises(CallerError, match="within 0:5"):
            session.position = 6
        with pytest.raises(GradientError):
            session.step(hidden[:, :1].clone().requires_grad_())
        close(session.step(hidden[:, :3]), blocks(torch.cat([hidden, hidden[:, :3]], dim=1))[:, 5:])
    session.close()
    with pytest.raises(CallerError, match="closed"):
        session.step(hidden)
    with (
        blocks.inference_session(8) as session,
        pytest.raises(CallerError, match=r"deep prompts \(4, 1 or 1, prefix, 32"),
    ):
        session.step(hidden[:1], deep_prompts(2))
    with pytest.raises(CallerError, match="at least 1"):
        blocks.inference_session(0)


def test_closing_leaves_nothing_open(swarm):
    threads = threading.active_count()
    with connect(swarm) as connection:
        blocks = connection.remote_sequential(swarm.dht_prefix, BLOCKS)

        async def tasks() -> int:
            return len(asyncio.all_tasks())

        blocks(hidden_states(1, 1))
        before = connection.loop.run(tasks)
        with blocks.inference_session(16) as session:
            session.step(torch.empty(1, 0, HIDDEN))  # reserves
            assert len(session.servers) == 2
            assert cache_in_use(swarm) > 0
            session.step(hidden_states(1, 4))
            session.position = 1
            session.step(hidden_states(1, 4))
        assert cache_in_use(swarm) == 0
        assert connection.loop.run(tasks) == before
    assert threading.active_count() <= threads
    assert not any(server._server.handler._sessions._pushed for server in swarm.servers)


def test_leaving_without_closing_ends_the_sessions_with_the_connection(swarm):
    with connect(swarm) as connection:
        session = connection.remote_sequential(swarm.dht_prefix, BLOCKS).inference_session(16)
        session.step(hidden_states(1, 4))
        assert cache_in_use(swarm) > 0
    session.close()
    until(lambda: cache_in_use(swarm) == 0, 5.0)


def test_a_server_that_dies_in_mid_session_is_replaced_with_equal_answers(model):
    """By one whose span is another, and by two; the hop after it keeps its cache."""
    hidden, prompts = hidden_states(2, 12), deep_prompts(2)
    with start(model, [(0, 3), (3, 4), (2, 4)]) as swarm, connect(swarm) as connection:
        blocks = connection.remote_sequential(swarm.dht_prefix, BLOCKS)
        with blocks.inference_session(16, batch=2) as session:
            expected = blocks(hidden, prompts)
            close(session.step(hidden[:, :4], prompts), expected[:, :4])
            victim = next(server for server in swarm.servers if server.peer_id == session.servers[0])
            assert str(victim.span) == "0:3"
            swarm.add_server((0, 2))
            swarm.add_server((1, 3))
            blocks.refresh()
            victim.kill()
            close(session.step(hidden[:, 4:6]), expected[:, 4:6])
            assert len(session.servers) == 3
            close(session.step(hidden[:, 6:9], hypo_ids=torch.tensor([0, 1])), expected[:, 6:9])
            victim = next(server for server in swarm.servers if server.peer_id == session.servers[2])
            victim.kill()
            session.position = 7
            close(session.step(hidden[:, 7:]), expected[:, 7:])
        assert cache_in_use(swarm) == 0
        assert blocks.status().retries >= 2


def test_a_step_that_finds_no_server_leaves_the_session_where_it_was(model):
    hidden = hidden_states(2, 8)
    order = torch.tensor([1, 0])
    with start(model, [(0, 2), (2, 4)]) as swarm, connect(swarm, deadline=3.0) as connection:
        blocks = connection.remote_sequential(swarm.dht_prefix, BLOCKS)
        with blocks.inference_session(16, batch=2) as session:
            expected = blocks(torch.cat([hidden[order, :4], hidden[:, 4:]], dim=1))
            session.step(hidden[:, :4])
            swarm.servers[1].kill()
            with pytest.raises(DeadlineError, match="blocks 2:4"):
                session.step(hidden[:, 4:6], hypo_ids=order)
            assert session.position == 4
            swarm.add_server((2, 4))
            blocks.refresh()
            close(session.step(hidden[:, 4:6], hypo_ids=order), expected[:, 4:6])
            close(session.step(hidden[:, 6:]), expected[:, 6:])


def test_a_server_that_ends_idle_sessions_is_asked_anew(model):
    hidden = hidden_states(1, 8)
    with start(model, [(0, 4)], step_timeout=0.3) as swarm, connect(swarm) as connection:
        blocks = connection.remote_sequential(swarm.dht_prefix, BLOCKS)
        with blocks.inference_session(16) as session:
            session.step(hidden[:, :4])
            until(lambda: cache_in_use(swarm) == 0, 5.0)
            close(session.step(hidden[:, 4:]), blocks(hidden)[:, 4:])


def test_a_full_cache_is_refused_cleanly_and_used_once_it_is_free(model):
    hidden = hidden_states(1, 20)
    settings = {"connect_timeout": 0.3, "deadline": 1.0}  # seconds
    with (
        start(model, [(0, 4)], inference_max_length=20, attn_cache_tokens=30) as swarm,
        connect(swarm, **settings) as connection,
    ):
        blocks = connection.remote_sequential(swarm.dht_prefix, BLOCKS)
        with blocks.inference_session(20) as first:
            first.step(hidden)
            second = blocks.inference_session(20)
            with pytest.raises(DeadlineError, match=r"40 tokens of its cache are free; .* needs 80 .* 120 are"):
                second.step(hidden)
            assert blocks.status().retries == 0
            assert blocks(hidden).shape == hidden.shape  # what needs no session goes on
            # Rolling back needs no proof that would need room, too.
            first.position = 4
            close(first.step(hidden[:, 4:8]), blocks(hidden)[:, 4:8])
        close(second.step(hidden), blocks(hidden))
        second.close()
        assert cache_in_use(swarm) == 0


def test_a_session_that_waits_for_a_cache_is_what_everybody_waits_for_only_where_no_other_steps(model):
    hidden = hidden_states(1, 20)
    options = {"inference_max_length": 20, "attn_cache_tokens": 30}
    with start(model, [(0, 4)], **options) as swarm, connect(swarm) as connection:
        blocks = connection.remote_sequential(swarm.dht_prefix, BLOCKS)
        first, second = blocks.inference_session(20), blocks.inference_session(20)
        first.step(hidden[:, :1])
        assert first.hops[0].span.stop == BLOCKS and first.seconds_waiting == 0
        waiting = second.start_step(hidden)
        until(lambda: blocks.status().waiting is not None and second.seconds_waiting > 0, 5.0)
        swarm.servers[0].switch(Slow(delay=0.5))
        stepping = first.start_step(hidden[:, 1:2])
        until(lambda: blocks.status().waiting is None, 5.0)
        assert not stepping.done()
        stepping.result()
        swarm.servers[0].switch()
        first.close()
        close(waiting.result(), blocks(hidden))
        second.close()


def test_a_step_that_is_cancelled_while_its_route_opens_leaves_nothing_reserved(model):
    with start(model, [(0, 2), (2, 4)]) as swarm, connect(swarm) as connection:
        blocks = connection.remote_sequential(swarm.dht_prefix, BLOCKS)
        swarm.servers[1].switch(Hang())
        session = blocks.inference_session(16)
        step = session.start_step(hidden_states(1, 4))
        until(lambda: any(peer.cache.held for peer in blocks.peers.values()), 30.0)
        step.cancel()
        until(lambda: not any(peer.cache.held for peer in blocks.peers.values()), 30.0)
        until(lambda: swarm.servers[0]._server.budget.used_bytes == 0, 30.0)
        session.close()


def test_a_session_longer_than_any_may_be_fails_at_once_with_the_numbers(model):
    options = {"max_batch_size": 32, "inference_max_length": 50}
    with start(model, [(0, 4), (0, 4)], **options) as swarm, connect(swarm, deadline=60) as connection:
        blocks = connection.remote_sequential(swarm.dht_prefix, BLOCKS)
        started = time.monotonic()
        for _ in range(2):
            with blocks.inference_session(70) as session, pytest.raises(RequestTooLargeError, match=r"70 .* 50 "):
                session.step(hidden_states(1, 4))
        # The same through forward, where a row is longer than a call may be.
        with pytest.raises(RequestTooLargeError, match=r"holds 70 tokens .* 32 in one call .* 50 in a session"):
            blocks(hidden_states(2, 70))
        assert time.monotonic() - started < 5.0
        assert blocks.status().retries == 0
        assert cache_in_use(swarm) == 0


def test_a_session_larger_than_any_cache_ever_was_is_told_of_at_once_and_fails_a_while_later(model, monkeypatch):
    """A server says "out of memory" to it as to one that has to wait."""
    monkeypatch.setattr(CachePolicy, "patience", 1.5)
    options = {"max_batch_size": 32, "inference_max_length": 99, "attn_cache_tokens": 60}
    with start(model, [(0, 4), (0, 4)], **options) as swarm, connect(swarm, deadline=60) as connection:
        blocks = connection.remote_sequential(swarm.dht_prefix, BLOCKS)
        started = time.monotonic()
        with ThreadPoolExecutor(1) as pool:
            row = pool.submit(blocks, hidden_states(1, 70))
            until(lambda: blocks.status().notices and blocks.status().waiting, 1.0)
            assert "needs 280 tokens" in blocks.status().notices[0] and "240 are the most" in blocks.status().notices[0]
            assert "needs 280 tokens" in blocks.status().waiting and "240 are the most" in blocks.status().waiting
            text = (
                "holds 70 tokens .* 32 in one call, and the session needs 280 tokens .* 240 are the most .*max_length"
            )
            with pytest.raises(RequestTooLargeError, match=text):
                row.result()
        assert 1.5 <= time.monotonic() - started < 8.0
        with (
            blocks.inference_session(70) as session,
            pytest.raises(RequestTooLargeError, match=r"needs 280 tokens .* 240 are the most .*max_length or batch"),
        ):
            session.step(hidden_states(1, 4))
        assert time.monotonic() - started < 8.0, "it is known by now"
        assert len(blocks.status().notices) == 2, "one a server"
        assert blocks.status().retries == 0
        assert cache_in_use(swarm) == 0
        assert blocks(hidden_states(1, 20)).shape == (1, 20, HIDDEN)


def test_rows_longer_than_a_call_may_be_are_computed_in_steps(model):
    """Exactly as in one call, deep prompts included, though the cache has room for one of them at a time."""
    hidden, prompts = hidden_states(4, 60), deep_prompts(4)
    with (
        start(model, [(0, 3), (2, 4)]) as roomy,
        start(model, [(0, 3), (2, 4)], max_batch_size=32, inference_max_length=64, attn_cache_tokens=64) as tight,
        connect(roomy) as one,
        connect(tight, connect_timeout=0.5) as other,
    ):
        expected = one.remote_sequential(roomy.dht_prefix, BLOCKS)(hidden, prompts)
        blocks = other.remote_sequential(tight.dht_prefix, BLOCKS)
        close(blocks(hidden, prompts), expected)
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda row: blocks(hidden[row : row + 1], prompts[:, row : row + 1]), range(4)))
        close(torch.cat(answers), expected)
        assert blocks.status().retries == 0
        assert cache_in_use(tight) == 0


@pytest.mark.parametrize("kind", ["none", "deep_ptune"])
def test_3000_tokens_on_a_server_that_takes_2048_give_the_local_logits(tmp_path, kind):
    folder = make_tiny("llama", tmp_path / "llama", blocks=BLOCKS, labels=6, max_position_embeddings=4096)
    tokens = tuple(torch.randint(3, 320, (3000,), generator=torch.Generator().manual_seed(0)).tolist())
    limits = {"max_batch_size": 2048, "inference_max_length": 4096}
    with (
        start(folder, [(0, 2), (2, 4)], **limits) as swarm,
        RemoteModel.from_pretrained(
            str(folder), initial_peers=swarm.initial_peers, dht_prefix=swarm.dht_prefix, deadline=60.0
        ) as model,
    ):
        adapter = make_adapter(model.local, kind, labels=6)
        request = Request(key="0", part=0, input_ids=tokens)
        (answered,) = model.compute([request], adapter, tokens_per_micro_batch=4096)
        assert model.blocks.status().retries == 0
    reference = classifier(folder)
    reference.score.weight.data = adapter.head_weight
    expected = full_logits(reference, model.local, adapter, tokens)
    torch.testing.assert_close(answered.answer, expected, rtol=0, atol=1e-4)
