"""Servers that push to each other: the same bits, sent once, and the ordinary way whenever that does not work."""

import contextlib
import time

import pytest
import torch

from petals_eval.config import SwarmSettings
from petals_eval.errors import MissingBlocksError
from petals_eval.local_swarm.faults import catalog as faults
from petals_eval.local_swarm.launcher import LocalSwarm
from petals_eval.local_swarm.server.sessions import Sessions
from petals_eval.swarm import SwarmConnection, Work
from petals_eval.swarm.scheduling import push_scheduler as push_calls
from petals_eval.swarm.trust.determinism import difference

BLOCKS, HIDDEN = 5, 64
SPANS = [(0, 2), (2, 3), (3, 4), (4, 5)]


@contextlib.contextmanager
def swarm_of(realdata, spans=SPANS, **options):
    with LocalSwarm(realdata / "stories260K-hf", spans=spans, mode="thread", **options) as swarm:
        yield swarm


@contextlib.contextmanager
def blocks_over(swarm, push="always", **settings):
    chosen = {"initial_peers": tuple(swarm.initial_peers), "deadline": 20.0, "verify": 0.0, **settings}
    with SwarmConnection.connect(SwarmSettings(push=push, **chosen)) as connection:
        yield connection.remote_sequential(swarm.dht_prefix, BLOCKS)


@pytest.fixture(scope="module")
def swarm(realdata):
    with swarm_of(realdata) as running:
        yield running


@pytest.fixture(scope="module")
def ordinary(swarm):
    with blocks_over(swarm, "never") as blocks:
        yield blocks


def hidden_states(batch: int, seq: int) -> torch.Tensor:
    return torch.randn(batch, seq, HIDDEN, generator=torch.Generator().manual_seed(batch * 1000 + seq))


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


def sent_to(blocks, swarm) -> list[int]:
    """Bytes of hidden states that left here in calls to each server."""
    seen = blocks.histories
    return [seen[server.peer_id].bytes_sent if server.peer_id in seen else 0 for server in swarm.servers]


def test_the_same_numbers_and_each_hidden_state_leaves_here_once(swarm, ordinary):
    shapes = [(1, 1), (3, 7), (16, 60), (20, 100)]
    with blocks_over(swarm) as blocks:
        for shape in shapes:
            hidden = hidden_states(*shape)
            assert close(blocks(hidden), ordinary(hidden))
        first, *rest = sent_to(blocks, swarm)
        assert first == sum(4 * HIDDEN * rows * seq for rows, seq in shapes)
        assert rest == [0, 0, 0]
        received = [blocks.histories[server.peer_id].bytes_received for server in swarm.servers]
        assert received == [first] * 4
        assert blocks.status().retries == 0


def test_many_at_once_come_back_each_with_its_own_and_leave_no_cache_behind(swarm, ordinary):
    inputs = [hidden_states(1 + number % 5, 3 + number % 17) for number in range(60)]
    with blocks_over(swarm) as blocks:
        found = {each.tag: each for each in blocks.stream(Work(*each, None) for each in enumerate(inputs))}
        assert sent_to(blocks, swarm)[1:] == [0, 0, 0]
        assert all(close(found[number].hidden, ordinary(hidden)) for number, hidden in enumerate(inputs))
        assert all([(hop.first, hop.last) for hop in each.hops] == SPANS for each in found.values())
        assert all(history.in_flight == 0 and history.flow.in_flight == 0 for history in blocks.histories.values())
    end = time.monotonic() + 10
    while any(server._server.budget.used_bytes for server in swarm.servers) and time.monotonic() < end:
        time.sleep(0.05)
    assert [server._server.budget.used_bytes for server in swarm.servers] == [0] * 4


def test_in_bfloat16_within_its_rounding(realdata):
    hidden = hidden_states(4, 40)
    with swarm_of(realdata, dtype="bfloat16") as swarm, blocks_over(swarm) as blocks:
        with blocks_over(swarm, "never") as ordinary:
            expected = ordinary(hidden)
        found = blocks(hidden)
        assert sent_to(blocks, swarm) == [2 * hidden.numel(), 0, 0, 0]
        assert difference(hidden, found, expected) < 2e-2


def test_parts_of_the_model(swarm, ordinary):
    hidden = hidden_states(3, 9)
    with blocks_over(swarm) as blocks:
        assert close(blocks[1:4](hidden), ordinary[1:4](hidden))
        assert sent_to(blocks, swarm)[:2] == [4 * hidden.numel(), 0]


