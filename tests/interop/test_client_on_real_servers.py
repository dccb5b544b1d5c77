"""Our client on real Petals servers: what it computes through them is what Hugging Face computes here."""

import pytest
import torch

import petals_eval
from petals_eval.data import load_rows
from petals_eval.local_swarm import LocalSwarm
from petals_eval.model import Adapter, load_adapter
from petals_eval.tasks import load_task, resolve_source
from tests.interop.conftest import BOUNDED, STORIES, in_one_call
from tests.interop.petals_folders import block_states, petals_copy
from tests.interop.real_petals import RealPetalsSwarm, run_petals_loop
from tests.model.reference import causal_lm, local_answers
from tests.support.real_swarm import connect
from tests.support.tensors import close


def remote_model(swarm, model_dir, adapter=None):
    return petals_eval.RemoteModel.from_pretrained(
        str(model_dir), initial_peers=swarm.initial_peers, dht_prefix=STORIES, adapter=adapter, **BOUNDED
    )


def some_tokens(rows: int, seq: int) -> torch.Tensor:
    return torch.randint(3, 320, (rows, seq), generator=torch.Generator().manual_seed(rows * seq))


def some_prompts(blocks: int, hidden: int, rows: int = 1) -> torch.Tensor:
    return 0.5 * torch.randn(blocks, rows, 4, hidden, generator=torch.Generator().manual_seed(1))


def trec(realdata):
    task = load_task("trec")
    return task, load_rows(resolve_source(task, realdata / "trec" / "TREC.test.all"))


def trec_requests(realdata, model) -> list:
    task, rows = trec(realdata)
    return [request for example in task.examples(rows, model.local.tokenizer) for request in example.requests]


def reference_logits(model, stories_dir, adapter: Adapter, requests) -> dict[str, torch.Tensor]:
    """By the local parts and Hugging Face's blocks, one unpadded text at a time."""
    blocks = causal_lm(stories_dir)
    return {request.key: local_answers(blocks, model.local, adapter, [request])[0] for request in requests}


@pytest.mark.parametrize("prompted", [False, True], ids=["plain", "deep prompts"])
@pytest.mark.parametrize(
    ("rows", "seq", "call"), [(3, 17, "rpc_forward"), (4, 300, "rpc_forward_stream")], ids=["unary", "stream"]
)
def test_tiny_families_on_overlapping_spans(tiny, rows, seq, call, prompted):
    input_ids = some_tokens(rows, seq)
    prompts = some_prompts(3, 256) if prompted else None
    entering, *_, leaving = block_states(tiny.model_dir, input_ids, prompts)
    with connect(tiny, **BOUNDED) as connection:
        hidden = in_one_call(connection.remote_sequential(tiny.dht_prefix, 3), entering, prompts)
    assert close(hidden, leaving, 1e-5)
    assert any(f"{call}(" in server.log() for server in tiny.servers)


def test_slices_and_prompts_of_their_own_for_every_row(stories, stories_dir):
    input_ids = some_tokens(3, 40)
    prompts = some_prompts(5, 64, rows=3)
    each = [block_states(stories_dir, input_ids[row : row + 1], prompts[:, row : row + 1]) for row in range(3)]
    entering, after_three, leaving = (torch.cat([states[index] for states in each]) for index in (0, 3, 5))
    with connect(stories, **BOUNDED) as connection:
        blocks = connection.remote_sequential(STORIES, 5)
        torch.testing.assert_close(blocks(entering, prompts), leaving, rtol=0, atol=1e-4)
        # Inside the second server's span.
        torch.testing.assert_close(blocks[:3](entering, prompts[:3]), after_three, rtol=0, atol=1e-4)
        torch.testing.assert_close(blocks[3:](after_three, prompts[3:]), leaving, rtol=0, atol=1e-4)


def test_a_call_over_one_mebibyte_to_a_grouped_query_model(stories, stories_dir):
    """A Llama with grouped queries takes 8,192 tokens a call."""
    input_ids = some_tokens(16, 300)
    entering, *_, leaving = block_states(stories_dir, input_ids)
    with connect(stories, max_tokens_per_call=8192, **BOUNDED) as connection:
        hidden = in_one_call(connection.remote_sequential(STORIES, 5), entering)
    torch.testing.assert_close(hidden, leaving, rtol=0, atol=1e-4)
    assert all("rpc_forward_stream(" in server.log() for server in stories.servers)


