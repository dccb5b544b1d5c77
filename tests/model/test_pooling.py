"""A head reads the token that the library reads which trained it, also in texts that hold the padding token."""

import itertools

import pytest
import torch

from petals_eval.data import rows_of
from petals_eval.errors import ConfigError
from petals_eval.model import LocalModel, load_adapter
from petals_eval.model.pooling import POOLINGS, pooled_token
from petals_eval.tasks import ClassificationTask, show_example
from petals_eval.tasks.requests import Request
from tests.model.reference import classifier, local_answers, make_adapter
from tests.support.tensors import close
from tests.support.tiny_models import CLASSIFIED, make_tiny

LABELS, PAD = 3, 2
TEXTS = ((1, 75, 86, 2), (1, 2, 86, 75), (2, 75, 86, 14), (1, 75, 2, 86, 2, 2), (2, 2), (1, 75, 86), (2,))


def requests_of(texts=TEXTS):
    return [Request(str(index), 0, text) for index, text in enumerate(texts)]


def test_the_rules_are_those_of_the_libraries():
    """Their own arithmetic on a row: transformers 4.49 to 5.23, 4.3x to 4.48, and BLOOM and Falcon before 4.37."""
    for length in range(1, 6):
        for text in itertools.product((PAD, 7), repeat=length):
            ids = torch.tensor([text])
            not_last = (torch.arange(length) * (ids != PAD)).argmax(-1)
            before_first = torch.eq(ids, PAD).int().argmax(-1) - 1
            counted = torch.ne(ids, PAD).sum(-1) - 1
            expected = [length - 1, not_last.item(), before_first.item() % length, counted.item() % length]
            assert [pooled_token(text, PAD, pooling) for pooling in POOLINGS] == expected
            assert {pooled_token(text, None, pooling) for pooling in POOLINGS} == {length - 1}


@pytest.mark.parametrize("pad", (None, 0, PAD))
@pytest.mark.parametrize("family", CLASSIFIED)
def test_the_models_own_head_reads_what_transformers_reads(family, pad, tmp_path):
    folder = make_tiny(family, tmp_path, labels=LABELS, pad_token_id=pad)
    local, whole = LocalModel.from_pretrained(str(folder)), classifier(folder)
    for request, answer in zip(requests_of(), local_answers(whole, local, None, requests_of()), strict=True):
        with torch.no_grad():
            assert close(answer, whole(input_ids=torch.tensor([request.input_ids])).logits[0])


def test_a_head_that_peft_trained_reads_what_peft_reads(tmp_path):
    import peft

    folder = make_tiny("llama", tmp_path / "model", labels=LABELS, pad_token_id=PAD)
    tuned = peft.get_peft_model(classifier(folder), peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.3)
    tuned.save_pretrained(tmp_path / "adapter")
    whole = peft.PeftModel.from_pretrained(classifier(folder), tmp_path / "adapter").eval()
    local = LocalModel.from_pretrained(str(folder))
    adapter = load_adapter(str(tmp_path / "adapter"), family=local.family, config=local.config)
    answers = local_answers(classifier(folder), local, adapter, requests_of())
    for request, answer in zip(requests_of(), answers, strict=True):
        ids = torch.tensor([request.input_ids])
        with torch.no_grad():
            assert close(answer, whole(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0])


def test_the_rule_can_be_chosen(tmp_path):
    folder = str(make_tiny("llama", tmp_path, labels=LABELS, pad_token_id=PAD))
    text = (1, 75, 2, 86, 2, 2)
    for pooling, position in (("last", 5), ("last-not-pad", 3), ("before-first-pad", 1), ("count-not-pad", 2)):
        local = LocalModel.from_pretrained(folder, pooling=pooling)
        for adapter in (None, make_adapter(local, "ptune", labels=LABELS)):
            assert local.pooled_token(text, adapter) == position


def test_a_rule_that_needs_a_padding_token_takes_that_of_the_tokenizer(tmp_path):
    """The model's config names none. This tokenizer neither, but it has a token that ends texts."""
    local = LocalModel.from_pretrained(str(make_tiny("llama", tmp_path, labels=LABELS)), pooling="last-not-pad")
    assert local.tokenizer.pad_token_id is None and local.tokenizer.eos_token_id == PAD
    assert local.pooled_token((1, 75, 86, 2)) == 2
    local.tokenizer.pad_token = "<s>"
    assert local.pooled_token((75, 86, 2, 1)) == 2
    local.tokenizer.pad_token = local.tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="--pool last-not-pad needs a padding token"):
        local.pooled_token((1, 75, 86, 2))


@pytest.mark.parametrize(
    ("pad", "text", "says"),
    (
        (PAD, (1, 75, 86, 2), r"padding token \(2\).*rule last-not-pad.*trained the head; by last it would be another"),
        (PAD, (1, 2, 86, 75), r"by before-first-pad and count-not-pad it would be another one\. --pool chooses"),
        (PAD, (1, 75, 86), None),
        (None, (1, 75, 86, 2), r"token that ends a text.*names no padding token.*--pool last-not-pad"),
        (None, (1, 75, 86), None),
    ),
)
def test_where_libraries_differ_it_is_said(pad, text, says, tmp_path):
    import re

    local = LocalModel.from_pretrained(str(make_tiny("llama", tmp_path, labels=LABELS, pad_token_id=pad)))
    note = local.pooling_note(text)
    assert note is None if says is None else re.search(says, note)


def test_a_dry_run_shows_the_token_that_is_read(tmp_path):
    local = LocalModel.from_pretrained(str(make_tiny("llama", tmp_path, labels=LABELS, pad_token_id=PAD)))
    task = ClassificationTask(name="t", text="{text}</s>", label_column="label", label_names=("a", "b"))
    [example] = task.examples(rows_of([{"text": " good", "label": "a"}]), local.tokenizer)
    assert example.requests[0].input_ids[-1] == PAD
    assert "the head reads position 5: Ġgood" in show_example(example, local.tokenizer, 4, None, local.pooled_token)
    assert "the head reads position 6: </s>" in show_example(example, local.tokenizer, 4)
