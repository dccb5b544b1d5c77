"""Spans of blocks against Hugging Face's own full forward, for every family."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from petals_eval.errors import ModelError
from petals_eval.model.blocks import BlockSpan
from tests.support.hugging_face import Reference
from tests.support.tensors import distance, hidden_states
from tests.support.tiny_models import FAMILIES, make_tiny

BLOCKS = 4
SPLIT = ((0, 1), (1, 3), (3, 4))


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return make_tiny(request.param, tmp_path_factory.mktemp(request.param), blocks=BLOCKS)


@pytest.fixture
def hidden():
    return hidden_states(3, 11, seed=1)


def through(spans, hidden, prompts=None):
    for span in spans:
        share = None if prompts is None else prompts[span.start : span.stop]
        hidden = span.forward(hidden, share)
    return hidden


def test_a_span_of_all_blocks_equals_hugging_faces_forward(folder, hidden):
    span = BlockSpan.load(str(folder), 0, BLOCKS)
    assert distance(span.forward(hidden), Reference(folder).forward(hidden)) < 1e-5


def test_threads_at_once_see_their_own_prompts(folder, hidden):
    """Prompts come in by hooks on the blocks, which all calls share."""
    span = BlockSpan.load(str(folder), 0, BLOCKS)
    draws = torch.Generator().manual_seed(2)
    questions = [None, *torch.randn(7, BLOCKS, 1, 4, 32, generator=draws)]
    alone = [span.forward(hidden, prompts) for prompts in questions]
    with ThreadPoolExecutor(len(questions)) as threads:
        for _ in range(5):
            together = threads.map(lambda prompts: span.forward(hidden, prompts), questions)
            for found, expected in zip(together, alone, strict=True):
                assert distance(found, expected) < 1e-5


def test_three_spans_equal_hugging_faces_forward(folder, hidden):
    spans = [BlockSpan.load(str(folder), first, last) for first, last in SPLIT]
    assert distance(through(spans, hidden), Reference(folder).forward(hidden)) < 1e-5


def test_deep_prompts_are_added_before_each_block(folder, hidden):
    prompts = torch.randn(BLOCKS, 1, 5, 32, generator=torch.Generator().manual_seed(2))
    spans = [BlockSpan.load(str(folder), first, last) for first, last in SPLIT]
    sent = hidden.clone()
    expected = Reference(folder).forward(hidden, prompts)
    assert distance(through(spans, sent, prompts), expected) < 1e-5
    assert torch.equal(sent, hidden), "the input was changed"
    assert distance(through(spans, sent), expected) > 1e-2, "prompts that do not matter prove nothing"


def test_deep_prompts_of_each_row(folder, hidden):
    prompts = torch.randn(BLOCKS, 3, 2, 32, generator=torch.Generator().manual_seed(3))
    span = BlockSpan.load(str(folder), 0, BLOCKS)
    assert distance(span.forward(hidden, prompts), Reference(folder).forward(hidden, prompts)) < 1e-5


def test_gradients_are_those_of_hugging_faces_own_backward(folder, hidden):
    prompts = torch.randn(BLOCKS, 1, 5, 32, generator=torch.Generator().manual_seed(2))
    upwards = hidden_states(3, 11, seed=3)
    expected = Reference(folder).gradients(hidden, prompts.repeat(1, 3, 1, 1), upwards)
    spans = [BlockSpan.load(str(folder), first, last) for first, last in SPLIT]
    entering = [hidden]
    for span in spans:
        entering.append(span.forward(entering[-1], prompts[span.start : span.stop]))
    by_prompts = []
    for span, states in zip(reversed(spans), reversed(entering[:-1]), strict=True):
        upwards, share = span.backward(states, upwards, prompts[span.start : span.stop])
        by_prompts.insert(0, share)
    assert distance(upwards, expected[0]) < 1e-5
    assert distance(torch.cat(by_prompts), expected[1]) < 1e-5


def test_gradients_of_a_part_without_prompts(folder, hidden):
    span = BlockSpan.load(str(folder), 0, BLOCKS)
    (alone,) = span.backward(hidden, hidden, start=1, stop=3)
    (first,) = span.backward(span.forward(hidden, start=1, stop=2), hidden, start=2, stop=3)
    (found,) = span.backward(hidden, first, start=1, stop=2)
    assert distance(found, alone) < 1e-5
    with pytest.raises(ValueError, match="expected prompts for 2 blocks, found 3"):
        span.backward(hidden, hidden, torch.zeros(3, 1, 2, 32), start=1, stop=3)


def test_part_of_a_span(folder, hidden):
    span = BlockSpan.load(str(folder), 0, BLOCKS)
    parts = hidden
    for first, last in SPLIT:
        parts = span.forward(parts, start=first, stop=last)
    assert distance(parts, span.forward(hidden)) < 1e-6


def test_bfloat16(folder, hidden):
    spans = [BlockSpan.load(str(folder), first, last, torch.bfloat16) for first, last in SPLIT]
    expected = Reference(folder, torch.bfloat16).forward(hidden.bfloat16())
    assert distance(through(spans, hidden), expected) < 2e-2


def test_what_hugging_face_keeps_in_float32_stays_so(folder):
    """What chooses DeepSeek's experts: rounded, it would choose others."""
    block = BlockSpan.load(str(folder), 2, 3, torch.bfloat16)._model.state_dict()
    whole = Reference(folder, torch.bfloat16).model.state_dict()
    expected = {name: tensor for name, tensor in whole.items() if re.match(r"(layers|h)\.2\.", name)}
    assert block.keys() == {name.replace(".2.", ".0.", 1) for name in expected}
    for name, tensor in expected.items():
        assert block[name.replace(".2.", ".0.", 1)].dtype is tensor.dtype, name


