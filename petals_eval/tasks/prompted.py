"""What the kinds of task that speak to a language model have in common: from a row to the text before its answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from petals_eval.data.rows import Row
from petals_eval.data.source import DataSource, FileFormat, FileReading
from petals_eval.errors import DataError, TaskError
from petals_eval.tasks.tokens import Bos
from petals_eval.validation import explain

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
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    description: str = ""
    metrics: tuple[str, ...] = Field(min_length=1)
    data: DataSource | None = None
    formats: dict[FileFormat, FileReading] = Field(default_factory=dict)
    bos: Bos = "auto"
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

    def bound_to(self, context: int | None) -> Self:
        """Return the task for a model that reads so many tokens of text beside its prompts; None: any number.

        Raises TaskError where the definition asks for more.
        """
        bound = self.model_copy()
        bound._context = context
        return bound

    def turn(self, row: Row, where: str) -> Turn:
        """Return a row with its right answer, as a shot shows it. Raises DataError, with `where` in front."""
        raise NotImplementedError

    def contexts(self, questions: Sequence[str], row: Row, tokenizer: Any) -> list[str]:
        """Return the whole text before the answer for each of the questions of a row."""
        return list(questions)
