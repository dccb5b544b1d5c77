"""Show an example as the model will get it, for a dry run. Nothing is computed and nothing is sent."""

from collections.abc import Sequence
from typing import Any

from petals_eval.tasks.requests import Example, Request

__all__ = ["describe_example", "show_example"]


def describe_example(
    example: Example, tokenizer: Any, prefix: int = 0, label_names: Sequence[str] | None = None
) -> dict[str, Any]:
    """The example as values that JSON can hold. Positions count from 0 and begin with the tuned prompt.

    prefix: tuned prompt tokens in front of the text.
    Per request: `tokens` as the tokenizer spells them, `prompt_positions` (first, last + 1), `text_positions`
    (first, last + 1), and either `pooled_position` (trained head) or `targets`: pairs (position, token) of which the
    word head gives the likelihood.
    """
    return {
        "key": example.key,
        "text": example.text,
        "label": example.label if label_names is None else label_names[example.label],
        "n_tokens": example.n_tokens,
        "truncated": example.truncated,
        "requests": [_describe_request(request, tokenizer, prefix) for request in example.requests],
    }


def show_example(example: Example, tokenizer: Any, prefix: int = 0, label_names: Sequence[str] | None = None) -> str:
    """What `describe_example` says, as lines for a person."""
    described = describe_example(example, tokenizer, prefix, label_names)
    cut = ", cut" if described["truncated"] else ""
    lines = [f"example {described['key']}  label {described['label']}  {described['n_tokens']} text tokens{cut}"]
    lines += [f"  | {line}" for line in described["text"].split("\n")]
    for request in described["requests"]:
        if prefix:
            lines.append(f"  positions 0-{prefix - 1}: prompt")
        first, stop = request["text_positions"]
        lines.append(f"  positions {first}-{stop - 1}: {' '.join(request['tokens'])}")
        if "pooled_position" in request:
            lines.append(f"  the head reads position {request['pooled_position']}: {request['tokens'][-1]}")
        else:
            asked = ", ".join(f"{token} after position {position}" for position, token in request["targets"])
            lines.append(f"  the word head is asked for {asked}")
    return "\n".join(lines)


def _describe_request(request: Request, tokenizer: Any, prefix: int) -> dict[str, Any]:
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
        described["pooled_position"] = stop - 1
    return described
