"""What the kinds of task that speak to a language model have in common: from a row to the text before its answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from petals_eval.data.rows import Row
from petals_eval.data.source import DataSource, FileFormat, FileReading
from petals_eval.tasks.labels import Unlabelled
from petals_eval.tasks.tokens import Bos

__all__ = ["PromptedTask", "Turn"]


@dataclass(frozen=True, slots=True)
class Turn:
    """A row as one exchange. question: the text before the answer. answer: what follows it, or None where it is asked.

    delimiter: between the two where they are one text, and not turns of a chat.
    """

    question: str
    answer: str | None
    delimiter: str = " "


class PromptedTask(BaseModel):
    """A task whose rows become texts that a language model goes on from.

    name, description: for people.
    metrics, data, formats: as a classification has them.
    bos: whether a beginning-of-text token stands in front.
    unlabelled: what becomes of rows that do not say what is right, for kinds that have labels
        (`petals_eval.tasks.labels.no_label`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    description: str = ""
    metrics: tuple[str, ...] = Field(min_length=1)
    data: DataSource | None = None
    formats: dict[FileFormat, FileReading] = Field(default_factory=dict)
    bos: Bos = "auto"
    unlabelled: Unlabelled = "error"

    def turn(self, row: Row, where: str) -> Turn:
        """Return a row with its right answer, as a shot shows it. Raises DataError, with `where` in front."""
        raise NotImplementedError

    def contexts(self, questions: Sequence[str], row: Row, tokenizer: Any) -> list[str]:
        """Return the whole text before the answer for each of the questions of a row."""
        return list(questions)
