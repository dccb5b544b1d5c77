"""Lanes over a real swarm on loopback: what they answer, what they send, what they hold, and where they fall back."""

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

import pytest
import torch

from petals_eval.local_swarm.faults.catalog import Hang, WrongRollBack
from petals_eval.local_swarm.launcher import LocalSwarm
from petals_eval.swarm import RemoteSequential, Work
from petals_eval.swarm.lanes.lane_scheduler import LanePolicy
from petals_eval.swarm.lanes.prefix import LaneSize, Prefix
from petals_eval.swarm.peers.peer_text import short_peer
from petals_eval.swarm.peers.session_cache import SessionCache
from petals_eval.swarm.transport.hop_session import HopSession
from petals_eval.swarm.transport.libp2p import Libp2pTransport
from tests.support import real_swarm
from tests.support.tensors import hidden_states
from tests.support.tiny_models import make_tiny
from tests.support.waiting import until

BLOCKS, HIDDEN = 4, 32
SPANS = [(0, 2), (2, 4)]
REPLICAS = [(0, 2), (2, 4), (2, 4)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny("llama", tmp_path_factory.mktemp("llama"), blocks=BLOCKS)


@pytest.fixture(scope="module")
def shared(model) -> Iterator[LocalSwarm]:
    """Servers that tests leave as they found them."""
    with started(model) as swarm:
        yield swarm


def started(model, spans=SPANS, **options) -> LocalSwarm:
    return LocalSwarm(model, spans=spans, mode="thread", **{"attn_cache_tokens": 1 << 14, **options})


@contextlib.contextmanager
def connected(swarm: LocalSwarm, **settings) -> Iterator[RemoteSequential]:
    """The model's blocks on a swarm, always in lanes and nothing audited unless told otherwise."""
    quick = {"min_backoff": 0.05, "max_backoff": 0.2, "missing_update_period": 0.2, "deadline": 10.0, "verify": 0}
    with real_swarm.connect(swarm, **{**quick, "lanes": "always", **settings}) as connection:
        yield connection.remote_sequential(swarm.dht_prefix, BLOCKS)


def hidden(rows: int, positions: int, seed: int = 0) -> torch.Tensor:
    return hidden_states(rows, positions, HIDDEN, seed=seed)


def deep_prompts(positions: int) -> torch.Tensor:
    return torch.randn(BLOCKS, 1, positions, HIDDEN, generator=torch.Generator().manual_seed(7))


def whole(work: Work) -> torch.Tensor:
    path = work.prefix.path
    rows = work.hidden.shape[0]
    return torch.cat([*(each.hidden.expand(rows, -1, -1) for each in path), work.hidden], dim=1)


def expected(blocks: RemoteSequential, work: Work) -> torch.Tensor:
    """What forward calls answer."""
    return blocks(whole(work), work.prefix.path[0].prompts)[:, work.prefix.end :]


def stream(blocks: RemoteSequential, work: Sequence[Work]) -> dict:
    """The answers by tag: each once."""
    answers: dict = {}
    for computed in blocks.stream(iter(work)):
        assert computed.tag not in answers
        answers[computed.tag] = computed
    assert sorted(answers) == sorted(each.tag for each in work)
    return answers


def check(blocks: RemoteSequential, work: Sequence[Work]) -> dict:
    answers = stream(blocks, work)
    for each in work:
        found, wanted = answers[each.tag].hidden, expected(blocks, each)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    return answers


def cache_in_use(swarm: LocalSwarm) -> int:
    servers: list[Any] = [server for server in swarm.servers if server.is_alive()]
    return sum(server._server.budget.used_bytes for server in servers)


@pytest.fixture
def sent(monkeypatch) -> Counter:
    """Tokens that servers were sent: "lanes" in sessions of several rows, "calls" in forward calls."""
    counts: Counter = Counter()
    step, call = HopSession.step, Libp2pTransport.call

    async def counted_step(session, states, *rest, **options):
        counts["lanes" if session.rows > 1 else "proofs"] += states.shape[0] * states.shape[1]
        return await step(session, states, *rest, **options)

    async def counted_call(transport, hop, activations, *, lossless=False):
        counts["probes" if lossless else "calls"] += activations.tokens
        return await call(transport, hop, activations, lossless=lossless)

    monkeypatch.setattr(HopSession, "step", counted_step)
    monkeypatch.setattr(Libp2pTransport, "call", counted_call)
    return counts


def some_work(count: int = 12, rows: int = 4, positions: int = 6, root: Prefix | None = None) -> list[Work]:
    root = root or Prefix(hidden(1, 9))
    size = LaneSize(rows, root.end + positions)
    return [Work(at, hidden(rows, positions, seed=at + 1), None, root, size) for at in range(count)]


@pytest.mark.parametrize("prompts", [None, 3], ids=["plain", "deep"])
def test_rows_after_a_prefix_are_answered_as_by_forward_calls(shared, prompts, sent):
    """Whatever the rows of a micro-batch and their lengths, the last and short one included."""
    root = Prefix(hidden(1, 9), prompts=None if prompts is None else deep_prompts(prompts))
    sizes = [(4, 8), (4, 5), (3, 8), (1, 1), (4, 2), (2, 7)]
    work = [Work(at, hidden(*each, seed=at + 1), None, root, LaneSize(4, 17)) for at, each in enumerate(sizes)]
    with connected(shared) as blocks:
        answers = check(blocks, work)
        assert all([str(hop.span) for hop in each.hops] == ["0:2", "2:4"] for each in answers.values())
        assert blocks.status().retries == 0
        until(lambda: cache_in_use(shared) == 0, 5.0)
    assert sent["lanes"] > 0


def test_the_prefix_is_computed_once_a_lane(shared, sent, monkeypatch):
    monkeypatch.setattr(LanePolicy, "most", 2)
    with connected(shared) as blocks:
        stream(blocks, some_work(12))
    assert sent["lanes"] == len(SPANS) * 4 * (2 * 9 + 12 * 6)
    assert sent["calls"] == 0


def test_contexts_are_computed_once_for_all_that_comes_after_them(shared, sent):
    """As the choices of several rows: each has its context, of one length, behind what all have in common."""
    root = Prefix(hidden(1, 5))
    contexts = [Prefix(hidden(4, 6, seed=70 + at), root) for at in range(3)]
    work = [
        Work((at, choice), hidden(4, 2, seed=10 * at + choice), None, context, LaneSize(4, 14))
        for at, context in enumerate(contexts)
        for choice in range(4)
    ]
    with connected(shared) as blocks:
        stream(blocks, work)
        for_all, lanes = 3 * 4 * (6 + 4 * 2), sent["lanes"] / len(SPANS)
        assert lanes - for_all in {4 * 5 * lanes for lanes in (1, 2, 3)}
        assert sent["calls"] == 0
        check(blocks, work[::-1])


LINES = {
    "2.2.0": {"version": "2.2.0.post1", "rolls_back": False},
    "one that lies of its version": {"rolls_back": False},
    "a small cache": {"attn_cache_tokens": 64},
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("line", LINES)
def test_where_there_are_no_lanes_forward_calls_do_the_work(model, line, sent):
    with started(model, **LINES[line]) as swarm, connected(swarm) as blocks:
        stream(blocks, some_work())
        assert sent["lanes"] == 0 and sent["calls"] == len(SPANS) * 12 * 4 * 15
        check(blocks, some_work())
        assert blocks.status().retries == 0
        assert cache_in_use(swarm) == 0


def test_no_lanes_are_used_where_they_are_not_to_be(shared, sent):
    with connected(shared, lanes="never") as blocks:
        check(blocks, some_work())
    assert sent["lanes"] == sent["proofs"] == 0


def test_a_share_of_the_cache_stays_for_others(shared, monkeypatch):
    """Keys and values as the server counts them: 16,384 tokens of each of two blocks, of which a lane takes 4 x 15."""
    most = []
    opened = SessionCache.on_opened

    def noted(cache, need):
        opened(cache, need)
        most.append(cache.held)

    monkeypatch.setattr(SessionCache, "on_opened", noted)
    with connected(shared, cache_share=0.0125) as blocks:
        stream(blocks, some_work(40))
    assert max(most) == 3 * 60 * 2


def test_a_server_whose_first_answer_after_going_back_is_wrong_is_not_used_for_lanes(shared, sent):
    """The trial of its sessions passes: what it does wrong begins later. Nothing of it counts."""
    with connected(shared) as blocks:
        shared.servers[1].switch(WrongRollBack(after=1))
        answers = check(blocks, some_work(20))
        assert sent["calls"] > 0
        status = blocks.status()
        assert status.findings == ()
        (notice,) = status.notices
        assert short_peer(shared.servers[1].peer_id) in notice and "do not go back" in notice
        before = sent["lanes"]
        check(blocks, some_work(8))
        assert sent["lanes"] == before
        assert len(answers) == 20
    shared.servers[1].switch()


@pytest.mark.soak
def test_a_server_whose_roll_back_lies_later_is_found_out_and_named(model):
    """A share of what lanes answer is asked once more in a forward call."""
    with started(model, REPLICAS) as swarm, connected(swarm, verify=0.3) as blocks:
        swarm.servers[1].switch(WrongRollBack(after=8))
        for at in range(8):
            stream(blocks, some_work(20, root=Prefix(hidden(1, 9, seed=100 + at))))
            blocks.settle()
            if blocks.status().findings:
                break
        (finding,) = blocks.status().findings
        assert finding.server.peer_id == swarm.servers[1].peer_id and finding.status == "wrong"
        check(blocks, some_work(8))


def test_a_server_that_dies_loses_no_micro_batch(model):
    work = some_work(60)
    with started(model, REPLICAS) as swarm, connected(swarm) as blocks:
        answers = {}
        for computed in blocks.stream(iter(work)):
            assert computed.tag not in answers
            answers[computed.tag] = computed
            if len(answers) == 10:
                victim = computed.hops[1].peer_id
                next(each for each in swarm.servers if each.peer_id == victim).kill()
        assert len(answers) == 60
        for each in work[::5]:
            found, wanted = answers[each.tag].hidden, expected(blocks, each)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
        until(lambda: cache_in_use(swarm) == 0, 5.0)


@pytest.mark.soak
def test_a_server_that_hangs_in_a_lane_gives_way_to_forward_calls(shared, monkeypatch):
    monkeypatch.setattr(LanePolicy, "min_patience", 0.5)
    monkeypatch.setattr(LanePolicy, "patience", 0.5)
    work = some_work(30)
    with connected(shared, request_timeout=6.0, deadline=60.0) as blocks:
        stream(blocks, work[:6])
        shared.servers[1].switch(Hang(at_most=1))
        started = time.monotonic()
        check(blocks, work)
        assert time.monotonic() - started < 40
        assert blocks.status().findings == ()
    shared.servers[1].switch()


@pytest.mark.soak
def test_lanes_that_servers_have_ended_are_opened_anew(model, sent):
    with started(model, step_timeout=0.4) as swarm, connected(swarm) as blocks:

        def pausing() -> Iterator[Work]:
            for each in some_work(8):
                if each.tag == 4:
                    until(lambda: cache_in_use(swarm) == 0, 5.0)
                yield each

        answers = {computed.tag: computed.hidden for computed in blocks.stream(pausing())}
        assert sorted(answers) == list(range(8))
        for each in some_work(8):
            wanted = expected(blocks, each)
            torch.testing.assert_close(answers[each.tag], wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_lanes_that_nobody_uses_are_closed(shared, monkeypatch):
    monkeypatch.setattr(LanePolicy, "idle", 0.3)
    with connected(shared) as blocks:

        def pausing() -> Iterator[Work]:
            for each in some_work(8):
                if each.tag == 4:
                    until(lambda: cache_in_use(shared) == 0, 5.0)
                yield each

        assert len(list(blocks.stream(pausing()))) == 8
        assert blocks.status().retries == 0


def test_leaving_a_stream_frees_every_cache(shared):
    with connected(shared) as blocks:
        answers = blocks.stream(iter(some_work(50)))
        next(answers)
        assert cache_in_use(shared) > 0
        answers.close()
        until(lambda: cache_in_use(shared) == 0, 5.0)
        until(lambda: not any(peer.cache.held for peer in blocks.peers.values()), 5.0)


@pytest.mark.soak
def test_longer_rows_take_the_place_of_lanes_that_are_too_short(model, sent):
    root = Prefix(hidden(1, 9))
    short, long = some_work(6, positions=2, root=root), some_work(6, positions=20, root=root)
    long = [Work(each.tag + 6, each.hidden, None, root, each.lane) for each in long]
    with started(model, attn_cache_tokens=512) as swarm, connected(swarm, cache_share=0.5) as blocks:
        check(blocks, [*short, *long])
    assert sent["lanes"] > 0


def drawn_work(draws: Random) -> list[Work]:
    """Micro-batches after a random tree of prefixes: roots with deep prompts or without, and up to three levels."""
    work: list[Work] = []

    def tensor(rows: int, positions: int) -> torch.Tensor:
        return hidden(rows, positions, seed=draws.randrange(1 << 30))

    for _ in range(draws.randrange(1, 3)):
        prompts = deep_prompts(draws.randrange(1, 3)) if draws.random() < 0.5 else None
        root = Prefix(tensor(1, draws.randrange(2, 12)), None, prompts)
        for _ in range(draws.randrange(1, 4)):
            rows, prefix = draws.randrange(1, 5), root
            for _ in range(draws.randrange(0, 3)):
                prefix = Prefix(tensor(draws.choice((1, rows)), draws.randrange(1, 6)), prefix)
            for _ in range(draws.randrange(1, 5)):
                states = tensor(rows, draws.randrange(1, 8))
                work.append(Work(len(work), states, None, prefix, LaneSize(4, 12 + 10 + 8)))
    draws.shuffle(work)
    return work


@pytest.mark.sample(1)
@pytest.mark.parametrize("seed", range(30))
def test_any_tree_of_prefixes_in_any_order_gives_what_forward_calls_give(shared, seed, sent):
    draws = Random(seed)
    with connected(shared, cache_share=draws.choice((0.02, 0.25, 1.0)), verify=draws.choice((0, 0.5))) as blocks:
        check(blocks, drawn_work(draws))
        blocks.settle()
        assert blocks.status().findings == () and blocks.status().notices == ()
    until(lambda: cache_in_use(shared) == 0, 5.0)
