"""Likelihoods of choices and continuations against Hugging Face's own forward on each whole text, for every family."""

import pytest
import torch
from transformers import AutoTokenizer

from petals_eval.data import rows_of
from petals_eval.model import LocalModel
from petals_eval.tasks import ChoiceTask, ContinuationTask
from tests.model.reference import causal_lm, full_logits, local_answers, make_adapter
from tests.support.tiny_models import FAMILIES, make_tiny

ROWS = [
    {"q": "is it", "choices": ["good", "bad", "no good", "xyz"], "label": 0},
    {"q": "Tom:", "choices": ["the great", "the"], "label": 1},
]
CHOICES = ChoiceTask(
    name="c", text="{q}", choices_column="choices", label_column="label", metrics=("acc", "acc_mutual_info")
)


def likelihood(whole, local, adapter, tokens, first):
    """The log-likelihoods of tokens[first:] and whether each is the likeliest, from one forward of the whole text."""
    logits = full_logits(whole, local, adapter, tokens).log_softmax(-1)
    steps = [
        (logits[at - 1, tokens[at]].item(), logits[at - 1].argmax().item() == tokens[at])
        for at in range(first, len(tokens))
    ]
    return sum(value for value, _ in steps), all(greedy for _, greedy in steps)


@pytest.mark.parametrize("family", FAMILIES)
def test_choices_and_continuations_of_every_family(family, tmp_path):
    folder = make_tiny(family, tmp_path, blocks=2)
    local, whole, tokenizer = (
        LocalModel.from_pretrained(str(folder)),
        causal_lm(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    compared = 0
    for kind in ("none", "deep_ptune"):
        adapter = make_adapter(local, kind)
        for example, row in zip(CHOICES.examples(rows_of(ROWS), tokenizer), ROWS, strict=True):
            assert example.error is None
            found = CHOICES.predict(example, local_answers(whole, local, adapter, list(example.requests)))
            for choice, (value, characters, size, count, alone) in zip(row["choices"], found.values, strict=True):
                context, tokens = tokenizer.encode(row["q"]), tokenizer.encode(f"{row['q']} {choice}")
                expected, _ = likelihood(whole, local, adapter, tokens, len(context))
                assert value == pytest.approx(expected, abs=1e-4)
                assert (characters, size, count) == (len(choice), len(choice), len(tokens) - len(context))
                tokens = tokenizer.encode(f" {choice}")  # this tokenizer begins every text with <s>
                assert alone == pytest.approx(likelihood(whole, local, adapter, tokens, 1)[0], abs=1e-4)
                compared += 1

        # What the model itself would write, and what it would not.
        context = tokenizer.encode("is it")
        best = full_logits(whole, local, adapter, context)[-1].argmax().item()
        for target in filter(str.strip, {tokenizer.decode([best]), " good"}):
            task = ContinuationTask(name="t", text="{q}", target="{target}", delimiter="")
            [example] = task.examples(rows_of([{"q": "is it", "target": target}]), tokenizer)
            if example.error is not None:  # such as half a character
                continue
            found = task.predict(example, local_answers(whole, local, adapter, list(example.requests)))
            tokens = tokenizer.encode(f"is it{target}")
            expected, is_greedy = likelihood(whole, local, adapter, tokens, len(context))
            assert found.values[0][:2] == (pytest.approx(expected, abs=1e-4), float(is_greedy))
    assert compared == 12


def test_what_greedy_decoding_writes_is_greedy(realdata, tokenizer):
    """The real model's own next tokens, and a token that it would not write."""
    folder = realdata / "stories260K-hf"
    local, whole = LocalModel.from_pretrained(str(folder)), causal_lm(folder)
    context = "Once upon a time, there was a little"
    tokens = torch.tensor([tokenizer.encode(context)])
    written = whole.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)[0].tolist()
    target = tokenizer.decode(written)[len(tokenizer.decode(tokens[0])) :]
    task = ContinuationTask(name="t", text="{q}", target="{target}", delimiter="")
    rows = [{"q": context, "target": target}, {"q": context, "target": f"{target[:-1]}zz"}]
    examples = list(task.examples(rows_of(rows), tokenizer))
    assert [token for _, token in examples[0].requests[0].targets] == written[-4:]
    found = [task.predict(each, local_answers(whole, local, None, list(each.requests))) for each in examples]
    assert [prediction.values[0][1] for prediction in found] == [1.0, 0.0]
    for row, prediction in zip(rows, found, strict=True):
        ids = tokenizer.encode(row["q"] + row["target"])
        expected, _ = likelihood(whole, local, None, ids, tokens.shape[1])
        assert prediction.values[0][0] == pytest.approx(expected, abs=1e-4)
