"""The model families in one table: what of each stays at home, and under which names."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

from petals_eval.errors import ModelError

__all__ = ["FAMILIES", "Experts", "Family", "Norm", "family_of", "text_config"]

Norm = Literal["rms", "rms-float32", "rms-plus-one", "layer"]
"""How hidden states are normed, as Hugging Face's models round it.

rms: RMSNorm, whose weight is applied in the model's dtype. rms-float32: its weight is applied in float32.
rms-plus-one: the same, of 1 + weight. layer: LayerNorm, a weight and a bias.
"""


@dataclass(frozen=True)
class Experts:
    """Under which names in a block a checkpoint holds experts, which transformers 5 fuses in memory (`mlp.experts`).

    module: what holds router and experts; in memory it is `mlp`.
    gate_up, down: the matrices of one expert, in the order in which they are fused.
    """

    module: str
    gate_up: tuple[str, ...]
    down: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """What must be known of one `model_type`. The defaults are Llama's.

    title: the family's name in messages.
    base: the base model's attribute in a causal LM: the prefix of its keys, and of Petals' prompt keys. Checkpoints of
        the bare model lack it.
    embeddings, embedding_norm, final_norm: modules of the base model; `embedding_norm` None where there is none.
    blocks: the base model's list of blocks.
    norm: the kind of the norms at home.
    scales_embeddings: whether the embeddings are multiplied by the square root of the hidden size.
    logit_cap_field: the config's name for the bound that the LM head's logits approach: cap * tanh(logits / cap).
    experts: of a mixture of experts, their names in checkpoints.
    eps_field, blocks_field, hidden_field, positions_field: the config's names for the norm's epsilon, the number of
        blocks, the hidden size and the context in tokens (None: the family has no such limit).
    wrapper: the `model_type` of multimodal models whose language model is one of this family. They are read as text.
    """

    model_type: str
    title: str
    base: str = "model"
    embeddings: str = "embed_tokens"
    embedding_norm: str | None = None
    final_norm: str = "norm"
    blocks: str = "layers"
    norm: Norm = "rms"
    scales_embeddings: bool = False
    logit_cap_field: str | None = None
    experts: Experts | None = None
    eps_field: str = "rms_norm_eps"
    positions_field: str | None = "max_position_embeddings"
    blocks_field: str = "num_hidden_layers"
    hidden_field: str = "hidden_size"
    wrapper: str | None = None

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
        answers by what it was sent before (`petals_eval.model.rotary`), so there the limit stays. Where each kind of
        layer has parameters of its own (Gemma 3), the config names the length after.
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

    def logit_cap(self, config: Any) -> float | None:
        """Return the bound of the LM head's logits; None where there is none."""
        cap = getattr(config, self.logit_cap_field, None) if self.logit_cap_field else None
        return None if cap is None else float(cap)


_BLOOM_LIKE: dict[str, Any] = {
    "base": "transformer",
    "embeddings": "word_embeddings",
    "final_norm": "ln_f",
    "blocks": "h",
    "norm": "layer",
    "eps_field": "layer_norm_epsilon",
}
_GEMMA_LIKE: dict[str, Any] = {
    "norm": "rms-plus-one",
    "scales_embeddings": True,
    "logit_cap_field": "final_logit_softcapping",
}
_GEMMA_4_LIKE = _GEMMA_LIKE | {"norm": "rms-float32"}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "Llama"),
        Family("mistral", "Mistral"),
        Family(
            "mixtral",
            "Mixtral",
            experts=Experts("block_sparse_moe", gate_up=("w1", "w3"), down=("w2",)),
        ),
        Family("qwen2", "Qwen2"),
        Family("qwen3", "Qwen3"),
        Family("gemma2", "Gemma 2", **_GEMMA_LIKE),
        Family("gemma3_text", "Gemma 3", **_GEMMA_LIKE, wrapper="gemma3"),
        Family("gemma4_text", "Gemma 4", **_GEMMA_4_LIKE, wrapper="gemma4"),
        Family("gemma4_unified_text", "Gemma 4 (unified)", **_GEMMA_4_LIKE, wrapper="gemma4_unified"),
        Family("phi3", "Phi-3"),
        Family("olmo2", "OLMo 2", norm="rms-float32"),
        Family(
            "deepseek_v3",
            "DeepSeek-V3",
            experts=Experts("mlp", gate_up=("gate_proj", "up_proj"), down=("down_proj",)),
        ),
        Family(
            "bloom",
            "BLOOM",
            **_BLOOM_LIKE,
            embedding_norm="word_embeddings_layernorm",
            positions_field=None,
        ),
        Family("falcon", "Falcon", **_BLOOM_LIKE),
    )
}

_WRAPPERS = {family.wrapper: family for family in FAMILIES.values() if family.wrapper is not None}

# What blocks of these take beside the hidden states is no part of a Petals call (`swarm/wire/PROTOCOL.md`, section 4),
# though relatives of Petals have ways of their own to send it.
_REFUSED_TYPES = ("gemma3n", "gemma3n_text")
_EXTRA_FIELDS = ("hidden_size_per_layer_input", "num_kv_shared_layers")
_EXTRA_INPUTS = (
    "its blocks take an input of their own for each token beside the hidden states, or the keys and values of earlier "
    "blocks, and a Petals call carries hidden states and prompts alone"
)


def family_of(config: Any) -> Family:
    """Return the family of a model by its config (anything with a `model_type`); of a multimodal one, its text's.

    Raises ModelError, naming the supported families, if it is none of them; and where a swarm cannot compute it.
    """
    model_type: Any = getattr(config, "model_type", None)
    if model_type in _REFUSED_TYPES:
        raise ModelError(f"a model of model_type {model_type!r} cannot be evaluated: {_EXTRA_INPUTS}.")
    family = (FAMILIES | _WRAPPERS).get(str(model_type))
    if family is None:
        raise ModelError(
            f"the model's config has model_type {model_type!r}; expected one of "
            f"{', '.join(sorted(FAMILIES.keys() | _WRAPPERS.keys()))}. Only models of these families can be evaluated."
        )
    text = text_config(config)
    if found := [field for field in _EXTRA_FIELDS if getattr(text, field, None)]:
        raise ModelError(f"this {family.title} cannot be evaluated: {_EXTRA_INPUTS} (config: {', '.join(found)}).")
    if getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        raise ModelError(
            f"the config of this {family.title} says use_bidirectional_attention: its tokens read those after them, "
            "and the blocks of a Petals server only those before. It cannot be evaluated."
        )
    return family


def text_config(config: Any) -> Any:
    """Return the config of the language model in a multimodal one that is read as text; of others, the config itself.

    Of a `text_config` that is a mapping the keys become attributes.
    """
    if str(getattr(config, "model_type", None)) not in _WRAPPERS:
        return config
    inner = getattr(config, "text_config", None) or {}
    return SimpleNamespace(**inner) if isinstance(inner, dict) else inner
