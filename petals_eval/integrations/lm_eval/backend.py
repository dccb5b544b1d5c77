"""`LM`: what lm-evaluation-harness asks of a model, answered over a swarm.

Texts become tokens as in the harness's own backend `hf` of release 0.4.13 (`lm_eval/models/huggingface.py`), so that
the same task gives the same numbers: its `TemplateLM` splits contexts from continuations, and the functions that `hf`
uses for stop sequences, generation settings and what is left of a text are used here, too.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from weakref import finalize

import jinja2
import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import has_bos_prefix, resolve_max_length
from lm_eval.utils import simple_parse_args_string

from petals_eval.errors import ConfigError, ExampleError, NotFiniteError, RequestTooLargeError
from petals_eval.evaluation.evaluate import is_remote_model
from petals_eval.integrations.lm_eval.answers import Answers, Asked, Handle
from petals_eval.integrations.lm_eval.cache import check_cache
from petals_eval.integrations.lm_eval.decoding import answer_text, decoding_of
from petals_eval.integrations.lm_eval.noise import LikelihoodNoise
from petals_eval.integrations.lm_eval.settings import BackendSettings, HarnessSettings
from petals_eval.integrations.manifest import BackendManifest
from petals_eval.integrations.swarm_model import opened_model
from petals_eval.remote_model import RemoteModel
from petals_eval.runs.manifest import NoiseRecord
from petals_eval.tasks.likelihood import requests_together
from petals_eval.tasks.requests import Decoding, Generated, Request, as_float64
from petals_eval.tasks.tokens import CHUNK_ROWS, start_token
from petals_eval.tasks.windows import Windows
from petals_eval.validation import shorten

if TYPE_CHECKING:
    from petals_eval.remote_model import RequestAnswer

__all__ = ["LM"]

_log = logging.getLogger("petals_eval")

_HARNESS_DEVICE = "cuda:0"
"""What the harness's command says where its user says nothing."""
_OF_THE_HARNESS = ("batch_size", "max_batch_size", "trust_remote_code")
"""What the harness may add and means nothing here: batches are made of all requests, and no model's code is run."""


