"""Texts into tokens, the same way with every tokenizer: no padding, cut on the right, and label words after a text."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from petals_eval.errors import ExampleError, ModelError

__all__ = [
    "CHUNK_ROWS",
    "Bos",
    "Continued",
    "EncodedPair",
    "continue_texts",
    "cut",
    "encode",
    "encode_pairs",
    "opening_tokens",
    "start_token",
    "tokenize",
    "tokenizer_sha256",
]

CHUNK_ROWS = 256
"""So many rows are tokenised together."""

Bos = Literal["auto", "always", "never"]
"""Whether a beginning-of-text token stands in front: as the tokenizer does it, once in any case, or not at all."""


@dataclass(frozen=True)
class Continued:
    """A text and the ways it may go on.

    context: tokens of the text, the tokenizer's opening tokens (BOS) included, its closing ones (EOS) not.
    words: tokens of each continuation.
    tail: how many of the last tokens of `context` belong to the fixed text at the end of the template.
    error: why a continuation cannot be told from another one, or None.
    """

    context: tuple[int, ...]
    words: tuple[tuple[int, ...], ...]
    tail: int
    error: ExampleError | None = None


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """A text and an answer that follows it, as the tokens of the two together; at least one token each."""

    context: tuple[int, ...]
    answer: tuple[int, ...]


def tokenize(
    tokenizer: Any, texts: Sequence[str], max_length: int, pairs: Sequence[str] | None = None
) -> list[tuple[tuple[int, ...], bool]]:
    """Return the tokens of each text, at most `max_length` with the tokenizer's special ones, and whether it was cut.

    These are the tokens of `tokenizer(text, truncation=True, max_length=max_length)`, always cut on the right. With
    `pairs`, the second texts, they are those of `tokenizer(text, pair, ...)`: a token at a time goes from the end of
    whichever text is the longer one then.
    """
    if not texts:
        return []

    def given(rows: Sequence[int]) -> tuple[list[str], ...]:
        return tuple([several[row] for row in rows] for several in (texts, pairs) if several is not None)

    # verbose=False: a text longer than the model's context is no reason for a warning, for it is about to be cut.
    whole = tokenizer(*given(range(len(texts))), verbose=False)["input_ids"]
    long = [row for row, ids in enumerate(whole) if len(ids) > max_length]
    kept = [tuple(ids) for ids in whole]
    if long:
        with _cutting_right(tokenizer):
            shorter = tokenizer(*given(long), truncation=True, max_length=max_length)["input_ids"]
        for row, ids in zip(long, shorter, strict=True):
            kept[row] = tuple(ids)
    return [(ids, len(before) > len(ids)) for ids, before in zip(kept, whole, strict=True)]


def continue_texts(
    tokenizer: Any, texts: Sequence[str], without_tail: Sequence[str], words: Sequence[str]
) -> list[Continued]:
    """Return the tokens of each text, and those of each of `words` after it.

    A word's tokens are what tokens(text + word) has beyond tokens(text). Where the two do not share that beginning,
    because the tokenizer merges across the boundary, the word is tokenised by itself, without special tokens: the
    text must be the same for every label. Where these tokens spell another text, for the tokenizer begins every word
    that stands by itself with a blank, that is an error of the row: it would be another word's likelihood.
    `without_tail` are the texts without the template's fixed end.
    """
    if not texts:
        return []
    opening = _opening_tokens(tokenizer)
    plain = _plain(tokenizer, texts)
    shorter = _plain(tokenizer, without_tail)
    joined = _plain(tokenizer, [text + word for text in texts for word in words])
    alone = _plain(tokenizer, words)
    found = []
    for row, ids in enumerate(plain):
        following, error = [], None
        for column, own in enumerate(alone):
            both = joined[row * len(words) + column]
            shared = len(both) > len(ids) and both[: len(ids)] == ids
            following.append(both[len(ids) :] if shared else own)
            if own and not shared and tokenizer.decode([*ids, *own]) != tokenizer.decode(both):
                error = error or _merged(tokenizer, ids, both, words[column])
        tail = len(ids) - _shared_beginning(ids, shorter[row])
        found.append(Continued(opening + ids, tuple(following), tail, error))
    return found


def cut(continued: Continued, max_length: int) -> tuple[tuple[int, ...], bool]:
    """Return the context that leaves room for the longest word under `max_length`, and whether it was cut.

    What goes are the last tokens before the template's fixed end: the cue that asks for the label stays.
    Raises ValueError when the cue and the words alone do not fit.
    """
    room = max_length - max(len(word) for word in continued.words)
    context = continued.context
    if len(context) <= room:
        return context, False
    kept = room - continued.tail
    if kept < 1:
        raise ValueError("no room")
    return context[:kept] + context[len(context) - continued.tail :], True


def opening_tokens(tokenizer: Any, bos: Bos = "auto") -> tuple[int, ...]:
    """Return what stands before every text. Raises ModelError where a token is wanted that the tokenizer lacks."""
    if bos == "never":
        return ()
    if bos == "auto":
        return _opening_tokens(tokenizer)
    if tokenizer.bos_token_id is None:
        raise ModelError("bos: always: this tokenizer has no beginning-of-text token. Choose auto or never.")
    return (int(tokenizer.bos_token_id),)


def start_token(tokenizer: Any) -> int:
    """Return the token after which a text is scored that nothing stands before: the one that begins texts, or else the
    one that ends them. Raises ModelError where the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ModelError("this tokenizer has no token that begins or ends a text, and a text without context needs one.")


