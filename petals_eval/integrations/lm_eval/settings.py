"""What `--model_args` of lm-evaluation-harness takes for this backend."""

from typing import Annotated, Any

from pydantic import Field, model_validator

from petals_eval.config import (
    AdapterPlaces,
    Blocks,
    CallSettings,
    ModelOnSwarm,
    Place,
    Positive,
    RunSettings,
    Settings,
    option,
    same_as,
)

__all__ = ["BackendSettings", "HarnessSettings"]

_SEVERAL = ("initial_peers", "allow_servers", "deny_servers", "index_keys")
_SEPARATOR = "+"
"""Between several values of one argument: the harness cuts its text at commas, a shell at blanks and semicolons, and no
multiaddress holds it."""


class HarnessSettings(Settings):
    """What the harness's own backend `hf` takes under the same names, and where the manifest goes."""

    max_length: Positive | None = option(None, "Tokens read at once at most.", unset="all that the model reads")
    add_bos_token: bool | None = option(
        None, "Whether a beginning-of-text token stands in front.", unset="as the tokenizer does it"
    )
    prefix_token_id: Annotated[int, Field(ge=0)] | None = option(
        None, "Token before a text without a context.", unset="the tokenizer's first token of a text, or its last"
    )
    max_gen_toks: Positive = option(256, "Tokens generated at most, where a task does not say.")
    chat_template_args: dict[str, Any] = option({}, "What the chat template is told besides.")
    enable_thinking: bool | None = option(None, "Told to the chat template.")
    think_end_token: str | int | None = option(None, "What ends a model's thinking; only what follows is its answer.")
    manifest: Place | None = option(None, "File for the manifest, written after each call.", "FILE")

    @model_validator(mode="before")
    @classmethod
    def _thinking_ends(cls, values: Any) -> Any:
        if values.get("enable_thinking") is True and values.get("think_end_token") is None:
            raise ValueError("enable_thinking: expected think_end_token beside it, which says where the answer begins")
        return values


class BackendSettings(ModelOnSwarm, CallSettings, HarnessSettings):
    """All of it: the model, its prompts, the swarm, how it is used, and what the harness wants of a backend.

    Several peers, servers or keys are a list, or one text with `+` between them. `peft`, which `hf` takes, means
    `adapter`.
    """

    model: Place = option(..., "Hub name or local folder.", "NAME", alias="pretrained")
    adapter: AdapterPlaces = same_as(RunSettings, "adapter")
    adapter_task: Annotated[int, Field(ge=0)] | None = same_as(RunSettings, "adapter_task")
    dtype: str | None = same_as(RunSettings, "dtype")  # `hf` takes torch's other names for one, too
    device: str = same_as(RunSettings, "device")
    verify_local: Blocks | None = same_as(RunSettings, "verify_local")

    @model_validator(mode="before")
    @classmethod
    def _separated(cls, values: Any) -> Any:
        split = {name: values[name].split(_SEPARATOR) for name in _SEVERAL if isinstance(values.get(name), str)}
        renamed = {"adapter" if name == "peft" and "adapter" not in values else name: values[name] for name in values}
        return renamed | split

    @model_validator(mode="after")
    def _one_adapter(self) -> "BackendSettings":
        if len(self.adapter) > 1:
            raise ValueError(f"adapter: expected one, for the harness shows one model, found {len(self.adapter)}")
        return self
