"""Show an example as the model will get it, for a dry run. Nothing is computed and nothing is sent."""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from petals_eval.tasks.requests import Decoding, Example, Request
from petals_eval.text import plural

__all__ = ["describe_example", "show_example"]

MOST_REQUESTS = 8
"""Of an example; a long document has thousands of windows."""
_MOST_TOKENS = 120  # shown of one request; the others are in the description
_MOST_TARGETS = 4  # named one by one
_MOST_LETTERS = 8000  # of a text

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
    `error`: why it cannot be computed, if so. Of the first `MOST_REQUESTS` of the `n_requests`: `tokens` as the
    tokenizer spells them, `prompt_positions` (first, last + 1), `text_positions` (first, last + 1), and what is asked:
    `pooled_position` (trained head); `targets`, pairs (position, token) of which the word head gives the likelihood,
    with `asks_greedy` where it is asked if they are greedy; or `decoding`, how a text is generated.
    """
    described = {
        "key": example.key,
        "text": example.text,
        "label": label_names[example.label] if label_names and isinstance(example.label, int) else example.label,
        "n_tokens": example.n_tokens,
        "truncated": example.truncated,
        "n_requests": len(example.requests),
        "requests": [
            _describe_request(request, tokenizer, prefix, pooled_token)
            for request in islice(example.requests, MOST_REQUESTS)
        ],
    }
    if example.error is not None:
        described["error"] = str(example.error)
    return described


def show_example(
    example: Example,
    tokenizer: Any,
    prefix: int = 0,
    label_names: Sequence[str] | None = None,
    pooled_token: PooledToken = _last,
) -> str:
    """Return what `describe_example` says, as lines for a person; of what is long, the beginning and the end."""
    described = describe_example(example, tokenizer, prefix, label_names, pooled_token)
    cut = ", cut" if described["truncated"] else ""
    label = "no label" if described["label"] is None else f"label {described['label']}"
    lines = [f"example {described['key']}  {label}  {described['n_tokens']} text tokens{cut}"]
    lines += [f"  | {line}" for line in _shortened(described["text"]).split("\n")]
    before: Sequence[int] = ()
    for request in described["requests"]:
        lines += _request_lines(request, prefix, before)
        before = request["token_ids"]
    more = described["n_requests"] - len(described["requests"])
    if more:
        lines.append(f"  ... and {plural(more, 'more request')}")
    if example.error is not None:
        lines.append(f"  cannot be computed: {example.error}")
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
    if request.decoding is not None:
        described["decoding"] = _describe_decoding(request.decoding)
    elif request.targets:
        spelled = tokenizer.convert_ids_to_tokens([token for _, token in request.targets])
        positions = (prefix + position for position, _ in request.targets)
        described["targets"] = [[position, token] for position, token in zip(positions, spelled, strict=True)]
        if request.asks_greedy:
            described["asks_greedy"] = True
    else:
        described["pooled_position"] = prefix + pooled_token(request.input_ids)
    return described


def _describe_decoding(decoding: Decoding) -> dict[str, Any]:
    described: dict[str, Any] = {"max_new_tokens": decoding.max_new_tokens, "stop": list(decoding.stop)}
    if decoding.temperature:
        drawn = ("temperature", "top_k", "top_p", "seed")
        described |= {name: getattr(decoding, name) for name in drawn}
    return described


def _request_lines(request: dict[str, Any], prefix: int, before: Sequence[int]) -> list[str]:
    """Return the lines of a request. before: the tokens of the one before it, which may begin alike."""
    lines = [f"  positions 0-{prefix - 1}: prompt"] if prefix else []
    first, stop = request["text_positions"]
    tokens, shared = request["tokens"], _shared(request["token_ids"], before)
    if shared:
        lines.append(f"  positions {first}-{first + shared - 1}: as in the request before")
    if shared < len(tokens):
        lines.append(f"  positions {first + shared}-{stop - 1}: {_joined(tokens[shared:])}")
    if "decoding" in request:
        lines.append(f"  goes on {_decoding_text(request['decoding'])}")
    elif "targets" in request:
        greedy = ", and whether each is the likeliest" if "asks_greedy" in request else ""
        lines.append(f"  the word head is asked for {_targets_text(request['targets'])}{greedy}")
    else:
        position = request["pooled_position"]
        lines.append(f"  the head reads position {position}: {tokens[position - first]}")
    return lines


def _shared(ids: Sequence[int], before: Sequence[int]) -> int:
    """Count the tokens that two requests begin with, where there are enough of them to leave them out."""
    pairs = enumerate(zip(ids, before, strict=False))
    count = next((at for at, (one, other) in pairs if one != other), min(len(ids), len(before)))
    return count if count > 8 else 0


def _joined(tokens: Sequence[str]) -> str:
    if len(tokens) <= _MOST_TOKENS:
        return " ".join(tokens)
    half = _MOST_TOKENS // 2
    return f"{' '.join(tokens[:half])} ... {len(tokens) - 2 * half:,} more ... {' '.join(tokens[-half:])}"


def _targets_text(targets: Sequence[tuple[int, str]]) -> str:
    positions = [position for position, _ in targets]
    in_a_row = positions == list(range(positions[0], positions[0] + len(positions)))
    if len(targets) <= _MOST_TARGETS or not in_a_row:
        named = ", ".join(f"{token} after position {position}" for position, token in targets[:_MOST_TOKENS])
        more = len(targets) - _MOST_TOKENS
        return f"{named} and {more:,} more" if more > 0 else named
    words = _joined([token for _, token in targets])
    return f"{len(targets):,} tokens after positions {positions[0]}-{positions[-1]}: {words}"


def _decoding_text(decoding: dict[str, Any]) -> str:
    stops = f", or until {' or '.join(map(repr, decoding['stop']))}" if decoding["stop"] else ""
    how = "the likeliest each time"
    if "temperature" in decoding:
        limits = f", from the {decoding['top_k']} likeliest" if decoding["top_k"] else ""
        limits += f", from those that have {decoding['top_p']:g} together" if decoding["top_p"] < 1 else ""
        how = f"drawn at temperature {decoding['temperature']:g}{limits}, seed {decoding['seed']}"
    return f"for at most {decoding['max_new_tokens']:,} tokens{stops}; {how}"


def _shortened(text: str) -> str:
    if len(text) <= _MOST_LETTERS:
        return text
    half = _MOST_LETTERS // 2
    return f"{text[:half]}\n... {len(text) - 2 * half:,} more characters ...\n{text[-half:]}"
