"""Our inference sessions on real servers: long inputs in steps, and rolling back where Petals 2.2.0 ignores it."""

import time

import pytest
import torch

import petals_eval
from petals_eval.errors import RequestTooLargeError
from petals_eval.swarm.transport.rolling_back import proves_rolling_back
from petals_eval.tasks.requests import Request
from tests.interop.petals_folders import block_states, make_petals_tiny
from tests.interop.real_petals import RealPetalsSwarm
from tests.model.reference import classifier, full_logits, make_adapter
from tests.support.real_swarm import connect

BLOCKS, HIDDEN, PREFIX, LABELS = 3, 32, 4, 6
TINY = "tiny-long"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama with a context of 8,192 tokens and a trained head."""
    return make_petals_tiny(
        "llama", tmp_path_factory.mktemp("long") / "llama", labels=LABELS, max_position_embeddings=8192
    )


@pytest.fixture(scope="module")
def swarm(folder):
    limits = {"max_batch_size": 2048, "inference_max_length": 4096}
    with RealPetalsSwarm(folder, [(0, 2), (2, 3)], dht_prefix=TINY, **limits) as running:
        yield running


@pytest.fixture(scope="module")
def blocks(swarm):
    with connect(swarm, deadline=60) as connection:
        yield connection.remote_sequential(TINY, BLOCKS)


def some_tokens(rows: int, seq: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 320, (rows, seq), generator=torch.Generator().manual_seed(seed))


def deep_prompts(rows: int = 1) -> torch.Tensor:
    return 0.5 * torch.randn(BLOCKS, rows, PREFIX, HIDDEN, generator=torch.Generator().manual_seed(1))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["none", "deep_ptune"])
def test_3000_tokens_give_the_local_logits(swarm, folder, kind):
    """More than the batch limit of 2,048, within the cache of 4,096."""
    tokens = tuple(some_tokens(1, 3000)[0].tolist())
    positions = (0, 1, 2040, 2047, 2048, 2049, 2998)
    with petals_eval.RemoteModel.from_pretrained(
        str(folder), initial_peers=swarm.initial_peers, dht_prefix=TINY, deadline=60.0
    ) as model:
        adapter = make_adapter(model.local, kind, labels=LABELS)
        request = Request(key="0", part=0, input_ids=tokens)
        (answered,) = model.compute([request], adapter, tokens_per_micro_batch=4096)
        expected = full_logits(_with_head(classifier(folder), adapter), model.local, adapter, tokens)
        close(answered.answer, expected)
        assert [hop.version for hop in answered.hops] == [swarm.kind.version] * 2
        assert model.blocks.status().retries == 0
        if kind == "none":
            hidden = model.blocks(model.local.embed(torch.tensor([tokens]), None))
            close(hidden[0, list(positions)], block_states(folder, torch.tensor([tokens]))[-1][0, list(positions)])


def test_what_the_cache_does_not_hold_fails_at_once_with_both_numbers(swarm, folder):
    with petals_eval.RemoteModel.from_pretrained(
        str(folder), initial_peers=swarm.initial_peers, dht_prefix=TINY, deadline=60.0
    ) as model:
        request = Request(key="0", part=0, input_ids=tuple(some_tokens(1, 5000)[0].tolist()))
        adapter = make_adapter(model.local, "none", labels=LABELS)
        started = time.monotonic()
        with pytest.raises(
            RequestTooLargeError, match=r"holds 5000 tokens .* takes 2048 in one call .* cache for 4096 "
        ):
            list(model.compute([request], adapter, tokens_per_micro_batch=8192))
        assert time.monotonic() - started < 20
        assert model.blocks.status().retries == 0


@pytest.mark.parametrize("rows", [None, 1, 2])
def test_many_steps_are_one_forward(blocks, folder, rows):
    """Of one token and of many: Petals computes short steps another way than long ones."""
    prompts = None if rows is None else deep_prompts(rows)
    input_ids = some_tokens(2, 200)
    states = [
        block_states(folder, input_ids[row : row + 1], None if rows is None else prompts[:, row % rows][:, None])
        for row in range(2)
    ]
    entering, leaving = (torch.cat([state[index] for state in states]) for index in (0, -1))
    with blocks.inference_session(256, batch=2) as session:
        session.step(entering[:, :0])  # reserves the caches
        answers = [
            session.step(part, None if session.position else prompts)
            for part in entering.split([2, 5, 1, 150, 42], dim=1)
        ]
    close(torch.cat(answers, dim=1), leaving)


@pytest.mark.parametrize("is_believed_newer", [False, True], ids=["its version read", "its version a lie"])
def test_rolling_back_never_changes_an_answer(swarm, folder, is_believed_newer, monkeypatch):
    """2.2.0 ignores the position and appends. Its version says so; where it did not, trying it out does."""
    proofs = []

    async def prove(session, hidden_size):
        proofs.append(await proves_rolling_back(session, hidden_size))
        return proofs[-1]

    monkeypatch.setattr("petals_eval.swarm.transport.rolling_back.proves_rolling_back", prove)
    if is_believed_newer:
        monkeypatch.setattr("petals_eval.swarm.transport.rolling_back.may_roll_back", lambda version: True)
    input_ids, others = some_tokens(2, 12), some_tokens(2, 12, seed=1)
    prompts = deep_prompts()
    with connect(swarm, deadline=60) as connection:
        blocks = connection.remote_sequential(TINY, BLOCKS)
        for position in (1, 3, 6, 9, 11):
            changed = torch.cat([input_ids[:, :position], others[:, position:]], dim=1)
            entering, *_, leaving = block_states(folder, changed, prompts)
            with blocks.inference_session(64, batch=2) as session:
                first = block_states(folder, input_ids, prompts)[0]
                session.step(first[:, :7], prompts)
                session.step(first[:, 7:])
                session.position = position
                close(session.step(entering[:, position:]), leaving[:, position:])
        assert blocks.status().retries == 0
    if swarm.kind.rolls_back:
        assert proofs == [True] * 2
    else:
        assert proofs == ([False] * 2 if is_believed_newer else [])


def test_reordered_rows(blocks, folder):
    input_ids, order = some_tokens(3, 10), torch.tensor([2, 0, 0])
    entering = block_states(folder, input_ids)[0]
    *_, leaving = block_states(folder, torch.cat([input_ids[order, :6], input_ids[:, 6:]], dim=1))
    with blocks.inference_session(16, batch=3) as session:
        session.step(entering[:, :6])
        close(session.step(entering[:, 6:], hypo_ids=order), leaving[:, 6:])


def test_closing_ends_the_session_on_every_server(swarm, blocks, folder):
    def counted(word: str) -> list[int]:
        return [server.log().count(f"rpc_inference.{word}(") for server in swarm.servers]

    entering = block_states(folder, some_tokens(1, 5))[0]
    opened = counted("open")
    with blocks.inference_session(16) as session:
        session.step(entering)
        assert counted("open") == [before + 1 for before in opened]
    deadline = time.monotonic() + 10
    while counted("close") != counted("open") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert counted("close") == counted("open")


def test_a_server_killed_in_mid_session_is_replaced(swarm, blocks, folder):
    """The last test of this module, for it leaves one server fewer."""
    entering, *_, leaving = block_states(folder, some_tokens(2, 20), deep_prompts())
    swarm.add_server((2, 3))
    blocks.refresh()
    with blocks.inference_session(32, batch=2) as session:
        close(session.step(entering[:, :9], deep_prompts()), leaving[:, :9])
        next(server for server in swarm.servers if server.peer_id == session.servers[1]).kill()
        close(session.step(entering[:, 9:10]), leaving[:, 9:10])
        session.position = 7
        close(session.step(entering[:, 7:]), leaving[:, 7:])


def _with_head(model, adapter):
    model.score.weight.data = adapter.head_weight
    return model
