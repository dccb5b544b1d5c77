"""Models and adapters that gave wrong numbers without a word, and what is right for each of them.

What is right is Hugging Face's own forward of one row, by a model that was called for nothing else.
"""

import csv
import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import petals_eval
from petals_eval.errors import AdapterError, TaskError
from petals_eval.local_swarm import LocalSwarm
from petals_eval.tasks import ClassificationTask

INPUTS = Path(__file__).parent / "inputs"
DATA = INPUTS / "data" / "q6.csv"
TASK = ClassificationTask(
    name="t",
    text="{text}",
    label_column="label",
    label_names=("description", "entity", "abbreviation", "human", "location", "number"),
    max_length=96,
    metrics=("accuracy",),
)


def texts():
    with DATA.open(newline="") as file:
        return [row["text"] for row in csv.DictReader(file)]


@contextmanager
def opened(model, adapter=None, **options):
    folder = INPUTS / "models" / model
    with (
        LocalSwarm(folder, servers=1, mode="thread", dht_prefix=model) as swarm,
        petals_eval.RemoteModel.from_pretrained(
            str(folder),
            adapter=None if adapter is None else str(INPUTS / "adapters" / adapter),
            initial_peers=swarm.initial_peers,
            dht_prefix=model,
            **options,
        ) as remote,
    ):
        yield remote


def evaluated(remote, out, **options):
    """Probabilities by key, and the reason of each failure by key."""
    petals_eval.evaluate(remote, task=TASK, data=DATA, out=out, **options)
    predictions = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    failures = out / "failures.jsonl"
    failed = [json.loads(line) for line in failures.read_text().splitlines()] if failures.exists() else []
    return (
        {int(each["key"]): each["probabilities"] for each in predictions},
        {int(each["key"]): each["reason"] for each in failed},
    )


@torch.no_grad()
def right_probabilities(model, adapter):
    """The softmax of the adapter's head over Hugging Face's hidden state of the last token, row by row."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = INPUTS / "models" / model
    state = torch.load(INPUTS / "adapters" / adapter / "petals_state_dict.pt", weights_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for text in texts():
        whole = AutoModelForCausalLM.from_pretrained(folder).eval()
        hidden = whole.get_input_embeddings()(torch.tensor([tokenizer(text)["input_ids"]]))
        hidden = torch.cat([state["model.prompt_embeddings.weight"][None], hidden], dim=1)
        last = whole.model(inputs_embeds=hidden).last_hidden_state[0, -1]
        found.append((torch.softmax((last @ state["score.weight"].T).double(), -1).tolist(), hidden.shape[1]))
    return found


@pytest.mark.parametrize("tokens_per_micro_batch", (None, 1, 150))
def test_longrope_rows_on_both_sides_of_the_original_length(tokens_per_micro_batch, tmp_path):
    """A3: batched, four of six rows got other probabilities, by up to 0.99."""
    with opened("longrope", "a5") as remote:
        found, failed = evaluated(remote, tmp_path / "run", tokens_per_micro_batch=tokens_per_micro_batch)
    right = right_probabilities("longrope", "a5")
    assert {length > 32 for _, length in right} == {True, False} and not failed
    for key, (probabilities, _) in enumerate(right):
        assert found[key] == pytest.approx(probabilities, abs=1e-5)


@pytest.mark.parametrize("tokens_per_micro_batch", (None, 1))
def test_dynamic_rows_beyond_the_original_length_fail_with_the_reason(tokens_per_micro_batch, tmp_path):
    """A3: batched, rows got other probabilities, by up to 0.78; one row did alone, by the calls before it."""
    with opened("dynamic_ntk", "a5") as remote:
        found, failed = evaluated(remote, tmp_path / "run", tokens_per_micro_batch=tokens_per_micro_batch)
    right = right_probabilities("dynamic_ntk", "a5")
    assert set(failed) == {key for key, (_, length) in enumerate(right) if length > 32} != set()
    assert all("rope_type dynamic" in reason for reason in failed.values())
    for key, probabilities in found.items():
        assert probabilities == pytest.approx(right[key][0], abs=1e-5)


@pytest.mark.parametrize("model", ("pad_is_eos_adds_eos", "seqm"))
def test_a_models_own_classifier_is_read_as_transformers_reads_it(model, tmp_path):
    """A6: with the padding token that the tokenizer puts at the end, every row was off by 0.14 to 0.47."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = INPUTS / "models" / model
    whole, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with opened(model) as remote:
        found, failed = evaluated(remote, tmp_path / "run")
    assert not failed
    for key, text in enumerate(texts()):
        with torch.no_grad():
            logits = whole.eval()(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0]
        assert found[key] == pytest.approx(torch.softmax(logits.double(), -1).tolist(), abs=1e-5)


def test_outputs_in_another_order_than_the_tasks_labels_are_an_error(tmp_path):
    """A7: the model's config names the six outputs in reverse, and its own head is used."""
    with opened("id2label_reversed") as remote:
        with pytest.raises(TaskError, match=r"calls output 0 of its head 'number'.*is label 5"):
            petals_eval.evaluate(remote, task=TASK, data=DATA, out=tmp_path / "run")
        # The head of an adapter is not the model's: its config says nothing of that one.
        with opened("id2label_reversed", "a5") as tuned:
            petals_eval.evaluate(tuned, task=TASK, data=DATA, out=tmp_path / "tuned")


def test_a_head_under_an_unknown_name_is_an_error():
    """A4: the base model's own random head was used in its place."""
    from petals_eval.remote_model import load_local

    says = r"holds base_model\.model\.classification_head\.weight, which .* would leave out"
    with pytest.raises(AdapterError, match=says):
        load_local(str(INPUTS / "models" / "seqm"), str(INPUTS / "adapters" / "head_other_name"))


def test_prompts_of_a_compiled_model_are_read():
    from petals_eval.remote_model import load_local

    _, [adapter] = load_local(str(INPUTS / "models" / "seqm"), str(INPUTS / "adapters" / "orig_mod_prefix"))
    state = torch.load(INPUTS / "adapters" / "orig_mod_prefix" / "petals_state_dict.pt")
    assert torch.equal(adapter.prompts, state["_orig_mod.model.prompt_embeddings.weight"])
    assert torch.equal(adapter.head_weight, state["_orig_mod.score.weight"])
