"""Models as they are published, in small: home and blocks, split three ways, give Hugging Face's own numbers."""

import json
from itertools import pairwise

import pytest
import torch

from petals_eval.data.batching import MicroBatch
from petals_eval.model import Checkpoint, LocalModel
from petals_eval.model.blocks import BlockSpan
from petals_eval.model.rotary import RotaryScaling, rotary_scaling
from petals_eval.tasks.requests import Request
from tests.model.reference import TOKENS, full_logits, make_adapter
from tests.support.published_configs import PUBLISHED, make_published
from tests.support.tensors import close

LONG = tuple(3 + 7 * position % 317 for position in range(40))  # beyond windows, and the lengths before scaling
TEXTS = (TOKENS, TOKENS[:1], LONG)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_kind_of_prompts_over_three_spans(name, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = make_published(name, tmp_path / "model")
    local = LocalModel.from_pretrained(folder, dtype=torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    edges = (0, 1, local.num_blocks - 1, local.num_blocks)
    spans = [BlockSpan.load(folder, start, stop, torch.float32) for start, stop in pairwise(edges)]
    for kind in ("none", "ptune", "deep_ptune"):
        adapter = make_adapter(local, kind)
        for text in TEXTS:
            targets = tuple((position, token) for position in range(len(text)) for token in (5, 262))
            batch = MicroBatch.of([Request("0", 0, text, targets)])
            hidden = local.embed(batch.input_ids, adapter)
            for span in spans:
                deep = None if adapter is None else adapter.deep_prompts
                hidden = span.forward(hidden, None if deep is None else deep[span.start : span.stop])
            expected = full_logits(whole, local, adapter, text).log_softmax(-1)
            wanted = torch.stack([expected[position, token] for position, token in targets])
            assert close(local.head(hidden, batch, adapter)[0], wanted), (kind, len(text))


@pytest.mark.parametrize(
    ("name", "context", "rotary", "ends"),
    (
        ("meta-llama/Llama-3.1-8B-Instruct", 131072, RotaryScaling("llama3"), [128001, 128008, 128009]),
        ("Qwen/Qwen2.5-7B-Instruct", 32768, RotaryScaling(), 151645),
        ("Qwen/Qwen3-8B", 40960, RotaryScaling(), 151645),
        ("google/gemma-2-27b", 8192, RotaryScaling(), 1),
        ("google/gemma-3-1b-it", 32768, RotaryScaling(), [1, 106]),
        ("google/gemma-3-27b-it", 131072, RotaryScaling("linear"), [1, 106]),
        ("microsoft/Phi-3-mini-4k-instruct", 4096, RotaryScaling(), 32000),
        ("microsoft/Phi-4-mini-instruct", 131072, RotaryScaling("longrope", 4096), 199999),
        ("allenai/OLMo-2-0425-1B", 4096, RotaryScaling(), 100257),
        ("deepseek-ai/DeepSeek-V3", 163840, RotaryScaling("yarn"), 1),
    ),
)
def test_what_is_read_of_a_published_config(name, context, rotary, ends, tmp_path):
    config = PUBLISHED[name]
    if "long_factor" in (config.get("rope_scaling") or {}):  # only its first factors are here
        config = config | {"rope_scaling": config["rope_scaling"] | {"long_factor": [1.0] * 48}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.family.context_limit(checkpoint.config) == context
    assert rotary_scaling(checkpoint.config) == rotary
    assert checkpoint.config.eos_token_id == ends
    assert str(checkpoint.config.dtype).removeprefix("torch.") == config["torch_dtype"]
