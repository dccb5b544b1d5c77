"""`PetalsEvalAPI`: what inspect_ai asks of a model, answered over a swarm.

Conversations become texts and texts tokens as in inspect's own provider `hf` of release 0.3.285
(`inspect_ai/model/_providers/hf.py`), by its own functions, so that the same task gives the same answers.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from secrets import randbits
from typing import Any, TypeVar
from weakref import finalize

import anyio.lowlevel
import numpy as np
from inspect_ai._util.error import PrerequisiteError
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    Logprob,
    Logprobs,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    StopReason,
    TopLogprob,
)
from inspect_ai.model._providers.hf import HuggingFaceAPI
from inspect_ai.model._providers.util import HFHandler
from inspect_ai.tool import ToolChoice, ToolInfo

from petals_eval.errors import ConfigError, ExampleError, NotFiniteError, PetalsEvalError, RequestTooLargeError
from petals_eval.integrations.inspect_ai.calls import Answer, Calls
from petals_eval.integrations.inspect_ai.settings import ProviderSettings
from petals_eval.integrations.manifest import BackendManifest
from petals_eval.integrations.swarm_model import opened_model
from petals_eval.tasks.requests import Decoding, Finish, Generated, Request, as_float64

__all__ = ["PetalsEvalAPI"]

T = TypeVar("T")

_log = logging.getLogger("petals_eval")

_CONNECTIONS = 256
"""Calls that inspect makes at once where its user says nothing: they are asked together."""
_TEMPERATURE, _TOP_K = 1.0, 50
"""Of draws, where the task does not say: the defaults of transformers, and so of `hf`."""
_NOT_KNOWN = ("best_of", "frequency_penalty", "presence_penalty", "logit_bias", "response_schema")
_FINISH: dict[Finish, StopReason] = {"end": "stop", "stop": "stop", "length": "max_tokens"}


class PetalsEvalAPI(HuggingFaceAPI):
    """A model on a swarm, as inspect_ai asks it.

    model_name: a hub name or a local folder. model_args: `ProviderSettings`, the `-M` of inspect's command.

    Calls that wait are asked together (`Calls`). One that cannot be computed raises its reason in its sample; none
    becomes a wrong answer.

    Raises inspect's PrerequisiteError for settings, a model, prompts or a swarm that cannot be; its cause is ours.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008  # as every provider of inspect's
        **model_args: Any,
    ):
        ModelAPI.__init__(self, model_name, base_url, api_key, [], config)  # that of `hf` loads all of the model
        try:
            self._open(ProviderSettings(model=model_name, **model_args))
        except PetalsEvalError as error:
            raise PrerequisiteError(str(error)) from error  # which inspect's command shows without a traceback
        # What `hf_chat` of the class above reads.
        self.tokenizer = self.remote.local.tokenizer
        self.chat_template = self.settings.chat_template
        self.use_chat_template = self.settings.use_chat_template
        self.enable_thinking = self.settings.enable_thinking
        self._seed = randbits(32)
        self._asked: Counter[str] = Counter()

    def _open(self, settings: ProviderSettings) -> None:
        self.settings = settings
        self.remote, opened = opened_model(settings)
        logging.addLevelName(logging.WARNING, "WARNING")  # hivemind calls it WARN, a level that inspect does not know
        self._adapter = self.remote.adapters[0] if self.remote.adapters else None
        with opened:  # closes what was opened where this fails
            self.remote.local.check_head("lm", self._adapter)
            self._manifest = BackendManifest.of(
                self.remote,
                {name: getattr(settings, name) for name in _ANSWERING},
                code="integrations/inspect_ai",
                packages={"inspect_ai": version("inspect_ai")},
            )
            # inspect's cache knows a model by its name and this alone, and would hand the answers of other prompts on.
            whose = json.dumps(self._manifest.whose(), sort_keys=True).encode()
            self.base_url = f"petals-eval:{sha256(whose).hexdigest()}"
            self._calls = Calls(self.remote, say=_log.warning, on_answered=self._write_manifest)
            opened.callback(self._calls.close)
            self._close = finalize(self, opened.pop_all().close)

    def close(self) -> None:
        """End the connection, and the embedded swarm."""
        self._close()

    @property
    def manifest(self) -> dict[str, Any]:
        """The model, its prompts, settings and versions; who computed how much, and what verification came to."""
        return self._manifest_now().model_dump(mode="json")

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """Return what the model writes after a conversation, and the likelihoods that the task asks for.

        Raises ConfigError for settings that are not known here, SwarmError, ExampleError.
        """
        started = time.monotonic()
        _refuse_unknown(config)
        text = self._completed_text(input, tools) if self.settings.completions else self.hf_chat(input, tools)
        [ids] = self.tokenizer([text], **self.settings.tokenizer_call_args)["input_ids"]
        if not ids:
            raise ExampleError(f"this tokenizer makes no token of the text {text!r}.")
        wanted = config.max_tokens or self.max_tokens() or 1
        max_tokens = self._room(len(ids), wanted)
        # What is drawn for a text depends on it and on how often it was asked, not on what else is asked.
        key = sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        part, self._asked[key] = self._asked[key], self._asked[key] + 1
        requests = [Request(key, 2 * part, tuple(ids), decoding=self._decoding(config, max_tokens))]
        if config.prompt_logprobs:
            targets = tuple((at, token) for at, token in enumerate(ids[1:]))
            requests += [Request(key, 2 * part + 1, tuple(ids), targets)] if targets else []
        answer = await _result(self._calls.ask(requests))
        generated = answer.values[0]
        written = generated.text
        if self.settings.stop_in_text:
            written = self.tokenizer.decode(list(generated.token_ids), skip_special_tokens=True)
        message = ChatMessageAssistant(content=written, model=self.model_name, source="generate")
        if tools:
            message = HFHandler(self.model_name, self.model_family()).parse_assistant_response(written, tools)
        is_full = generated.finish == "length" and max_tokens < wanted
        usage = (len(ids), len(generated.token_ids))
        return ModelOutput(
            model=self.model_name,
            choices=[
                ChatCompletionChoice(
                    message=message,
                    stop_reason="model_length" if is_full else _FINISH[generated.finish],
                    logprobs=self._logprobs(generated) if config.logprobs else None,
                    prompt_logprobs=self._prompt_logprobs(ids, answer) if config.prompt_logprobs else None,
                )
            ],
            usage=ModelUsage(input_tokens=usage[0], output_tokens=usage[1], total_tokens=sum(usage)),
            time=time.monotonic() - started,
            metadata={"petals_eval": {"servers": sorted(server.peer_id for server in answer.servers)}},
        )

    def max_connections(self) -> int:
        """Return how many calls inspect makes at once where its user does not say."""
        return _CONNECTIONS

    async def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text, without those that the tokenizer puts around it."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    async def count_text_tokens(self, text: str) -> int:
        """Return how many tokens a text has."""
        return len(await self.tokenize(text))

    def _completed_text(self, input: Sequence[ChatMessage], tools: Sequence[ToolInfo]) -> str:
        if len(input) != 1 or input[0].role != "user" or tools:
            raise ConfigError(
                f"completions=true: expected a single user message and no tools, found {len(input)} messages "
                f"({', '.join(message.role for message in input)}) and {len(tools)} tools"
            )
        return input[0].text

    def _room(self, length: int, wanted: int) -> int:
        """Return how many of the wanted tokens may follow a text of this length, or raise RequestTooLargeError."""
        context = self.remote.local.context
        if context is None:
            return wanted
        prefix = 0 if self._adapter is None else self._adapter.prefix_length
        # The last new token is not read.
        room = context - prefix - length + 1
        if room < 1:
            raise RequestTooLargeError(
                f"expected a text of {context - prefix} tokens at most, which this model reads beside its prompts, "
                f"found {length}"
            )
        return min(wanted, room)

    def _decoding(self, config: GenerateConfig, max_tokens: int) -> Decoding:
        temperature = _TEMPERATURE if config.temperature is None else config.temperature
        return Decoding(
            max_tokens,
            tuple(stop for stop in config.stop_seqs or () if stop),
            temperature=temperature if self.settings.do_sample else 0.0,
            top_k=_TOP_K if config.top_k is None else config.top_k,
            top_p=1.0 if config.top_p is None else config.top_p,
            seed=self._seed if config.seed is None else config.seed,
            likeliest=(config.top_logprobs or 1) if config.logprobs else 0,
        )

    def _logprobs(self, generated: Generated) -> Logprobs:
        content = []
        for token, found in zip(generated.token_ids, generated.likelihoods, strict=True):
            top = [TopLogprob(**self._spelled(other), logprob=value) for other, value in found.likeliest]
            content.append(Logprob(**self._spelled(token), logprob=found.log_likelihood, top_logprobs=top))
        return Logprobs(content=content)

    def _prompt_logprobs(self, ids: Sequence[int], answer: Answer) -> Logprobs | None:
        """Return the likelihood of each token but the first, which has nothing before it; None: there is no other."""
        if len(answer.values) < 2:
            return None
        numbers = as_float64(answer.values[1])
        if not np.isfinite(numbers).all():
            raise NotFiniteError("expected finite log-likelihoods, found NaN or infinity: try -M dtype=float32.")
        pairs = zip(ids[1:], numbers.tolist(), strict=True)
        return Logprobs(content=[Logprob(**self._spelled(token), logprob=value) for token, value in pairs])

    def _spelled(self, token: int) -> dict[str, Any]:
        """Return a token as inspect's `hf` writes it: as in the vocabulary, and the code of each letter."""
        spelled = self.tokenizer.convert_ids_to_tokens(token)
        return {"token": spelled, "bytes": list(map(ord, spelled))}

    def _manifest_now(self) -> BackendManifest:
        return self._manifest.now(self.remote, {"generate": self._calls.answered}, self._calls.servers)

    def _write_manifest(self) -> None:
        if self.settings.manifest is not None:
            self._manifest_now().write(Path(self.settings.manifest))


