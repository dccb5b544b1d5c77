"""A run of each newer family, from the command and from Python, gives the numbers of Hugging Face's own forward."""

import json

import pytest
import torch

import petals_eval
from petals_eval.local_swarm import LocalSwarm
from petals_eval.model import LocalModel, load_adapter
from tests.cli.invoking import invoke
from tests.model.reference import causal_lm, classifier, full_logits
from tests.support.real_swarm import predictions
from tests.support.tiny_models import make_tiny

BLOCKS, PREFIX, LABELS = 4, 4, 2
SPANS = [(0, 1), (1, 3), (3, 4)]
ROWS = [{"text": text, "label": index % 2} for index, text in enumerate(("good", "it is bad", "yes it is great", "no"))]
WORDS = ["no", "yes"]


def saved_prompts(folder, hidden):
    """Deep prompts as Petals saves them; the head is the model's own."""
    draws = torch.Generator().manual_seed(1)
    state = {
        "model.prompt_embeddings.weight": 0.5 * torch.randn(PREFIX, hidden, generator=draws),
        "model.intermediate_prompt_embeddings.weight": 0.5 * torch.randn(PREFIX, BLOCKS * hidden, generator=draws),
    }
    torch.save(state, folder / "prompts.pt")
    return folder / "prompts.pt"


@pytest.mark.sample(2)
@pytest.mark.parametrize("family", ("gemma2", "gemma3_text", "phi3", "olmo2", "deepseek_v3"))
def test_a_run_of_each_newer_family(family, tmp_path):
    folder = make_tiny(family, tmp_path / "tiny", blocks=BLOCKS, labels=LABELS, tied=True)
    local = LocalModel.from_pretrained(folder)
    prompts = saved_prompts(tmp_path, local.hidden_size)
    adapter = load_adapter(prompts, family=local.family, config=local.config)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "task.yaml").write_text('text: "{text}"\nlabel_column: label\nlabel_names: [bad, good]\n')

    with LocalSwarm(folder, spans=SPANS, mode="thread", dht_prefix="tiny") as swarm:
        swarm_options = ("--initial-peers", *swarm.initial_peers, "--dht-prefix", "tiny")
        task_options = ("--task", tmp_path / "task.yaml", "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "run")
        assert invoke("run", "--model", folder, "--adapter", prompts, *task_options, *swarm_options).code == 0
        with petals_eval.RemoteModel.from_pretrained(
            folder, adapter=prompts, initial_peers=swarm.initial_peers, dht_prefix="tiny"
        ) as model:
            words = {"kind": "choice", "text": "{text}", "choices": WORDS, "label_column": "label"}
            petals_eval.evaluate(model, task=words, data=ROWS, out=tmp_path / "words")

    texts = [tuple(local.tokenizer.encode(row["text"])) for row in ROWS]
    for line, tokens in zip(predictions(tmp_path / "run"), texts, strict=True):
        expected = full_logits(classifier(folder), local, adapter, tokens).softmax(-1)
        assert line["probabilities"] == pytest.approx(expected.tolist(), rel=1e-3)
    asked = [local.tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in WORDS]
    for line, tokens in zip(predictions(tmp_path / "words"), texts, strict=True):
        expected = full_logits(causal_lm(folder), local, adapter, tokens)[-1].log_softmax(-1)[asked]
        assert line["log_likelihood"] == pytest.approx(expected.tolist(), abs=1e-4)
