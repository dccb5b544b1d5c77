"""What a model keeps at home: embeddings before the remote blocks, the final norm and the heads after them."""

from abc import ABC, abstractmethod
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from torch.nn import functional

from petals_eval.data.batching import MicroBatch
from petals_eval.errors import AdapterError, ModelError, RequestTooLargeError
from petals_eval.model.adapter import Adapter, hash_tensors
from petals_eval.model.checkpoint import Checkpoint
from petals_eval.model.families import Family
from petals_eval.model.norms import RMSNorm

__all__ = ["LocalModel", "LocalPart"]

# Logits computed at once: positions times vocabulary. Bounds the memory of a head over many positions (64 MiB each in
# float32 for the logits and what log-sum-exp makes of them).
_LOGITS_AT_ONCE = 1 << 24


class Answerable(Protocol):
    """What the head must know of a request (`petals_eval.tasks.requests.Request` is one)."""

    @property
    def input_ids(self) -> tuple[int, ...]: ...

    @property
    def targets(self) -> tuple[tuple[int, int], ...]: ...


R = TypeVar("R", bound=Answerable)


class LocalPart(nn.Module, ABC):
    """What a model computes at home: text into the first block's input, the last block's output into answers.

    config, family, num_blocks, hidden_size, context: of the whole model, whose blocks are elsewhere.
    fingerprint: model, revision, dtype, sha256 and lm_head_sha256, as they stand in a run's manifest.

    Where the tensors come from is a subclass's business: it sets embeddings, embedding_norm, norm and the fingerprint,
    and has a tokenizer and the heads.
    """

    embeddings: nn.Embedding
    embedding_norm: nn.Module
    norm: nn.Module
    fingerprint: dict[str, str | None]

    def __init__(self, config: Any, family: Family):
        super().__init__()
        self.config = config
        self.family = family
        self.num_blocks = family.num_blocks(config)
        self.hidden_size = family.hidden_size(config)
        self.context = family.context_limit(config)
        self.embedding_norm = nn.Identity()

    @property
    @abstractmethod
    def tokenizer(self) -> Any:
        """The model's tokenizer, loaded when first asked for. Raises ModelError if there is none."""

    @abstractmethod
    def _class_logits(self, normed: torch.Tensor, adapter: Adapter | None) -> torch.Tensor:
        """Normed (rows, hidden) -> (rows, labels) float32 on the CPU. Raises AdapterError if there is no class head."""

    @abstractmethod
    def _lm_logits(self, normed: torch.Tensor) -> torch.Tensor:
        """Normed (rows, hidden) -> (rows, vocabulary). Raises ModelError if there is no LM head."""

    @abstractmethod
    def _lm_vocabulary(self) -> int:
        """How many tokens the LM head scores. Raises ModelError if there is no LM head."""

    @property
    def dtype(self) -> torch.dtype:
        """What the local computing is done in."""
        return self.embeddings.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the local tensors are and the local computing is done."""
        return self.embeddings.weight.device

    def check_length(self, tokens: int, prefix: int) -> None:
        """Raise RequestTooLargeError if `prefix` prompt tokens and `tokens` of text exceed the model's context."""
        if self.context is not None and prefix + tokens > self.context:
            room = max(0, self.context - prefix)
            raise RequestTooLargeError(
                f"{prefix} prompt tokens and {tokens} tokens of text are {prefix + tokens} positions; this "
                f"{self.family.title} reads {self.context} at most. Lower the task's max_length to {room}."
            )

    def embed(self, input_ids: torch.Tensor, adapter: Adapter | None = None) -> torch.Tensor:
        """The input of the first block: prompts, then the text's embeddings.

        input_ids: int64 (batch, seq). Returns (batch, prefix + seq, hidden) in the model's dtype.
        BLOOM's prompts come before its embedding layernorm, which then norms them too (section 6 of the wire).

        Raises ModelError if a token is outside the vocabulary, AdapterError if the prompts are another model's.
        """
        vocabulary = self.embeddings.weight.shape[0]
        if input_ids.numel() and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < vocabulary:
            raise ModelError(
                f"tokens {int(input_ids.min())} to {int(input_ids.max())} were given to a model whose vocabulary is "
                f"0 to {vocabulary - 1}. Use the tokenizer that belongs to the model."
            )
        hidden = self.embeddings(input_ids.to(self.device))
        if adapter is not None and adapter.prompts is not None:
            self._check_width(adapter.name, "prompts", adapter.prompts)
            prompts = adapter.prompts.to(self.device, self.dtype)
            hidden = torch.cat([prompts.expand(hidden.shape[0], -1, -1), hidden], dim=1)
        return self.embedding_norm(hidden)

    def head(self, hidden: torch.Tensor, batch: MicroBatch[R], adapter: Adapter | None = None) -> list[torch.Tensor]:
        """The answers to a micro-batch from the last block's output.

        hidden: (batch, prefix + seq, hidden) of any dtype; it is cast to the model's dtype before the norm, as Petals
        does. Only the positions wanted go through norm and head.

        Returns one float32 tensor on the CPU for each request: (labels,) logits of the class head at its last token, or
        (targets,) natural-log likelihoods by the LM head. The class head is the adapter's, or else the checkpoint's.

        Raises AdapterError if there is no class head, ModelError if there is no LM head or a target is out of range.
        """
        prefix = 0 if adapter is None else adapter.prefix_length
        expected = (len(batch.requests), prefix + batch.input_ids.shape[1], self.hidden_size)
        if tuple(hidden.shape) != expected:
            raise ModelError(f"hidden states {tuple(hidden.shape)} for this micro-batch; expected {expected}")
        rows = range(len(batch.requests))
        answers: dict[int, torch.Tensor] = {}
        pooled = [row for row in rows if not batch.requests[row].targets]
        if pooled:
            last = torch.tensor([prefix + batch.lengths[row] - 1 for row in pooled])
            normed = self.norm(hidden[torch.tensor(pooled), last].to(self.device, self.dtype))
            answers.update(zip(pooled, self._class_logits(normed, adapter), strict=True))
        scored = [row for row in rows if batch.requests[row].targets]
        if scored:
            answers.update(self._log_likelihoods(hidden, batch, scored, prefix))
        return [answers[row] for row in rows]

    def _log_likelihoods(
        self, hidden: torch.Tensor, batch: MicroBatch[R], rows: list[int], prefix: int
    ) -> dict[int, torch.Tensor]:
        """For each row (targets,) float32: log softmax of the LM head's logits, at each target's position and token."""
        vocabulary = self._lm_vocabulary()
        # Label words all ask about one position: it goes through the head once.
        places: dict[tuple[int, int], int] = {}
        wanted: list[tuple[int, int]] = []
        for row in rows:
            for position, token in batch.requests[row].targets:
                if not (0 <= position < batch.lengths[row] and 0 <= token < vocabulary):
                    raise ModelError(
                        f"target ({position}, {token}) is out of range: the request has {batch.lengths[row]} tokens, "
                        f"the vocabulary {vocabulary}"
                    )
                wanted.append((places.setdefault((row, prefix + position), len(places)), token))
        place_rows, positions = torch.tensor(list(places)).unbind(1)
        chosen = hidden[place_rows, positions].to(self.device, self.dtype)
        values = self._scores(chosen, torch.tensor(wanted))

        counts = [len(batch.requests[row].targets) for row in rows]
        return dict(zip(rows, values.split(counts), strict=True))

    def _scores(self, hidden: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """(places, hidden) and int64 (n, 2) of place and token -> (n,) float32 log-likelihoods, on the CPU."""
        values = torch.empty(wanted.shape[0], dtype=torch.float32)
        step = max(1, _LOGITS_AT_ONCE // self._lm_vocabulary())
        for start in range(0, hidden.shape[0], step):
            inside = (wanted[:, 0] >= start) & (wanted[:, 0] < start + step)
            place, token = (wanted[inside] - torch.tensor([start, 0])).to(self.device).unbind(1)
            logits = self._lm_logits(self.norm(hidden[start : start + step])).float()
            values[inside] = (logits[place, token] - logits.logsumexp(-1)[place]).cpu()
        return values

    def _check_width(self, name: str, what: str, tensor: torch.Tensor) -> None:
        if tensor.shape[-1] != self.hidden_size:
            raise AdapterError(
                f"the {what} of {name} is {tensor.shape[-1]} wide; expected {self.hidden_size}, the hidden size of "
                f"{self.fingerprint['model']}. It was tuned for another model."
            )


class LocalModel(LocalPart):
    """The local tensors of one model, frozen.

    lm_head: (vocabulary, hidden); the embedding matrix itself where tied, None where the checkpoint has none.
    score: (labels, hidden) of a sequence-classification checkpoint, or None.
    """

    def __init__(self, checkpoint: Checkpoint, *, dtype: torch.dtype | None, device: str | torch.device):
        super().__init__(checkpoint.config, checkpoint.family)
        self._checkpoint = checkpoint
        self._tokenizer: Any = None

        stored = _read_local_tensors(checkpoint)
        dtype = dtype or _config_dtype(self.config) or stored["embeddings"].dtype
        head = stored.pop("lm_head", None)
        self.fingerprint = {
            "model": checkpoint.name,
            "revision": checkpoint.revision,
            "dtype": str(dtype).removeprefix("torch."),
            "sha256": hash_tensors(stored),
            "lm_head_sha256": None if head is None else hash_tensors({"lm_head": head}),
        }

        # Copies: a tensor of a safetensors file is mapped from it, and files may change under a long run.
        held = {name: tensor.to(device, dtype, copy=True) for name, tensor in stored.items()}
        eps = float(getattr(self.config, self.family.eps_field))
        embeddings = nn.Embedding.from_pretrained(held["embeddings"], freeze=True)
        self.embeddings = embeddings
        if self.family.embedding_norm:
            self.embedding_norm = _norm(held, "embedding_norm", eps)
        self.norm = _norm(held, "norm", eps)
        # The embedding matrix's own parameter where tied: held once, also after the module moves to another device.
        self.lm_head: nn.Parameter | None = None
        if head is not None:
            self.lm_head = nn.Parameter(head.to(device, dtype, copy=True), requires_grad=False)
        elif _is_tied(self.config):
            self.lm_head = embeddings.weight
        self.score: nn.Parameter | None = None
        if "score" in stored:
            # In the dtype it was stored in: a trained head is small and its last bits are worth keeping.
            self.score = nn.Parameter(stored["score"].to(device, copy=True), requires_grad=False)
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        revision: str | None = None,
        token: str | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        cache_dir: str | None = None,
    ) -> "LocalModel":
        """Read the local tensors, and only those, of a folder or hub repository; of shards only those that hold them.

        dtype: what is computed in at home; None: the config's dtype, or else that of the stored embeddings.

        Raises ModelError if there is no such model, its family is not supported, or a tensor is missing or misshapen.
        """
        checkpoint = Checkpoint.open(model, revision=revision, token=token, cache_dir=cache_dir)
        return cls(checkpoint, dtype=dtype, device=device)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, loaded when first asked for. Raises ModelError if there is none."""
        if self._tokenizer is None:
            self._tokenizer = self._checkpoint.load_tokenizer()
        return self._tokenizer

    def _class_logits(self, normed: torch.Tensor, adapter: Adapter | None) -> torch.Tensor:
        # In float32: the head is small and was trained so.
        weight: torch.Tensor | None = self.score
        bias: torch.Tensor | None = None
        if adapter is not None and adapter.head_weight is not None:
            weight, bias = adapter.head_weight, adapter.head_bias
            self._check_width(adapter.name, "head", weight)
        if weight is None:
            raise AdapterError(
                "class logits were asked for, but there is no trained head.\n"
                f"  expected  score.weight (labels, {self.hidden_size}) in the adapter or in the model's checkpoint\n"
                f"  found     none in {'no adapter' if adapter is None else adapter.name} and none in "
                f"{self.fingerprint['model']}\n"
                "  Give an adapter that holds its head, or a task with label words, which the LM head scores."
            )
        bias = None if bias is None else bias.to(self.device, torch.float32)
        return functional.linear(normed.float(), weight.to(self.device, torch.float32), bias).cpu()

    def _lm_logits(self, normed: torch.Tensor) -> torch.Tensor:
        return functional.linear(normed, self._lm_weight())

    def _lm_vocabulary(self) -> int:
        return self._lm_weight().shape[0]

    def _lm_weight(self) -> nn.Parameter:
        if self.lm_head is None:
            raise ModelError(
                f"the LM head is needed, but {self.fingerprint['model']} has none: its config does not tie it to the "
                "embeddings and its weights lack lm_head.weight.\n"
                "  Give the causal LM's checkpoint, or a task with a trained head."
            )
        return self.lm_head


def _read_local_tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The tensors that stay at home, as stored, with their shapes checked. `lm_head` only where it is not tied."""
    family, config = checkpoint.family, checkpoint.config
    hidden = family.hidden_size(config)
    tensors = {"embeddings": checkpoint.read(*family.keys(family.embeddings))}
    for name, module in (("embedding_norm", family.embedding_norm), ("norm", family.final_norm)):
        if module is not None:
            tensors[f"{name}.weight"] = checkpoint.read(*family.keys(module))
            if family.norm == "layer":
                tensors[f"{name}.bias"] = checkpoint.read(*family.keys(module, "bias"))
    score = checkpoint.find("score.weight")
    if score is not None:
        tensors["score"] = score
    head = checkpoint.find("lm_head.weight")
    # A checkpoint may say that its head is tied and yet hold another one; Hugging Face then uses that one.
    if head is not None and not (_is_tied(config) and torch.equal(head, tensors["embeddings"])):
        tensors["lm_head"] = head
    for name, tensor in tensors.items():
        expected: tuple[object, ...] = (hidden,) if "norm" in name else ("rows", hidden)
        if tensor.ndim != len(expected) or tensor.shape[-1] != hidden or not tensor.is_floating_point():
            raise ModelError(
                f"{checkpoint.name}: {name} has the wrong form.\n"
                f"  expected  ({', '.join(map(str, expected))}) floating point, by the config's hidden size\n"
                f"  found     {tuple(tensor.shape)} {tensor.dtype}"
            )
    return tensors


def _norm(held: dict[str, torch.Tensor], name: str, eps: float) -> nn.Module:
    weight, bias = held[f"{name}.weight"], held.get(f"{name}.bias")
    if bias is None:
        return RMSNorm(weight, eps)
    norm = nn.LayerNorm(weight.shape[0], eps=eps, device=weight.device, dtype=weight.dtype)
    norm.weight = nn.Parameter(weight, requires_grad=False)
    norm.bias = nn.Parameter(bias, requires_grad=False)
    return norm


def _is_tied(config: Any) -> bool:
    return bool(getattr(config, "tie_word_embeddings", False))


def _config_dtype(config: Any) -> torch.dtype | None:
    """The dtype that a config names: `dtype` since transformers 5, `torch_dtype` before, as a dtype or as its name."""
    named = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    dtype = getattr(torch, named, None) if isinstance(named, str) else named
    return dtype if isinstance(dtype, torch.dtype) else None
