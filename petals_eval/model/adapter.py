"""A prompt-tuned checkpoint, checked against the model it is for."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from petals_eval.errors import AdapterError
from petals_eval.model.families import Family
from petals_eval.model.pooling import Pooling
from petals_eval.model.tensor_files import Tensors, shown_name, tensor_bytes
from petals_eval.model.tensor_roles import Role, find_head, local_key, role_of
from petals_eval.model.wrappers import unwrapped

if TYPE_CHECKING:
    from petals_eval.model.checkpoint import Checkpoint

__all__ = ["Adapter", "AdapterReader", "Kind", "hash_tensors"]

Kind = Literal[
    "none",
    "ptune",
    "deep_ptune",
    "peft-prompt_tuning",
    "peft-p_tuning",
    "peft-multitask_prompt_tuning",
    "peft-cpt",
]


@dataclass(frozen=True, eq=False)
class Adapter:
    """Tuned prompts and the head that was trained with them.

    name: the folder's or file's own name, the hub name, or the one it was given; never a path.
    prompts: (prefix, hidden) float32, put in front of the embedded text; None: no prompts.
    deep_prompts: (blocks, 1, prefix, hidden) float32, added to the first `prefix` positions of each block's input; or
        None. Petals casts both to the dtype of the embeddings when it uses them.
    head_weight: (labels, hidden) and head_bias: (labels,) as stored; None where the checkpoint holds no head.
    pooling: which token that head reads, as the library does that trained it.
    unused: tensors of the checkpoint that are not needed and change no answer, by name.
    task: of prompts for several tasks (PEFT's MULTITASK_PROMPT_TUNING) the one that these are for, counted from 0.
    sha256: over names, shapes, dtypes and bytes of these tensors: the same on every machine and in every file format.
    """

    name: str
    kind: Kind
    prompts: torch.Tensor | None = None
    deep_prompts: torch.Tensor | None = None
    head_weight: torch.Tensor | None = None
    head_bias: torch.Tensor | None = None
    sha256: str = ""
    pooling: Pooling = "last-not-pad"
    unused: tuple[str, ...] = ()
    task: int | None = None

    def __post_init__(self) -> None:
        if not self.sha256:
            object.__setattr__(self, "sha256", hash_tensors(self._tensors()))

    @property
    def prefix_length(self) -> int:
        """How many tokens the prompts take in front of every text."""
        return 0 if self.prompts is None else self.prompts.shape[0]

    def without_prompts(self) -> "Adapter":
        """Return the same head without the prompts: what the prompts are compared with."""
        return replace(
            self, name=f"{self.name} without prompts", kind="none", prompts=None, deep_prompts=None, sha256=""
        )

    def _tensors(self) -> dict[str, torch.Tensor]:
        named = {
            "prompts": self.prompts,
            "deep_prompts": self.deep_prompts,
            "head_weight": self.head_weight,
            "head_bias": self.head_bias,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def hash_tensors(tensors: dict[str, torch.Tensor]) -> str:
    """Return a SHA-256 over names, shapes, dtypes and bytes (little-endian, as on every machine hivemind runs on)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


class AdapterReader:
    """Takes checked tensors out of one adapter file. Every problem becomes an AdapterError that names the file.

    names: of the tensors, without what the model was wrapped in when they were saved (`petals_eval.model.wrappers`).
    checkpoint: of the model that the prompts are for, to hold what the file has of that model against; None: there is
        nothing to hold it against.
    """

    def __init__(self, path: Path, tensors: Tensors, family: Family, config: Any, checkpoint: "Checkpoint | None"):
        self.path = path
        self.tensors = tensors
        self.family = family
        self.hidden = family.hidden_size(config)
        self.blocks = family.num_blocks(config)
        self.context = family.context_limit(config)
        self._stored = unwrapped(tensors.names(), family, path)
        self.names = set(self._stored)
        self._checkpoint = checkpoint
        self._taken: set[str] = set()

    def first(self, *names: str) -> str | None:
        """Return the first of these names that the file has."""
        return next((name for name in names if name in self.names), None)

    def matrix(self, name: str, expected: str, columns: int) -> torch.Tensor:
        """Return the tensor `name`, finite and of shape (rows, columns), as stored. expected: the shape in words."""
        return self.array(name, expected, None, columns)

    def array(self, name: str, expected: str, *shape: int | None) -> torch.Tensor:
        """Return the tensor `name`, finite, not empty and of this shape, as stored. None: any length.

        expected: the shape in words.
        """
        tensor = self._take(name)
        fits = tensor.ndim == len(shape) and all(
            found == wanted or (wanted is None and found > 0) for found, wanted in zip(tensor.shape, shape, strict=True)
        )
        if not fits:
            raise AdapterError(
                f"{self.path}: {self.shown(name)} has the wrong shape for this {self.family.title} "
                f"(hidden size {self.hidden}, {self.blocks} blocks).\n"
                f"  expected  {expected}\n  found     {tuple(tensor.shape)}\n"
                "  Was it tuned for another model?"
            )
        return self._checked(name, tensor)

    def prompts(self, name: str) -> torch.Tensor:
        """(prefix, hidden) float32."""
        prompts = self.matrix(name, f"(prefix tokens, {self.hidden})", self.hidden)
        if self.context is not None and prompts.shape[0] >= self.context:
            raise AdapterError(
                f"{self.path}: {self.shown(name)} holds {prompts.shape[0]} prompt tokens, which leaves no room for "
                f"text: the model reads {self.context} positions. Was it tuned for another model?"
            )
        return prompts.float()

    def head(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the file's head: (labels, hidden) and (labels,) or None, as stored."""
        weight, bias = find_head(self.names, self.path, AdapterError)
        if weight is None:
            return None, None
        matrix = self.matrix(weight, f"(labels, {self.hidden})", self.hidden)
        if bias is None:
            return matrix, None
        vector = self._take(bias)
        if tuple(vector.shape) != (matrix.shape[0],):
            raise AdapterError(
                f"{self.path}: {self.shown(bias)} has the wrong shape.\n"
                f"  expected  ({matrix.shape[0]},), a number for each label of {self.shown(weight)}\n"
                f"  found     {tuple(vector.shape)}"
            )
        return matrix, self._checked(bias, vector)

    def check_the_rest(self) -> tuple[str, ...]:
        """Return the names (in the file) of the tensors that were not taken, once each is known to change no answer.

        A tensor of the model's own is harmless where it is equal to that model's.
        Raises AdapterError, naming it, for one that an evaluation would leave out without a word: another head, a
        trained word head or embedding, LoRA, weights of blocks.
        """
        rest = sorted(self.names - self._taken)
        for name in rest:
            if problem := self._why_needed(name, role_of(name, self.family)):
                raise AdapterError(
                    f"{self.path} holds {self.shown(name)}, which an evaluation would leave out: {problem}\n"
                    "  Expected tuned prompts, the head that was trained with them, and nothing else that was trained. "
                    "Save these alone, or remove the tensor if it does not matter."
                )
        return tuple(sorted(self._stored[name] for name in rest))

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor; None where telling it would mean opening one more file."""
        return self.tensors.shape(self._stored[name])

    def shown(self, name: str) -> str:
        """Return the name that a tensor has in the file, safe on a terminal."""
        return shown_name(self._stored[name])

    def _why_needed(self, name: str, role: Role) -> str | None:
        """Return what is wrong with leaving this tensor out; None where that changes nothing."""
        if role is Role.NO_EFFECT:
            return None
        if role is Role.EARLIER_HEAD:
            has_head = any(role_of(taken, self.family) is Role.HEAD for taken in self._taken)
            return None if has_head else "it is a head from before its training, and the trained one is not there."
        if role is Role.LORA:
            return "LoRA runs inside the blocks, so it belongs on the servers. Name it with --active-adapter there."
        if role is Role.LOCAL:
            own = self._own_local(name)
            if own is not None and _same_values(self._read(name), own):
                return None
            return (
                "it is a part of the model that stays at home, and not equal to the model's own: was it trained, too?"
            )
        if role is Role.BLOCK:
            own = self._own_block(name)
            if own is not None and _same_values(self._read(name), own):
                return None
            differs = "cannot be held against" if own is None else "differs from"
            return f"blocks are computed by servers, from their own weights, and this one {differs} the model's own."
        if self.shape(name) == () and not self._read(name).is_floating_point():
            return None  # a count, such as that of the epochs
        return "no module of that name is known here. A head is read under score.weight or classifier.weight."

    def _own_local(self, name: str) -> torch.Tensor | None:
        key = local_key(name, self.family)
        if self._checkpoint is None or key is None:
            return None
        own = self._checkpoint.find(*self.family.keys(*key))
        if own is None and key[0] == "lm_head" and getattr(self._checkpoint.config, "tie_word_embeddings", False):
            own = self._checkpoint.find(*self.family.keys(self.family.embeddings))
        return own

    def _own_block(self, name: str) -> torch.Tensor | None:
        """Only where the model's weights lie on this machine: nobody should download all of a model for this."""
        if self._checkpoint is None or not self._checkpoint.is_folder:
            return None
        place = name[name.index(f"{self.family.blocks}.") :]
        return self._checkpoint.find(f"{self.family.base}.{place}", place)

    def _take(self, name: str) -> torch.Tensor:
        self._taken.add(name)
        return self._read(name)

    def _read(self, name: str) -> torch.Tensor:
        return self.tensors.take(self._stored[name])

    def _checked(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            raise AdapterError(f"{self.path}: {self.shown(name)} is {tensor.dtype}; expected floating point numbers.")
        tensor = tensor.detach().clone()  # of its own: the file may be mapped into memory
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise AdapterError(
                f"{self.path}: {self.shown(name)} holds {bad} values that are not finite (NaN or infinite); expected "
                "none. Did the training diverge? Take an earlier checkpoint."
            )
        return tensor


_ROWS_COMPARED = 8192  # at once: an embedding matrix may have gigabytes


def _same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors are equal, or one is the other rounded to its dtype."""
    if one.shape != other.shape:
        return False
    rows = max(1, one.shape[0] if one.ndim else 1)
    pairs = zip(one.reshape(rows, -1).split(_ROWS_COMPARED), other.reshape(rows, -1).split(_ROWS_COMPARED), strict=True)
    return all(torch.equal(part, own.to(part.dtype)) or torch.equal(part.to(own.dtype), own) for part, own in pairs)
