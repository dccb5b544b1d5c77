"""Show an example as the model will get it, for a dry run. Nothing is computed and nothing is sent."""

from collections.abc import Callable, Sequence
from typing import Any

from petals_eval.tasks.requests import Example, Request

__all__ = ["describe_example", "show_example"]


PooledToken = Callable[[Sequence[int]], int]
"""The position in a text, without prompts, of the token that the trained head reads."""


def _last(input_ids: Sequence[int]) -> int:
    return len(input_ids) - 1


def describe_example(
    example: Example,
    tokenizer: Any,
    prefix: int = 0,
    label_names: Sequence[str] | None = None,
    pooled_token: PooledToken = _last,
) -> dict[str, Any]:
    """Return the example as values that JSON can hold. Positions count from 0 and begin with the tuned prompt.

    prefix: tuned prompt tokens in front of the text. pooled_token: by default the last token of a text.
    Per request: `tokens` as the tokenizer spells them, `prompt_positions` (first, last + 1), `text_positions`
    (first, last + 1), and either `pooled_position` (trained head) or `targets`: pairs (position, token) of which the
    word head gives the likelihood.
    """
    return {
        "key": example.key,
        "text": example.text,
        "label": label_names[example.label] if label_names and isinstance(example.label, int) else example.label,
        "n_tokens": example.n_tokens,
        "truncated": example.truncated,
        "requests": [_describe_request(request, tokenizer, prefix, pooled_token) for request in example.requests],
    }


def show_example(
    example: Example,
    tokenizer: Any,
    prefix: int = 0,
    label_names: Sequence[str] | None = None,
    pooled_token: PooledToken = _last,
) -> str:
    """Return what `describe_example` says, as lines for a person."""
    described = describe_example(example, tokenizer, prefix, label_names, pooled_token)
    cut = ", cut" if described["truncated"] else ""
    label = "no label" if described["label"] is None else f"label {described['label']}"
    lines = [f"example {described['key']}  {label}  {described['n_tokens']} text tokens{cut}"]
    lines += [f"  | {line}" for line in described["text"].split("\n")]
    for request in described["requests"]:
        if prefix:
            lines.append(f"  positions 0-{prefix - 1}: prompt")
        first, stop = request["text_positions"]
        lines.append(f"  positions {first}-{stop - 1}: {' '.join(request['tokens'])}")
        if "pooled_position" in request:
            position = request["pooled_position"]
            lines.append(f"  the head reads position {position}: {request['tokens'][position - first]}")
        else:
            asked = ", ".join(f"{token} after position {position}" for position, token in request["targets"])
            lines.append(f"  the word head is asked for {asked}")
    return "\n".join(lines)


def _describe_request(request: Request, tokenizer: Any, prefix: int, pooled_token: PooledToken) -> dict[str, Any]:
    stop = prefix + len(request.input_ids)
    described: dict[str, Any] = {
        "part": request.part,
        "tokens": tokenizer.convert_ids_to_tokens(list(request.input_ids)),
        "token_ids": list(request.input_ids),
        "prompt_positions": [0, prefix],
        "text_positions": [prefix, stop],
    }
    if request.targets:
        described["targets"] = [
            [prefix + position, tokenizer.convert_ids_to_tokens(token)] for position, token in request.targets
        ]
    else:
        described["pooled_position"] = prefix + pooled_token(request.input_ids)
    return described
