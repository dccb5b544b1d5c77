"""Batches as a PyTorch program has them: padded tokens with their masks and labels, into rows without padding."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from petals_eval.errors import DataError
from petals_eval.text import listed
from petals_eval.validation import shorten

__all__ = ["NOT_SCORED", "BatchRow", "read_batches"]

NOT_SCORED = -100
"""The label of what is not scored: torch's cross entropy ignores it."""

Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class BatchRow:
    """A row of a batch, without its padding.

    batch, row: where it stood, from 0.
    input_ids: int32 (seq,).
    label: its class; None where its tokens are scored.
    targets: int32 (n, 2): each a position in `input_ids` and the token that is scored right after it.
    """

    batch: int
    row: int
    input_ids: Ints
    label: int | None
    targets: Ints

    @property
    def place(self) -> str:
        return _place(self.batch, self.row)


def read_batches(loader: Iterable[Any], vocabulary: int) -> Iterator[BatchRow]:
    """Yield the rows of which something is scored, batch by batch, as they are asked for.

    loader: of mappings (dictionaries, transformers' BatchEncoding) with tensors, arrays or lists:
        `input_ids` (batch, seq); `attention_mask` (batch, seq), 1 for text and 0 for padding on either side, or left
        out where there is no padding; `labels`, either (batch,), a class for each row, or (batch, seq), the tokens
        themselves. Where a label is -100 nothing is scored. Nothing else in a batch is read.
    vocabulary: how many tokens the model knows.

    As in Hugging Face's models the label at a position is predicted from the position before it, so that the one of a
    text's first token is never scored.

    Raises DataError, which names the batch and the row: for padding between tokens, tokens outside the vocabulary,
    labels of another shape or at padding, rows without a token.
    """
    scores_tokens: bool | None = None
    for index, batch in enumerate(loader):
        ids, masks, labels = _parts_of(batch, index)
        if not ids:
            continue
        is_tokens = isinstance(labels, list)
        if scores_tokens not in (None, is_tokens):
            raise DataError(
                f"batch {index}: labels are {_labels_text(is_tokens)}, and those of the batches before are "
                f"{_labels_text(not is_tokens)}. Evaluate them apart."
            )
        scores_tokens = is_tokens
        for row, (tokens, mask, label) in enumerate(zip(ids, masks, labels, strict=True)):
            text = _text_span(tokens, mask, index, row)
            if is_tokens:
                targets = _targets(label, text, vocabulary, index, row)
                if len(targets):
                    yield BatchRow(index, row, _checked(tokens[text], vocabulary, index, row), None, targets)
            elif label != NOT_SCORED:
                nothing = np.zeros((0, 2), np.int32)
                yield BatchRow(index, row, _checked(tokens[text], vocabulary, index, row), int(label), nothing)


def _parts_of(batch: object, index: int) -> tuple[list[Any], list[Any], Any]:
    """Return rows of tokens, rows of masks, and labels: a list of rows, or an array (batch,) of classes."""
    if not isinstance(batch, Mapping):
        raise DataError(
            f"batch {index}: expected a mapping with input_ids, attention_mask and labels, found "
            f"{type(batch).__name__} ({shorten(batch, 40)}). A single batch goes into a list."
        )
    for name in ("input_ids", "labels"):
        if name not in batch:
            raise DataError(f"batch {index} has no {name}; it has {listed(map(str, batch))}.")
    ids = _rows(batch["input_ids"], "input_ids", index)
    mask = batch.get("attention_mask")
    masks = [np.ones(len(row), np.int64) for row in ids] if mask is None else _rows(mask, "attention_mask", index)
    labels = _labels(batch["labels"], index)
    for name, found in (("attention_mask", masks), ("labels", labels)):
        if len(found) != len(ids):
            raise DataError(f"batch {index}: expected {len(ids)} rows in {name}, as in input_ids, found {len(found)}.")
    for row, tokens in enumerate(ids):
        if len(masks[row]) != len(tokens):
            raise DataError(
                f"{_place(index, row)}: expected {len(tokens)} numbers in attention_mask, as in input_ids, found "
                f"{len(masks[row])}."
            )
        if isinstance(labels, list) and len(labels[row]) != len(tokens):
            raise DataError(
                f"{_place(index, row)}: expected labels of shape ({len(ids)},), a class for each row, or "
                f"({len(ids)}, {len(tokens)}), a token for each position; found {len(labels[row])} in this row."
            )
    return ids, masks, labels


