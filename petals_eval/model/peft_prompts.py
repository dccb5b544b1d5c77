"""Prompts as PEFT keeps them: `adapter_config.json` beside `adapter_model.safetensors` or `.bin`."""

import json
from pathlib import Path
from typing import Any

from petals_eval.errors import AdapterError
from petals_eval.model.adapter import Adapter, AdapterReader, Kind
from petals_eval.model.tensor_files import describe

__all__ = ["PEFT_CONFIG", "PEFT_WEIGHTS", "read_peft", "read_peft_config"]

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

_KINDS: dict[str, Kind] = {"PROMPT_TUNING": "peft-prompt_tuning", "P_TUNING": "peft-p_tuning"}


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
    reasons = {
        "PREFIX_TUNING": "It holds past keys and values for the attention of every block, which a Petals server "
        "cannot take. Tune with PROMPT_TUNING, P_TUNING or Petals' deep_ptune instead.",
        "LORA": "LoRA runs on the servers; name it with --active-adapter.",
    }
    reason = reasons.get(kind, "Only tuned prompts can be used with blocks that run elsewhere.")
    raise AdapterError(f"{path} is a {kind:.80} adapter; expected {' or '.join(_KINDS)}.\n  {reason}")


def read_peft(reader: AdapterReader, config: dict[str, Any], name: str) -> Adapter:
    """Return the prompts, and the head if there is one, of a PEFT adapter that `read_peft_config` let through.

    PEFT saves one tensor `prompt_embeddings` (prefix, hidden), for P_TUNING already encoded.

    Raises AdapterError if keys are missing or misshapen, naming those expected and found.
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
    if "prompt_embeddings" not in reader.names:
        raise AdapterError(
            f"{reader.path} has no prompt embeddings.\n"
            f"  expected  prompt_embeddings  ({config.get('num_virtual_tokens', 'prefix tokens')}, {reader.hidden})\n"
            f"  found     {describe(reader.tensors)}"
        )
    prompts = reader.prompts("prompt_embeddings")
    declared = config.get("num_virtual_tokens") or prompts.shape[0]
    if prompts.shape[0] != declared:
        raise AdapterError(
            f"{reader.path}: prompt_embeddings holds {prompts.shape[0]} tokens; expected {declared}, the "
            f"num_virtual_tokens of {PEFT_CONFIG}. Do the two files belong together?"
        )
    head_weight, head_bias = reader.head()
    unused = reader.check_the_rest()
    # PEFT gives the model embeddings and no tokens, so that it cannot see any padding.
    return Adapter(
        name, _KINDS[config["peft_type"]], prompts, None, head_weight, head_bias, unused=unused, pooling="last"
    )
