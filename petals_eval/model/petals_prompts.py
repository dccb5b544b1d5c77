"""Prompts as Petals keeps them: `ptune` and `deep_ptune` state dicts, also inside a whole model's."""

import torch

from petals_eval.errors import AdapterError
from petals_eval.model.adapter import Adapter, AdapterReader
from petals_eval.model.pooling import transformers_pooling
from petals_eval.model.tensor_files import describe

__all__ = ["read_petals"]

_PETALS_TRANSFORMERS = "4.34.1"
"""The release of transformers that Petals 2.2.0, the package on PyPI, is pinned to: its heads are trained by it."""


def read_petals(reader: AdapterReader, name: str) -> Adapter:
    """Return the prompts, and the head if there is one, of a Petals state dict.

    `{base}.prompt_embeddings.weight` (prefix, hidden); for `deep_ptune` also
    `{base}.intermediate_prompt_embeddings.weight` (prefix, blocks * hidden), whose rows hold one vector a block.

    Raises AdapterError if keys are missing or misshapen, naming those expected and found, or if a tensor that could
    change an answer would be left out.
    """
    prompts_key = _find(reader, "prompt_embeddings.weight")
    deep_key = _find(reader, "intermediate_prompt_embeddings.weight")
    if prompts_key is None:
        raise no_prompts(reader)
    prompts = reader.prompts(prompts_key)
    deep = None if deep_key is None else _deep(reader, deep_key, prompts.shape[0])
    head_weight, head_bias = reader.head()
    return Adapter(
        name,
        "ptune" if deep is None else "deep_ptune",
        prompts,
        deep,
        head_weight,
        head_bias,
        unused=reader.check_the_rest(),
        pooling=transformers_pooling(reader.family.model_type, _PETALS_TRANSFORMERS),
    )


def no_prompts(reader: AdapterReader) -> AdapterError:
    """Petals itself would go on with random prompts and say nothing."""
    base, blocks, hidden = reader.family.base, reader.blocks, reader.hidden
    return AdapterError(
        f"{reader.path} has no prompt embeddings for a {reader.family.title}.\n"
        f"  expected  {base}.prompt_embeddings.weight  (prefix tokens, {hidden})\n"
        f"            and for deep prompts {base}.intermediate_prompt_embeddings.weight  "
        f"(prefix tokens, {blocks} * {hidden})\n"
        f"  found     {describe(reader.tensors)}\n"
        f"  {_advice(reader)}"
    )


def _advice(reader: AdapterReader) -> str:
    if any("lora_" in name for name in reader.names):
        return "This looks like a LoRA adapter: LoRA runs on the servers; name it with --active-adapter."
    if "prompt_embeddings" in reader.names:
        return "This looks like PEFT's weights: keep them in one folder with their adapter_config.json."
    if any(name.endswith("prompt_embeddings.weight") for name in reader.names):
        return "These prompts were tuned for a model of another family."
    return "Give a checkpoint that holds the tuned prompts, or leave the adapter out."


def _find(reader: AdapterReader, key: str) -> str | None:
    return reader.first(f"{reader.family.base}.{key}", key)  # without the base where the bare model was saved


def _deep(reader: AdapterReader, key: str, prefix: int) -> torch.Tensor:
    """Return the deep prompts (blocks, 1, prefix, hidden), float32."""
    width = reader.blocks * reader.hidden
    flat = reader.matrix(key, f"({prefix}, {reader.blocks} * {reader.hidden} = {width})", width)
    if flat.shape[0] != prefix:
        raise AdapterError(
            f"{reader.path}: {reader.shown(key)} is for {flat.shape[0]} prefix tokens, but the prompts before the "
            f"first block are {prefix}; expected as many. Were the two saved by different runs?"
        )
    deep = flat.float().view(prefix, reader.blocks, reader.hidden).permute(1, 0, 2)
    return deep.unsqueeze(1).contiguous()
