"""Regression: a number for each text or pair of texts, by a trained head with one output."""

from collections.abc import Iterator, Sequence
from decimal import Decimal
from itertools import islice
from math import isfinite
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from petals_eval.data.rows import Row, Rows
from petals_eval.errors import AdapterError, DataError, PetalsEvalError
from petals_eval.tasks.headed import HeadedTask, HeadTexts, check_finite, columns_needed, label_of
from petals_eval.tasks.labels import NUMBER, no_label
from petals_eval.tasks.requests import Example, Generated, Prediction, as_float64
from petals_eval.tasks.tokens import CHUNK_ROWS
from petals_eval.validation import shorten

if TYPE_CHECKING:
    import torch

__all__ = ["RegressionTask", "number_of"]


class RegressionTask(HeadedTask):
    """A number of each row, such as how alike two sentences are. A wrong definition raises TaskError.

    label_column: the column of the right numbers, which may be texts such as "3.2".
    label_range: (lowest, highest) right number. One outside is an error, or where it is -1, as hidden test sets have
        it, a row without a label; without a range -1 is a number like any other.
    metrics: names that `petals_eval.metrics` knows for a regression.

    The others are those of `HeadedTask`. The head's output is the prediction, as it is. Of what `Prompting` has, a
    regression has `prepare` alone.
    """

    without_shots: ClassVar[str | None] = "gives its head the text alone"

    kind: Literal["regression"] = "regression"
    label_range: tuple[float, float] | None = None
    metrics: tuple[str, ...] = Field(default=("pearson", "spearman"), min_length=1)

    @property
    def label_names(self) -> tuple[str, ...]:
        return ()

    @property
    def head(self) -> Literal["class", "lm"]:
        return "class"

    @field_validator("label_range")
    @classmethod
    def _in_order(cls, ends: tuple[float, float] | None) -> tuple[float, float] | None:
        if ends is not None and not (isfinite(ends[0]) and isfinite(ends[1]) and ends[0] < ends[1]):
            raise ValueError("should be the lowest and the highest right number, such as [0, 5]")
        return ends

    def fingerprint(self) -> dict[str, object]:
        """Return all that changes an answer: neither the name nor the metrics, and not where the data lies."""
        changing = {"kind", "text", "label_column", "label_range", "max_length"}
        changing |= set() if self.text_pair is None else {"text_pair"}
        return {"head": self.head, **self.model_dump(mode="json", include=changing), **self.prompt_fingerprint()}

    def examples(self, rows: Rows, tokenizer: Any) -> Iterator[Example]:
        """Yield examples in the order of `rows`, tokenised a few hundred at a time as they are asked for.

        All of them are checked before the first one comes out. Raises DataError as `check` does.
        """
        self.check(rows)
        texts, source = HeadTexts.parse(self.text, self.text_pair), iter(rows)
        while chunk := list(islice(source, CHUNK_ROWS)):
            labels = [self._label(row, rows) for row in chunk]
            yield from texts.examples(rows, chunk, labels, tokenizer, self.max_length, self.label_column)

    def check(self, rows: Rows) -> None:
        """Look at the columns, numbers and texts of all rows. Raises DataError, which names the row, what was found
        there and what was expected.

        Rows that passed, and parts of them, are not looked at again.
        """
        read_as = (self.kind, self.text, self.text_pair, self.label_column, self.label_range, self.unlabelled)
        if read_as in rows.passed:
            return
        texts = HeadTexts.parse(self.text, self.text_pair)
        rows.check_columns(columns_needed(texts.columns, self.label_column, self.unlabelled), self.name)
        names = rows.class_names.get(self.label_column)
        if names is not None:
            raise DataError(
                f"{rows.name}: column {self.label_column} holds classes ({', '.join(names)}), and task {self.name} "
                "expects numbers there. Name another label_column, or use a task with kind: classification."
            )
        for row in rows:
            self._label(row, rows)
            texts.render(row, rows)
        rows.passed.add(read_as)

    def check_outputs(self, shape: tuple[int, ...]) -> None:
        """Raise AdapterError where a head that answers with scores of this shape gives more than one number."""
        if shape != (1,):
            raise AdapterError(
                f"the head gives {shape} scores, but task {self.name} is a regression, which needs a head with one "
                "output. Use the adapter that was trained for it, or a task with kind: classification."
            )

    def predict(self, example: Example, answers: "Sequence[torch.Tensor | Generated]") -> Prediction:
        """Return the head's output, in float64.

        answers: one float32 tensor (1,). Raises AdapterError for a head with more outputs, and NotFiniteError.
        """
        if len(answers) != 1:
            raise PetalsEvalError(f"example {example.key}: expected 1 answer, found {len(answers)}.")
        scores = as_float64(answers[0])
        self.check_outputs(scores.shape)
        check_finite(example, scores)
        [number] = scores.tolist()
        return example.predicted(number, [(number,)])

    def row_labels(self, rows: Rows) -> Iterator[tuple[str, float | None]]:
        """Yield the key and the label of each of `rows`. Raises DataError as `check` does."""
        return ((str(row.index), self._label(row, rows)) for row in rows)

    def _label(self, row: Row, rows: Rows) -> float | None:
        value = label_of(row, self.label_column, self.unlabelled)
        number = number_of(value)
        lowest, highest = self.label_range or (float("-inf"), float("inf"))
        if number is not None and lowest <= number <= highest:
            return number
        span = "" if self.label_range is None else f" from {lowest:g} to {highest:g}"
        complaint = (
            f"{rows.where(row)}: the label in column {self.label_column} is {shorten(value)}. Expected a number{span}."
        )
        no_label(value, self.unlabelled, complaint)
        return None


def number_of(value: object) -> float | None:
    """Return the number that a value is, or that a text spells; None for what is none, infinity and NaN."""
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        return None
    if isinstance(value, str) and not NUMBER.fullmatch(value.strip()):
        return None
    try:
        number = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return None
    return number if isfinite(number) else None
