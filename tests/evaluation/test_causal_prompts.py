"""A causal prompt that PEFT trained, over a swarm: choices and texts are those of PEFT's own local computation."""

import json

import peft
import pytest
import torch

import petals_eval
from petals_eval.tasks import ChoiceTask, GenerationTask
from tests.model.reference import causal_lm
from tests.support.real_swarm import STORIES, predictions, stories_swarm

PREFIX, ROWS, NEW = 8, 40, 24


@pytest.fixture(scope="module")
def model(realdata, causal_prompt):
    with (
        stories_swarm(realdata, [(0, 3), (3, 5)]) as swarm,
        petals_eval.RemoteModel.from_pretrained(
            realdata / STORIES, adapter=causal_prompt, initial_peers=swarm.initial_peers, dht_prefix=swarm.dht_prefix
        ) as remote,
    ):
        yield remote


@pytest.fixture(scope="module")
def logits_of(realdata, causal_prompt):
    """PEFT's own logits (seq, vocabulary) of the tokens of a text."""
    tuned = peft.PeftModel.from_pretrained(causal_lm(realdata / STORIES), causal_prompt).eval()

    @torch.inference_mode()
    def compute(tokens):
        ids = torch.tensor([tokens])
        return tuned(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, PREFIX:]

    return compute


def test_choices(model, logits_of, realdata, tmp_path):
    rows = [json.loads(line) for line in (realdata / "copa" / "test.jsonl").read_text().splitlines()][:ROWS]
    task = ChoiceTask(name="copa", text="{premise}", choices=("{choice1}", "{choice2}"), label_column="label")
    result = petals_eval.evaluate(model, task=task, data=rows, out=tmp_path / "run")
    assert result.first.n_scored == len(rows)
    tokenizer, right = model.local.tokenizer, 0
    for line, row in zip(predictions(tmp_path / "run"), rows, strict=True):
        expected = []
        for choice in (row["choice1"], row["choice2"]):
            tokens, first = tokenizer.encode(f"{row['premise']} {choice}"), len(tokenizer.encode(row["premise"]))
            scores = logits_of(tokens).log_softmax(-1)
            expected.append(sum(scores[at - 1, tokens[at]].item() for at in range(first, len(tokens))))
        assert line["log_likelihood"] == pytest.approx(expected, abs=1e-4)
        right += expected.index(max(expected)) == row["label"]
    assert result.metrics["acc"].value == right / len(rows)


def test_greedy_texts(model, logits_of, realdata):
    stories = (realdata / "tinystories" / "validation.txt").read_text().split("\n\n")
    rows = [{"begin": " ".join(story.split()[:length])} for length, story in enumerate(stories[:6], 3)]
    task = GenerationTask(name="stories", text="{begin}", max_new_tokens=NEW)
    result = petals_eval.evaluate(model, task=task, data=rows, save_texts=True)
    tokenizer, ends = model.local.tokenizer, model.local.end_tokens()
    for found, row in zip(result.predictions, rows, strict=True):
        tokens = tokenizer.encode(row["begin"])
        before = len(tokens)
        while len(tokens) < before + NEW and tokens[-1] not in ends:
            tokens.append(logits_of(tokens)[-1].argmax().item())
        new = tokens[before:-1] if tokens[-1] in ends else tokens[before:]
        assert found.text == tokenizer.decode(new, skip_special_tokens=True) != ""