def test_swapped_blocks_would_show(folder, hidden):
    last, first = (BlockSpan.load(str(folder), *span) for span in ((2, 4), (0, 2)))
    assert distance(through([last, first], hidden), Reference(folder).forward(hidden)) > 1e-2


@pytest.mark.parametrize("shape", [{"shard_size": "20KB"}, {"weights": "bin"}, {"bare": True}, {"labels": 3}], ids=str)
@pytest.mark.parametrize("family", ["bloom", "mixtral"])
def test_checkpoints_of_other_shapes(family, shape, hidden, tmp_path):
    make_tiny(family, tmp_path, blocks=BLOCKS, **shape)
    spans = [BlockSpan.load(str(tmp_path), first, last) for first, last in SPLIT]
    assert distance(through(spans, hidden), Reference(tmp_path).forward(hidden)) < 1e-5


def test_gemma_4_with_experts(hidden, tmp_path):
    experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
    make_tiny("gemma4_text", tmp_path, blocks=BLOCKS, **experts)
    spans = [BlockSpan.load(str(tmp_path), first, last) for first, last in SPLIT]
    assert distance(through(spans, hidden), Reference(tmp_path).forward(hidden)) < 1e-5


def test_falcon_of_the_newer_kind_and_with_alibi(hidden, tmp_path):
    for name, fields in (
        ("new", {"new_decoder_architecture": True, "num_kv_heads": 2}),
        ("alibi", {"alibi": True, "multi_query": False}),
    ):
        folder = make_tiny("falcon", tmp_path / name, blocks=BLOCKS, **fields)
        spans = [BlockSpan.load(str(folder), first, last) for first, last in SPLIT]
        assert distance(through(spans, hidden), Reference(folder).forward(hidden)) < 1e-5


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_blocks_keep_the_window_of_their_place_in_the_model(family, hidden, tmp_path):
    make_tiny(family, tmp_path, blocks=BLOCKS, use_sliding_window=True, sliding_window=4, max_window_layers=2)
    spans = [BlockSpan.load(str(tmp_path), first, last) for first, last in SPLIT]
    expected = Reference(tmp_path).forward(hidden)
    assert distance(through(spans, hidden), expected) < 1e-5
    whole = BlockSpan.load(str(tmp_path), 0, BLOCKS)
    assert distance(whole.forward(whole.forward(hidden, stop=2), start=2), expected) < 1e-5


