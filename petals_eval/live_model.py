"""A live Petals model: evaluated over our remote path as it is at that moment, inside somebody's training loop.

    for epoch in range(3):
        train(model, ...)                                        # the user's own Petals code
        print(epoch, petals_eval.evaluate(model, task="sst2"))   # the model stays as it was

Its embeddings, prompts, norm and head are used where they are, not copied; its config says where the swarm is. A
connection of our own to that swarm is opened at the first evaluation and kept for the next one. Petals' own connection
is left alone. petals itself is never imported here: who has such a model has imported it.

DRIFT and BloomBee have kept the structure of Petals' client, so that models of all three are told by it alone.
"""

import contextlib
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import transformers
from torch import nn

from petals_eval.config import SwarmSettings
from petals_eval.errors import AdapterError, ConfigError, ModelError
from petals_eval.model.adapter import Adapter, Kind, hash_tensors
from petals_eval.model.checkpoint import load_tokenizer
from petals_eval.model.dht_prefixes import other_prefixes
from petals_eval.model.eval_mode import evaluating
from petals_eval.model.families import family_of
from petals_eval.model.local import LocalPart
from petals_eval.model.pooling import transformers_pooling
from petals_eval.model.sources import open_source
from petals_eval.remote_model import LocalSide, RemoteModel
from petals_eval.swarm import RemoteSequential, SwarmConnection

__all__ = [
    "LIVE_PROMPTS",
    "LivePart",
    "close",
    "connect",
    "connected",
    "is_petals_model",
    "local_side",
    "opened",
]

LIVE_PROMPTS = "live prompts"
"""The journal's name for the prompts of a live model."""


def is_petals_model(model: object) -> bool:
    """Return whether this is a model of Petals or of a relative that has kept its structure."""
    return _has_all(getattr(model, "config", None), _CONFIG) and _has_all(getattr(model, "transformer", None), _BASE)


_CONFIG = ("initial_peers", "dht_prefix", "tuning_mode", "daemon_startup_timeout", "request_timeout", "active_adapter")
_BASE = ("word_embeddings", "word_embeddings_layernorm", "ln_f", "get_prompt")
"""What a client's config and its model without the head have, and nobody else's: the swarm, and the tuned prompts."""


def _has_all(thing: object, names: tuple[str, ...]) -> bool:
    return all(hasattr(thing, name) for name in names)


@contextlib.contextmanager
def opened(model: nn.Module, *, tokenizer: Any = None) -> Iterator[RemoteModel]:
    """Open the Petals model `model` as a RemoteModel for the body: it stands for this moment, so make one each time.

    As `local_side`, and connected; SwarmUnreachableError when no initial peer answers.
    """
    with local_side(model, tokenizer=tokenizer) as side:
        yield connected(model, side)


@contextlib.contextmanager
def local_side(model: nn.Module, *, tokenizer: Any = None) -> Iterator[LocalSide]:
    """Take our side of the Petals model `model` as it is at this moment; nothing is connected.

    tokenizer: by default the one that lies with the model its config names, looked for when it is first asked for.

    Afterwards, also after an exception, the random generators of Python and NumPy stand where they stood; `evaluating`,
    which every local step runs under, sees to torch's, to the training flags and to autograd.

    Raises ConfigError where `model` is no Petals model with a head or its config names no swarm, ModelError for its
    family, tensors or tokenizer.
    """
    base = _base_of(model)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        part = LivePart(model, base, partial(_tokenizer_of, model) if tokenizer is None else lambda: tokenizer)
        config: Any = model.config
        yield LocalSide(part, part.adapters, _settings_of(config, _chosen.get(model, {})), _dht_prefix_of(config))
    except BaseException:
        close(model)  # its reason may lie in the connection: the next evaluation makes a new one
        raise
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def connected(model: nn.Module, side: LocalSide) -> RemoteModel:
    """Connect our side of `model` to its swarm, or take the connection of the evaluation before.

    Raises SwarmUnreachableError.
    """
    return RemoteModel(side.local, _connected(model).blocks, side.adapters)


def connect(model: nn.Module, **swarm_settings: Any) -> None:
    """Open our connection for `model` now, with settings that Petals' config does not have.

    swarm_settings: fields of petals_eval.SwarmSettings, such as deadline, window or require_dtype. They hold for all
        evaluations of this model to come; without them, evaluations connect by themselves.

    Raises ConfigError, ModelError, SwarmUnreachableError.
    """
    _base_of(model)
    config: Any = model.config
    family_of(config)
    _settings_of(config, swarm_settings)  # refuses a mistake before it is kept
    _chosen[model] = dict(swarm_settings)
    _connected(model)


def close(model: nn.Module) -> None:
    """End our connection for `model`, if there is one. Petals' own stays, and the next evaluation connects anew.

    Left alone, it ends with the model or with the process.
    """
    with _lock:
        kept = _kept.pop(model, None)
    if kept is not None:
        kept.finalizer.detach()
        kept.connection.close()


