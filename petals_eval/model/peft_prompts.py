"""Prompts as PEFT keeps them: `adapter_config.json` beside `adapter_model.safetensors` or `.bin`.

Or the state dict of a whole PEFT model, as training loops and Lightning save it.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from petals_eval.errors import AdapterError
from petals_eval.model.adapter import Adapter, AdapterReader, Kind
from petals_eval.model.tensor_files import describe

__all__ = ["PEFT_CONFIG", "PEFT_WEIGHTS", "holds_peft_model", "read_peft", "read_peft_config", "read_peft_model"]

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

_KINDS: dict[str, Kind] = {
    "PROMPT_TUNING": "peft-prompt_tuning",
    "P_TUNING": "peft-p_tuning",
    "MULTITASK_PROMPT_TUNING": "peft-multitask_prompt_tuning",
    "CPT": "peft-cpt",
}

_PAST = (
    "It holds past keys and values for the attention of every block, which a Petals server cannot take. "
    "Tune with PROMPT_TUNING, P_TUNING or Petals' deep_ptune instead."
)
_MIXED = (
    "It chooses among low-rank updates inside the blocks as it runs, and a Petals server applies one LoRA adapter. "
    "Train that and name it with --active-adapter, or tune prompts."
)
_REFUSED = {
    "PREFIX_TUNING": _PAST,
    "CARTRIDGE": _PAST,
    "ADAPTION_PROMPT": "It adds to the attention of blocks, which a Petals server cannot take. "
    "Tune with PROMPT_TUNING, P_TUNING or Petals' deep_ptune instead.",
    "LORA": "LoRA runs on the servers; name it with --active-adapter.",
    "XLORA": _MIXED,
    "POLY": _MIXED,
    "TRAINABLE_TOKENS": "It changes rows of the embedding matrix, which is a part of the model here. "
    "Merge it (merge_and_unload), save the whole model, and evaluate that with --model.",
}
# Every other kind: IA3, OFT, VERA, LN_TUNING and their like.
_INSIDE = (
    "It changes what the blocks compute, and of all such kinds a Petals server applies LoRA alone. Train LoRA and name "
    "it with --active-adapter, tune prompts, or serve the model that it was merged into, where PEFT can merge it."
)

_ENCODER = re.compile(r"prompt_encoder\.(?P<adapter>[^.]+)\.(?P<tensor>.+)")
_TASK_FACTORS = ("prefix_task_cols", "prefix_task_rows")


def read_peft_config(path: Path) -> dict[str, Any]:
    """Return the adapter's config, if it is prompt tuning of a kind that a swarm can run.

    Raises AdapterError, with the reason, for prefix tuning, LoRA and every other kind.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = str(config["peft_type"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterError(f"{path} is not a PEFT config: expected JSON with a `peft_type`.") from error
    if config.get("task_type") == "TOKEN_CLS":
        raise AdapterError(
            f"{path} is for token classification (task_type TOKEN_CLS): its head gives each token a label of its own, "
            "and none to the text. Expected SEQ_CLS or CAUSAL_LM."
        )
    if kind in _KINDS:
        return config
    *others, last = _KINDS
    raise AdapterError(
        f"{path} is a {kind:.80} adapter; expected {', '.join(others)} or {last}.\n  {_REFUSED.get(kind, _INSIDE)}"
    )


def read_peft(reader: AdapterReader, config: dict[str, Any], name: str, task: int | None = None) -> Adapter:
    """Return the prompts, and the head if there is one, of a PEFT adapter that `read_peft_config` let through.

    PEFT saves one tensor `prompt_embeddings` (prefix, hidden): for P_TUNING already encoded, for CPT with what
    training added. MULTITASK_PROMPT_TUNING has two more, `prefix_task_cols` (tasks, prefix, ranks) and
    `prefix_task_rows` (tasks, ranks, hidden): the prompts of a task are their product times the shared ones, value by
    value.

    task: which of several tasks. Raises AdapterError if keys are missing or misshapen, naming those expected and found.
    """
    if (config.get("num_transformer_submodules") or 1) != 1:
        raise AdapterError(
            f"{reader.path} is for a model with an encoder and a decoder (num_transformer_submodules "
            f"{config['num_transformer_submodules']}); expected 1, a decoder alone."
        )
    width = config.get("token_dim") or reader.hidden
    if width != reader.hidden:
        raise AdapterError(
            f"{reader.path} was tuned for another model ({config.get('base_model_name_or_path') or 'not named'}): "
            f"token_dim {width}; expected {reader.hidden}, the hidden size of this {reader.family.title}."
        )
    kind = _KINDS[config["peft_type"]]
    needed = {"prompt_embeddings": f"({config.get('num_virtual_tokens', 'prefix tokens')}, {reader.hidden})"}
    if kind == "peft-multitask_prompt_tuning":
        needed |= dict(zip(_TASK_FACTORS, ("(tasks, prefix, ranks)", f"(tasks, ranks, {reader.hidden})"), strict=True))
    if not needed.keys() <= reader.names:
        expected = "\n            ".join(f"{key}  {shape}" for key, shape in needed.items())
        raise AdapterError(
            f"{reader.path} has no prompt embeddings.\n  expected  {expected}\n  found     {describe(reader.tensors)}"
        )
    prompts = reader.prompts("prompt_embeddings")
    declared = config.get("num_virtual_tokens") or prompts.shape[0]
    if prompts.shape[0] != declared:
        raise AdapterError(
            f"{reader.path}: prompt_embeddings holds {prompts.shape[0]} tokens; expected {declared}, the "
            f"num_virtual_tokens of {PEFT_CONFIG}. Do the two files belong together?"
        )
    if kind == "peft-multitask_prompt_tuning":
        return _adapter(reader, name, kind, *_of_task(reader, prompts, _TASK_FACTORS, task))
    return _adapter(reader, name, kind, prompts)


def holds_peft_model(reader: AdapterReader) -> bool:
    """Return whether a file holds the state dict of a whole PEFT model, and no prompts under Petals' names."""
    is_petals = any(name.endswith("prompt_embeddings.weight") for name in reader.names)
    return not is_petals and any(_ENCODER.fullmatch(name) for name in reader.names)


def read_peft_model(reader: AdapterReader, name: str, task: int | None = None) -> Adapter:
    """Return the prompts, and the head if there is one, of the state dict of a whole PEFT model.

    Its prompts are under `prompt_encoder.{adapter}.embedding.weight` (prefix, hidden). task: as in `read_peft`.

    Raises AdapterError where prompts are there for several adapters, or would have to be computed from them first.
    """
    found = [match for each in sorted(reader.names) if (match := _ENCODER.fullmatch(each))]
    adapters = sorted({match["adapter"] for match in found})
    tensors = {match["tensor"]: match[0] for match in found}
    multitask = {"embedding.weight", *_TASK_FACTORS}
    if len(adapters) > 1:
        problem = f"holds the prompts of several adapters ({', '.join(adapters)}); expected those of one."
    elif tensors.keys() not in ({"embedding.weight"}, multitask):
        others = ", ".join(reader.shown(each) for key, each in tensors.items() if key not in multitask)
        problem = f"holds a prompt encoder whose prompts only PEFT can compute ({others})."
    elif (shape := reader.shape(tensors["embedding.weight"])) is not None and shape[-1:] != (reader.hidden,):
        raise AdapterError(
            f"{reader.path} holds a prompt encoder of shape {shape}; expected (prefix tokens, {reader.hidden}).\n"
            f"  If it is that of PREFIX_TUNING: {_PAST[0].lower()}{_PAST[1:]}\n"
            "  Otherwise it was tuned for another model."
        )
    else:
        prompts = reader.prompts(tensors["embedding.weight"])
        if len(tensors) == 1:
            return _adapter(reader, name, "peft-prompt_tuning", prompts)
        factors = [tensors[key] for key in _TASK_FACTORS]
        return _adapter(reader, name, "peft-multitask_prompt_tuning", *_of_task(reader, prompts, factors, task))
    raise AdapterError(f"{reader.path} {problem}\n  Save what PEFT computes of it: model.save_pretrained(FOLDER).")


def _of_task(
    reader: AdapterReader, shared: torch.Tensor, factors: Sequence[str], task: int | None
) -> tuple[torch.Tensor, int]:
    """Return the prompts of one task (prefix, hidden), float32, and its number.

    shared: (prefix, hidden). factors: the names of the two tensors that are multiplied for each task.
    """
    cols_name, rows_name = factors
    prefix = shared.shape[0]
    cols = reader.array(cols_name, f"(tasks, {prefix}, ranks)", None, prefix, None)
    tasks, _, ranks = cols.shape
    rows = reader.array(rows_name, f"({tasks}, {ranks}, {reader.hidden})", tasks, ranks, reader.hidden)
    if task is None and tasks == 1:
        task = 0
    if task is None or not 0 <= task < tasks:
        raise AdapterError(
            f"{reader.path} holds prompts for {tasks} tasks; expected --adapter-task, a number from 0 to {tasks - 1}, "
            f"found {'none' if task is None else task}."
        )
    return shared * (cols[task].float() @ rows[task].float()), task


def _adapter(reader: AdapterReader, name: str, kind: Kind, prompts: torch.Tensor, task: int | None = None) -> Adapter:
    head_weight, head_bias = reader.head()
    unused = reader.check_the_rest()
    # PEFT gives the model embeddings and no tokens, so that it cannot see any padding.
    return Adapter(name, kind, prompts, None, head_weight, head_bias, unused=unused, pooling="last", task=task)
