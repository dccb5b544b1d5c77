"""What a model keeps at home: embeddings before the remote blocks, the final norm and the heads after them."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import nn
from torch.nn import functional

from petals_eval.data.batching import MicroBatch
from petals_eval.errors import AdapterError, ConfigError, ModelError, RequestTooLargeError, UnknownTokenError
from petals_eval.model.adapter import Adapter, hash_tensors
from petals_eval.model.arithmetic import isolated_arithmetic
from petals_eval.model.checkpoint import Checkpoint
from petals_eval.model.families import Family, Norm
from petals_eval.model.pooling import POOLINGS, Pooling, pooled_token
from petals_eval.model.rotary import rotary_scaling
from petals_eval.model.tensor_files import shown_name
from petals_eval.model.tensor_roles import Role, block_number, find_head, looks_like_head, role_of
from petals_eval.validation import shorten

__all__ = ["LocalModel", "LocalPart"]

# Logits computed at once: positions times vocabulary. Bounds the memory of a head over many positions (64 MiB in
# float32).
_LOGITS_AT_ONCE = 1 << 24


class Answerable(Protocol):
    """What the head must know of a request (`petals_eval.tasks.requests.Request` is one)."""

    @property
    def input_ids(self) -> tuple[int, ...]: ...

    @property
    def targets(self) -> tuple[tuple[int, int], ...]: ...

    @property
    def asks_greedy(self) -> bool: ...

    @property
    def new_tokens(self) -> int: ...


R = TypeVar("R", bound=Answerable)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight over the last dimension (Zhang and Sennrich, 2019).

    The mean and the division are done in float32. Where the result is cast back, before or after the weight is applied,
    goes by the kind of norm, as in Hugging Face's models: in bfloat16 the order shows.
    """

    def __init__(self, weight: torch.Tensor, eps: float, kind: Norm = "rms"):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps
        self.kind = kind

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return (..., hidden) normed, in the dtype that it comes in."""
        wide = hidden.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.kind == "rms":
            return self.weight * scaled.to(hidden.dtype)
        weight = self.weight.float()
        return (scaled * (1 + weight if self.kind == "rms-plus-one" else weight)).to(hidden.dtype)


class ScaledEmbedding(nn.Embedding):
    """An embedding matrix whose rows are multiplied by the square root of their width, rounded to their dtype."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return (..., hidden) of int64 (...)."""
        scale = torch.tensor(self.embedding_dim**0.5, dtype=torch.float32, device=self.weight.device)
        return super().forward(input_ids) * scale.to(self.weight.dtype)


