"""Tiny models of every family: random weights, config and tokenizer in a folder, laid out as public checkpoints are.

The weights are drawn here, not by Hugging Face's initialisation: norms away from one, biases away from zero and
matrices large enough that a dropped prompt, a swapped block or a forgotten norm shows in the logits.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

FAMILIES = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "gemma4_text",
    "gemma4_unified_text",
    "phi3",
    "olmo2",
    "deepseek_v3",
    "bloom",
    "falcon",
)
# transformers has no classifier of Gemma 4.
CLASSIFIED = tuple(family for family in FAMILIES if not family.startswith("gemma4"))

# Words that are one token each when a space stands before them; every other text is one token a byte.
WORDS = ("good", "bad", "yes", "no", "great", "the", "is", "it")

_SPECIAL = ("<unk>", "<s>", "</s>")
VOCABULARY = 320
_LATENT_ATTENTION = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}


def make_tiny(
    family: str,
    folder: Path,
    *,
    blocks: int = 3,
    hidden: int = 32,
    tied: bool | None = None,
    dtype: torch.dtype = torch.float32,
    shard_size: str | None = None,
    seed: int = 0,
    labels: int | None = None,
    weights: str = "safetensors",
    bare: bool = False,
    **config_fields: object,
) -> Path:
    """Write a tiny model of `family` (one of FAMILIES) to `folder` and return the folder.

    tied: whether the LM head is the embedding matrix; None: as the family's public checkpoints mostly are
        (BLOOM, Falcon and Gemma tied, the others not).
    shard_size: such as "20KB": the weights are split into shards of about that size, with an index.
    labels: write a sequence-classification checkpoint with this many labels (`score.weight`) instead of a causal LM.
    weights: "safetensors" or "bin" (pickled state dicts, as older checkpoints are).
    bare: save the base model alone, so that keys have no `model.` or `transformer.` prefix (as bigscience's BLOOM).
    config_fields: anything else for the config (dropout, context length, Falcon's variants, ...).
    """
    model = _build(_config(family, blocks, hidden, tied, config_fields), dtype, seed, labels)
    if bare:
        model = model.base_model
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, **({"max_shard_size": shard_size} if shard_size else {}))
    if weights == "bin":
        _as_bin(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE that puts `<s>` in front and nothing behind, in a format that old and new tokenizers read."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    pieces = [*_SPECIAL, *bytes_to_unicode().values()]
    merges = []
    for word in WORDS:
        left = "Ġ"
        for letter in word:
            if left + letter not in pieces:
                merges.append(f"{left} {letter}")
                pieces.append(left + letter)
            left += letter
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": text, **flags} for index, text in enumerate(_SPECIAL)],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def _config(family: str, blocks: int, hidden: int, tied: bool | None, extra: dict):
    from transformers import AutoConfig

    if tied is None:
        tied = family in ("bloom", "falcon") or family.startswith("gemma")
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "num_hidden_layers": blocks,
        "num_attention_heads": 4,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    if family not in ("bloom", "falcon"):
        fields |= {"intermediate_size": 2 * hidden, "num_key_value_heads": 2, "max_position_embeddings": 512}
    if family == "qwen3" or family.startswith("gemma"):
        fields["head_dim"] = hidden // 4
    if family.startswith("gemma"):  # a window shorter than texts are; scores scaled as nothing else says
        fields |= {"sliding_window": 6, "query_pre_attn_scalar": hidden // 2}
    if family.startswith(("gemma3", "gemma4")):
        last = "full_attention"  # of a Gemma 4 whatever is said
        fields["layer_types"] = [("sliding_attention", last)[block % 2] for block in range(blocks - 1)] + [last]
    if family.startswith("gemma4"):  # of the larger ones, which have nothing that a call does not carry
        fields |= {"global_head_dim": hidden // 2, "num_global_key_value_heads": 1}
        fields |= {"attention_k_eq_v": True, "final_logit_softcapping": 30.0}
    if family == "gemma4_text":
        fields["hidden_size_per_layer_input"] = 0
    if family == "deepseek_v3":
        fields |= _LATENT_ATTENTION
        fields |= {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
        fields |= {"moe_intermediate_size": hidden, "first_k_dense_replace": 1, "num_key_value_heads": 4}
    if family == "mixtral":
        fields |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    if family == "falcon":
        fields["max_position_embeddings"] = 512
    return AutoConfig.for_model(family, **(fields | extra))


def _build(config, dtype: torch.dtype, seed: int, labels: int | None):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if labels is None:
        model = AutoModelForCausalLM.from_config(config)
    else:
        config.num_labels = labels
        model = AutoModelForSequenceClassification.from_config(config)
    draw_weights(model, seed)
    return model.to(dtype).eval()


def draw_weights(model: nn.Module, seed: int) -> None:
    """Draw all parameters of a Hugging Face model."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = model.get_input_embeddings()
    seen = set()  # a tied head is the embedding matrix: drawn once
    with torch.no_grad():
        for module in model.modules():
            is_norm = "norm" in type(module).__name__.lower()
            held = dict(module.named_parameters(recurse=False))
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:  # checkpoints hold it
                    held[name] = buffer
            for name, parameter in held.items():
                if parameter in seen:
                    continue
                seen.add(parameter)
                noise = torch.randn(parameter.shape, generator=generator)
                if (is_norm and name == "weight") or parameter.numel() == 1:
                    value = 1 + 0.2 * noise
                elif parameter.ndim == 1:
                    value = 0.1 * noise
                elif module is embeddings or "router" in type(module).__name__.lower():
                    value = 0.5 * noise  # a router with clear winners: rounding must not change the experts
                else:
                    value = 0.2 * noise
                parameter.copy_(value)


def _as_bin(folder: Path) -> None:
    for shard in sorted(folder.glob("model*.safetensors")):
        state: dict[str, nn.Parameter | torch.Tensor] = dict(load_file(shard))
        torch.save(state, folder / _bin_name(shard.name))
        shard.unlink()
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] = {key: _bin_name(shard) for key, shard in content["weight_map"].items()}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(content))
        index.unlink()


def _bin_name(shard: str) -> str:
    return "pytorch_" + shard.removesuffix(".safetensors") + ".bin"
