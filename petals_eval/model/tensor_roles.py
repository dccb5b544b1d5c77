"""What a tensor of a checkpoint is there for, by its name: so that none is left out without a word."""

import re
from collections.abc import Iterable
from enum import Enum

from petals_eval.errors import CallerError
from petals_eval.model.families import Family
from petals_eval.model.tensor_files import shown_name

__all__ = ["Role", "block_number", "find_head", "local_key", "looks_like_head", "role_of"]


class Role(Enum):
    """What a tensor is there for.

    LOCAL: embeddings, norms around the blocks and word head, which stay at home. BLOCK: one of the model's blocks,
    which servers have. HEAD: a classification head of a single linear layer. EARLIER_HEAD: what PEFT keeps of a head
    before its training. LORA: an update of the weights by low-rank factors. NO_EFFECT: a buffer that is computed anew,
    or a module that no answer passes. OTHER: anything else, which no evaluation takes into account.
    """

    LOCAL = "local"
    BLOCK = "block"
    HEAD = "head"
    EARLIER_HEAD = "earlier head"
    LORA = "lora"
    NO_EFFECT = "no effect"
    OTHER = "other"


# Wrapped for data-parallel training; PEFT's two layers around a model.
_WRAPPERS = ("module.", "base_model.model.", "base_model.")
# PEFT keeps a module that was trained beside the prompts under `modules_to_save`, below the adapter's name, and the
# module as it was before under `original_module`.
_PEFT_PLACES = re.compile(r"\.(?:modules_to_save(?:\.[^.]+)?|original_module)(?=\.(?:weight|bias)$)")
# A whole PEFT model's state dict holds the embeddings once more, under this name whatever the family.
_PEFT_EMBEDDINGS = "word_embeddings.weight"
# An adapter may have any name. Below it a number is the position in a stack of modules, and of what stands beside it
# there (an activation, for one) a file of weights says nothing.
_HEAD = re.compile(
    r"(?:(?:module|base_model|model|transformer)\.)*(?:score|classifier)"
    r"(?:\.modules_to_save(?:\.[^.]+(?:\.(?!base_layer|original_module|lora_)[^.]*[^.\d][^.]*)*)?)?\.(?P<part>weight|bias)"
)
_EARLIER_HEAD = re.compile(
    r"(?:(?:module|base_model|model|transformer)\.)*(?:score|classifier)\.original_module\.(?:weight|bias)"
)
_HEAD_PART = re.compile(r"score|classif\w*|\w*_?head|cls|pooler|dense|out_proj|qa_outputs")
# Buffers that the modules compute for themselves, and the value head of reinforcement learning.
_NO_EFFECT = re.compile(
    r"(?:.*\.)?(?:rotary_emb\.(?:\w*inv_freq|cos_cached|sin_cached)|masked_bias|position_ids)|v_head\..*"
)


def role_of(name: str, family: Family) -> Role:
    """Return the role of the tensor `name` in a checkpoint of this family, or of prompts tuned for it.

    >>> from petals_eval.model.families import FAMILIES
    >>> role_of("base_model.model.score.modules_to_save.sst2-v1.weight", FAMILIES["llama"]).name
    'HEAD'
    >>> role_of("score.modules_to_save.default.2.weight", FAMILIES["llama"]).name
    'OTHER'
    >>> role_of("transformer.h.3.mlp.dense_4h_to_h.bias", FAMILIES["bloom"]).name
    'BLOCK'
    """
    if "lora_" in name:
        return Role.LORA
    if _HEAD.fullmatch(name):
        return Role.HEAD
    if _EARLIER_HEAD.fullmatch(name):
        return Role.EARLIER_HEAD
    if _NO_EFFECT.fullmatch(name):
        return Role.NO_EFFECT
    if local_key(name, family) is not None:
        return Role.LOCAL
    return Role.OTHER if block_number(name, family) is None else Role.BLOCK


def block_number(name: str, family: Family) -> int | None:
    """Return the number of the block that a tensor belongs to; None for one that is no part of a block."""
    found = re.match(rf"{re.escape(family.blocks)}\.(\d+)\.", _bare(name, family))
    return None if found is None else int(found[1])


def looks_like_head(name: str) -> bool:
    """Return whether a tensor of Role.OTHER may be part of a classification head, by its name."""
    parts = name.split(".")
    return "lm_head" not in parts and any(_HEAD_PART.fullmatch(part) for part in parts)


def local_key(name: str, family: Family) -> tuple[str, str] | None:
    """Return the module (by the family's table, or `lm_head`) and parameter that a tensor of Role.LOCAL is, or None."""
    module, _, parameter = _PEFT_PLACES.sub("", _bare(name, family)).rpartition(".")
    if name == _PEFT_EMBEDDINGS:
        module = family.embeddings
    parameters: dict[str, tuple[str, ...]] = {family.embeddings: ("weight",), "lm_head": ("weight",)}
    for norm in (family.embedding_norm, family.final_norm):
        if norm is not None:
            parameters[norm] = ("weight", "bias") if family.norm == "layer" else ("weight",)
    return (module, parameter) if parameter in parameters.get(module, ()) else None


def find_head(names: Iterable[str], where: object, error: type[CallerError]) -> tuple[str | None, str | None]:
    """Return the names of a classification head's weight and bias, whoever saved it; None for what there is not.

    Raises `error`, naming them, where there is more than one head in the file `where`, or a bias without its weight.
    """
    found: dict[str, list[str]] = {"weight": [], "bias": []}
    for name in sorted(names):
        if match := _HEAD.fullmatch(name):
            found[match["part"]].append(name)
    if any(len(each) > 1 for each in found.values()):
        raise error(
            f"{where} holds more than one head: {', '.join(map(shown_name, found['weight'] + found['bias']))}. "
            "Expected one; delete the other."
        )
    weight, bias = (next(iter(each), None) for each in found.values())
    if weight is None and bias is not None:
        raise error(f"{where} holds {shown_name(bias)} without the weight that belongs to it; expected both.")
    return weight, bias


def _bare(name: str, family: Family) -> str:
    """Return the name inside the base model, without what a model was wrapped in."""
    while wrapper := next((each for each in _WRAPPERS if name.startswith(each)), None):
        name = name.removeprefix(wrapper)
    return name.removeprefix(f"{family.base}.")