class LocalPart(nn.Module, ABC):
    """What a model computes at home: text into the first block's input, the last block's output into answers.

    config, family, num_blocks, hidden_size, context, rotary: of the whole model, whose blocks are elsewhere.
    fingerprint: model, revision, dtype, sha256 and lm_head_sha256, as they stand in a run's manifest.
    pooling: which token of a text the class head reads; None: the one that the library reads which trained the head.
    own_pooling: that of the model's own head.
    unused: tensors of the model's checkpoint that are not needed and change no answer, by name.

    Where the tensors come from is a subclass's business: it sets embeddings, embedding_norm, norm and the fingerprint,
    and has a tokenizer and the heads.
    """

    embeddings: nn.Embedding
    embedding_norm: nn.Module
    norm: nn.Module
    fingerprint: dict[str, str | None]
    pooling: Pooling | None = None
    own_pooling: Pooling = "last-not-pad"
    unused: tuple[str, ...] = ()

    def __init__(self, config: Any, family: Family):
        super().__init__()
        self.config = config
        self.family = family
        self.num_blocks = family.num_blocks(config)
        self.hidden_size = family.hidden_size(config)
        self.context = family.context_limit(config)
        self.rotary = rotary_scaling(config)
        self.logit_cap = family.logit_cap(config)
        self.embedding_norm = nn.Identity()

    @property
    @abstractmethod
    def tokenizer(self) -> Any:
        """The model's tokenizer, loaded when first asked for. Raises ModelError if there is none."""

    @abstractmethod
    def check_head(self, head: Literal["class", "lm"], adapter: Adapter | None) -> None:
        """Raise AdapterError or ModelError where the class head (the adapter's or the model's own) or the LM head that
        answers need is not there: before anything is sent, and not when the first answer is back."""

    @abstractmethod
    def class_outputs(self, adapter: Adapter | None) -> int | None:
        """Return how many scores the class head gives; None where it does not say. Raises AdapterError, ModelError."""

    @abstractmethod
    def uses_own_head(self, adapter: Adapter | None) -> bool:
        """Return whether class logits are those of the model's own head, whose outputs its config may name."""

    @abstractmethod
    def _class_logits(self, normed: torch.Tensor, adapter: Adapter | None) -> torch.Tensor:
        """Return scores (rows, labels), float32 on the CPU, of normed (rows, hidden). Raises AdapterError: no head."""

    @abstractmethod
    def _lm_logits(self, normed: torch.Tensor) -> torch.Tensor:
        """Return logits (rows, vocabulary) of normed (rows, hidden), not capped. Raises ModelError: no LM head."""

    @abstractmethod
    def _lm_vocabulary(self) -> int:
        """Return how many tokens the LM head scores. Raises ModelError if there is no LM head."""

    @abstractmethod
    def _generation_end(self) -> object:
        """Return the token or tokens that end a text by the model's generation config; None where it names none."""

    @property
    def dtype(self) -> torch.dtype:
        """What the local computing is done in."""
        return self.embeddings.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the local tensors are and the local computing is done."""
        return self.embeddings.weight.device

    def _refuse_other_kinds(self, adapter: Adapter | None) -> None:
        """Raise ModelError where the model's own head is asked for and its config says that it is none for one label,
        or one number, a text."""
        if not self.uses_own_head(adapter):
            return
        name, architectures = self.fingerprint["model"], getattr(self.config, "architectures", None) or ()
        tagger = next((each for each in architectures if each.endswith("ForTokenClassification")), None)
        if tagger is not None:
            raise ModelError(
                f"{name} is a {tagger}: its head gives each token a label of its own, and none to the text. Token "
                "classification is not evaluated here; give an adapter or a model with a head for whole texts."
            )
        if getattr(self.config, "problem_type", None) == "multi_label_classification":
            raise ModelError(
                f"the config of {name} says problem_type: multi_label_classification: its head gives each label a yes "
                "or no of its own, and none is the answer. Multi-label classification is not evaluated here; give a "
                "head for one label out of several, or correct problem_type where it is wrong."
            )

    def own_label_names(self, adapter: Adapter | None) -> tuple[str, ...] | None:
        """Return what the model's config calls the outputs of the class head, in order.

        None where that head is the adapter's, or the config has only the names that transformers makes up.
        """
        names = getattr(self.config, "id2label", None)
        if not names or not self.uses_own_head(adapter):
            return None
        ordered = tuple(str(names[index]) for index in sorted(names))
        return None if all(re.fullmatch(r"LABEL_\d+", name) for name in ordered) else ordered

    def end_tokens(self) -> frozenset[int]:
        """Return the tokens after which a text is over: those of the generation config, the config and the tokenizer.

        Raises ModelError for a generation config that cannot be read.
        """
        named = self._generation_end(), *(getattr(each, "eos_token_id", None) for each in (self.config, self.tokenizer))
        tokens = [token for each in named for token in (each if isinstance(each, list | tuple) else [each])]
        return frozenset(token for token in tokens if isinstance(token, int))

    def pooled_token(self, input_ids: Sequence[int], adapter: Adapter | None = None) -> int:
        """Return the position in the text, without prompts, of the token that the class head reads."""
        return pooled_token(input_ids, self._pad_token_id(), self._pooling_for(adapter))

    def pooling_note(self, input_ids: Sequence[int], adapter: Adapter | None = None) -> str | None:
        """Return a sentence for a person, where another library's class head would read another token of this text."""
        pad, pooling = self._pad_token_id(), self._pooling_for(adapter)
        chosen = "as --pool says" if self.pooling is not None else "as the library does that trained the head"
        if pad is not None:
            at = {each: pooled_token(input_ids, pad, each) for each in POOLINGS}
            others = [each for each, position in at.items() if position != at[pooling]]
            if not others:
                return None
            return (
                f"texts hold the model's padding token ({pad}): the head reads the token that the rule {pooling} "
                f"gives, {chosen}; by {' and '.join(others)} it would be another one. --pool chooses"
            )
        end = getattr(self.tokenizer, "eos_token_id", None)
        if self.pooling is not None or end is None or input_ids[-1] != end or len(input_ids) < 2:
            return None
        return (
            "the head reads the token that ends a text, for the model's config names no padding token; a head that was "
            "trained with that token for padding reads the one before it: --pool last-not-pad"
        )

    def _pooling_for(self, adapter: Adapter | None) -> Pooling:
        if self.pooling is not None:
            return self.pooling
        return self.own_pooling if adapter is None or adapter.head_weight is None else adapter.pooling

    def _pad_token_id(self) -> int | None:
        """Return the padding token by the model's config, as classifiers know it.

        Where a rule was chosen that needs one, the tokenizer's will do, and then the token that ends a text: most who
        have none choose that one.
        """
        pad: int | None = getattr(self.config, "pad_token_id", None)
        if pad is None and self.pooling not in (None, "last"):
            pad = getattr(self.tokenizer, "pad_token_id", None)
            pad = getattr(self.tokenizer, "eos_token_id", None) if pad is None else pad
            if pad is None:
                raise ConfigError(
                    f"--pool {self.pooling} needs a padding token, but neither model nor tokenizer names one."
                )
        return pad

    def check_length(self, tokens: int, prefix: int, new_tokens: int = 0) -> None:
        """Raise RequestTooLargeError if `prefix` prompt tokens and `tokens` of text exceed what the model reads; where
        as many new ones may be generated, with these, of which it reads all but the last.

        That is its context, and with dynamic scaling of its rotary embeddings the length before any scaling.
        """
        total = prefix + tokens + max(0, new_tokens - 1)
        if self.context is None or total <= self.context:
            return
        if new_tokens:
            positions = f"{prefix} prompt tokens, {tokens} of text and {new_tokens} new ones come to {total} positions"
            room = self.context - prefix - tokens + 1
            advice = f"Lower max_new_tokens to {room}." if room > 0 else "Shorten the text."
        else:
            positions = f"{prefix} prompt tokens and {tokens} tokens of text are {total} positions"
            advice = f"Give it {max(0, self.context - prefix)} tokens of text at most (a task's max_length)."
        if self.rotary.remembers_calls:
            raise RequestTooLargeError(
                f"{positions}, more than the original length of this {self.family.title} ({self.context}). Its rotary "
                "embeddings are scaled dynamically (rope_type dynamic): beyond that length a server's answer depends "
                f"on the longest call that anybody sent it, so no number of this row could be trusted. {advice}"
            )
        raise RequestTooLargeError(f"{positions}; this {self.family.title} reads {self.context} at most. {advice}")

    def check_request(self, request: Answerable, prefix: int) -> None:
        """Raise RequestTooLargeError for a request longer than what the model reads after `prefix` prompt tokens, and
        UnknownTokenError for a token that it does not have."""
        self.check_length(len(request.input_ids), prefix, request.new_tokens)
        self._check_tokens(request.input_ids, self.embeddings.weight.shape[0])
        if request.targets:
            self._check_tokens([token for _, token in request.targets], self._lm_vocabulary())

    def _check_tokens(self, tokens: Sequence[int], vocabulary: int) -> None:
        odd = next((token for token in tokens if not 0 <= token < vocabulary), None)
        if odd is not None:
            raise UnknownTokenError(
                f"token {odd} ({shorten(self.tokenizer.decode([odd]))}) is outside this model's vocabulary, 0 to "
                f"{vocabulary - 1}: its tokenizer was given more tokens than the model. Use the model that was resized "
                "for it, or take the token out of the text."
            )

    def embed(self, input_ids: torch.Tensor, adapter: Adapter | None = None) -> torch.Tensor:
        """Return the input of the first block: prompts, then the text's embeddings.

        input_ids: int64 (batch, seq). Returns (batch, prefix + seq, hidden) in the model's dtype.
        BLOOM's prompts come before its embedding layernorm, which then norms them too (`swarm/wire/PROTOCOL.md`,
        section 6). Gemma's stand beside its scaled embeddings as they are, as in PEFT over transformers 5.

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
        """Return the answers to a micro-batch from the last block's output.

        hidden: (batch, prefix + seq, hidden) of any dtype, or without the positions that the rows share with others; it
        is cast to the model's dtype before the norm, as Petals does. Only the positions wanted go through norm and
        head.

        Returns one float32 tensor on the CPU for each request: (labels,) logits of the class head at the token that
        `pooled_token` says, or (targets,) natural-log likelihoods by the LM head. Of a request that asks whether its
        targets are greedy: (targets, 2), likelihoods and 1.0 or 0.0 (the first of several equal tokens is the greedy
        one). The class head is the adapter's, or else the checkpoint's.

        Raises AdapterError if there is no class head, ModelError if there is no LM head or a target is out of range.
        """
        prefix = 0 if adapter is None else adapter.prefix_length
        if batch.shared is not None:  # what is left of the positions begins this far before the text
            prefix = -batch.shared.length
        expected = (len(batch.requests), prefix + batch.input_ids.shape[1], self.hidden_size)
        if tuple(hidden.shape) != expected:
            raise ModelError(f"hidden states {tuple(hidden.shape)} for this micro-batch; expected {expected}")
        rows = range(len(batch.requests))
        answers: dict[int, torch.Tensor] = {}
        pooled = [row for row in rows if not batch.requests[row].targets]
        if pooled:
            read = [prefix + self.pooled_token(batch.requests[row].input_ids, adapter) for row in pooled]
            normed = self.norm(hidden[pooled, read].to(self.device, self.dtype))
            answers.update(zip(pooled, self._class_logits(normed, adapter), strict=True))
        scored = [row for row in rows if batch.requests[row].targets]
        if scored:
            answers.update(self._log_likelihoods(hidden, batch, scored, prefix))
        return [answers[row] for row in rows]

    def next_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the LM head's logits of the token that comes next, (vocabulary,) float32 on the CPU.

        hidden: (hidden,), what the last block makes of a text's last position, in any dtype. One text at a time: in a
        product over several rows sums are rounded by how many there are, and equal logits are common in bfloat16.
        Raises ModelError if there is no LM head.
        """
        self._lm_vocabulary()
        return self._token_logits(hidden[None].to(self.device, self.dtype))[0].float().cpu()

    def _token_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the LM head's logits (rows, vocabulary), capped where the model caps them, of (rows, hidden)."""
        logits = self._lm_logits(self.norm(hidden))
        return logits if self.logit_cap is None else (logits / self.logit_cap).tanh() * self.logit_cap

    def _log_likelihoods(
        self, hidden: torch.Tensor, batch: MicroBatch[R], rows: list[int], prefix: int
    ) -> dict[int, torch.Tensor]:
        """Return (targets,) float32 for each row: the LM head's log softmax at each target's position and token; and
        (targets, 2) where it is asked whether these are greedy."""
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
        place_rows, positions = zip(*places, strict=True)
        chosen = hidden[list(place_rows), list(positions)].to(self.device, self.dtype)
        counts = [len(batch.requests[row].targets) for row in rows]
        asks = [batch.requests[row].asks_greedy for row in rows]
        values = self._scores(chosen, torch.tensor(wanted, device="cpu"), asks_greedy=any(asks))
        split = zip(rows, values.split(counts), asks, strict=True)
        return {row: found if asks_greedy else found[:, 0].clone() for row, found, asks_greedy in split}

    def _scores(self, hidden: torch.Tensor, wanted: torch.Tensor, *, asks_greedy: bool) -> torch.Tensor:
        """Return (n, 2) float32 on the CPU, log-likelihood and whether it is the greedy token, for (places, hidden) and
        int64 (n, 2) of place and token. The latter is 0 where nobody asks: it takes another look at all logits."""
        values = torch.zeros(wanted.shape[0], 2, dtype=torch.float32, device="cpu")
        step = max(1, _LOGITS_AT_ONCE // self._lm_vocabulary())
        for start in range(0, hidden.shape[0], step):
            inside = (wanted[:, 0] >= start) & (wanted[:, 0] < start + step)
            place, token = (wanted[inside] - wanted.new_tensor([start, 0])).to(self.device).unbind(1)
            logits = self._token_logits(hidden[start : start + step]).float()
            wanted_logits = logits[place, token]
            if asks_greedy:
                values[inside, 1] = (logits.argmax(-1)[place] == token).float().cpu()
            values[inside, 0] = (wanted_logits - _logsumexp_over(logits)[place]).cpu()
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
    score: (labels, hidden) of a sequence-classification checkpoint, and score_bias: (labels,) of one; or None.
    checkpoint: where they were read from.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype | None,
        device: str | torch.device,
        pooling: Pooling | None = None,
    ):
        super().__init__(checkpoint.config, checkpoint.family)
        self.checkpoint = checkpoint
        self.pooling = pooling
        self._tokenizer: Any = None

        with isolated_arithmetic():
            self._load(dtype, device)
        self.eval()

    def _load(self, dtype: torch.dtype | None, device: str | torch.device) -> None:
        checkpoint = self.checkpoint
        stored, self.unused, self._other_heads = _read_local_tensors(checkpoint)
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
        kind: type[nn.Embedding] = ScaledEmbedding if self.family.scales_embeddings else nn.Embedding
        embeddings = kind.from_pretrained(held["embeddings"], freeze=True)
        self.embeddings = embeddings
        if self.family.embedding_norm:
            self.embedding_norm = _norm(held, "embedding_norm", eps, self.family.norm)
        self.norm = _norm(held, "norm", eps, self.family.norm)
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
        self.score_bias: nn.Parameter | None = None
        if "score.bias" in stored:
            self.score_bias = nn.Parameter(stored["score.bias"].to(device, copy=True), requires_grad=False)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        cache_dir: str | Path | None = None,
        pooling: Pooling | None = None,
    ) -> "LocalModel":
        """Read the local tensors, and only those, of a folder or hub repository; of shards only those that hold them.

        dtype: what is computed in at home; None: the config's dtype, or else that of the stored embeddings.
        pooling: which token of a text a class head reads; None: as the library does that trained the head.

        Raises ModelError if there is no such model, its family is not supported, a tensor is missing or misshapen, or
        one that stays at home is none of those known.
        """
        checkpoint = Checkpoint.open(model, revision=revision, token=token, cache_dir=cache_dir)
        return cls(checkpoint, dtype=dtype, device=device, pooling=pooling)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, loaded when first asked for. Raises ModelError if there is none."""
        if self._tokenizer is None:
            self._tokenizer = self.checkpoint.load_tokenizer()
        return self._tokenizer

    def check_head(self, head: Literal["class", "lm"], adapter: Adapter | None) -> None:
        if head == "lm":
            self._lm_weight()
        else:
            self._class_head(adapter)
            self._refuse_other_kinds(adapter)

    def class_outputs(self, adapter: Adapter | None) -> int | None:
        return self._class_head(adapter)[0].shape[0]

    def uses_own_head(self, adapter: Adapter | None) -> bool:
        return adapter is None or adapter.head_weight is None

    def _class_logits(self, normed: torch.Tensor, adapter: Adapter | None) -> torch.Tensor:
        # In float32: the head is small and was trained so.
        weight, bias = self._class_head(adapter)
        bias = None if bias is None else bias.to(self.device, torch.float32)
        return functional.linear(normed.float(), weight.to(self.device, torch.float32), bias).cpu()

    def _class_head(self, adapter: Adapter | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return (labels, hidden) and (labels,) or None: the adapter's head, or else the model's own."""
        if adapter is not None and adapter.head_weight is not None:
            self._check_width(adapter.name, "head", adapter.head_weight)
            return adapter.head_weight, adapter.head_bias
        if self._other_heads:
            raise ModelError(
                f"the weights of {self.fingerprint['model']} hold {', '.join(map(shown_name, self._other_heads))}: a "
                "trained head, it seems, but not of the form expected: one linear layer, score.weight (labels, "
                f"{self.hidden_size}) with or without score.bias.\n"
                "  Rename it, if it is one, or give an adapter that holds its head."
            )
        if self.score is None:
            raise AdapterError(
                "class logits were asked for, but there is no trained head.\n"
                f"  expected  score.weight (labels, {self.hidden_size}) in the adapter or in the model's checkpoint\n"
                f"  found     none in {'no adapter' if adapter is None else adapter.name} and none in "
                f"{self.fingerprint['model']}\n"
                "  Give an adapter that holds its head, or a task with label words, which the LM head scores."
            )
        return self.score, self.score_bias

    def _generation_end(self) -> object:
        return self.checkpoint.generation_config().get("eos_token_id")

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


