"""Generated texts over a real swarm on loopback are Hugging Face's own, in sessions and by a forward call a token."""

import dataclasses
import inspect
import time

import pytest
import torch

from petals_eval import RemoteModel
from petals_eval.errors import DeadlineError, RequestTooLargeError
from petals_eval.generation.engine import GenerationPolicy
from petals_eval.local_swarm import LocalSwarm
from petals_eval.local_swarm.faults.catalog import OtherLayout, Slow
from petals_eval.local_swarm.server.cache_budget import CacheBudget
from petals_eval.model import load_adapter
from petals_eval.swarm import RemoteSequential
from petals_eval.tasks.requests import Decoding, Request
from tests.model.reference import causal_lm, deep_prompts_added
from tests.support.waiting import until

SPANS = [(0, 2), (2, 5)]
NEW = 24
TEXTS = (
    "Once upon a time",
    "Lily and Tom went to the park. They saw a big dog and",
    "The",
    "One day, a little girl named Sue found a box. She wanted to open it, but it was very heavy. Her mom said",
)
ADAPTERS = (None, "trec-ptune", "trec-deep_ptune")


@pytest.fixture(scope="module")
def folder(realdata):
    return realdata / "stories260K-hf"


@pytest.fixture(scope="module")
def swarm(folder):
    with LocalSwarm(folder, spans=SPANS, mode="thread") as running:
        yield running


@pytest.fixture(scope="module")
def model(swarm):
    with connected(swarm) as remote:
        yield remote


@pytest.fixture(scope="module")
def whole(folder):
    return causal_lm(folder)


@pytest.fixture
def without_sessions(swarm):
    """The servers open none that this client can use, and compute all the same."""
    for server in swarm.servers:
        server.switch(OtherLayout())
    yield
    for server in swarm.servers:
        server.switch()


def connected(swarm, **settings):
    quick = {"min_backoff": 0.05, "max_backoff": 0.2, "missing_update_period": 0.2, "deadline": 20.0, "verify": 0}
    return RemoteModel.from_pretrained(
        swarm.model, initial_peers=swarm.initial_peers, dht_prefix=swarm.dht_prefix, **{**quick, **settings}
    )


def requests(model, texts=TEXTS, **decoding) -> list[Request]:
    how = Decoding(**{"max_new_tokens": NEW, **decoding})
    encoded = model.local.tokenizer(list(texts))["input_ids"]
    return [Request(str(index), 0, tuple(ids), decoding=how) for index, ids in enumerate(encoded)]


def generated(model, asked, adapter=None, **options):
    """The answers by key."""
    return {each.request.key: each for each in model.generate(asked, adapter, **options)}


def texts_of(answers) -> dict[str, str]:
    return {key: each.answer.text for key, each in answers.items()}


def adapter_of(model, realdata, name):
    if name is None:
        return None
    place = str(realdata / "adapters" / name)
    return load_adapter(place, family=model.local.family, config=model.local.config)


@torch.no_grad()
def expected_text(whole, model, adapter, request) -> str:
    """Hugging Face's own generate; with prompts its own forward of the whole text, token after token."""
    tokenizer, ids = model.local.tokenizer, list(request.input_ids)
    if adapter is None:
        found = whole.generate(torch.tensor([ids]), max_new_tokens=request.new_tokens, do_sample=False)[0].tolist()
        return tokenizer.decode(found[len(ids) :], skip_special_tokens=True)
    new: list[int] = []
    for _ in range(request.new_tokens):
        hidden = whole.get_input_embeddings()(torch.tensor([ids + new]))
        hidden = torch.cat([adapter.prompts[None], hidden], dim=1)
        with deep_prompts_added(whole, model.local, adapter):
            new.append(int(whole(inputs_embeds=hidden).logits[0, -1].argmax()))
    return tokenizer.decode(new, skip_special_tokens=True)


def budget_of(server) -> CacheBudget:
    """The room for caches of a server in this process."""
    return server._server.budget


def cache_in_use(swarm) -> int:
    return sum(budget_of(server).used_bytes for server in swarm.servers if server.is_alive())


@pytest.mark.parametrize("name", ADAPTERS)
def test_greedy_texts_in_sessions_are_hugging_faces(name, model, swarm, realdata, whole, monkeypatch):
    monkeypatch.setattr(model, "_stream", lambda *arguments: pytest.fail("by a forward call"))
    adapter = adapter_of(model, realdata, name)
    asked = requests(model)
    answers = generated(model, asked, adapter)
    assert texts_of(answers) == {each.key: expected_text(whole, model, adapter, each) for each in asked}
    assert all([str(hop.span) for hop in each.hops] == ["0:2", "2:5"] for each in answers.values())
    until(lambda: cache_in_use(swarm) == 0, 5.0)