class LivePart(LocalPart):
    """The local modules of a live Petals model: themselves, not copies.

    adapters: the prompts as they are at this moment, with the class head; () where the model has none.
    """

    def __init__(self, model: nn.Module, base: nn.Module, load_tokenizer: Callable[[], Any]):
        config: Any = model.config
        super().__init__(config, family_of(config))
        self._load_tokenizer = load_tokenizer
        self._kind = type(model).__name__
        # Petals' models of every family have them under these names, as properties where Hugging Face calls them else.
        self.embeddings = cast(nn.Embedding, base.word_embeddings)
        self.embedding_norm = cast(nn.Module, base.word_embeddings_layernorm)
        self.norm = cast(nn.Module, base.ln_f)
        self.score: nn.Module | None = getattr(model, "score", None)
        self.lm_head: nn.Module | None = getattr(model, "lm_head", None)
        self._generation_config = getattr(model, "generation_config", None)

        # The very library that trains the head is at hand: its classifier says which token it reads.
        self.own_pooling = transformers_pooling(self.family.model_type, transformers.__version__)

        tensors = self._tensors()
        prompts, deep_prompts = _prompts_of(base)
        self.adapters: tuple[Adapter, ...] = ()
        if prompts is not None:
            kind: Kind = "ptune" if deep_prompts is None else "deep_ptune"
            # The head is hashed with the prompts, as in the checkpoint that both will be saved in.
            head = tensors.pop("score", None), tensors.pop("score.bias", None)
            self.adapters = (Adapter(LIVE_PROMPTS, kind, prompts, deep_prompts, *head, pooling=self.own_pooling),)
        head_weight = None if self.lm_head is None else self.lm_head.weight
        is_tied = head_weight is None or head_weight is self.embeddings.weight
        self.fingerprint = {
            "model": _name_of(config),
            "revision": getattr(config, "_commit_hash", None),
            "dtype": str(self.dtype).removeprefix("torch."),
            "sha256": hash_tensors(tensors),
            "lm_head_sha256": None if is_tied else hash_tensors({"lm_head": cast(torch.Tensor, head_weight)}),
        }

    @property
    def tokenizer(self) -> Any:
        """The caller's, or that of the model which the config names, looked for when first asked for.

        Raises ConfigError, ModelError.
        """
        return self._load_tokenizer()

    def check_head(self, head: Literal["class", "lm"], adapter: Adapter | None) -> None:
        if head == "lm":
            self._lm_module()
        else:
            self._class_head()
            self._refuse_other_kinds(adapter)

    def class_outputs(self, adapter: Adapter | None) -> int | None:
        return getattr(self._class_head(), "out_features", None)

    def uses_own_head(self, adapter: Adapter | None) -> bool:
        return True

    def _class_logits(self, normed: torch.Tensor, adapter: Adapter | None) -> torch.Tensor:
        head = self._class_head()
        weight = next(head.parameters(), normed)
        return head(normed.to(weight.dtype)).float().cpu()

    def _class_head(self) -> nn.Module:
        if self.score is None:
            raise AdapterError(
                f"class logits were asked for, but a {self._kind} has no class head (score). Load the model with "
                "AutoDistributedModelForSequenceClassification, or give a task with label words."
            )
        return self.score

    def _generation_end(self) -> object:
        return getattr(self._generation_config, "eos_token_id", None)

    def _lm_logits(self, normed: torch.Tensor) -> torch.Tensor:
        return self._lm_module()(normed)

    def _lm_vocabulary(self) -> int:
        return cast(torch.Tensor, self._lm_module().weight).shape[0]

    def _lm_module(self) -> nn.Module:
        if self.lm_head is None:
            raise ModelError(
                f"the LM head is needed, but a {self._kind} has none. Load the model with "
                "AutoDistributedModelForCausalLM, or give a task with a trained head."
            )
        return self.lm_head

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Everything used here but prompts and LM head, under the names it has when read from a checkpoint."""
        tensors: dict[str, torch.Tensor] = {"embeddings": self.embeddings.weight}
        for name in ("embedding_norm", "norm", "score"):
            module = getattr(self, name)
            if module is not None:
                tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        if "score.weight" in tensors:
            tensors["score"] = tensors.pop("score.weight")
        return tensors


@dataclass(frozen=True, eq=False)
class _Kept:
    """Our connection for one model, kept from one evaluation to the next."""

    settings: SwarmSettings
    connection: SwarmConnection
    blocks: RemoteSequential
    finalizer: "weakref.finalize[Any, nn.Module]"


_lock = threading.Lock()
_kept: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()
_chosen: weakref.WeakKeyDictionary[nn.Module, dict[str, Any]] = weakref.WeakKeyDictionary()
_tokenizers: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def _connected(model: nn.Module) -> _Kept:
    """Return the connection to the swarm that the model's config names now."""
    config: Any = model.config
    prefix, settings = _dht_prefix_of(config), _settings_of(config, _chosen.get(model, {}))
    with _lock:
        kept = _kept.get(model)
    if kept is not None and kept.settings == settings and kept.blocks.dht_prefix == prefix:
        return kept
    close(model)
    connection = SwarmConnection.connect(settings)
    try:
        family = family_of(config)
        others = other_prefixes(family.model_type, _name_of(config), prefix)
        blocks = connection.remote_sequential(prefix, family.num_blocks(config), others)
    except BaseException:
        connection.close()
        raise
    finalizer = weakref.finalize(model, _close_apart, connection)
    finalizer.atexit = False  # at exit the connection closes itself
    kept = _Kept(settings, connection, blocks, finalizer)
    with _lock:
        _kept[model] = kept
    return kept


