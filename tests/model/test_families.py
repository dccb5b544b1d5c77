from types import SimpleNamespace

import pytest

from petals_eval.errors import ModelError
from petals_eval.model import FAMILIES, family_of
from petals_eval.model.dht_prefixes import default_prefix
from tests.support import tiny_models


def test_the_table_has_every_family():
    assert set(FAMILIES) == set(tiny_models.FAMILIES)


def test_an_unknown_family_is_refused_by_name():
    with pytest.raises(ModelError, match=r"'gpt2'.*bloom, deepseek_v3, falcon, gemma2, .*, llama, mistral, mixtral"):
        family_of(SimpleNamespace(model_type="gpt2"))


@pytest.mark.parametrize("model_type", (None, 7, ["llama"], {}))
def test_a_type_that_is_no_name_is_refused_like_an_unknown_one(model_type):
    with pytest.raises(ModelError, match="expected one of bloom"):
        family_of(SimpleNamespace(model_type=model_type))


@pytest.mark.parametrize(
    ("family", "repository", "prefix"),
    (
        ("llama", "meta-llama/Llama-2-70b-hf", "Llama-2-70b-hf"),
        ("llama", "meta-llama/Meta-Llama-3.1-405B-Instruct", "Meta-Llama-3-1-405B-Instruct-hf"),
        ("falcon", "tiiuae/falcon-180B", "falcon-180B"),
        ("bloom", "bigscience/bloomz-7b1", "bigscience/bloomz-7b1-petals"),
        ("bloom", "bigscience/bloom-petals", "bigscience/bloom-petals"),
        ("mixtral", "mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-v0-1"),
        ("mistral", "mistralai/Mistral-7B-v0.1", "Mistral-7B-v0-1"),
        ("qwen3", "Qwen/Qwen3-8B", "Qwen3-8B"),
        ("gemma3_text", "google/gemma-3-1b-it", "gemma-3-1b-it"),
    ),
)
def test_the_default_dht_prefix_is_petals_own(family, repository, prefix):
    assert default_prefix(family, repository) == prefix


@pytest.mark.parametrize(
    ("family", "fields", "limit"),
    (
        ("llama", {"max_position_embeddings": 512}, 512),
        ("llama", {"max_position_embeddings": 512, "rope_scaling": {"type": "linear", "factor": 4.0}}, 2048),
        ("llama", {"max_position_embeddings": 8192, "rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, 8192),
        (
            "qwen2",
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131072,
        ),
        ("bloom", {"max_position_embeddings": 512}, None),
        ("falcon", {"max_position_embeddings": 512, "alibi": False}, 512),
        ("falcon", {"max_position_embeddings": 512, "alibi": True}, None),
    ),
)
def test_the_context_limit(family, fields, limit):
    assert FAMILIES[family].context_limit(SimpleNamespace(**fields)) == limit


@pytest.mark.parametrize(
    ("config", "said"),
    (
        ({"model_type": "gemma3n"}, "model of model_type 'gemma3n' cannot be evaluated: its blocks take an input"),
        (
            {"model_type": "gemma4_text", "hidden_size_per_layer_input": 256},
            r"this Gemma 4 cannot be evaluated: its blocks take an input.*config: hidden_size_per_layer_input",
        ),
        (
            {"model_type": "gemma4", "text_config": {"num_kv_shared_layers": 18, "hidden_size_per_layer_input": 0}},
            r"Gemma 4 cannot be evaluated: .* the keys and values of earlier blocks.*config: num_kv_shared_layers",
        ),
    ),
)
def test_blocks_that_take_more_than_a_call_carries_are_refused_with_that_reason(config, said):
    with pytest.raises(ModelError, match=said):
        family_of(SimpleNamespace(**config))


@pytest.mark.parametrize(
    "config",
    (
        {"model_type": "gemma3_text", "use_bidirectional_attention": True},
        {"model_type": "gemma3", "text_config": {"use_bidirectional_attention": True}},
        {"model_type": "gemma4_text", "use_bidirectional_attention": "all"},
    ),
)
def test_tokens_that_read_those_after_them_are_refused(config):
    with pytest.raises(ModelError, match="says use_bidirectional_attention"):
        family_of(SimpleNamespace(**config))


def test_only_the_tokens_of_images_may_read_those_after_them():
    config = SimpleNamespace(model_type="gemma4_text", use_bidirectional_attention="vision")
    assert family_of(config).title == "Gemma 4"
