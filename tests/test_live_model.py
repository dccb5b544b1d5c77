"""Live models by their structure alone: that of DRIFT's client, on today's transformers, held against Hugging Face."""

import pytest
import torch

import petals_eval
from petals_eval import live_model
from petals_eval.errors import ConfigError, MissingBlocksError
from petals_eval.local_swarm import LocalSwarm
from petals_eval.tasks.requests import Request
from tests.model.reference import PREFIX, TOKENS, classifier, full_logits
from tests.support import live_models
from tests.support.tensors import close
from tests.support.tiny_models import make_tiny

BLOCKS, LABELS = 4, 3
TEXTS = (TOKENS, TOKENS[:3])


@pytest.fixture(scope="module", params=["qwen3", "bloom"])
def served(request, tmp_path_factory):
    """A model with a trained head, its folder's name and its swarm, announced as DRIFT's servers do."""
    folder = make_tiny(request.param, tmp_path_factory.mktemp("models") / "tiny", blocks=BLOCKS, labels=LABELS)
    options = {"dht_prefix": "tiny", "index_key": "_drift.models", "mode": "thread"}
    with LocalSwarm(folder, spans=[(0, 1), (1, 4)], **options) as swarm:
        yield folder, swarm


def live(folder, swarm, **client):
    given = {"initial_peers": swarm.initial_peers, "dht_prefix": "tiny", "pre_seq_len": PREFIX}
    return live_models.live_model(folder, labels=LABELS, **given, **client)


@pytest.mark.parametrize("mode", [None, "deep_ptune"])
def test_answers_are_those_of_hugging_faces_own_model(served, mode):
    folder, swarm = served
    model = live(folder, swarm, tuning_mode=mode).train()
    requests = [Request(str(index), 0, text) for index, text in enumerate(TEXTS)]
    whole = classifier(folder)
    with live_model.opened(model) as remote:
        [adapter] = remote.adapters or [None]
        for each in remote.compute(requests, adapter):
            assert close(each.answer, full_logits(whole, remote.local, adapter, each.request.input_ids))
    assert (adapter is None) == (mode is None)
    assert model.training and model.transformer.ln_f.training
    assert mode is None or model.transformer.prefix_tokens.is_meta, "it stays as it was"
    live_model.close(model)


def test_a_task_is_evaluated_with_the_prompts_of_the_moment(served):
    folder, swarm = served
    model = live(folder, swarm, tuning_mode="ptune")
    rows = [{"text": text, "label": index % LABELS} for index, text in enumerate(["good", "the bad", "no yes"])]
    task = petals_eval.ClassificationTask(name="own", text="{text}", label_column="label", label_names=("a", "b", "c"))
    before = petals_eval.evaluate(model, task=task, data=rows)
    with torch.no_grad():
        model.transformer.prompt_embeddings.weight += 1
    after = petals_eval.evaluate(model, task=task, data=rows)
    assert len(before.predictions) == 3
    assert before.predictions != after.predictions

    model.config.dht_prefix = "wrong"
    with pytest.raises(MissingBlocksError, match=r"announced here: tiny \(4 blocks\)"):
        petals_eval.evaluate(model, task=task, data=rows)
    model.config.dht_prefix = None
    with pytest.raises(ConfigError, match="the model's config has no dht_prefix"):
        petals_eval.evaluate(model, task=task, data=rows)


def test_a_model_of_hugging_face_is_none(served):
    folder, _ = served
    model = classifier(folder)
    assert not live_model.is_petals_model(model)
    with pytest.raises(ConfigError, match=r"a Petals model with a head, such as .*; found transformers\."):
        live_model.connect(model)
