"""A multimodal Gemma 3 or 4 is read as text: the numbers are those that the whole model gives a text without images."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from petals_eval.errors import ModelError
from petals_eval.local_swarm import launcher
from petals_eval.model import Checkpoint, LocalModel
from petals_eval.model.blocks import BlockSpan
from petals_eval.model.sources import open_source
from petals_eval.tasks.requests import Request
from tests.model.reference import TOKENS, full_logits, local_answers, make_adapter
from tests.support.tensors import close
from tests.support.tiny_models import draw_weights, write_tokenizer

BLOCKS, LABELS = 3, 3
TEXT = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "query_pre_attn_scalar": 16,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "pad_token_id": 0,
}
TEXT_4 = TEXT | {
    "hidden_size_per_layer_input": 0,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "final_logit_softcapping": 30.0,
    "use_bidirectional_attention": "vision",
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
VISION_4 = VISION | {"num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "position_embedding_size": 16}
TARGETS = ((2, 262), (2, 268), (0, 75), (1, 86))


def made(folder, labels=None, **of_the_whole):
    """Write a tiny Gemma 3 with eyes, of the hub's layout, to `folder`, and return the whole model."""
    import transformers

    config = transformers.Gemma3Config(
        text_config=TEXT,
        vision_config=VISION,
        mm_tokens_per_image=1,
        image_token_index=319,
        eos_token_id=[2, 106],
        **of_the_whole,
    )
    if labels is None:
        model = transformers.Gemma3ForConditionalGeneration(config)
    else:
        config.num_labels = labels
        model = transformers.Gemma3ForSequenceClassification(config)
    draw_weights(model, seed=0)
    model.eval().save_pretrained(folder)
    write_tokenizer(folder)
    return model


def made_4(folder, kind="Gemma4"):
    """The same of Gemma 4."""
    import transformers

    tokens = {"image_token_id": 319, "video_token_id": 318, "audio_token_id": 317, "eos_token_id": [2, 106]}
    config_class, model_class = (getattr(transformers, kind + each) for each in ("Config", "ForConditionalGeneration"))
    model = model_class(config_class(text_config=TEXT_4, vision_config=VISION_4, audio_config=None, **tokens))
    draw_weights(model, seed=0)
    model.eval().save_pretrained(folder)
    write_tokenizer(folder)
    return model


def made_4_unified(folder):
    return made_4(folder, "Gemma4Unified")


def renamed(source, folder, language_model):
    """The same checkpoint with another prefix for the tensors of its language model."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    prefix = re.compile(r"(model\.)?language_model\.(model\.)?")
    save_file({prefix.sub(language_model, name): each for name, each in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module", params=(made, made_4, made_4_unified))
def whole(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("multimodal") / "gemma"
    return folder, request.param(folder)


def requests(targets=()):
    return [Request(str(index), 0, text, targets) for index, text in enumerate((TOKENS, TOKENS[:4]))]


def test_text_scores_as_the_whole_model_scores_it(whole):
    folder, model = whole
    local = LocalModel.from_pretrained(folder)
    assert local.family.title.startswith("Gemma") and local.num_blocks == BLOCKS
    for kind in ("none", "ptune", "deep_ptune"):
        adapter = make_adapter(local, kind)
        for request, answer in zip(requests(), local_answers(model, local, adapter, requests(TARGETS)), strict=True):
            expected = full_logits(model, local, adapter, request.input_ids).log_softmax(-1)
            assert close(answer, torch.stack([expected[position, token] for position, token in TARGETS])), kind


def test_its_blocks_are_those_of_the_text(whole):
    folder, model = whole
    local = LocalModel.from_pretrained(folder)
    hidden = local.embed(torch.tensor([TOKENS]))
    text = model.model.language_model
    with torch.inference_mode():
        expected = text(inputs_embeds=hidden).last_hidden_state
        for start in range(BLOCKS):
            hidden = BlockSpan.load(folder, start, start + 1).forward(hidden)
        assert close(local.norm(hidden), expected)


@pytest.mark.parametrize("prefix", ("language_model.model.", "model.language_model.", "language_model."))
def test_every_layout_holds_the_same_tensors(prefix, whole, tmp_path):
    folder, _ = whole
    other = LocalModel.from_pretrained(renamed(folder, tmp_path / "gemma", prefix))
    assert other.fingerprint == LocalModel.from_pretrained(folder).fingerprint
    assert other.unused == ()


def test_a_word_head_of_its_own_is_found_inside_the_language_model(whole, tmp_path):
    folder, _ = whole
    own = renamed(folder, tmp_path / "own", "language_model.model.")
    tensors = load_file(own / "model.safetensors")
    head = torch.randn_like(tensors["language_model.model.embed_tokens.weight"])
    save_file(tensors | {"language_model.lm_head.weight": head}, own / "model.safetensors")
    assert torch.equal(LocalModel.from_pretrained(own).lm_head, head)


def test_its_classifier_is_read_with_its_head(tmp_path):
    model = made(tmp_path, LABELS, id2label={0: "bad", 1: "good", 2: "fine"})
    local = LocalModel.from_pretrained(tmp_path)
    assert local.own_label_names(None) == ("bad", "good", "fine")
    for request, answer in zip(requests(), local_answers(model, local, None, requests()), strict=True):
        assert close(answer, full_logits(model, local, None, request.input_ids))


def test_what_the_config_says_of_the_whole_holds_for_the_text(whole):
    folder, _ = whole
    config = Checkpoint.open(folder).config
    assert config.model_type in ("gemma3_text", "gemma4_text", "gemma4_unified_text")
    assert config.architectures[0].endswith("ForConditionalGeneration")
    assert LocalModel.from_pretrained(folder).end_tokens() == {2, 106}
    assert config.dtype == torch.float32 and config.tie_word_embeddings is True


def test_the_local_swarm_counts_the_blocks_of_the_text(whole):
    folder, _ = whole
    family, num_blocks, _ = launcher._read_config(open_source(folder, error=ModelError))
    assert (family.model_type, num_blocks) == (LocalModel.from_pretrained(folder).family.model_type, BLOCKS)


def test_a_part_that_is_neither_text_nor_vision_is_named(whole, tmp_path):
    folder, _ = whole
    other = shutil.copytree(folder, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file(tensors | {"point_tower.conv.weight": torch.ones(2)}, other / "model.safetensors")
    with pytest.raises(ModelError, match=r"hold point_tower\.conv\.weight, which is no known part of a Gemma"):
        LocalModel.from_pretrained(other)


def test_a_vision_model_of_another_family_is_refused_by_name(whole, tmp_path):
    folder, _ = whole
    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "llava"}))
    with pytest.raises(ModelError, match="model_type 'llava'; expected one of"):
        Checkpoint.open(other)


def test_one_tensor_under_two_names_is_refused(tmp_path):
    made(tmp_path)
    [file] = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    stored = next(name for name in tensors if re.fullmatch(r"(model\.)?language_model\.(model\.)?norm\.weight", name))
    tensors["model.norm.weight"] = tensors[stored] + 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="which are one tensor of the language model"):
        LocalModel.from_pretrained(str(tmp_path))