def test_one_hop_has_nobody_to_push_to(swarm, ordinary):
    hidden = hidden_states(3, 9)
    with blocks_over(swarm) as blocks:
        assert close(blocks[:2](hidden), ordinary[:2](hidden))
        assert blocks.status().retries == 0


def test_deep_prompts_a_lossy_wire_and_too_many_tokens_go_the_ordinary_way(swarm, ordinary):
    hidden = hidden_states(4, 20)
    prompts = 0.1 * torch.randn(BLOCKS, 1, 4, HIDDEN, generator=torch.Generator().manual_seed(0))
    with blocks_over(swarm) as blocks:
        assert close(blocks(hidden, prompts), ordinary(hidden, prompts))
        assert sent_to(blocks, swarm)[0] == 4 * hidden.numel() + 4 * prompts[:2].numel()
        assert all(sent > 0 for sent in sent_to(blocks, swarm))
        assert blocks.status().retries == 0
    with blocks_over(swarm, wire="float16") as blocks:
        assert torch.allclose(blocks(hidden), ordinary(hidden), rtol=0.02, atol=0.05)
        assert sent_to(blocks, swarm) == [2 * hidden.numel()] * 4
    with blocks_over(swarm, max_tokens_per_call=50) as blocks:
        long = hidden_states(1, 60)
        assert close(blocks(long), ordinary(long))
        assert all(sent > 0 for sent in sent_to(blocks, swarm))


def test_a_server_of_an_older_version_in_the_route(realdata, swarm, ordinary):
    hidden = hidden_states(3, 9)
    with swarm_of(realdata, SPANS[:3]) as older:
        older.add_server(SPANS[3], version="2.2.0.post1", rolls_back=False)
        with blocks_over(older) as blocks:
            assert close(blocks(hidden), ordinary(hidden))
            assert sent_to(blocks, older) == [4 * hidden.numel()] * 4
            assert blocks.status().retries == 0


def test_a_server_that_announces_a_newer_version_than_it_has(realdata, ordinary):
    hidden = hidden_states(3, 9)
    with swarm_of(realdata) as lying, blocks_over(lying) as blocks:  # the announcement is read
        lying.servers[2].switch(faults.VersionLie(version="2.2.0"))
        assert close(blocks(hidden), ordinary(hidden))
        assert sent_to(blocks, lying) == [4 * hidden.numel()] * 4


def test_a_full_cache_is_no_fault_of_the_server(realdata, ordinary):
    hidden = hidden_states(4, 16)
    with swarm_of(realdata, SPANS[:3]) as full:
        full.add_server(SPANS[3], attn_cache_tokens=40, inference_max_length=40)  # of 64 that it takes
        with blocks_over(full) as blocks:
            assert close(blocks(hidden), ordinary(hidden))
            assert sent_to(blocks, full) == [4 * hidden.numel()] * 4
            assert all(history.failures == 0 for history in blocks.histories.values())
            small = hidden_states(1, 8)
            assert close(blocks(small), ordinary(small))


@pytest.mark.parametrize("window", [None, 40])
def test_pushes_never_take_more_than_half_of_what_a_cache_has(realdata, ordinary, window):
    """Others have sessions, too; also where the number of micro-batches in flight is set by hand."""
    tokens = 400
    inputs = [hidden_states(2, 10) for _ in range(60)]
    with swarm_of(realdata, attn_cache_tokens=tokens, inference_max_length=tokens) as tight:
        last = tight.servers[3]
        last.switch(faults.Slow(delay=0.1))  # they pile up there
        most = 0
        with blocks_over(tight, window=window) as blocks:
            for computed in blocks.stream(Work(*each, None) for each in enumerate(inputs)):
                most = max(
                    most, *(each._server.budget.used_bytes / each._server.budget.total_bytes for each in tight.servers)
                )
                assert close(computed.hidden, ordinary(inputs[computed.tag]))
            assert sent_to(blocks, tight)[1:] == [0, 0, 0], "all were pushed"
        assert 0.1 < most <= 0.5


def test_a_server_without_sessions_serves_on_the_ordinary_way(realdata, ordinary):
    """The only one that holds its block: if that were held against its calls, the run would stop for half a minute."""
    hidden = hidden_states(3, 9)
    with swarm_of(realdata) as refusing:
        refusing.servers[1].switch(faults.Refuse(at_most=1))
        with blocks_over(refusing, min_backoff=30.0, deadline=10.0) as blocks:
            assert close(blocks(hidden), ordinary(hidden))
            assert sent_to(blocks, refusing) == [4 * hidden.numel()] * 4
            assert refusing.servers[1].fault_counts()["refuse"].times == 1
            assert blocks.status().retries == 1