def _rows(value: Any, name: str, batch: int) -> list[Any]:
    """Return rows of whole numbers, which in lists may differ in length. Raises DataError."""
    try:
        rows = list(map(_numbers, value)) if isinstance(value, list | tuple) else list(_numbers(value))
    except (TypeError, ValueError) as error:
        raise DataError(f"batch {batch}: {name} should be numbers (batch, seq), found {shorten(value)}.") from error
    for row, numbers in enumerate(rows):
        whole = _whole(numbers, or_floats=name == "attention_mask")
        if whole is None or whole.ndim != 1:
            raise DataError(
                f"{_place(batch, row)}: {name} should be whole numbers (batch, seq), found {numbers.dtype} of shape "
                f"{numbers.shape} in this row."
            )
        rows[row] = whole
    return rows


def _labels(value: Any, batch: int) -> Any:
    """Return an array (batch,) of classes, or a list of rows of tokens. Raises DataError."""
    try:
        labels = _numbers(value)
    except (TypeError, ValueError):
        return _rows(value, "labels", batch)  # lists of several lengths
    if labels.ndim == 2:
        return _rows(value, "labels", batch)
    classes = _whole(labels)
    if labels.ndim != 1 or classes is None:
        hint = (
            " A number to be predicted is a regression: petals_eval.evaluate(model, task={'kind': 'regression', ...})."
            if np.issubdtype(labels.dtype, np.floating)
            else ""
        )
        raise DataError(
            f"batch {batch}: labels should be whole numbers, (batch,) for a class each or (batch, seq) for tokens; "
            f"found {labels.dtype} of shape {labels.shape}.{hint}"
        )
    return classes


def _numbers(value: Any) -> Any:
    """Return a tensor, an array or lists of numbers as an array. Raises TypeError, ValueError."""
    if callable(detach := getattr(value, "detach", None)):
        tensor = detach().cpu()
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()  # NumPy has no bfloat16
    return np.asarray(value)


def _whole(numbers: Any, *, or_floats: bool = False) -> Any:
    """Return an array of a whole type as int64, and of floats that are all whole if these will do; otherwise None."""
    is_whole = np.issubdtype(numbers.dtype, np.integer) or numbers.dtype == np.bool_
    if or_floats and np.issubdtype(numbers.dtype, np.floating):
        is_whole = bool((numbers == np.rint(numbers)).all())
    return numbers.astype(np.int64) if is_whole or numbers.size == 0 else None


def _text_span(tokens: Any, mask: Any, batch: int, row: int) -> slice:
    """Return where the text stands among its padding. Raises DataError."""
    if not np.isin(mask, (0, 1)).all():
        raise DataError(
            f"{_place(batch, row)}: attention_mask should hold 1 and 0 alone, found {shorten(mask.tolist())}."
        )
    [real] = np.nonzero(mask)
    if len(real) == 0:
        raise DataError(f"{_place(batch, row)} has no token: its attention_mask is 0 everywhere. Leave the row out.")
    first, last = int(real[0]), int(real[-1])
    if last - first + 1 != len(real):
        gap = first + int(np.argmin(mask[first:]))
        raise DataError(
            f"{_place(batch, row)}: padding at position {gap} stands between tokens; expected it before or after the "
            "text. A text's tokens follow each other."
        )
    return slice(first, last + 1)


def _targets(labels: Any, text: slice, vocabulary: int, batch: int, row: int) -> Ints:
    """Return (n, 2) int32: positions in the text, and the tokens to be scored right after them. Raises DataError."""
    scored = labels != NOT_SCORED
    outside = scored.copy()
    outside[text] = False
    if outside.any():
        raise DataError(
            f"{_place(batch, row)}: the label at position {int(np.argmax(outside))} stands at padding, where nothing "
            f"can be scored: set it to {NOT_SCORED}."
        )
    wrong = scored & ((labels < 0) | (labels >= vocabulary))
    if wrong.any():
        at = int(np.argmax(wrong))
        raise DataError(
            f"{_place(batch, row)}: the label at position {at} is {int(labels[at])}; expected a token from 0 to "
            f"{vocabulary - 1}, or {NOT_SCORED} where nothing is scored."
        )
    tokens = labels[text][1:]
    [positions] = np.nonzero(tokens != NOT_SCORED)
    return np.stack([positions, tokens[positions]], axis=1).astype(np.int32)


def _checked(tokens: Any, vocabulary: int, batch: int, row: int) -> Ints:
    wrong = (tokens < 0) | (tokens >= vocabulary)
    if wrong.any():
        raise DataError(
            f"{_place(batch, row)}: input_ids holds the token {int(tokens[np.argmax(wrong)])}; the model's vocabulary "
            f"is 0 to {vocabulary - 1}. Use the tokenizer that belongs to the model, and mask what is padding."
        )
    ids: Ints = tokens.astype(np.int32)
    return ids


def _place(batch: int, row: int) -> str:
    return f"batch {batch}, row {row}"


def _labels_text(is_tokens: bool) -> str:
    return "tokens (batch, seq)" if is_tokens else "classes (batch,)"
