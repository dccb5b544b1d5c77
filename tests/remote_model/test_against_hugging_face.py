"""Over a real swarm the logits are those of Hugging Face's own whole model: every family, every kind of prompts.

The reference never touches the stub's code: it is the model's own forward on one unpadded text (and PEFT's, for its own
format). Remotely the same text is padded, batched and split over three servers.
"""

from contextlib import contextmanager

import pytest
import torch

from petals_eval import RemoteModel, SwarmSettings
from petals_eval.local_swarm.launcher import LocalSwarm
from petals_eval.model import LocalModel, load_adapter
from petals_eval.swarm import SwarmConnection
from petals_eval.tasks.requests import Request
from tests.model.reference import TOKENS, causal_lm, classifier, full_logits, make_adapter
from tests.support.tensors import close
from tests.support.tiny_models import CLASSIFIED, FAMILIES, make_tiny

BLOCKS, LABELS = 4, 3
SPANS = [(0, 1), (1, 3), (3, 4)]
KINDS = ("none", "ptune", "deep_ptune")
TEXTS = ((*TOKENS, 20, 30, 40), TOKENS, TOKENS[:3], TOKENS[:1])


@contextmanager
def remote_model(folder, spans=SPANS, **options):
    """The model over servers of these spans."""
    with LocalSwarm(folder, spans=spans, mode="thread", dht_prefix="tiny", **options) as swarm:
        settings = SwarmSettings(initial_peers=tuple(swarm.initial_peers), deadline=20.0)
        local = LocalModel.from_pretrained(str(folder))
        with SwarmConnection.connect(settings) as connection:
            yield RemoteModel(local, connection.remote_sequential("tiny", local.num_blocks), (), connection)


def answers(model, adapter, requests, **options):
    found = {each.request.key: each.answer for each in model.compute(requests, adapter, **options)}
    return [found[request.key] for request in requests]


def classify(texts=TEXTS) -> list[Request]:
    return [Request(str(index), 0, text) for index, text in enumerate(texts)]


@pytest.mark.sample(6)
@pytest.mark.parametrize("family", CLASSIFIED)
def test_class_logits_of_every_family_and_kind_of_prompts(family, tmp_path):
    folder = make_tiny(family, tmp_path, blocks=BLOCKS, labels=LABELS)
    whole = classifier(folder)
    with remote_model(folder) as model:
        for kind in KINDS:
            adapter = make_adapter(model.local, kind)
            for tokens_per_micro_batch in (1, 30, 1000):  # alone, in two or three batches, all together
                found = answers(model, adapter, classify(), tokens_per_micro_batch=tokens_per_micro_batch)
                for text, answer in zip(TEXTS, found, strict=True):
                    assert close(answer, full_logits(whole, model.local, adapter, text))


@pytest.mark.sample(6)
@pytest.mark.parametrize("family", FAMILIES)
def test_label_words_score_as_local_log_likelihoods(family, tmp_path):
    folder = make_tiny(family, tmp_path, blocks=BLOCKS)
    whole = causal_lm(folder)
    targets = ((2, 262), (2, 268), (0, 75), (1, 86))
    with remote_model(folder) as model:
        for kind in KINDS:
            adapter = make_adapter(model.local, kind)
            requests = [Request(str(index), 0, text, targets) for index, text in enumerate(TEXTS[:3])]
            for request, answer in zip(requests, answers(model, adapter, requests), strict=True):
                expected = full_logits(whole, model.local, adapter, request.input_ids).log_softmax(-1)
                assert close(answer, torch.stack([expected[position, token] for position, token in targets]))


@pytest.mark.sample(6)
@pytest.mark.parametrize("family", CLASSIFIED)
def test_bfloat16_servers_and_home_agree_within_their_precision(family, tmp_path):
    """Each text alone: torch's bfloat16 attention is not the same for another padded length, whoever runs it."""
    folder = make_tiny(family, tmp_path, blocks=BLOCKS, labels=LABELS, dtype=torch.bfloat16)
    whole = classifier(folder)
    with remote_model(folder) as model:
        assert model.local.dtype is torch.bfloat16
        for kind in KINDS:
            adapter = make_adapter(model.local, kind)
            found = answers(model, adapter, classify(), tokens_per_micro_batch=1)
            for text, answer in zip(TEXTS, found, strict=True):
                assert close(answer, full_logits(whole, model.local, adapter, text), 2e-2)


