"""The text template of a task: `{column}` stands for a row's value, `{{` and `}}` for braces."""

import string
from collections.abc import Mapping
from dataclasses import dataclass

from petals_eval.data.rows import is_missing
from petals_eval.errors import DataError

__all__ = ["Template"]


@dataclass(frozen=True)
class Template:
    """segments: pairs (literal text, column after it); tail: the literal text after the last column."""

    segments: tuple[tuple[str, str], ...]
    tail: str

    @classmethod
    def parse(cls, text: str, *, may_be_constant: bool = False) -> "Template":
        """Raises ValueError for a template that is not well-formed or, unless it may be constant, uses no column."""
        segments: list[tuple[str, str]] = []
        literal = ""
        for before, field, spec, conversion in string.Formatter().parse(text):
            literal += before
            if field is None:
                continue
            if not field or spec or conversion:
                raise ValueError("should hold plain placeholders such as {sentence}; write {{ and }} for braces")
            segments.append((literal, field))
            literal = ""
        if not segments and not may_be_constant:
            raise ValueError("should hold a placeholder for each column that is to be read, such as {sentence}")
        return cls(tuple(segments), literal)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns used, each once, in the order of their first use."""
        return tuple(dict.fromkeys(column for _, column in self.segments))

    def is_filled(self, values: Mapping[str, object]) -> bool:
        """Return whether a column of a row that can be rendered holds more than blanks."""
        return any(str(values[column]).strip() for column in self.columns)

    def render(
        self,
        values: Mapping[str, object],
        *,
        where: str,
        with_tail: bool = True,
        truth_words: tuple[str, str] = ("False", "True"),
        may_be_empty: bool = False,
    ) -> str:
        """Return the text of a row: texts as they are, numbers as `str` writes them, false and true as `truth_words`.

        `where` names the row in the DataError for a value that is missing or no text, and, unless `may_be_empty`, where
        no column holds any text.
        """
        parts: list[str] = []
        filled = False
        for literal, column in self.segments:
            value = values[column]
            if is_missing(value):
                raise DataError(f"{where} has no text in column {column}. Remove the row, or fill it in.")
            if not isinstance(value, str | int | float):
                raise DataError(f"{where}: column {column} should hold text, found {type(value).__name__}.")
            shown = truth_words[value] if isinstance(value, bool) else str(value)
            filled = filled or bool(shown.strip())
            parts += (literal, shown)
        if self.segments and not filled and not may_be_empty:
            raise DataError(
                f"{where} is empty: no text in {', '.join(self.columns)}. Remove the row, or name another column."
            )
        return "".join(parts) + (self.tail if with_tail else "")
