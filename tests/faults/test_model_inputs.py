"""Models and adapters that gave wrong numbers without a word, or none, and what is right for each of them: `HELD`.

What is right is Hugging Face's own forward of one row, by a model that was called for nothing else. What is too large
to lie here, or differs from the demo's model in one line, is made by its test.
"""

import csv
import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import AutoTokenizer

import petals_eval
from petals_eval.config import CallSettings
from petals_eval.demo import demo_paths
from petals_eval.errors import AdapterError, ModelError, TaskError
from petals_eval.evaluation.dry_run import dry_run
from petals_eval.evaluation.prepare import prepare
from petals_eval.local_swarm import LocalSwarm
from petals_eval.remote_model import LocalSide, load_local
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
    says = r"holds base_model\.model\.classification_head\.weight, which .* would leave out"
    with pytest.raises(AdapterError, match=says):
        load_local(str(INPUTS / "models" / "seqm"), str(INPUTS / "adapters" / "head_other_name"))


def test_prompts_of_a_compiled_model_are_read():
    _, [adapter] = load_local(str(INPUTS / "models" / "seqm"), str(INPUTS / "adapters" / "orig_mod_prefix"))
    state = torch.load(INPUTS / "adapters" / "orig_mod_prefix" / "petals_state_dict.pt")
    assert torch.equal(adapter.prompts, state["_orig_mod.model.prompt_embeddings.weight"])
    assert torch.equal(adapter.head_weight, state["_orig_mod.score.weight"])


def test_a_token_that_the_model_does_not_have_is_a_failure_of_its_row(tmp_path):
    """A padding token was added to the tokenizer, say, and the model was not resized for it."""
    model = tmp_path / "model"
    shutil.copytree(demo_paths().model, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(model)
    rows = [{"text": f"a {word} meal", "label": "good"} for word in ("good", "<extra>", "bad", "<extra>")]
    task = ClassificationTask(name="t", text="{text}", label_column="label", label_names=("bad", "good"))
    local, adapters = load_local(str(model), str(demo_paths().prompts))
    side = LocalSide(local, adapters, CallSettings(), "model")
    plan = dry_run(prepare(lambda: side, task=task, data=rows, is_kept=False), adapters[0])
    assert [key for key, _ in plan.failures] == ["1", "3"]
    with (
        LocalSwarm(model, servers=1, mode="thread") as swarm,
        petals_eval.RemoteModel.from_pretrained(
            model, adapter=demo_paths().prompts, initial_peers=swarm.initial_peers, dht_prefix=swarm.dht_prefix
        ) as remote,
    ):
        result = petals_eval.evaluate(remote, task=task, data=rows, out=tmp_path / "run")
    assert (result.first.n_scored, result.first.n_failed) == (2, 2)
    failed = [json.loads(line) for line in (tmp_path / "run" / "failures.jsonl").read_text().splitlines()]
    assert {each["key"]: each["reason"] for each in failed} == dict(plan.failures)
    assert "token 143 ('<extra>') is outside this model's vocabulary, 0 to 142" in failed[0]["reason"]


def test_a_tokenizer_of_sentencepiece_alone_is_read_as_sentencepiece_reads_it(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(demo_paths().model, model)
    (model / "tokenizer.json").unlink()
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "unk_token": "<unk>", "add_bos_token": True}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"has no tokenizer: expected tokenizer\.json, tokenizer\.model"):
        load_local(str(model))[0].tokenizer("a meal")
    texts = [json.loads(line)["text"] for line in demo_paths().data.read_text().splitlines()]
    (tmp_path / "corpus.txt").write_text("\n".join(texts))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(model / "tokenizer"),
        model_type="bpe",
        vocab_size=120,
        minloglevel=2,
    )
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model / "tokenizer.model"))
    tokenizer = load_local(str(model))[0].tokenizer
    assert [tokenizer(text)["input_ids"] for text in texts] == [[1, *reference.encode(text)] for text in texts]


HELD = {
    "models/longrope": (
        test_longrope_rows_on_both_sides_of_the_original_length,
        "the factors go by a row's own length, as where Hugging Face computes it alone",
    ),
    "models/dynamic_ntk": (
        test_dynamic_rows_beyond_the_original_length_fail_with_the_reason,
        "a server's angles go by what others sent before: such a row has no right answer from it, and is a failure",
    ),
    "models/pad_is_eos_adds_eos": (
        test_a_models_own_classifier_is_read_as_transformers_reads_it,
        "transformers reads the last token that is not the padding token, which here is not the last one",
    ),
    "models/seqm": (
        test_a_models_own_classifier_is_read_as_transformers_reads_it,
        "without a padding token at the end the last token is read",
    ),
    "models/id2label_reversed": (
        test_outputs_in_another_order_than_the_tasks_labels_are_an_error,
        "the model says what its outputs mean: another order would turn every answer round",
    ),
    "adapters/head_other_name": (
        test_a_head_under_an_unknown_name_is_an_error,
        "what was trained is used or named, never left out for the base model's own head",
    ),
    "adapters/orig_mod_prefix": (
        test_prompts_of_a_compiled_model_are_read,
        "torch.compile puts a part in front of every name, which means nothing",
    ),
    "adapters/a5": (
        test_longrope_rows_on_both_sides_of_the_original_length,
        "plain prompts of Petals, beside which the models are held",
    ),
}
"""By input: the test that holds it to what is right, and why that is right."""


def test_every_model_and_adapter_is_held():
    folders = [path for kind in ("models", "adapters") for path in (INPUTS / kind).iterdir()]
    assert set(HELD) == {path.relative_to(INPUTS).as_posix() for path in folders}
