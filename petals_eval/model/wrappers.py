"""The names of a checkpoint's tensors without what the model was wrapped in when it was saved."""

import re
from collections.abc import Iterable

from petals_eval.errors import AdapterError
from petals_eval.model.families import FAMILIES, Family
from petals_eval.model.tensor_files import shown_name

__all__ = ["unwrapped"]

# What torch.compile, FSDP and activation checkpointing put around any module, at any depth.
_TRANSPARENT = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module)\.")
# Prompts as Petals names them; the prompt encoder of a whole PEFT model.
_PROMPTS = re.compile(
    r"(?P<around>(?:.+\.)?)(?:prompt_embeddings\.weight|(?P<encoder>prompt_encoder)\.[^.]+\.embedding\.weight)"
)


def unwrapped(names: Iterable[str], family: Family, where: object) -> dict[str, str]:
    """Return the names of all tensors without wrappers, and for each the one that it has in the file `where`.

    A wrapper that holds the model under an attribute (`module` of DistributedDataParallel, whatever a LightningModule
    calls it) is what stands in front of the prompts' name; it is removed from all names that begin so.

    Raises AdapterError where that leaves two tensors with one name: those of two models in one file, for example.

    >>> from petals_eval.model.families import FAMILIES
    >>> list(unwrapped(["net.model._orig_mod.prompt_embeddings.weight", "net.score.weight"], FAMILIES["llama"], "a.pt"))
    ['model.prompt_embeddings.weight', 'score.weight']
    """
    plain = [(_TRANSPARENT.sub("", name), name) for name in names]
    wrapper = next((found for name, _ in plain if (found := _wrapper(name, family))), "")
    stored: dict[str, str] = {}
    for name, stored_name in plain:
        bare = name.removeprefix(wrapper)
        if bare in stored:
            raise AdapterError(
                f"{where} holds two tensors that are {shown_name(bare)}: {shown_name(stored[bare])} and "
                f"{shown_name(stored_name)}. Expected one model; delete the other."
            )
        stored[bare] = stored_name
    return stored


def _wrapper(name: str, family: Family) -> str:
    """Return what stands in front of the model's own name of the prompts, if this is the name of prompts."""
    found = _PROMPTS.fullmatch(name)
    if found is None:
        return ""
    around = found["around"]
    if found["encoder"]:
        return around
    module = around.removesuffix(".").rpartition(".")[2]
    if module == family.base:
        return around.removesuffix(f"{family.base}.")
    # The bare base model was saved, unless another family's base has that name: then these are another model's prompts.
    return "" if any(module == other.base for other in FAMILIES.values()) else around
