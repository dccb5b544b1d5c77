"""What `--model_args` of lm-evaluation-harness takes for this backend."""

from typing import Annotated, Any

from pydantic import Field, model_validator

from petals_eval.config import Place, Positive, RunSettings, Settings, option, same_as
from petals_eval.integrations.swarm_model import SwarmModelSettings

__all__ = ["BackendSettings", "HarnessSettings"]


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
    no_noise: bool = same_as(RunSettings, "no_noise")
    manifest: Place | None = option(None, "File for the manifest, written after each call.", "FILE")

    @model_validator(mode="before")
    @classmethod
    def _thinking_ends(cls, values: Any) -> Any:
        if values.get("enable_thinking") is True and values.get("think_end_token") is None:
            raise ValueError("enable_thinking: expected think_end_token beside it, which says where the answer begins")
        return values


class BackendSettings(SwarmModelSettings, HarnessSettings):
    """All of it: the model, its prompts, the swarm, how it is used, and what the harness wants of a backend."""

    model: Place = option(..., "Hub name or local folder.", "NAME", alias="pretrained")
