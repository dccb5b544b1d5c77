"""The model families in one table: what of each stays at home, and under which names."""

from dataclasses import dataclass
from typing import Any, Literal

from petals_eval.errors import ModelError

__all__ = ["FAMILIES", "Family", "family_of"]


@dataclass(frozen=True)
class Family:
    """What the local side must know of one `model_type`.

    title: the family's name in messages.
    base: the base model's attribute in a causal LM: the prefix of its keys, and of Petals' prompt keys. Checkpoints of
        the bare model lack it.
    embeddings, embedding_norm, final_norm: modules of the base model; `embedding_norm` None where there is none.
    blocks: the base model's list of blocks.
    norm: "rms" (a weight) or "layer" (a weight and a bias).
    eps_field, blocks_field, hidden_field, positions_field: the config's names for the norm's epsilon, the number of
        blocks, the hidden size and the context in tokens (None: the family has no such limit).
    """

    model_type: str
    title: str
    base: str
    embeddings: str
    final_norm: str
    blocks: str
    norm: Literal["rms", "layer"]
    eps_field: str
    positions_field: str | None
    embedding_norm: str | None = None
    blocks_field: str = "num_hidden_layers"
    hidden_field: str = "hidden_size"

    def keys(self, module: str, parameter: str = "weight") -> tuple[str, str]:
        """Return the names that a parameter of the base model may have in a checkpoint, the usual one first."""
        return f"{self.base}.{module}.{parameter}", f"{module}.{parameter}"

    def num_blocks(self, config: Any) -> int:
        """Return how many blocks the model has."""
        return int(getattr(config, self.blocks_field))

    def hidden_size(self, config: Any) -> int:
        """Return the width of a hidden state."""
        return int(getattr(config, self.hidden_field))

    def context_limit(self, config: Any) -> int | None:
        """Return how many positions the model can read, tuned prompts included; None where nothing limits them (ALiBi).

        Where a config stretches rotary embeddings by a factor, the limit stretches with it: "linear" and "yarn" name
        the length before, other kinds the length after. "dynamic" names the length before, too, but beyond it a server
        answers by what it was sent before (`petals_eval.model.rotary`), so there the limit stays.
        """
        if self.positions_field is None or getattr(config, "alibi", False):
            return None
        limit = getattr(config, self.positions_field, None)
        if limit is None:
            return None
        # transformers 5 keeps these fields in `rope_parameters`, before that it was `rope_scaling`.
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        stretched = rope.get("rope_type", rope.get("type")) in ("linear", "yarn")
        if stretched and rope.get("original_max_position_embeddings", limit) == limit:
            return int(limit * float(rope.get("factor") or 1))
        return int(limit)


def _llama_like(model_type: str, title: str, **more: Any) -> Family:
    return Family(
        model_type,
        title,
        base="model",
        embeddings="embed_tokens",
        final_norm="norm",
        blocks="layers",
        norm="rms",
        eps_field="rms_norm_eps",
        positions_field="max_position_embeddings",
        **more,
    )


def _bloom_like(model_type: str, title: str, **more: Any) -> Family:
    return Family(
        model_type,
        title,
        base="transformer",
        embeddings="word_embeddings",
        final_norm="ln_f",
        blocks="h",
        norm="layer",
        eps_field="layer_norm_epsilon",
        **more,
    )


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        _llama_like("llama", "Llama"),
        _llama_like("mistral", "Mistral"),
        _llama_like("mixtral", "Mixtral"),
        _llama_like("qwen2", "Qwen2"),
        _llama_like("qwen3", "Qwen3"),
        _bloom_like(
            "bloom",
            "BLOOM",
            embedding_norm="word_embeddings_layernorm",
            positions_field=None,
        ),
        _bloom_like("falcon", "Falcon", positions_field="max_position_embeddings"),
    )
}


def family_of(config: Any) -> Family:
    """Return the family of a model by its config (anything with a `model_type`).

    Raises ModelError, naming the supported families, if it is none of them.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise ModelError(
            f"the model's config has model_type {model_type!r}; expected one of {', '.join(sorted(FAMILIES))}. "
            "Only models of these families can be evaluated."
        )
    return FAMILIES[model_type]