def _read_local_tensors(
    checkpoint: Checkpoint,
) -> tuple[dict[str, torch.Tensor], tuple[str, ...], tuple[str, ...]]:
    """Return the tensors that stay at home, as stored, with their shapes checked. `lm_head` only where it is not tied.

    Also the names of tensors that nothing needs, and of those that may be a head of a form not known here.
    """
    family, config = checkpoint.family, checkpoint.config
    hidden = family.hidden_size(config)
    tensors = {"embeddings": checkpoint.read(*family.keys(family.embeddings))}
    for name, module in (("embedding_norm", family.embedding_norm), ("norm", family.final_norm)):
        if module is not None:
            tensors[f"{name}.weight"] = checkpoint.read(*family.keys(module))
            if family.norm == "layer":
                tensors[f"{name}.bias"] = checkpoint.read(*family.keys(module, "bias"))
    score, bias = find_head(checkpoint.names(), f"the weights of {checkpoint.name}", ModelError)
    if score is not None:
        tensors["score"] = checkpoint.read(score)
    if bias is not None:
        tensors["score.bias"] = checkpoint.read(bias)
    head = checkpoint.find("lm_head.weight")
    # A checkpoint may say that its head is tied and yet hold another one; Hugging Face then uses that one.
    if head is not None and not (_is_tied(config) and torch.equal(head, tensors["embeddings"])):
        tensors["lm_head"] = head
    for name, tensor in tensors.items():
        if name == "score.bias":
            expected: tuple[object, ...] = (tensors["score"].shape[0],)
        else:
            expected = (hidden,) if "norm" in name else ("rows", hidden)
        if tensor.ndim != len(expected) or tensor.shape[-1] != expected[-1] or not tensor.is_floating_point():
            raise ModelError(
                f"{checkpoint.name}: {name} has the wrong form.\n"
                f"  expected  ({', '.join(map(str, expected))}) floating point, by the config's hidden size\n"
                f"  found     {tuple(tensor.shape)} {tensor.dtype}"
            )
    return tensors, *_sort_the_rest(checkpoint)