@pytest.mark.parametrize("name", ADAPTERS)
def test_greedy_texts_by_forward_calls_are_hugging_faces_and_their_cost_is_said_first(
    name, swarm, realdata, whole, without_sessions
):
    said: list[tuple[str, int]] = []
    with connected(swarm) as model:
        adapter = adapter_of(model, realdata, name)
        asked = requests(model)

        def note(line: str) -> None:
            said.append((line, sum(peer.tokens for peer in model.blocks.peers.values())))

        answers = generated(model, asked, adapter, on_notice=note)
    assert texts_of(answers) == {each.key: expected_text(whole, model, adapter, each) for each in asked}
    assert all([str(hop.span) for hop in each.hops] == ["0:2", "2:5"] for each in answers.values())
    [(line, sent_before)] = said
    longest = max(len(each.input_ids) for each in asked) + (0 if adapter is None else adapter.prefix_length)
    assert f"up to {NEW * longest + NEW * (NEW - 1) // 2:,} positions" in line
    cost = f"in a session it would be {longest + NEW - 1:,}"
    assert cost in line and line.index(cost) < line.index("no session"), "what is shown of a long line is its beginning"
    assert "opens a session for this client" in line
    assert sent_before == 0


def test_rows_whose_length_forbids_steps_are_generated_by_forward_calls(swarm, whole):
    """As where rotary angles go by the length of a call."""
    notices: list[str] = []
    with connected(swarm) as model:
        asked = requests(model)
        model.blocks.limit_steps(len(asked[0].input_ids) + NEW)
        answers = generated(model, asked, on_notice=notices.append)
    assert texts_of(answers) == {each.key: expected_text(whole, model, None, each) for each in asked}
    assert len(notices) == 1 and "rotary embeddings" in notices[0]


def test_as_many_rows_grow_at_once_as_the_settings_say_and_sampled_texts_do_not_depend_on_it(swarm):
    sampling = {"temperature": 1.0, "top_p": 0.95, "seed": 7}
    found, at_once = {}, {}
    for rows in (1, 3):
        with connected(swarm, generation_rows=rows) as model:
            most = 0

            def look(model=model):
                nonlocal most
                most = max(most, *(peer.cache._open_sessions for peer in model.blocks.peers.values()), 0)

            asked = requests(model, TEXTS * 2, **sampling)
            found[rows] = texts_of(generated(model, asked if rows == 1 else reversed(asked), on_tick=look))
            at_once[rows] = most
    assert found[1] == found[3]
    assert at_once[1] <= 1 and 1 < at_once[3] <= 3
    assert len(set(found[1].values())) > len(TEXTS), "one text twice is drawn twice"


def test_sampled_texts_by_forward_calls_are_those_of_sessions(model, swarm, without_sessions):
    sampling = {"temperature": 1.0, "seed": 3}
    with connected(swarm) as other:
        by_calls = texts_of(generated(other, requests(other, **sampling)))
    for server in swarm.servers:
        server.switch()
    assert texts_of(generated(model, requests(model, **sampling))) == by_calls


def test_stop_sequences_and_lengths(model):
    asked = requests(model, max_new_tokens=60)
    free = texts_of(generated(model, asked))
    stop = (". ", "\n")
    answers = generated(model, requests(model, max_new_tokens=60, stop=stop))
    for key, each in answers.items():
        cut = min(len(free[key]), *(at for mark in stop if (at := free[key].find(mark)) >= 0))
        assert each.answer.text == free[key][:cut]
        assert each.answer.finish == ("length" if cut == len(free[key]) else "stop")
    assert {each.answer.finish for each in answers.values()} >= {"stop"}
    assert max(len(each.answer.token_ids) for each in answers.values()) <= 60


def test_a_session_reserves_what_the_text_may_come_to_and_no_more(model, monkeypatch):
    lengths = []
    session = model.blocks.inference_session
    monkeypatch.setattr(model.blocks, "inference_session", lambda length: lengths.append(length) or session(length))
    asked = requests(model)
    generated(model, asked)
    assert sorted(lengths) == sorted(len(each.input_ids) + NEW - 1 for each in asked)


def test_a_row_beyond_the_context_fails_with_the_numbers_and_the_others_go_on(model):
    asked = requests(model, TEXTS[:2])
    asked[0] = dataclasses.replace(asked[0], decoding=Decoding(600))
    failures = []
    answers = generated(model, asked, on_failed=lambda request, error: failures.append((request.key, error)))
    assert list(answers) == ["1"]
    [(key, error)] = failures
    room = 512 - len(asked[0].input_ids) + 1
    assert key == "0" and f"of text and 600 new ones come to {len(asked[0].input_ids) + 599} positions" in str(error)
    assert f"Lower max_new_tokens to {room}" in str(error)
    with pytest.raises(RequestTooLargeError):
        generated(model, asked)
    fitting = dataclasses.replace(asked[0], decoding=Decoding(room, stop=(".",)))
    assert generated(model, [fitting])["0"].answer.text