_ANSWERING = (
    *("chat_template", "use_chat_template", "tokenizer_call_args", "enable_thinking", "do_sample", "completions"),
    "stop_in_text",
)
"""The settings of the provider itself that change an answer."""


def _refuse_unknown(config: GenerateConfig) -> None:
    """Raise ConfigError for settings of a call that would change its answer and are not known here."""
    given = [name for name in _NOT_KNOWN if getattr(config, name) is not None]
    if (config.num_choices or 1) > 1:
        given.append("num_choices")
    if given:
        raise ConfigError(f"{', '.join(given)}: not known here. Leave it out of the task's and the command's settings.")
    if config.prompt_logprobs and config.prompt_logprobs > 1:
        raise ConfigError(
            f"prompt_logprobs: expected 1, the likelihood of each token of the prompt, found {config.prompt_logprobs}: "
            "likelier tokens in its place are not computed here"
        )


async def _result(future: "Future[T]") -> T:
    """Wait for a future of another thread, in any event loop that inspect may run in: asyncio's or trio's."""
    done = anyio.Event()
    loop: Any = anyio.lowlevel.current_token().native_token
    soon = loop.call_soon_threadsafe if hasattr(loop, "call_soon_threadsafe") else loop.run_sync_soon

    def wake(_: "Future[T]") -> None:
        with suppress(RuntimeError):  # the loop is over, and nobody waits any more
            soon(done.set)

    future.add_done_callback(wake)
    await done.wait()
    return future.result()