def test_peft_prompts_are_as_peft_computes_them(tmp_path):
    import peft

    folder = make_tiny("llama", tmp_path / "model", blocks=BLOCKS, labels=LABELS)
    tuned = peft.get_peft_model(classifier(folder), peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.3)
    tuned.save_pretrained(tmp_path / "adapter")
    whole = peft.PeftModel.from_pretrained(classifier(folder), tmp_path / "adapter").eval()
    with remote_model(folder) as model:
        adapter = load_adapter(str(tmp_path / "adapter"), family=model.local.family, config=model.local.config)
        for text, answer in zip(TEXTS, answers(model, adapter, classify()), strict=True):
            with torch.no_grad():
                expected = whole(input_ids=torch.tensor([text]), attention_mask=torch.ones(1, len(text))).logits[0]
            assert close(answer, expected)


def test_the_comparison_fails_when_anything_is_wrong(tmp_path):
    """Dropped prompts, swapped blocks, shifted pooling: each shows, so the tests above can fail."""
    folder = make_tiny("llama", tmp_path / "right", blocks=BLOCKS, labels=LABELS)
    whole = classifier(folder)
    with remote_model(folder) as model:
        adapter = make_adapter(model.local, "deep_ptune")
        expected = [full_logits(whole, model.local, adapter, text) for text in TEXTS]

        def agrees(adapter, texts=TEXTS):
            found = answers(model, adapter, classify(texts))
            return all(close(answer, each) for answer, each in zip(found, expected, strict=True))

        assert agrees(adapter)
        assert not agrees(make_adapter(model.local, "ptune"))  # deep prompts dropped
        assert not agrees(None)  # all prompts dropped
        assert not agrees(adapter, tuple(text[:-1] or (2,) for text in TEXTS))  # pooled one position early

    layers = whole.model.layers
    layers[1], layers[2] = layers[2], layers[1]
    whole.save_pretrained(tmp_path / "swapped")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "swapped" / name).write_bytes((folder / name).read_bytes())
    with remote_model(tmp_path / "swapped") as model:
        found = answers(model, adapter, classify())
        assert not any(close(answer, each) for answer, each in zip(found, expected, strict=True))


@pytest.mark.parametrize("spans", [[(0, 5)], [(0, 2), (2, 4), (4, 5)], [(0, 3), (1, 5), (2, 4)]])
@pytest.mark.parametrize("order", ["forward", "backward"])
def test_real_weights_for_any_batch_size_order_and_split_of_blocks(realdata, spans, order):
    from transformers import AutoModelForCausalLM

    from petals_eval.data import load_rows
    from petals_eval.tasks import load_task, resolve_source

    folder = realdata / "stories260K-hf"
    task = load_task("trec")
    rows = load_rows(resolve_source(task, realdata / "trec" / "TREC.test.all"))
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    with remote_model(folder, spans) as model:
        adapter = load_adapter(
            str(realdata / "adapters" / "trec-deep_ptune"), family=model.local.family, config=model.local.config
        )
        examples = list(task.examples(rows, model.local.tokenizer))[::10]
        requests = [request for example in examples for request in example.requests]
        normed = [_normed(whole, model.local, adapter, request.input_ids) for request in requests]
        expected = torch.stack(normed) @ adapter.head_weight.T
        if order == "backward":
            requests, expected = requests[::-1], expected.flip(0)
        for tokens_per_micro_batch in (1, 300, 2048):
            found = torch.stack(answers(model, adapter, requests, tokens_per_micro_batch=tokens_per_micro_batch))
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def _normed(whole, local, adapter, tokens) -> torch.Tensor:
    """The last token's hidden state after the final norm, by Hugging Face's own base model."""
    from tests.model.reference import deep_prompts_added

    hidden = whole.get_input_embeddings()(torch.tensor([tokens]))
    hidden = torch.cat([adapter.prompts[None], hidden], dim=1)
    with deep_prompts_added(whole, local, adapter):
        return whole.model(inputs_embeds=hidden).last_hidden_state[0, -1]
