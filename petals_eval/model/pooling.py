"""Which token a classification head reads: each library has its own rule, and a head is read as it was trained.

The rules differ where a text holds the padding token itself, as it does where the padding token is that of the text's
end and the tokenizer puts one there.
"""

from collections.abc import Sequence
from typing import Literal, get_args

__all__ = ["POOLINGS", "Pooling", "pooled_token", "transformers_pooling"]

Pooling = Literal["last", "last-not-pad", "before-first-pad", "count-not-pad"]
"""Which token of a text the head reads.

last: the last one. PEFT does so with tuned prompts, for its model is given embeddings and cannot see what is padding.
last-not-pad: the last one that is not the padding token: transformers from 4.49 on.
before-first-pad: the one before the first padding token: transformers before 4.49 (BLOOM and Falcon: from 4.37 on).
count-not-pad: as many tokens on as are not the padding token: BLOOM and Falcon of transformers before 4.37.

Where a rule finds no token it is the last one, and the first one for last-not-pad, as in those libraries.
"""

POOLINGS: tuple[Pooling, ...] = get_args(Pooling)


def pooled_token(input_ids: Sequence[int], pad_token_id: int | None, pooling: Pooling) -> int:
    """Return the position, counted from 0, of the token that the head reads in a text without padding.

    >>> [pooled_token((7, 2, 8, 2), 2, pooling) for pooling in POOLINGS]
    [3, 2, 0, 1]
    >>> [pooled_token((7, 9, 8, 2), 2, pooling) for pooling in POOLINGS]
    [3, 2, 2, 2]
    """
    last = len(input_ids) - 1
    if pooling == "last" or pad_token_id is None:
        return last
    kept = [position for position, token in enumerate(input_ids) if token != pad_token_id]
    if pooling == "last-not-pad":
        return kept[-1] if kept else 0
    if pooling == "before-first-pad":
        first_pad = next((place for place, position in enumerate(kept) if place != position), len(kept))
        return first_pad - 1 if first_pad else last
    return len(kept) - 1 if kept else last


def transformers_pooling(model_type: str, version: str) -> Pooling:
    """Return the rule of transformers' own classifiers of this family in this release (read off 4.34 to 5.23).

    >>> transformers_pooling("llama", "4.34.1"), transformers_pooling("bloom", "4.34.1")
    ('before-first-pad', 'count-not-pad')
    >>> transformers_pooling("bloom", "4.43.1"), transformers_pooling("llama", "5.23.0")
    ('before-first-pad', 'last-not-pad')
    """
    release = tuple(int(part) for part in version.split(".")[:2])
    if release >= (4, 49):
        return "last-not-pad"
    counts = model_type in ("bloom", "falcon") and release < (4, 37)
    return "count-not-pad" if counts else "before-first-pad"
