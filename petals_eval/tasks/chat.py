"""A conversation as the text that a tokenizer's chat template makes of it."""

from collections.abc import Sequence
from typing import Any

from petals_eval.errors import ExampleError, ModelError

__all__ = ["Message", "chat_text", "check_chat_template", "joined"]

Message = dict[str, str]
"""Its role (system, user or assistant) and its content."""


def chat_text(tokenizer: Any, messages: Sequence[Message]) -> str:
    """Return the conversation up to where the assistant is to answer.

    Raises ModelError where there is no template, ExampleError where it fails on these messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            "chat: this model's tokenizer has no chat template. Leave chat out: a model without one was hardly trained "
            "on conversations."
        )
    import jinja2

    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    # A template is a program of the model's author: these are what Jinja and its expressions raise.
    except (jinja2.TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise ExampleError(f"the chat template of this model's tokenizer fails: {error}") from error
    return str(text)


def check_chat_template(tokenizer: Any, messages: Sequence[Message]) -> None:
    """Raise ModelError where the template cannot be used for messages of these roles, whatever they say."""
    try:
        chat_text(tokenizer, messages)
    except ExampleError as error:
        hint = (
            " It may take no system message: leave instruction and system out." if "system" in _roles(messages) else ""
        )
        raise ModelError(f"chat: {error} (the roles were {', '.join(_roles(messages))}).{hint}") from error


def joined(first: str, second: str, delimiter: str) -> str:
    """Join two texts, with the delimiter between them unless one is empty or has a blank or line end there.

    >>> joined("Be brief.", "Now answer.", "|"), joined("Be brief.", "", "|"), joined("Be brief. ", "Now answer.", "|")
    ('Be brief.|Now answer.', 'Be brief.', 'Be brief. Now answer.')
    """
    if not first or not second or first[-1].isspace() or second[0].isspace():
        return first + second
    return first + delimiter + second


def _roles(messages: Sequence[Message]) -> list[str]:
    return [message["role"] for message in messages]
