"""What `-M` of inspect_ai takes for this provider."""

from typing import Any

from petals_eval.config import Place, option
from petals_eval.integrations.swarm_model import SwarmModelSettings

__all__ = ["ProviderSettings"]


class ProviderSettings(SwarmModelSettings):
    """The model, its prompts, the swarm, how it is used, and how a conversation becomes a text.

    The model is the one that stands behind `petals-eval/` in inspect's `--model`. What `hf` takes has the same name.
    """

    chat_template: str | None = option(None, "Instead of the tokenizer's own.")
    use_chat_template: bool | None = option(None, "False: a line `role: text` for each message.")
    tokenizer_call_args: dict[str, Any] = option({}, "What the tokenizer is told besides.")
    enable_thinking: bool | None = option(None, "Told to the chat template.")
    do_sample: bool = option(True, "False: the likeliest token each time, whatever the temperature.")
    completions: bool = option(False, "Go on from the text of a single user message as it is.")
    stop_in_text: bool = option(False, "Leave a stop sequence in the text, as hf does, with all of its last token.")
    manifest: Place | None = option(None, "File for the manifest, written as answers come.", "FILE")