def test_a_server_that_dies_in_mid_generation_is_replaced_and_the_texts_are_the_same(folder, whole):
    with (
        LocalSwarm(folder, spans=[(0, 3), (0, 3), (3, 5)], mode="thread", faults=(Slow(delay=0.02),)) as swarm,
        connected(swarm) as model,
    ):
        asked, killed = requests(model), []

        def kill_the_busy_one() -> None:
            if not killed:
                for server in swarm.servers[:2]:
                    peer = model.blocks.peers.get(server.peer_id)
                    if peer is not None and peer.cache.held and peer.calls > 15:
                        server.kill()
                        killed.append(server.peer_id)
                        return

        answers = generated(model, asked, on_tick=kill_the_busy_one)
        assert killed, "it was over before a server was killed"
        assert texts_of(answers) == {each.key: expected_text(whole, model, None, each) for each in asked}
        replaced = [each for each in answers.values() if killed[0] in {hop.peer_id for hop in each.hops}]
        assert any(len({hop.peer_id for hop in each.hops}) == 3 for each in replaced), "both that computed a part of it"
        assert model.blocks.status().retries > 0


def test_without_room_in_the_caches_rows_go_on_by_calls_and_later_rows_take_sessions_again(folder, whole, monkeypatch):
    """Somebody else holds the whole cache for a while."""
    monkeypatch.setattr(GenerationPolicy, "patience", 2.0)
    monkeypatch.setattr(GenerationPolicy, "rest", 0.5)
    options = {"inference_max_length": 128, "attn_cache_tokens": 128}
    notices: list[str] = []
    with (
        LocalSwarm(folder, spans=[(0, 5)], mode="thread", **options) as swarm,
        connected(swarm) as model,
        connected(swarm) as other,
    ):
        other_session = other.blocks.inference_session(128)
        other_session.step(torch.zeros(1, 1, 64))
        asked = requests(model, TEXTS * 2)
        answers = {}
        for answer in model.generate(asked, on_notice=notices.append):
            answers[answer.request.key] = answer
            if other_session is not None:
                other_session.close()
                other_session = None
                time.sleep(GenerationPolicy.rest)
        assert texts_of(answers) == {each.key: expected_text(whole, model, None, each) for each in asked}
        assert len(notices) == 1 and "none within 2 s" in notices[0] and "room" in notices[0]
        assert model.blocks.peers[swarm.servers[0].peer_id].cache.held == 0
        until(lambda: cache_in_use(swarm) == 0, 5.0)


def test_our_sessions_leave_others_half_of_a_cache(folder):
    """Room for four of these texts: two at most are in sessions at once."""
    positions = 64
    options = {"inference_max_length": positions, "attn_cache_tokens": 4 * positions}
    with LocalSwarm(folder, spans=[(0, 5)], mode="thread", **options) as swarm, connected(swarm) as model:
        asked = requests(model, [TEXTS[0]] * 8)
        new = positions - len(asked[0].input_ids) + 1
        most: list[int] = []
        generated(
            model,
            [dataclasses.replace(each, decoding=Decoding(new)) for each in asked],
            on_tick=lambda: most.append(cache_in_use(swarm)),
        )
        total = budget_of(swarm.servers[0]).total_bytes
        assert 0 < max(most) <= total // 2
        until(lambda: cache_in_use(swarm) == 0, 5.0)


def test_whatever_ends_it_no_session_stays_open(model, swarm):
    answers = model.generate(requests(model, TEXTS * 3, max_new_tokens=60))
    next(answers)
    assert cache_in_use(swarm) > 0
    answers.close()
    until(lambda: cache_in_use(swarm) == 0, 5.0)


@pytest.mark.parametrize("way", ["generate", "compute"])
def test_what_is_in_flight_ends_with_it_even_where_somebody_holds_the_stream(way, swarm, without_sessions, monkeypatch):
    held = []
    stream = RemoteSequential.stream

    def holding(*arguments, **options):
        held.append(stream(*arguments, **options))
        return held[-1]

    monkeypatch.setattr(RemoteSequential, "stream", holding)
    with connected(swarm) as model:
        asked = requests(model, max_new_tokens=2)
        if way == "compute":
            asked = [dataclasses.replace(each, decoding=None, targets=((0, 1),)) for each in asked]
        answers = getattr(model, way)(asked)
        next(answers)
        answers.close()
        assert {inspect.getgeneratorstate(each) for each in held} == {inspect.GEN_CLOSED}


def test_without_a_server_it_ends_at_the_deadline(folder):
    with LocalSwarm(folder, spans=SPANS, mode="thread") as swarm, connected(swarm, deadline=1.0) as model:
        swarm.servers[1].kill()
        with pytest.raises(DeadlineError, match="blocks 2:5"):
            generated(model, requests(model, TEXTS[:1]))