def test_mistral_with_a_window(hidden, tmp_path):
    make_tiny("mistral", tmp_path, blocks=BLOCKS, sliding_window=4)
    spans = [BlockSpan.load(str(tmp_path), first, last) for first, last in SPLIT]
    assert distance(through(spans, hidden), Reference(tmp_path).forward(hidden)) < 1e-5


def test_blocks_without_a_deep_prompt_are_skipped(hidden, tmp_path):
    make_tiny("llama", tmp_path, blocks=BLOCKS)
    span = BlockSpan.load(str(tmp_path), 0, BLOCKS)
    prompts = torch.randn(2, 1, 5, 32)
    assert torch.equal(span.forward(hidden, prompts), span.forward(hidden, prompts, stop=2))


def test_more_prompt_tokens_than_positions_are_refused(hidden, tmp_path):
    make_tiny("llama", tmp_path, blocks=BLOCKS)
    span = BlockSpan.load(str(tmp_path), 0, BLOCKS)
    with pytest.raises(ValueError, match=r"prompt tokens \(12\), found 11"):
        span.forward(hidden, torch.randn(BLOCKS, 1, 12, 32))


def test_only_the_spans_weights_are_in_memory(tmp_path):
    make_tiny("llama", tmp_path, blocks=BLOCKS)
    span = BlockSpan.load(str(tmp_path), 1, 2)
    held = sum(tensor.numel() for tensor in span._model.parameters())
    one_block = sum(tensor.numel() for tensor in Reference(tmp_path).blocks[0].parameters())
    assert held == one_block
    assert not any(tensor.requires_grad for tensor in span._model.parameters())
    assert not any(module.training for module in span._model.modules())


def test_only_the_spans_shards_are_opened(hidden, tmp_path):
    make_tiny("llama", tmp_path, blocks=BLOCKS, shard_size="20KB")
    import json

    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {shard for key, shard in index.items() if ".layers.1." in key}
    for shard in set(index.values()) - needed:
        (tmp_path / shard).unlink()
    BlockSpan.load(str(tmp_path), 1, 2).forward(hidden)


def test_dropout_in_the_config_does_not_act(hidden, tmp_path):
    make_tiny("bloom", tmp_path, blocks=BLOCKS, hidden_dropout=0.5, attention_dropout=0.5)
    span = BlockSpan.load(str(tmp_path), 0, BLOCKS)
    assert torch.equal(span.forward(hidden), span.forward(hidden))


def test_blocks_the_model_does_not_have_are_refused(tmp_path):
    make_tiny("llama", tmp_path, blocks=BLOCKS)
    with pytest.raises(ModelError, match=r"span within 0:4.*found 3:5"):
        BlockSpan.load(str(tmp_path), 3, 5)


def test_missing_weights_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    make_tiny("llama", tmp_path, blocks=BLOCKS)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.2.mlp.up_proj.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack model\.layers\.2\.mlp\.up_proj\.weight"):
        BlockSpan.load(str(tmp_path), 1, 3)
    BlockSpan.load(str(tmp_path), 0, 2)


def test_misshapen_weights_are_named(tmp_path):
    import json

    make_tiny("llama", tmp_path, blocks=BLOCKS)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(ModelError, match=r"of block 1 to be \(\d+, \d+\) by the config, found"):
        BlockSpan.load(str(tmp_path), 1, 2)


def test_quantised_weights_are_refused_by_name(tmp_path):
    """DeepSeek's are published so: without the scales beside them the numbers mean nothing."""
    from safetensors.torch import load_file, save_file

    make_tiny("deepseek_v3", tmp_path, blocks=2)
    state = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    state[name] = state[name].to(torch.float8_e4m3fn)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"o_proj\.weight of block 1 in float32.*float8.*no quantised weights"):
        BlockSpan.load(str(tmp_path), 0, 2)
    BlockSpan.load(str(tmp_path), 0, 1)
