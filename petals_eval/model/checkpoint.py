"""A model's config and the few of its tensors that stay at home, from a local folder or from the hub."""

import json
import re
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from petals_eval.errors import ModelError
from petals_eval.model.families import Family, family_of, text_config
from petals_eval.model.sources import Folder, Source, first_found, open_source
from petals_eval.model.tensor_files import Tensors, describe, open_index, open_tensors

__all__ = ["Checkpoint", "load_tokenizer"]

_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

# The tensors of a multimodal model that is read as text, by their names: transformers before 4.52, those after it, and
# the base model saved alone.
_LANGUAGE_MODEL = re.compile(r"(?:model\.)?language_model\.(?:model\.)?(?P<name>.+)")
_OTHER_MODALITIES = re.compile(
    r"(?:model\.)?(?:vision_tower|audio_tower|embed_vision|embed_audio|vision_embedder|multi_modal_projector)\..+"
)
# What the config of such a model says of the whole, its language model included.
_OF_THE_WHOLE = ("architectures", "dtype", "eos_token_id", "id2label", "problem_type", "tie_word_embeddings")


class Checkpoint:
    """A model as it lies on disk or on the hub.

    Of a multimodal model it is the language model alone, its tensors under the names that they have without the rest.

    config: its Hugging Face config. family: its Family.
    name: the folder's own name or the hub name, never a path. revision: the hub's commit, None for a folder.
    """

    def __init__(self, source: Source):
        self._source = source
        self._weights: Tensors | None = None
        self._stored_names: dict[str, str] = {}
        self.config, self._is_multimodal = _read_config(source)
        self.family: Family = family_of(self.config)
        self.name = source.name

    @classmethod
    def open(
        cls,
        model: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
    ) -> "Checkpoint":
        """Read the config of the folder or hub repository `model`; the weights are not touched yet.

        Raises ModelError if there is no such model, or if its family is not supported.
        """
        return cls(open_source(model, revision=revision, token=token, cache_dir=cache_dir, error=ModelError))

    @property
    def revision(self) -> str | None:
        return self._source.revision

    @property
    def is_folder(self) -> bool:
        """Whether it lies on this machine, so that reading any tensor of it downloads nothing."""
        return isinstance(self._source, Folder)

    def names(self) -> list[str]:
        """Return the names of all its tensors, those of the blocks too. Of shards only the index is read."""
        self._tensors()
        return list(self._stored_names)

    def find(self, *names: str) -> torch.Tensor | None:
        """Return the tensor under the first of these names that there is, or None. Only its shard is opened."""
        weights = self._tensors()
        stored = next((self._stored_names[name] for name in names if name in self._stored_names), None)
        return None if stored is None else weights.take(stored)

    def read(self, *names: str) -> torch.Tensor:
        """Return what `find` does. Raises ModelError, which names the keys expected and found, if there is none."""
        tensor = self.find(*names)
        if tensor is None:
            raise ModelError(
                f"the weights of {self._source} lack a tensor that stays at home.\n"
                f"  expected  {' or '.join(names)}\n"
                f"  found     {describe(self._tensors())}\n"
                f"  Is this a whole {self.family.title} checkpoint?"
            )
        return tensor

    def generation_config(self) -> dict[str, Any]:
        """Return what lies with the model about generating with it; nothing where there is no such file.

        Raises ModelError for a file that is something else.
        """
        path = self._source.find("generation_config.json")
        if path is None:
            return {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError("expected keys and values")
        except (OSError, ValueError, RecursionError) as error:
            raise ModelError(f"{path} is no generation config: {error}") from error
        return found

    def load_tokenizer(self) -> Any:
        """Return the model's own tokenizer. Raises ModelError if there is none."""
        return load_tokenizer(self._source)

    def _tensors(self) -> Tensors:
        if self._weights is None:
            path = first_found(self._source, _WEIGHTS)
            if path is None:
                raise ModelError(f"{self._source} holds no weights; expected one of {', '.join(_WEIGHTS)}.")
            is_index = path.name.endswith(".index.json")
            self._weights = open_index(self._source, path, ModelError) if is_index else open_tensors(path, ModelError)
            self._stored_names = {self._name_in_text(name): name for name in self._weights.names()}
            self._stored_names.pop("", None)
        return self._weights

    def _name_in_text(self, stored: str) -> str:
        """Return the name of a tensor in the language model alone; empty for one that text does not pass."""
        if not self._is_multimodal:
            return stored
        if _OTHER_MODALITIES.fullmatch(stored):
            return ""
        inside = _LANGUAGE_MODEL.fullmatch(stored)
        if inside is None or inside["name"].startswith("lm_head."):
            return stored if inside is None else inside["name"]
        return f"{self.family.base}.{inside['name']}"


_UNREADABLE = (OSError, ValueError, KeyError, TypeError, ImportError)


def load_tokenizer(source: Source) -> Any:
    """Return the tokenizer that lies with a model. Raises ModelError if there is none."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    place, options = source.for_transformers()
    try:
        try:
            return AutoTokenizer.from_pretrained(place, trust_remote_code=False, **options)
        except ValueError:
            # transformers 5 names classes that older ones lack, yet tokenizer.json says all of the same tokenizer.
            if source.find("tokenizer.json") is None:
                raise
            return PreTrainedTokenizerFast.from_pretrained(place, **options)
    except Exception as error:  # tokenizers raises Exception itself for a file it cannot read
        if type(error) is not Exception and not isinstance(error, _UNREADABLE):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{source} has no tokenizer that can be loaded by transformers {version('transformers')} and tokenizers "
            f"{version('tokenizers')}: {reason}. Files written by newer releases may need these."
        ) from error


def _read_config(source: Source) -> tuple[Any, bool]:
    """Return the config of the model, or of the language model in a multimodal one, and whether it is in one."""
    path = source.find("config.json")
    if path is None:
        raise ModelError(f"{source} has no config.json; expected a model in Hugging Face's format.")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        model_type = fields.get("model_type")
        if not isinstance(model_type, str | None):
            raise ValueError(f"its model_type is {str(model_type)[:80]}")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} is not a model's config: {error}") from error
    family = family_of(SimpleNamespace(model_type=model_type))  # before transformers says it less plainly

    import huggingface_hub
    import transformers

    # Newer hubs check a config's fields by an error class of their own, which is no ValueError.
    invalid = getattr(getattr(huggingface_hub, "errors", None), "StrictDataclassError", ValueError)
    try:
        config = transformers.AutoConfig.from_pretrained(str(path.parent), trust_remote_code=False)
    except (*_UNREADABLE, ArithmeticError, AttributeError, LookupError, RuntimeError, invalid) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"transformers {transformers.__version__} cannot read {path} ({family.title}): {reason}\n"
            "  Correct the config, or use a transformers that knows this family."
        ) from error
    inner = text_config(config)
    for field in _OF_THE_WHOLE if inner is not config else ():
        if getattr(config, field, None) is not None:
            setattr(inner, field, getattr(config, field))
    return inner, inner is not config
