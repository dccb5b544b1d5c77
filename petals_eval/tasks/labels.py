"""What a value in the label column means."""

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import cached_property
from math import isfinite
from typing import Any, Literal

from petals_eval.data.rows import is_missing
from petals_eval.errors import DataError
from petals_eval.text import listed
from petals_eval.validation import shorten

__all__ = [
    "NUMBER",
    "Labels",
    "Unlabelled",
    "is_unlabelled",
    "no_label",
    "other_spellings",
    "spelled",
    "spelled_keys",
]

Unlabelled = Literal["error", "predict"]
"""What becomes of rows of which nobody says what is right: an error before anything is sent, or a prediction that is in
no metric."""

# The truth values as JSON and as pandas write them, each with the position it has among two labels.
_TRUTH = {"false": 0, "False": 0, "true": 1, "True": 1}
_OTHER_TRUTH = {"true": "True", "True": "true", "false": "False", "False": "false"}
# A whole number that is written in the one usual way, and as pandas writes it in a column with fractions or gaps.
_WHOLE = re.compile(r"(0|-?[1-9][0-9]*)(\.0)?")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_NO_LABELS = (list, tuple, dict, bytes)
# Above it a number such as 1e999999999 would be written out for hours.
_MAX_DIGITS = 400


def spelled(value: object) -> str:
    """Return the exact spelling of a value, which the keys of `label_map` and the label names are held against.

    A text is spelled as it stands in the file, without outer blanks; so is a number of a JSON file (1.0, 1e3). A truth
    value is spelled true or false. A number of a typed column, such as parquet's, is spelled as Python writes it: 1.0
    where the column holds fractions.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value).strip()


def other_spellings(value: object) -> tuple[str, ...]:
    """Return how pandas or JSON may write the same value otherwise: True and true, False and false, 3 and 3.0.

    What is a number already, and no text, has those of its value: 1e3 is also 1000 and 1000.0, and 0.50 is also 0.5.
    A text such as 01, +1 or 1e3 has none: only whoever wrote it knows whether it is a number.
    """
    word = spelled(value)
    if word in _TRUTH:
        return (_OTHER_TRUTH[word],)
    whole = _whole(value)
    others = [] if whole is None else [whole, f"{whole}.0"]
    if isinstance(value, float) and isfinite(value):
        shortest = repr(float(value))
        others += [shortest] if _exact(value) == Decimal(shortest) else []
    return tuple(dict.fromkeys(other for other in others if other != word))


def spelled_keys(mapping: Any) -> Any:
    """Return a label_map with its keys as texts, as they are compared; Python may give numbers and truth values."""
    if not isinstance(mapping, Mapping):
        return mapping
    if None in mapping:
        raise ValueError('should have text as keys, and one of them is missing: put an empty text in quotes, as ""')
    keys: dict[str, object] = {}
    for key, name in mapping.items():
        if spelled(key) in keys:
            raise ValueError(f"has the key {spelled(key)!r} twice: outer blanks do not count")
        keys[spelled(key)] = name
    return keys


def is_unlabelled(value: object) -> bool:
    """Return whether a value says that nobody labelled its row: nothing, NaN, an empty text, or -1, as hidden test sets
    have it. A task that reads a label from one of these has a label there: it asks this only afterwards.

    >>> [is_unlabelled(value) for value in (None, float("nan"), " ", -1, "-1.0", 0, "no", [])]
    [True, True, True, True, True, False, False, False]
    """
    if is_missing(value):
        return True
    return not isinstance(value, _NO_LABELS) and (not spelled(value) or _whole(value) == "-1")


def no_label(value: object, unlabelled: Unlabelled, complaint: str) -> None:
    """Return None, the label of a row that has none, for a value from which the task could read no label.

    This is the rule of every kind of task that has labels. Raises DataError with the complaint, which names row, column
    and what was found, for a value that is there and wrong, and unless `unlabelled` is "predict" for one that is not.
    """
    if not is_unlabelled(value):
        raise DataError(complaint)
    if unlabelled != "predict":
        raise DataError(f"{complaint} To predict such rows all the same, in no metric: --unlabelled predict.")


@dataclass(frozen=True)
class Labels:
    """Reads one label column.

    names: the task's label names, in the order of the head's outputs.
    mapping: the task's label_map: a value, as `spelled` has it -> label name.
    class_names: what the source itself says that its class numbers mean, or None.

    Outer blanks of keys and names do not count. A value is read by the first of these that holds:
      1. the source names its classes: the number stands for that name, never for a position in `names`;
      2. its exact spelling (or that name) is a key of `mapping`;
      3. its exact spelling (or that name) is one of `names`;
      4. one of its `other_spellings` is a key or a name, and all that are mean one label;
      5. true and false of a task with two labels: position 1 and 0;
      6. a whole number, also as text (1 or 1.0): the position in `names`, from 0.
    By position nothing is read where a key or a name is a number: a file that counts from 0 would then be read half by
    name and half by position. Nor are truth values where one of them is a key or a name, and 0 and 1 where these give
    true and false other labels than positions would. Nothing is guessed beyond that: every other value is an error.
    """

    names: tuple[str, ...]
    mapping: Mapping[str, str]
    class_names: tuple[str, ...] | None = None

    def index(self, value: object, *, where: str, column: str, unlabelled: Unlabelled = "error") -> int | None:
        """Return the label's position in `names`, or None for a row without one where `unlabelled` is "predict".

        Raises DataError with what was found and what there is.
        """
        index = self._find(value)
        if index is None:
            no_label(value, unlabelled, self._complaint(value, where, column))
        return index

    @cached_property
    def _names(self) -> dict[str, int]:
        return {name.strip(): index for index, name in enumerate(self.names)}

    @cached_property
    def _keys(self) -> dict[str, int]:
        return {key.strip(): self._names[name.strip()] for key, name in self.mapping.items()}

    @cached_property
    def _numbered(self) -> bool:
        """Whether a key or a name is a number."""
        return any(NUMBER.fullmatch(word) for word in (*self._keys, *self._names))

    @cached_property
    def _truths(self) -> dict[str, int]:
        """The truth values among keys and names, with the label that each stands for."""
        return {word: index for word, index in {**self._names, **self._keys}.items() if word in _TRUTH}

    def _find(self, value: object) -> int | None:
        if value is None or isinstance(value, _NO_LABELS):
            return None
        name = self._class_name(value)
        words = (spelled(value),) if name is None else (name, spelled(value))
        for word in words:
            if word in self._keys:
                return self._keys[word]
        if words[0] in self._names:
            return self._names[words[0]]
        fitting = {index for _, index in self._fitting(value if name is None else name)}
        if fitting:
            return fitting.pop() if len(fitting) == 1 else None
        return self._position(value) if self.class_names is None else None

    def _fitting(self, value: object) -> Iterator[tuple[str, int]]:
        """Yield the other spellings of a value that are keys or names, with the label of each."""
        for word in other_spellings(value):
            for known in (self._keys, self._names):
                if word in known:
                    yield word, known[word]

    def _position(self, value: object) -> int | None:
        if self._numbered:
            return None
        word = spelled(value)
        if word in _TRUTH:
            return _TRUTH[word] if len(self.names) == 2 and not self._truths else None
        whole = _whole(value)
        if whole is None or not 0 <= int(whole) < len(self.names):
            return None
        turned = any(_TRUTH[truth] != index for truth, index in self._truths.items())
        return None if turned and whole in ("0", "1") else int(whole)

    def _class_name(self, value: object) -> str | None:
        if self.class_names is None or isinstance(value, bool) or not isinstance(value, int):
            return None
        return self.class_names[value].strip() if 0 <= value < len(self.class_names) else None

    def _complaint(self, value: object, where: str, column: str) -> str:
        name = self._class_name(value)
        found = shorten(value) if name is None else f"{shorten(value)}, which this source calls {name!r}"
        counted = self.class_names is None and not self._numbered
        known = [f"{index} {label}" for index, label in enumerate(self.names)] if counted else self.names
        keys = f", or a key of label_map: {listed(map(shorten, self._keys), most=20)}" if self._keys else ""
        expected = f"Expected one of: {', '.join(known)}{keys}."
        return f"{where}: the label in column {column} is {found}. {expected} {self._advice(value, name)}"

    def _advice(self, value: object, name: str | None) -> str:
        word = name if name is not None else spelled(value)
        if is_missing(value) or not word:
            return "The row has no label."
        if isinstance(value, _NO_LABELS):
            return "A label is one value: a text, a number, or true or false."
        if _whole(value) == "-1":
            return "-1 stands for a hidden label, as in the test splits of benchmarks: use another split."
        hints = []
        if fitting := list(self._fitting(value if name is None else name)):
            shown = " and ".join(f"{spelling} ({self.names[index]})" for spelling, index in fitting)
            hints.append(f"It could be meant for {shown}.")
        elif self._numbered and NUMBER.fullmatch(word):
            hints.append("Where keys or names are numbers, no number is read as a position.")
        elif NUMBER.fullmatch(word) and _whole(value) is None:
            hints.append("A position is a whole number without a sign and without zeros before it.")
        elif alike := next((known for known in (*self._keys, *self._names) if _folded(known) == _folded(word)), None):
            hints.append(f"It differs from {alike!r} in capital letters, or in how Unicode composes its letters.")
        spelling = json.dumps(word if len(word) <= 40 else "...", ensure_ascii=False)
        hints.append(f"If it stands for one of them, say so in the task's label_map, with quotes: {{{spelling}: ...}}.")
        return " ".join(hints)


def _whole(value: object) -> str | None:
    """Return the digits of a whole number (with a sign if it is negative), or None for what is none."""
    if isinstance(value, str):
        match = _WHOLE.fullmatch(value.strip())
        return match.group(1) if match else None
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return None
    number = _exact(value)
    if number is None or number.adjusted() > _MAX_DIGITS or number != number.to_integral_value():
        return None
    return str(int(number))


def _exact(number: int | float | Decimal) -> Decimal | None:
    """Return the number that is written, by way of its text: a float above 2^53 no longer has all of its digits."""
    try:
        exact = Decimal(str(number))
    except InvalidOperation:  # an exponent of twenty digits
        return None
    return exact if exact.is_finite() else None


def _folded(word: str) -> str:
    return unicodedata.normalize("NFC", word).casefold()
