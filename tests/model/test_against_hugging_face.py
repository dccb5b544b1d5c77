"""Embedding, blocks, head: the same numbers as Hugging Face's own whole model, for every family."""

import pytest
import torch

from petals_eval.model import LocalModel, load_adapter
from petals_eval.tasks.requests import Request
from tests.model.reference import TOKENS, causal_lm, classifier, full_logits, local_answers, make_adapter
from tests.support.tensors import close
from tests.support.tiny_models import CLASSIFIED, FAMILIES, make_tiny

KINDS = ("none", "ptune", "deep_ptune")
LABELS = 3


def _requests(targets=()) -> list[Request]:
    """The text, between a longer and a shorter one, so that it is padded."""
    texts = ((*TOKENS, 20, 30, 40), TOKENS, TOKENS[:3])
    return [Request(str(part), 0, text, tuple(targets)) for part, text in enumerate(texts)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", CLASSIFIED)
def test_class_logits_are_those_of_the_whole_model(family, kind, tmp_path):
    folder = make_tiny(family, tmp_path, labels=LABELS)
    local, model = LocalModel.from_pretrained(str(folder)), classifier(folder)
    adapter = make_adapter(local, kind)
    answers = local_answers(model, local, adapter, _requests())
    for request, answer in zip(_requests(), answers, strict=True):
        assert answer.dtype == torch.float32
        assert close(answer, full_logits(model, local, adapter, request.input_ids))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", (True, False))
@pytest.mark.parametrize("family", FAMILIES)
def test_log_likelihoods_are_those_of_the_whole_model(family, tied, kind, tmp_path):
    folder = make_tiny(family, tmp_path, tied=tied)
    local, model = LocalModel.from_pretrained(str(folder)), causal_lm(folder)
    adapter = make_adapter(local, kind)
    targets = [(2, 262), (2, 268), (0, 75), (1, 86), (2, 0)]
    answers = local_answers(model, local, adapter, _requests(targets))
    for request, answer in zip(_requests(targets), answers, strict=True):
        expected = full_logits(model, local, adapter, request.input_ids).float().log_softmax(-1)
        assert close(answer, torch.stack([expected[position, token] for position, token in targets]))


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_agrees_within_its_precision(family, tmp_path):
    folder = make_tiny(family, tmp_path, dtype=torch.bfloat16)
    local, model = LocalModel.from_pretrained(str(folder)), causal_lm(folder)
    assert local.dtype == model.dtype == torch.bfloat16
    adapter = make_adapter(local, "deep_ptune")
    targets = [(position, token) for position in range(3) for token in range(0, 300, 50)]
    answers = local_answers(model, local, adapter, _requests(targets))
    expected = full_logits(model, local, adapter).float().log_softmax(-1)
    assert close(answers[1], torch.stack([expected[position, token] for position, token in targets]), 2e-2)


@pytest.mark.parametrize(
    "variant",
    (
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        {"alibi": True},
        {"multi_query": False, "parallel_attn": False},
    ),
    ids=lambda variant: next(iter(variant)),
)
def test_falcons_variants(variant, tmp_path):
    folder = make_tiny("falcon", tmp_path, labels=LABELS, **variant)
    local, model = LocalModel.from_pretrained(str(folder)), classifier(folder)
    adapter = make_adapter(local, "ptune")
    answers = local_answers(model, local, adapter, _requests())
    assert close(answers[1], full_logits(model, local, adapter))


def test_the_comparison_notices_dropped_prompts_and_shifted_pooling(tmp_path):
    folder = make_tiny("llama", tmp_path, labels=LABELS)
    local, model = LocalModel.from_pretrained(str(folder)), classifier(folder)
    adapter = make_adapter(local, "deep_ptune")
    expected = full_logits(model, local, adapter)
    assert close(local_answers(model, local, adapter, _requests())[1], expected)
    assert not close(local_answers(model, local, make_adapter(local, "ptune"), _requests())[1], expected)
    assert not close(local_answers(model, local, None, _requests())[1], expected)
    assert not close(full_logits(model, local, adapter, TOKENS[:-1]), expected)


@pytest.mark.parametrize("tuning", ("PROMPT_TUNING", "P_TUNING"))
@pytest.mark.parametrize("family", CLASSIFIED)
def test_peft_prompt_tuning_is_as_peft_computes_it(family, tuning, tmp_path):
    import peft

    folder = make_tiny(family, tmp_path / "model", labels=LABELS)
    torch.manual_seed(0)
    if tuning == "PROMPT_TUNING":
        settings = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5)
    else:
        settings = peft.PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=5, encoder_hidden_size=16)
    tuned = peft.get_peft_model(classifier(folder), settings)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape), alpha=0.3)
    tuned.save_pretrained(tmp_path / "adapter")

    whole = peft.PeftModel.from_pretrained(classifier(folder), tmp_path / "adapter").eval()
    local = LocalModel.from_pretrained(str(folder))
    adapter = load_adapter(str(tmp_path / "adapter"), family=local.family, config=local.config)
    assert adapter.kind == f"peft-{tuning.lower()}"
    assert adapter.head_weight is not None
    with torch.no_grad():
        expected = whole(input_ids=torch.tensor([TOKENS]), attention_mask=torch.ones(1, len(TOKENS))).logits[0]
    assert close(local_answers(classifier(folder), local, adapter, _requests())[1], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_prompt_tuning_of_a_causal_lm(family, tmp_path):
    import peft

    folder = make_tiny(family, tmp_path / "model")
    tuned = peft.get_peft_model(causal_lm(folder), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    tuned.save_pretrained(tmp_path / "adapter")
    local = LocalModel.from_pretrained(str(folder))
    adapter = load_adapter(str(tmp_path / "adapter"), family=local.family, config=local.config)
    with torch.no_grad():
        logits = tuned.eval()(input_ids=torch.tensor([TOKENS]), attention_mask=torch.ones(1, len(TOKENS))).logits[0]
    expected = logits[5:].log_softmax(-1)
    targets = [(2, 262), (1, 3)]
    answer = local_answers(causal_lm(folder), local, adapter, _requests(targets))[1]
    assert close(answer, torch.stack([expected[position, token] for position, token in targets]))
