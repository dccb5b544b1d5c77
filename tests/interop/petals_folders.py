"""Tiny models in folders that all the servers' versions of transformers read, from Petals 2.2.0's 4.34.1 on."""

import json
import shutil
from pathlib import Path

import torch

from tests.interop.server_kinds import PETALS, PETALS_MAIN
from tests.support.tiny_models import make_tiny


def make_petals_tiny(family: str, folder: Path, **settings: object) -> Path:
    """Like `make_tiny`, as the servers expect it; BLOOM with the bare model's keys.

    Falcon is of the new architecture (40B, 180B): Petals 2.2.0 cannot compute the multi-query attention of Falcon-7B.
    """
    if family == "falcon":
        settings = {"new_decoder_architecture": True, "num_kv_heads": 2} | settings
    make_tiny(family, folder, bare=family == "bloom", **settings)
    if family.startswith("gemma4"):
        return in_words_of_gemma4(folder)
    # Those that no older server has are served on transformers 5 alone.
    return in_old_words(folder) if family in PETALS.families + PETALS_MAIN.families else folder


def petals_copy(source: Path, folder: Path) -> Path:
    """A copy of a model folder that was written by today's transformers and tokenizers."""
    shutil.copytree(source, folder, copy_function=shutil.copyfile)
    return in_old_words(folder)


def in_old_words(folder: Path) -> Path:
    """Rewrite what transformers 5 and tokenizers 0.20 say in words that 4.34.1 and 0.14.1 do not know."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["torch_dtype"] = config.pop("dtype", "float32")
    config |= {key: value for key, value in config.pop("rope_parameters", {}).items() if key == "rope_theta"}
    path.write_text(json.dumps(config, indent=2))

    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"].pop("ignore_merges", None)
    merges = tokenizer["model"]["merges"]
    tokenizer["model"]["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")

    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def in_words_of_gemma4(folder: Path) -> Path:
    """Say of all blocks with global attention at once, as published checkpoints do, what transformers 5.23 writes of
    each and 5.13 does not read."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    of_one, *_ = config.pop("per_layer_config").values()
    config |= {"global_head_dim": of_one["head_dim"], "num_global_key_value_heads": of_one["num_key_value_heads"]}
    path.write_text(json.dumps(config, indent=2))
    return folder


def block_states(folder: Path, input_ids: torch.Tensor, prompts: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Hugging Face's own forward here: [what enters block 0, what leaves block 0, what leaves block 1, ...].

    input_ids: (batch, seq), unpadded. prompts: (blocks, 1, prefix, hidden) deep prompts, added to the first `prefix`
    positions of what enters each block. Every state is (batch, seq, hidden) float32.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    base = model.base_model
    blocks = base.layers if hasattr(base, "layers") else base.h
    states: list[torch.Tensor] = []

    def before(index: int):
        def hook(_module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            if index == 0:
                states.append(hidden.clone())
            if prompts is None:
                return None
            hidden = hidden.clone()
            hidden[:, : prompts.shape[2]] += prompts[index]
            return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

        return hook

    def after(_module, _args, output):
        states.append((output[0] if isinstance(output, tuple) else output).clone())

    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(before(index), with_kwargs=True)
        block.register_forward_hook(after)
    with torch.inference_mode():
        model(input_ids=input_ids, use_cache=False)
    return states