def _close_apart(connection: SwarmConnection) -> None:
    """The garbage collector may run in any thread, the connection's own included, where closing would wait for ever."""
    threading.Thread(target=connection.close, name="petals-eval-close").start()


def _dht_prefix_of(config: Any) -> str:
    if not config.dht_prefix:
        raise ConfigError(
            "the model's config has no dht_prefix, so the name its servers announce is not known: load it with "
            "from_pretrained(..., dht_prefix=...)."
        )
    return str(config.dht_prefix)


def _settings_of(config: Any, chosen: dict[str, Any]) -> SwarmSettings:
    """Return what Petals' ClientConfig says of the swarm, in our words; what `connect` was given goes before it."""
    theirs = {
        "initial_peers": tuple(str(peer) for peer in config.initial_peers),
        "active_adapter": config.active_adapter,
        "allow_servers": tuple(str(peer) for peer in config.allowed_servers or ()),
        "deny_servers": tuple(str(peer) for peer in config.blocked_servers or ()),
        "startup_timeout": config.daemon_startup_timeout,
        "request_timeout": config.request_timeout,
        "min_backoff": config.min_backoff,
        "max_backoff": config.max_backoff,
    }
    return SwarmSettings(**(theirs | chosen))


def _base_of(model: nn.Module) -> nn.Module:
    """Return the model without its head, in which Petals keeps embeddings, prompts and norm."""
    base = getattr(model, "transformer", None) if is_petals_model(model) else None
    has_head = getattr(model, "score", None) is not None or getattr(model, "lm_head", None) is not None
    if base is None or not has_head:
        kind = type(model)
        raise ConfigError(
            "expected a petals_eval.RemoteModel or a Petals model with a head, such as petals' and drift's "
            "AutoDistributedModelForSequenceClassification and AutoDistributedModelForCausalLM load; "
            f"found {kind.__module__}.{kind.__qualname__}. Of a wrapped model (DataParallel, torch.compile) give the "
            "one inside."
        )
    return base


def _prompts_of(base: nn.Module) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the prompts (prefix, hidden) and deep prompts (blocks, 1, prefix, hidden), float32 on the CPU, or None.

    By Petals' own get_prompt, which rounds them to the dtype of the embeddings.
    """
    config: Any = base.config
    tuning_mode = config.tuning_mode
    if not tuning_mode or "ptune" not in tuning_mode:
        return None, None
    with evaluating(base), _numbered_prefix(base):
        prompts, deep = base.get_prompt(1)  # type: ignore[operator]
        prompts = prompts[0].float().cpu()
        deep = deep.float().cpu() if tuning_mode == "deep_ptune" else None
    for name, tensor in (("prompt_embeddings", prompts), ("intermediate_prompt_embeddings", deep)):
        bad = 0 if tensor is None else int((~torch.isfinite(tensor)).sum())
        if bad:
            raise ModelError(
                f"{name} holds {bad} values that are not finite (NaN or infinite); expected none. "
                "Did the training diverge?"
            )
    return prompts, deep


@contextlib.contextmanager
def _numbered_prefix(base: nn.Module) -> Iterator[None]:
    """Give `get_prompt` its rows' numbers for the body where they have no values.

    transformers 5 makes a model on the meta device and leaves what is neither a parameter nor a buffer there; the own
    forward of DRIFT dd294a1 fails on that.
    """
    numbers = getattr(base, "prefix_tokens", None)
    if not isinstance(numbers, torch.Tensor) or not numbers.is_meta:
        yield
        return
    base.prefix_tokens = torch.arange(len(numbers))
    try:
        yield
    finally:
        base.prefix_tokens = numbers


def _tokenizer_of(model: nn.Module) -> Any:
    """Return the tokenizer of the model that the config names, loaded once for each model."""
    if model not in _tokenizers:
        config: Any = model.config
        if not config._name_or_path:
            raise ConfigError(
                "the model's config does not say where it was loaded from, so its tokenizer is not known: give it with "
                "evaluate(model, tokenizer=...)."
            )
        revision = getattr(config, "_commit_hash", None)
        _tokenizers[model] = load_tokenizer(open_source(config._name_or_path, revision=revision, error=ModelError))
    return _tokenizers[model]


def _name_of(config: Any) -> str:
    """Return the hub name, or a folder's own name; never a path."""
    name = config._name_or_path
    if not name:
        return "unnamed"
    return Path(name).resolve().name if Path(name).is_dir() else name
