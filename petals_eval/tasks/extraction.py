"""Taking an answer out of a generated text, by a pattern or by choices, and what counts when it is compared."""

import re
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from petals_eval.metrics.texts import exact_match

__all__ = ["Extraction", "Normalise", "Sampling"]


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"should be a regular expression; this one is not: {error}") from None
    return pattern


class Extraction(BaseModel):
    """Where in a text an answer stands.

    pattern: a regular expression. The answer is what its group `group` matched; without that, the first group that
        matched anything, or the whole match where there are no groups.
    choices: instead, texts one of which is the answer: where one stands by itself, not inside a word. The longest that
        stands in a place counts.
    ignore_case: of pattern or choices.
    take: the first match or the last.

    As lm-evaluation-harness 0.4.13's filter `regex` with `group_select` 0 or -1 and then `take_first`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pattern: str | None = Field(default=None, min_length=1)
    choices: tuple[str, ...] | None = Field(default=None, min_length=1)
    group: int | None = Field(default=None, ge=0)
    ignore_case: bool = False
    take: Literal["first", "last"] = "first"

    @field_validator("pattern")
    @classmethod
    def _is_a_pattern(cls, pattern: str | None) -> str | None:
        return None if pattern is None else _compiles(pattern)

    @field_validator("choices")
    @classmethod
    def _are_texts(cls, choices: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if choices is not None and not all(choice.strip() for choice in choices):
            raise ValueError("should hold texts, none of them empty")
        return choices

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.pattern is None) == (self.choices is None):
            raise ValueError("should hold either pattern or choices")
        if self.group is not None and (self.pattern is None or self.group > re.compile(self.pattern).groups):
            raise ValueError("names a group that the pattern does not have")
        return self

    def answer(self, text: str) -> str | None:
        """Return the answer without outer blanks; None where there is none.

        >>> flexible = Extraction(pattern="(-?[$0-9.,]{2,})|(-?[0-9]+)", take="last")
        >>> flexible.answer("5 and 12, that is $17."), flexible.answer("none")
        ('$17.', None)
        >>> Extraction(choices=("yes", "no"), ignore_case=True).answer("Nothing says no: Yes")
        'no'
        """
        matches = list(re.finditer(self._expression, text, re.IGNORECASE if self.ignore_case else 0))
        if not matches:
            return None
        found = matches[0 if self.take == "first" else -1]
        if self.group is not None:
            matched = found[self.group]
        else:
            matched = next(filter(None, found.groups()), None) if found.re.groups else found[0]
        return None if matched is None else matched.strip()

    @property
    def _expression(self) -> str:
        if self.choices is None:
            return self.pattern or ""
        longest_first = sorted(self.choices, key=len, reverse=True)
        return rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)"


class Normalise(BaseModel):
    """What does not count when an answer is held against a right one: outer blanks, and what is said here.

    remove: regular expressions whose matches go, one after the other, before all else. ignore_punctuation: ASCII's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ignore_case: bool = False
    ignore_punctuation: bool = False
    remove: tuple[str, ...] = ()

    @field_validator("remove")
    @classmethod
    def _are_patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(_compiles, patterns))

    def exact_match(self, text: str | None, references: tuple[str, ...]) -> float:
        """Return 1.0 where a text is a right one, else 0.0; None is none."""
        return exact_match(
            text,
            references,
            remove=self.remove,
            ignore_case=self.ignore_case,
            ignore_punctuation=self.ignore_punctuation,
        )


class Sampling(BaseModel):
    """How tokens are drawn. temperature: 0 draws none and takes the likeliest. top_k: 0 draws from all. seed: with the
    row's own position it says what is drawn, whatever else is evaluated."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int = 0