def test_a_push_that_is_lost_holds_nothing_up_and_what_came_before_it_counts(realdata, ordinary, monkeypatch):
    monkeypatch.setattr(push_calls, "FIRST_PATIENCE", 1.0)
    monkeypatch.setattr(push_calls, "LEAST_PATIENCE", 1.0)
    hidden = hidden_states(3, 9)
    hears = Sessions.receive
    monkeypatch.setattr(
        Sessions, "receive", lambda self, request: self._served.settings.start != 3 and hears(self, request)
    )
    with swarm_of(realdata) as deaf, blocks_over(deaf) as blocks:
        started = time.monotonic()
        assert close(blocks(hidden), ordinary(hidden))
        assert time.monotonic() - started < 10
        once = 4 * hidden.numel()
        assert sent_to(blocks, deaf) == [once, 0, once, once]
        assert blocks.status().retries == 1
        assert close(blocks(hidden), ordinary(hidden))  # not pushed: that server rests
        assert sent_to(blocks, deaf) == [2 * once, once, 2 * once, 2 * once]


def test_a_server_that_dies_in_mid_push(realdata, ordinary):
    inputs = [hidden_states(2, 5 + number) for number in range(30)]
    with swarm_of(realdata, [*SPANS, SPANS[2]]) as dying, blocks_over(dying, min_backoff=0.1) as blocks:
        blocks(inputs[0])
        route = blocks._pipeline._finder.plan(0, 5, 12)  # which of the two replicas is used depends on their paces
        (victim,) = [each for each in dying.servers if each.peer_id == route[2].server.peer_id]
        victim.switch(faults.Crash(after=1))
        found = {each.tag: each.hidden for each in blocks.stream(Work(*each, None) for each in enumerate(inputs))}
        give_up = time.monotonic() + 10
        while victim.is_alive() and time.monotonic() < give_up:
            time.sleep(0.05)
        assert not victim.is_alive()
        assert all(close(found[number], ordinary(hidden)) for number, hidden in enumerate(inputs))
        assert blocks.status().retries > 0


def test_answers_that_are_wrong_are_refused_and_held_against_the_server(realdata, ordinary):
    hidden = hidden_states(3, 9)
    with swarm_of(realdata) as wrong, blocks_over(wrong, min_backoff=0.1) as blocks:
        blocks(hidden)
        wrong.servers[2].switch(faults.NotFinite(at_most=1))
        assert close(blocks(hidden), ordinary(hidden))
        history = blocks.histories[wrong.servers[2].peer_id]
        assert history.failures == 1 and "not finite" in history.last_error


@pytest.mark.parametrize("place", [0, 1, 3])
def test_training_mode_is_caught_when_pushing(realdata, place):
    """Wherever in the route it stands; the others' answers do not hide it."""
    with swarm_of(realdata) as training:
        training.servers[place].switch(faults.TrainingMode(dropout=0.1))
        with blocks_over(training, deadline=5.0) as blocks:
            with pytest.raises(MissingBlocksError, match="two answers"):
                blocks(hidden_states(3, 9))
            assert blocks.histories[training.servers[place].peer_id].is_left_out


def test_pushed_answers_are_checked_against_others(realdata, ordinary):
    spans = [*SPANS, SPANS[2], SPANS[2]]
    with swarm_of(realdata, spans) as lying:
        lying.servers[2].switch(faults.Noise(size=0.5, repeats=True))
        with blocks_over(lying, verify=1.0) as blocks:
            for number in range(8):
                blocks(hidden_states(2, 10 + number))
            blocks.settle()
            assert blocks.histories[lying.servers[2].peer_id].is_left_out
            assert sent_to(blocks, lying)[1] == 0  # it was a pushed answer that was found out
            hidden = hidden_states(2, 30)
            assert close(blocks(hidden), ordinary(hidden))


def test_no_push_is_left_when_the_run_is_interrupted(realdata):
    with swarm_of(realdata) as slow, blocks_over(slow) as blocks:
        blocks(hidden_states(1, 3))
        slow.servers[1].switch(faults.Slow(delay=0.3))
        stream = blocks.stream(Work(number, hidden_states(1, 4), None) for number in range(20))
        next(stream)
        stream.close()
        end = time.monotonic() + 10
        while any(history.in_flight for history in blocks.histories.values()) and time.monotonic() < end:
            time.sleep(0.05)
        assert all(history.in_flight == 0 for history in blocks.histories.values())
