"""What a value in the label column means."""

from collections.abc import Mapping
from dataclasses import dataclass

from petals_eval.data.problems import shorten
from petals_eval.errors import DataError

__all__ = ["Labels", "plain"]


def plain(value: object) -> str:
    """A label value as the keys of `label_map` spell it: text without outer blanks, 3 for 3.0, true and false."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


@dataclass(frozen=True)
class Labels:
    """Reads one label column.

    names: the task's label names, in the order of the head's outputs.
    mapping: the task's label_map: data value, as `plain` spells it -> label name.
    class_names: what the source itself says that its class numbers mean, or None.

    A value is read by the first of these that holds:
      1. the source names its classes: the number stands for that name, never for a position in `names`;
      2. it (or that name) is a key of `mapping`;
      3. it (or that name) is one of `names`;
      4. true and false of a task with two labels: position 1 and 0;
      5. a whole number, also as text: the position in `names`, from 0; not where a name is a whole number itself, for
         a file that counts from 0 would then be read half by name and half by position.
    Nothing is guessed beyond that: every other value is an error.
    """

    names: tuple[str, ...]
    mapping: Mapping[str, str]
    class_names: tuple[str, ...] | None = None

    def index(self, value: object, *, where: str, column: str) -> int:
        """The label's position in `names`. Raises DataError with what was found and what there is."""
        index = self._find(value)
        if index is None:
            raise DataError(self._complaint(value, where, column))
        return index

    def _find(self, value: object) -> int | None:
        if value is None:
            return None
        word = plain(value)
        name = self._class_name(value)
        for known in (word,) if name is None else (name, word):
            if known in self.mapping:
                return self.names.index(self.mapping[known])
        if name is not None:
            return self.names.index(name) if name in self.names else None
        if word in self.names:
            return self.names.index(word)
        if self.class_names is not None:
            return None
        if word in ("true", "false") and len(self.names) == 2:
            return int(word == "true")
        if self._have_positions() and _is_number(word) and int(word) < len(self.names):
            return int(word)
        return None

    def _have_positions(self) -> bool:
        return not any(_is_number(name) for name in self.names)

    def _class_name(self, value: object) -> str | None:
        if self.class_names is None or isinstance(value, bool) or not isinstance(value, int):
            return None
        return self.class_names[value] if 0 <= value < len(self.class_names) else None

    def _complaint(self, value: object, where: str, column: str) -> str:
        name = self._class_name(value)
        found = shorten(value) if name is None else f"{shorten(value)}, which this source calls {name!r}"
        known = [f"{index} {label}" for index, label in enumerate(self.names)] if self._have_positions() else self.names
        message = f"{where}: the label in column {column} is {found}. Expected one of: {', '.join(known)}."
        if value is None:
            return f"{message} The row has no label."
        if plain(value) == "-1":
            return f"{message} -1 stands for a hidden label, as in the test splits of benchmarks: use another split."
        return f"{message} If it stands for one of them, say so in the task's label_map."


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdigit()