@pytest.mark.parametrize(("mode", "accuracy"), [("deep_ptune", 0.7360), ("ptune", 0.7180)])
def test_trec(stories, stories_dir, realdata, tmp_path, mode, accuracy):
    """The known accuracy, and the logits of the local forward and of the loop that Petals' own users run."""
    adapter_dir = realdata / "adapters" / f"trec-{mode}"
    task, rows = trec(realdata)
    with remote_model(stories, stories_dir, adapter=str(adapter_dir)) as model:
        result = petals_eval.evaluate(model, task=task, data=realdata / "trec" / "TREC.test.all")
        requests = trec_requests(realdata, model)
        (adapter,) = model.adapters
        remote = {answered.request.key: answered.answer for answered in model.compute(requests, adapter)}
        local = reference_logits(model, stories_dir, adapter, requests)
    theirs = run_petals_loop(
        {
            "model": str(petals_copy(stories_dir, tmp_path / "model")),
            "initial_peers": stories.initial_peers,
            "dht_prefix": STORIES,
            "adapter": str(adapter_dir / "petals_state_dict.pt"),
            "tuning_mode": mode,
            "texts": [row.columns["text"] for row in rows],
            "padding": "longest",
        },
        tmp_path,
    )
    assert result.metrics["accuracy"].value == accuracy
    for request, logits in zip(requests, theirs["logits"], strict=True):
        torch.testing.assert_close(remote[request.key], local[request.key], rtol=0, atol=1e-4)
        torch.testing.assert_close(remote[request.key], torch.tensor(logits), rtol=0, atol=1e-4)


def test_bfloat16_servers(stories_dir, realdata, tmp_path):
    """They are spoken to in their own dtype, and the answer is that of Petals' own client."""
    adapter_dir = realdata / "adapters" / "trec-deep_ptune"
    with RealPetalsSwarm(stories_dir, [(0, 3), (3, 5)], dht_prefix=STORIES, dtype="bfloat16") as swarm:
        with remote_model(swarm, stories_dir, adapter=str(adapter_dir)) as model:
            requests = trec_requests(realdata, model)[:64]
            (adapter,) = model.adapters
            answered = list(model.compute(requests, adapter))
            local = reference_logits(model, stories_dir, adapter, requests)
        theirs = run_petals_loop(
            {
                "model": str(petals_copy(stories_dir, tmp_path / "model")),
                "initial_peers": swarm.initial_peers,
                "dht_prefix": STORIES,
                "adapter": str(adapter_dir / "petals_state_dict.pt"),
                "tuning_mode": "deep_ptune",
                "texts": [row.columns["text"] for row in list(trec(realdata)[1])[:64]],
                "padding": "longest",
            },
            tmp_path,
        )
    remote = {answer.request.key: answer.answer for answer in answered}
    largest = max(float(logits.abs().max()) for logits in local.values())
    for request, logits in zip(requests, theirs["logits"], strict=True):
        assert float((remote[request.key] - local[request.key]).abs().max()) < 5e-2 * largest
        assert float((remote[request.key] - torch.tensor(logits)).abs().max()) < 2e-2 * largest


def test_real_servers_and_the_stub_in_one_swarm(stories_dir):
    entering, *_, leaving = block_states(stories_dir, some_tokens(4, 50))
    with (
        LocalSwarm(stories_dir, spans=[(2, 4)], dht_prefix=STORIES, mode="thread") as stub,
        RealPetalsSwarm(stories_dir, [(0, 2), (4, 5)], dht_prefix=STORIES, initial_peers=stub.initial_peers) as swarm,
        connect(swarm, **BOUNDED) as connection,
    ):
        blocks = connection.remote_sequential(STORIES, 5)
        hidden = blocks(entering)
        used = set(blocks.status().servers)
    torch.testing.assert_close(hidden, leaving, rtol=0, atol=1e-4)
    assert used == {*(server.peer_id for server in stub.servers), *(server.peer_id for server in swarm.servers)}


def test_a_server_killed_in_mid_run_changes_no_answer(stories_dir, realdata):
    with (
        RealPetalsSwarm(stories_dir, [(0, 3), (3, 5), (3, 5)], dht_prefix=STORIES) as swarm,
        remote_model(swarm, stories_dir) as model,
    ):
        adapter = load_adapter(
            str(realdata / "adapters" / "trec-deep_ptune"), family=model.local.family, config=model.local.config
        )
        requests = trec_requests(realdata, model)
        remote, victim = {}, None
        for answered in model.compute(requests, adapter, tokens_per_micro_batch=256):
            remote[answered.request.key] = answered.answer
            if len(remote) == 50:
                victim = next(server for server in swarm.servers if server.peer_id == answered.hops[-1].peer_id)
                victim.kill()
        local = reference_logits(model, stories_dir, adapter, requests)
        retries = model.blocks.status().retries
    assert victim is not None and retries > 0
    for request in requests:
        torch.testing.assert_close(remote[request.key], local[request.key], rtol=0, atol=1e-4)
