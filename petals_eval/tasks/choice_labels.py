"""Which choice is right, where the choices have no names that all rows share."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real

from petals_eval.errors import DataError
from petals_eval.tasks.labels import NUMBER, Unlabelled, no_label, other_spellings, spelled
from petals_eval.text import listed
from petals_eval.validation import shorten

__all__ = ["ChoiceLabels"]

_WHOLE = re.compile(r"(0|[1-9][0-9]{0,8})(\.0)?")


@dataclass(frozen=True)
class ChoiceLabels:
    """Reads the label column of rows whose choices are their own.

    mapping: the task's label_map: a value, as `petals_eval.tasks.labels.spelled` has it -> position of a choice.
    class_names: what the source itself says that its class numbers mean, or None.

    A value is read by the first of these that holds:
      1. its exact spelling, or the name that the source gives it, is a key of `mapping`; or one of its other spellings;
      2. it is a number, and no text: the position of a choice, from 0;
      3. it is the text of one choice, outer blanks aside;
      4. it is a whole number as text: a position.
    Where a key is a number nothing is read as a position; and where a text is one choice and the position of another,
    that is an error. Nothing is guessed beyond that.
    """

    mapping: Mapping[str, int]
    class_names: tuple[str, ...] | None = None

    def position(
        self, value: object, choices: Sequence[str], *, where: str, column: str, unlabelled: Unlabelled = "error"
    ) -> int | None:
        """Return the position of the right choice, or None for a row without a label where `unlabelled` is "predict".

        Raises DataError with what was found and what there is.
        """
        keyed = {self.mapping[word] for word in self._words(value) if word in self.mapping}
        if len(keyed) == 1:
            return self._within(keyed.pop(), value, choices, where, column)
        counted = None if self._numbered else _WHOLE.fullmatch(spelled(value))
        position = None if counted is None or int(counted[1]) >= len(choices) else int(counted[1])
        if not keyed and isinstance(value, Real) and not isinstance(value, bool) and position is not None:
            return position
        same = [at for at, choice in enumerate(choices) if isinstance(value, str) and choice.strip() == value.strip()]
        if not keyed and same and (position is None or position in same):
            return same[0]
        if not keyed and not same and position is not None and isinstance(value, str):
            return position
        no_label(value, unlabelled, self._complaint(value, choices, same, where, column))
        return None

    @cached_property
    def _numbered(self) -> bool:
        return any(NUMBER.fullmatch(key) for key in self.mapping)

    def _words(self, value: object) -> tuple[str, ...]:
        """Return how the value may be spelled as a key: exactly where that is one."""
        names = self.class_names or ()
        exact = [spelled(value)]
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names):
            exact.insert(0, names[value].strip())
        known = tuple(word for word in exact if word in self.mapping)
        return known[:1] or other_spellings(value)

    def _within(self, position: int, value: object, choices: Sequence[str], where: str, column: str) -> int:
        if position >= len(choices):
            raise DataError(
                f"{where}: label_map makes position {position} of the label {shorten(value)} in column {column}; the "
                f"row has {len(choices)} choices, 0 to {len(choices) - 1}."
            )
        return position

    def _complaint(self, value: object, choices: Sequence[str], same: Sequence[int], where: str, column: str) -> str:
        said = f"{where}: the label in column {column} is {shorten(value)}."
        if same:
            return (
                f"{said} That is the text of choice {same[0]}, and as a number it is the position of another. Say in "
                f"label_map which position each value stands for, such as {{{spelled(value)!r}: {same[0]}}}."
            )
        keys = f", or a key of label_map: {listed(map(shorten, self.mapping), most=20)}" if self.mapping else ""
        texts = listed((shorten(choice, 40) for choice in choices), most=6)
        counted = "" if self._numbered else f"a position from 0 to {len(choices) - 1}, or "
        return f"{said} Expected {counted}the text of one of the choices ({texts}){keys}."
