"""What the kinds of task that speak to a language model have in common: from a row to the text before its answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from petals_eval.data.rows import Row, Rows
from petals_eval.data.source import DataSource, FileFormat, FileReading
from petals_eval.errors import DataError, TaskError
from petals_eval.tasks.labels import Unlabelled
from petals_eval.tasks.tokens import Bos
from petals_eval.validation import explain

__all__ = ["PromptedTask", "Turn"]

_NOT_ANSWERING = frozenset({"name", "description", "metrics", "data", "formats", "unlabelled"})
"""Keys that change no answer."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A row as one exchange. question: the text before the answer. answer: what follows it, or None where it is asked.

    delimiter: between the two where they are one text, and not turns of a chat.
    """

    question: str
    answer: str | None
    delimiter: str = " "


class PromptedTask(BaseModel):
    """A task whose rows become texts that a language model goes on from. A wrong definition raises TaskError.

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
    _context: int | None = PrivateAttr(default=None)

    @model_validator(mode="wrap")
    @classmethod
    def _say_what_is_wrong(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            task = handler(values)
        except ValidationError as error:
            raise TaskError(f"this task cannot be used:\n{explain(error, cls)}") from None
        except DataError as error:
            raise TaskError(f"this task's data: {error}") from None
        if problem := task._disagreement():
            raise TaskError(f"this task cannot be used:\n  {problem}")
        return task

    def _disagreement(self) -> str | None:
        """Return what of the definition does not fit together, or None."""
        return None

    @property
    def head(self) -> Literal["class", "lm"]:
        return "lm"

    def fingerprint(self) -> dict[str, object]:
        """Return all that changes an answer: neither the name nor the metrics, and not where the data lies."""
        return {"head": self.head, **self.model_dump(mode="json", by_alias=True, exclude=set(_NOT_ANSWERING))}

    def bound_to(self, context: int | None) -> Self:
        """Return the task for a model that reads so many tokens of text, tuned prompts not among them; None: any number.

        Raises TaskError where the definition asks for more.
        """
        bound = self.model_copy()
        bound._context = context
        return bound

    def turn(self, row: Row, where: str) -> Turn:
        """Return a row with its right answer, as a shot shows it. Raises DataError, with `where` in front.

        `shot_rows` says what the row's source knows of its columns.
        """
        raise NotImplementedError

    @property
    def shot_rows(self) -> Rows | None:
        """The rows that shots are drawn from, with the names of their classes."""
        return None

    def answer_delimiter(self, delimiter: str) -> str:
        """Return what stands between a question and its answer."""
        return delimiter

    def contexts(self, questions: Sequence[str], row: Row, tokenizer: Any) -> list[str]:
        """Return the whole text before the answer for each of the questions of a row."""
        return list(questions)
