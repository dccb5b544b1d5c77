"""The Petals client from PyPI, unmodified but for hivemind's namespace, on our stub alone."""

import pytest
import torch

from petals_eval.local_swarm import LocalSwarm
from petals_eval.model import LocalModel, load_adapter
from tests.interop.conftest import STORIES
from tests.interop.petals_folders import petals_copy
from tests.interop.real_petals import run_petals_loop
from tests.interop.test_client_on_real_servers import reference_logits, trec, trec_requests

REFERENCE = {"trec-deep_ptune": ("deep_ptune", 368), "trec-ptune": ("ptune", 359)}


class OnlyLocal:
    """What `trec_requests` and `reference_logits` need of a model."""

    def __init__(self, folder):
        self.local = LocalModel.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def stub(stories_dir):
    with LocalSwarm(stories_dir, spans=[(0, 2), (2, 4), (4, 5)], dht_prefix=STORIES) as swarm:
        yield swarm


@pytest.fixture
def asked(stub, stories_dir, tmp_path):
    """What every question to Petals' client holds."""
    model = petals_copy(stories_dir, tmp_path / "model")
    return {"model": str(model), "initial_peers": stub.initial_peers, "dht_prefix": STORIES}


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", REFERENCE)
def test_the_evaluation_loop_of_petals_example_on_trec(asked, name, realdata, stories_dir, tmp_path):
    mode, right = REFERENCE[name]
    folder = realdata / "adapters" / name
    rows = list(trec(realdata)[1])
    adapter_file = str(folder / "petals_state_dict.pt")
    texts = [row.columns["text"] for row in rows]
    found = run_petals_loop(asked | {"adapter": adapter_file, "tuning_mode": mode, "texts": texts}, tmp_path)

    model = OnlyLocal(stories_dir)
    requests = trec_requests(realdata, model)
    adapter = load_adapter(str(folder), family=model.local.family, config=model.local.config)
    expected = reference_logits(model, stories_dir, adapter, requests[:50])
    for key, logits in expected.items():
        torch.testing.assert_close(torch.tensor(found["logits"][int(key)]), logits, rtol=0, atol=1e-4)
    labels = [int(row.columns["coarse_label"]) for row in rows]
    assert sum(one == other for one, other in zip(found["predictions"], labels, strict=True)) == right


def test_greedy_generation_gives_the_tokens_of_a_local_one(asked, stories_dir, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    start = AutoTokenizer.from_pretrained(stories_dir)("Once upon a time, there was a little")["input_ids"]
    local = AutoModelForCausalLM.from_pretrained(stories_dir).eval()
    expected = local.generate(torch.tensor([start]), max_new_tokens=60, do_sample=False)[0].tolist()
    found = run_petals_loop(asked | {"generate": start, "max_new_tokens": 60}, tmp_path)
    assert len(found["tokens"]) == len(start) + 60
    assert found["tokens"] == expected