def encode(tokenizer: Any, texts: Sequence[str], bos: Bos = "auto") -> list[tuple[int, ...]]:
    """Return the tokens of whole texts, without closing tokens and uncut. A text that begins with the spelled-out
    beginning-of-text token, as chat templates write it, gets no second one.
    """
    opening, spelled = opening_tokens(tokenizer, bos), tokenizer.bos_token
    return [
        ids if spelled and text.startswith(spelled) else opening + ids
        for text, ids in zip(texts, _plain(tokenizer, texts) if texts else [], strict=True)
    ]


def encode_pairs(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], bos: Bos = "auto"
) -> list[EncodedPair | ExampleError]:
    """Return the tokens of each pair (text, answer after it), or why there are none.

    As lm-evaluation-harness 0.4.13 has them (`TemplateLM._encode_pair`, `loglikelihood`), whose `add_bos_token` None,
    True and False are `bos` auto, always and never: blanks at the end of the text belong to the answer, whose tokens
    are what the whole has beyond the text's own. An answer without a text is tokenised without opening tokens and
    stands after `start_token`; where it begins with that token itself, this one is the text.

    One difference: where the tokenizer merges the end of the text with the beginning of the answer, the harness takes
    what is left of the answer behind the text's length. Here that is an ExampleError, and so is an answer that makes no
    token. Raises ModelError as `start_token` and `opening_tokens` do.
    """
    split = [(text.rstrip(), text[len(text.rstrip()) :] + answer) for text, answer in pairs]
    following = [index for index, (text, _) in enumerate(pairs) if text]
    alone = [index for index, (text, _) in enumerate(pairs) if not text]
    # Each text once: it stands before all of its answers.
    texts = dict.fromkeys(each for index in following for each in (split[index][0], "".join(split[index])))
    encoded = dict(zip(texts, encode(tokenizer, list(texts), bos), strict=True))
    bare = dict(zip(alone, _plain(tokenizer, [split[index][1] for index in alone]) if alone else (), strict=True))
    found: list[EncodedPair | ExampleError] = []
    for index, (text, answer) in enumerate(split):
        context, whole = ((), bare[index]) if index in bare else (encoded[text], encoded[text + answer])
        if whole[: len(context)] != context:
            found.append(_merged(tokenizer, context, whole, pairs[index][1]))
            continue
        if not context:  # nothing but blanks before it, or a tokenizer that makes nothing of the text
            start = start_token(tokenizer)
            whole = whole if whole[:1] == (start,) else (start, *whole)
            context = whole[:1]
        if len(whole) == len(context):
            found.append(ExampleError(f"this tokenizer makes no token of the answer {pairs[index][1]!r:.80}."))
        else:
            found.append(EncodedPair(context, whole[len(context) :]))
    return found


def _merged(tokenizer: Any, context: Sequence[int], whole: Sequence[int], answer: str) -> ExampleError:
    """Return what is said of an answer that begins inside a token."""
    shared = _shared_beginning(context, whole)
    token = tokenizer.convert_ids_to_tokens(whole[shared]) if shared < len(whole) else ""
    return ExampleError(
        f"the answer {answer!r:.80} begins inside a token: this tokenizer makes {token!r} of the end of the text and "
        "the beginning of the answer, which has no likelihood of its own. Expected a token to begin with it: put a "
        "blank or a line end between the two (delimiter)."
    )


def tokenizer_sha256(tokenizer: Any, *, with_chat: bool = False) -> str:
    """Return a SHA-256 over what makes tokens of texts, the same on every machine.

    with_chat: over the chat template, too. What calls set on a tokenizer, truncation and padding, is left out.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: dict[str, Any] = {"class": type(tokenizer).__name__}
    if backend is not None:
        rules = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
    elif hasattr(tokenizer, "get_vocab"):
        rules["vocabulary"] = tokenizer.get_vocab()
    special = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    template = getattr(tokenizer, "chat_template", None) if with_chat else None
    told = json.dumps([rules, special, template], sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()


def _plain(tokenizer: Any, texts: Sequence[str]) -> list[tuple[int, ...]]:
    return [tuple(ids) for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]]


def _opening_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Return what the tokenizer puts before every text (BOS, for most; nothing for some)."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    starts = [at for at in range(len(full) - len(bare) + 1) if full[at : at + len(bare)] == bare]
    return tuple(full[: starts[0]]) if starts else ()


def _shared_beginning(first: Sequence[int], second: Sequence[int]) -> int:
    for count, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return count
    return min(len(first), len(second))


@contextmanager
def _cutting_right(tokenizer: Any) -> Iterator[None]:
    side = tokenizer.truncation_side
    tokenizer.truncation_side = "right"
    try:
        yield
    finally:
        tokenizer.truncation_side = side