def _sort_the_rest(checkpoint: Checkpoint) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the tensors that are neither at home nor in a block: those that change no answer, and those like a head.

    Raises ModelError, naming it, for one that may be anything: what a model computes with it would be left out.
    """
    family = checkpoint.family
    num_blocks = family.num_blocks(checkpoint.config)
    unused, heads = [], []
    for name in sorted(checkpoint.names()):
        role = role_of(name, family)
        number = block_number(name, family)
        if number is not None:
            if number >= num_blocks:  # Hugging Face computes as many as the config says, whatever lies beside them
                unused.append(name)
        elif role in (Role.NO_EFFECT, Role.EARLIER_HEAD):
            unused.append(name)
        elif role is Role.OTHER and looks_like_head(name):
            heads.append(name)
        elif role in (Role.OTHER, Role.LORA):
            raise ModelError(
                f"the weights of {checkpoint.name} hold {shown_name(name)}, which is no known part of a "
                f"{family.title}, so an evaluation would leave it out; expected {family.embeddings}, the blocks "
                f"({family.blocks}), {family.final_norm}, lm_head and score.\n"
                "  Is the model of another kind than its config says? Remove the tensor if it does not matter."
            )
    return tuple(unused), tuple(heads)


def _norm(held: dict[str, torch.Tensor], name: str, eps: float, kind: Norm) -> nn.Module:
    weight, bias = held[f"{name}.weight"], held.get(f"{name}.bias")
    if bias is None:
        return RMSNorm(weight, eps, kind)
    norm = nn.LayerNorm(weight.shape[0], eps=eps, device=weight.device, dtype=weight.dtype)
    norm.weight = nn.Parameter(weight, requires_grad=False)
    norm.bias = nn.Parameter(bias, requires_grad=False)
    return norm


def _logsumexp_over(logits: torch.Tensor) -> torch.Tensor:
    """Return what `logits.logsumexp(-1)` gives, to the bit, and leave nothing of the logits (rows, vocabulary): written
    over, they take less than half the time, and no memory beside their own."""
    highest = logits.amax(-1, keepdim=True)
    return logits.sub_(highest).exp_().sum(-1).log_().add_(highest[:, 0])


def _is_tied(config: Any) -> bool:
    return bool(getattr(config, "tie_word_embeddings", False))


def _config_dtype(config: Any) -> torch.dtype | None:
    """Return the dtype that a config names: in `dtype` since transformers 5, in `torch_dtype` before."""
    named = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    dtype = getattr(torch, named, None) if isinstance(named, str) else named
    return dtype if isinstance(dtype, torch.dtype) else None