@register_model("petals-eval")
class LM(TemplateLM):
    """A model on a swarm, as the harness asks it.

        lm = LM("bigscience/bloom", adapter="./prompts", initial_peers=peers)
        lm_eval.simple_evaluate(model=lm, tasks=["copa"])

    pretrained: a hub name or a local folder, with settings of `BackendSettings`; or a RemoteModel, with those of
    `HarnessSettings`.

    model: the RemoteModel. manifest: who computed what so far, and how it was verified.

    All requests of a call are in flight together, the longest first; those that read the same tokens are sent once. A
    request that cannot be computed ends its call with the reason: the harness knows no failures, and none becomes a
    wrong answer. What was answered by then is in the harness's cache, if it has one (`--use_cache`).

    Raises ConfigError, ModelError, AdapterError, SwarmUnreachableError, MissingBlocksError.
    """

    def __init__(self, pretrained: "str | Path | RemoteModel | None" = None, **settings: Any):
        super().__init__()
        self.settings: HarnessSettings
        self.model: RemoteModel
        opened = ExitStack()
        if is_remote_model(pretrained):
            self.settings, self.model = HarnessSettings(**settings), cast(RemoteModel, pretrained)
        else:
            given = settings if pretrained is None else {"pretrained": pretrained, **settings}
            self.settings = chosen = BackendSettings(**given)
            self.model, opened = opened_model(chosen)
        self._close = finalize(self, opened.close)
        local, adapters = self.model.local, self.model.adapters
        if len(adapters) > 1:
            raise ConfigError(
                f"expected a RemoteModel with one adapter, for the harness shows one model; found {len(adapters)}"
            )
        self._adapter = adapters[0] if adapters else None
        local.check_head("lm", self._adapter)
        self.tokenizer = local.tokenizer
        self._at_hand: dict[str, list[int]] = {}
        self._answers = Answers(self.model)
        self._noise = LikelihoodNoise(self.model, self._adapter)
        self._max_length = self._longest()
        told = ("add_bos_token", "max_gen_toks", "think_end_token")
        self._manifest = BackendManifest.of(
            self.model,
            {
                "max_length": self._max_length,
                "prefix_token_id": self.prefix_token_id,
                **{name: getattr(self.settings, name) for name in told},
            },
            code="integrations/lm_eval",
            packages={"lm_eval": version("lm_eval")},
        )

    def close(self) -> None:
        """End the connection that was opened here, and the embedded swarm. A RemoteModel that was given stays open."""
        self._close()

    def __enter__(self) -> "LM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- how the harness makes one, and what it wants to know

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> "LM":
        """Make one of the harness's text `key=value,key=value`; several values have `+` between them."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> "LM":
        """Make one of the harness's `--model_args`, and of what other flags of it say of a model."""
        given = {key: value for key, value in arg_dict.items() if key not in _OF_THE_HARNESS}
        if "require_quant" in given:
            # Of the word none, which leaves quantised servers out, the harness makes Python's None.
            given["require_quant"] = given["require_quant"] or "none"
        device = (additional_config or {}).get("device")
        is_its_default = device == _HARNESS_DEVICE and not torch.cuda.is_available()
        if device is not None and "device" not in given and not is_its_default:
            given["device"] = device
        return cls(**given)

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context."""
        chosen = self.settings.prefix_token_id
        return start_token(self.tokenizer) if chosen is None else chosen

    @property
    def max_length(self) -> int:
        """Tokens that are read at once at most, the tuned prompts not among them."""
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        return self.settings.max_gen_toks

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    @property
    def prefix_length(self) -> int:
        """How many tuned prompts stand before every text."""
        return 0 if self._adapter is None else self._adapter.prefix_length

    @property
    def manifest(self) -> dict[str, Any]:
        """The model, its prompts, settings and versions; who computed how much, and what verification came to."""
        return self._manifest_now().model_dump(mode="json")

    def _manifest_now(self) -> BackendManifest:
        now = self._manifest.now(self.model, self._answers.requests, self._answers.servers)
        if self.settings.no_noise:
            return now
        noise = NoiseRecord(now.adapter.name, self._noise.recomputed, tuple(self._noise.notes))
        return now.model_copy(update={"noise": noise})

    def get_model_info(self) -> dict[str, Any]:
        """Return what stands in the harness's results beside the model's arguments: the manifest."""
        return {"petals_eval": self.manifest}

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Take the harness's cache of answers. Raises ConfigError where it holds those of another model or settings."""
        check_cache(cache_hook.dbdict, self._manifest)
        super().set_cache_hook(cache_hook)
        self._answers.hook = cache_hook

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as the tokenizer's chat template writes it; where it fails, without system messages."""
        settings = self.settings
        thinking = {} if settings.enable_thinking is None else {"enable_thinking": settings.enable_thinking}

        def written(messages: list[dict[str, str]]) -> str:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **settings.chat_template_args | thinking,
            )
            return text

        try:
            return written(chat_history)
        except jinja2.TemplateError:
            _log.warning("the chat template fails: it is tried without the system message")
            return written([message for message in chat_history if message["role"] != "system"])

    # -- texts to tokens

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the tokens of a text. add_special_tokens: whether with the tokenizer's; None: as the settings say."""
        if add_special_tokens is None and string in self._at_hand:
            return self._at_hand[string]
        return self._encode([string], self._spelled_start(), add_special_tokens)[0]

    def _spelled_start(self) -> str:
        return str(self.tokenizer.decode(self.prefix_token_id))

    def _encode(
        self, texts: Sequence[str], spelled: str | None, add_special_tokens: bool | None = None
    ) -> list[list[int]]:
        """Return the tokens of texts. One that begins with `spelled` has its beginning already and gets no other."""
        wanted = self.settings.add_bos_token if add_special_tokens is None else add_special_tokens
        is_begun = [add_special_tokens is None and has_bos_prefix(text, spelled) for text in texts]
        found: list[list[int]] = [[] for _ in texts]
        for begun, options in (
            (True, {"add_special_tokens": False}),
            (False, {"add_special_tokens": wanted is not False}),
        ):
            chosen = [index for index, one in enumerate(is_begun) if one is begun]
            encoded = self.tokenizer([texts[index] for index in chosen], verbose=False, **options) if chosen else None
            for index, ids in zip(chosen, encoded["input_ids"] if encoded else (), strict=True):
                found[index] = list(ids)
        bos = self.tokenizer.bos_token_id
        if self.settings.add_bos_token and add_special_tokens is None and bos is not None:
            # `hf` loads the tokenizer so that it puts one there, whatever it does by itself.
            found = [
                ids if begun or ids[:1] == [bos] else [bos, *ids] for ids, begun in zip(found, is_begun, strict=True)
            ]
        return found

    @contextmanager
    def _encoded(self, texts: Iterable[str]) -> Iterator[None]:
        """Have the tokens of texts at hand for the body: made together, they take a fraction of the time."""
        distinct = list(dict.fromkeys(texts))
        self._at_hand = dict(zip(distinct, self._encode(distinct, self._spelled_start()), strict=True))
        try:
            yield
        finally:
            self._at_hand = {}

    # -- what the harness asks

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return of each (context, continuation) the continuation's log-likelihood, in nats, and whether it is the
        greedy one. Raises SwarmError, ExampleError."""
        if self.settings.enable_thinking:
            raise ConfigError("enable_thinking: expected tasks of generated texts, found one that asks for likelihoods")
        if any(not context and not continuation for context, continuation in _arguments(requests)):
            raise ExampleError("expected a context or a continuation, found a request with neither.")
        pairs = [(context, context.rstrip(), continuation) for context, continuation in _arguments(requests) if context]
        texts = [text for whole, kept, after in pairs for text in (kept, whole + after)]
        with self._encoded(texts):
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        inputs, answers = [], []
        for (_, continuation), context_ids, answer in requests:
            if not 0 < len(answer) <= self.max_length:
                raise RequestTooLargeError(
                    f"the continuation {shorten(continuation)} makes {len(answer)} tokens; expected 1 at least and "
                    f"{self.max_length} at most, which this model reads at once."
                )
            if not context_ids:
                raise ExampleError(
                    f"the context before {shorten(continuation)} makes no token, so that nothing stands before its "
                    "first one: leave add_bos_token out, or give the harness an empty context."
                )
            inputs.append(tuple([*context_ids, *answer][-(self.max_length + 1) :][:-1]))
            answers.append(tuple(answer))
        merged, places = requests_together("", inputs, answers, asks_greedy=True)
        asked = [
            Asked(arguments, (("", place.part),), _likelihood_of(place.start, place.stop))
            for (arguments, _, _), place in zip(requests, places, strict=True)
        ]
        by_handle = {(request.key, request.part): request for request in merged}
        return self._ask("loglikelihood", asked, by_handle, _finite, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return of each document its log-likelihood, in nats, each token scored once in windows that do not overlap.

        Raises SwarmError, ExampleError.
        """
        documents: list[Windows | None] = []
        texts = [text for (text,) in _arguments(requests)]
        for first in range(0, len(texts), CHUNK_ROWS):
            for ids in self._encode(texts[first : first + CHUNK_ROWS], self._spelled_start()):
                key = str(len(documents))
                start, longest = self.prefix_token_id, self.max_length
                documents.append(Windows(key, ids, start=start, longest=longest) if ids else None)
        asked = [
            Asked(arguments, tuple((str(index), part) for part in range(len(windows or ()))), math.fsum)
            for index, (arguments, windows) in enumerate(zip(_arguments(requests), documents, strict=True))
        ]

        def window(handle: Handle) -> Request:
            return documents[int(handle[0])][handle[1]]  # type: ignore[index]  # of an empty document none is asked

        longest_first = sorted((each.needs for each in asked), key=len, reverse=True)
        handles = (handle for needs in longest_first for handle in needs)
        return self._ask_for("loglikelihood_rolling", asked, handles, window, _summed, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return of each (context, settings) what the model writes after the context, without the stop sequence.

        Raises ConfigError for settings that are not known here, SwarmError, ExampleError.
        """
        arguments = _arguments(requests)
        tokens = self._encode([context for context, _ in arguments], self.tokenizer.bos_token)
        eos = None if self.eot_token_id is None else self.tokenizer.decode(self.eot_token_id)
        before: Counter[str] = Counter()
        by_handle: dict[Handle, Request] = {}
        asked = []
        for (context, settings), ids in zip(arguments, tokens, strict=True):
            decoding = decoding_of(settings, eos, self.max_gen_toks)
            room = self.max_length - decoding.max_new_tokens
            if room < 1:
                raise ConfigError(
                    f"max_gen_toks: expected less than the {self.max_length} tokens that this model reads, found "
                    f"{decoding.max_new_tokens}"
                )
            if not ids:
                raise ExampleError(f"this tokenizer makes no token of the context {shorten(context)}.")
            # What is drawn for a context depends on it and on how often it was asked before, not on what else is asked.
            key = sha256(context.encode("utf-8", "surrogatepass")).hexdigest()
            handle = key, before[key]
            before[key] += 1
            by_handle[handle] = Request(*handle, tuple(ids[-room:]), decoding=decoding)
            asked.append(Asked((context, settings), (handle,), partial(self._written, decoding)))
        return self._ask("generate_until", asked, by_handle, lambda generated: generated, disable_tqdm)

    def _written(self, decoding: Decoding, generated: Sequence[Generated]) -> str:
        return answer_text(generated[0], self.tokenizer, decoding.stop, self.settings.think_end_token)

    # -- the swarm

    def _ask(
        self,
        kind: str,
        asked: list[Asked],
        by_handle: dict[Handle, Request],
        value_of: Callable[[Any], Any],
        is_quiet: bool,
    ) -> list[Any]:
        handles = sorted(by_handle, key=lambda handle: len(by_handle[handle].input_ids), reverse=True)
        return self._ask_for(kind, asked, handles, by_handle.__getitem__, value_of, is_quiet)

    def _ask_for(
        self,
        kind: str,
        asked: list[Asked],
        handles: Iterable[Handle],
        request_of: Callable[[Handle], Request],
        value_of: Callable[[Any], Any],
        is_quiet: bool,
    ) -> list[Any]:
        """Return the answers to a call of the harness; the manifest is written then, however it ends."""

        def stream(wanted: Iterable[Handle]) -> "Generator[RequestAnswer]":
            requests = map(self._checked, map(request_of, wanted))
            tick, say = self._answers.tick, self._answers.say
            if kind == "generate_until":
                return self.model.generate(requests, self._adapter, on_tick=tick, on_notice=say)
            return self.model.compute(requests, self._adapter, on_tick=tick)

        before, started = len(self._answers.given), time.monotonic()
        try:
            results = self._answers.answer(kind, asked, stream, handles, value_of, is_quiet=is_quiet)
            if kind != "generate_until" and not self.settings.no_noise:
                self._noise.measure(
                    self._answers.given[before:],
                    results,
                    request_of,
                    value_of,
                    took=time.monotonic() - started,
                    on_tick=self._answers.tick,
                )
                self._answers.check_recalled()
            return results
        finally:
            if self.settings.manifest is not None:
                self._manifest_now().write(Path(self.settings.manifest))

    def _checked(self, request: Request) -> Request:
        self.model.local.check_request(request, self.prefix_length)
        return request

    def _longest(self) -> int:
        """Return how many tokens are read at once. Raises ConfigError for more than the model reads."""
        local, chosen = self.model.local, self.settings.max_length
        room = None if local.context is None else local.context - self.prefix_length
        if chosen is None:
            of_config = resolve_max_length(local.config, self.tokenizer)
            return of_config if room is None else min(of_config, room)
        if room is not None and chosen > room:
            raise ConfigError(
                f"max_length: expected {room} at most, the tokens that this model reads beside its prompts, found "
                f"{chosen}"
            )
        return chosen


def _arguments(requests: Iterable[Instance]) -> list[tuple[Any, ...]]:
    return [request.args for request in requests]


def _finite(answer: Any) -> np.ndarray:
    """Return the numbers of an answer. Raises NotFiniteError: servers' answers are checked, so it is the head's."""
    numbers = as_float64(answer)
    if not np.isfinite(numbers).all():
        raise NotFiniteError(
            "expected finite log-likelihoods, found NaN or infinity: the local norm or head overflowed, or its weights "
            "are damaged. Try dtype=float32, and check the model."
        )
    return numbers


def _summed(answer: Any) -> float:
    return math.fsum(_finite(answer))


def _likelihood_of(start: int, stop: int) -> Callable[[list[np.ndarray]], tuple[float, bool]]:
    """Return what makes the harness's answer of (targets, 2) likelihoods and whether each is greedy."""

    def likelihood(answers: list[np.ndarray]) -> tuple[float, bool]:
        scores, greedy = answers[0][start:stop].T
        return math.fsum(scores), bool(greedy.all())

    return likelihood
