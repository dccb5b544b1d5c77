"""What the kinds of task for a trained head have in common: the text, or the pair of texts, that it reads of a row."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, field_validator, model_validator

from petals_eval.data.rows import Row, Rows, row_hash
from petals_eval.data.source import DataSource, FileFormat, FileReading
from petals_eval.errors import DataError, NotFiniteError, TaskError
from petals_eval.tasks.labels import Unlabelled
from petals_eval.tasks.prompted import Prompting
from petals_eval.tasks.requests import Example, Label, Request, RowText
from petals_eval.tasks.template import Template
from petals_eval.tasks.tokens import tokenize
from petals_eval.validation import shorten

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "HeadTexts",
    "HeadedTask",
    "check_finite",
    "columns_needed",
    "label_of",
    "no_tokens",
    "with_label",
    "with_pair",
]


@dataclass(frozen=True)
class HeadTexts:
    """The templates of a task for a trained head.

    second: of the other text of a pair, which the tokenizer joins to the first in its own way; None: there is one text.
    """

    first: Template
    second: Template | None = None

    @classmethod
    def parse(cls, text: str, text_pair: str | None) -> Self:
        """Raises ValueError as `Template.parse` does."""
        return cls(Template.parse(text), None if text_pair is None else Template.parse(text_pair))

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns used, each once."""
        second = () if self.second is None else self.second.columns
        return tuple(dict.fromkeys((*self.first.columns, *second)))

    def render(self, row: Row, rows: Rows) -> tuple[str, ...]:
        """Return the text of a row, or the two of a pair, one of which may be empty. Raises DataError."""
        where, truth_words, values = rows.where(row), rows.truth_words, row.columns
        if self.second is None:
            return (self.first.render(values, where=where, truth_words=truth_words),)
        first = self.first.render(values, where=where, truth_words=truth_words, may_be_empty=True)
        may_be_empty = self.first.is_filled(values)
        return first, self.second.render(values, where=where, truth_words=truth_words, may_be_empty=may_be_empty)

    def examples(
        self, rows: Rows, chunk: Sequence[Row], labels: Iterable[Label], tokenizer: Any, max_length: int, column: str
    ) -> Iterator[Example]:
        """Yield an example for each row of a chunk, with its label. column: that of the labels.

        Raises DataError for a text that the tokenizer makes no token of.
        """
        texts = [self.render(row, rows) for row in chunk]
        pairs = None if self.second is None else [second for _, second in texts]
        tokenized = tokenize(tokenizer, [each[0] for each in texts], max_length, pairs)
        for row, label, text, (ids, truncated) in zip(chunk, labels, texts, tokenized, strict=True):
            shown = "\n".join(text)
            if not ids:
                raise no_tokens(rows, row, shown)
            key, hashed = str(row.index), row_hash(row.columns, with_label(self.columns, column, row))
            yield Example(key, label, (Request(key, 0, ids),), len(ids), truncated, shown, hashed)


class HeadedTask(Prompting):
    """A task for a head that was trained on a text, or on a pair of texts, and one column of what is right.

    name, description: for people.
    text: template with a {column} for each value that is read, such as "{premise} </s> {hypothesis}".
    text_pair: for a trained head that reads pairs of texts, the template of the second one: the tokenizer joins the two
        in its own way, as `tokenizer(text, text_pair)` does. `text` may also be a list of both.
    label_column: the column of what is right.
    max_length: tokens of text at most, the tokenizer's special tokens included, tuned prompts not.
    metrics: names that `petals_eval.metrics` knows for the kind.
    data: what to evaluate when nothing else is said.
    formats: how to read a local file of each format (csv, tsv, jsonl, parquet, lines).
    unlabelled: "predict": rows without a label (missing, empty, or -1 where that is no label) are predicted, and are in
        no metric; their column may be missing altogether. "error": they end a run before it begins.
    cluster_column: the column that says which rows may depend on each other, such as the text that questions are about.
        Rows of the same value there are a cluster, and intervals and comparisons are cluster-robust.
    """

    name: str = Field(min_length=1)
    description: str = ""
    text: str
    text_pair: str | None = None
    label_column: str = Field(min_length=1)
    max_length: int = Field(default=512, ge=1)
    metrics: tuple[str, ...] = Field(min_length=1)
    data: DataSource | None = None
    formats: dict[FileFormat, FileReading] = Field(default_factory=dict)
    unlabelled: Unlabelled = "error"
    cluster_column: str | None = Field(default=None, min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _spelled_as_pair(cls, values: Any) -> Any:
        return with_pair(values)

    @field_validator("text", "text_pair")
    @classmethod
    def _well_formed(cls, text: str | None) -> str | None:
        if text is not None:
            Template.parse(text)
        return text

    @property
    def columns(self) -> tuple[str, ...]:
        return ("score",)

    def row_text(self, rows: Rows, row: Row) -> RowText:
        """Return what a person reads of one of `rows`. Raises DataError."""
        texts = HeadTexts.parse(self.text, self.text_pair)
        rows.check_columns(texts.columns, self.name)
        hashed = row_hash(row.columns, with_label(texts.columns, self.label_column, row))
        return RowText("\n".join(texts.render(row, rows)), row_hash=hashed)


def columns_needed(texts: Sequence[str], label: str, unlabelled: Unlabelled) -> tuple[str, ...]:
    """Return the columns that rows must have: those of the texts, and that of the labels unless rows may have none."""
    return tuple(texts) if unlabelled == "predict" else (*texts, label)


def label_of(row: Row, column: str, unlabelled: Unlabelled) -> object:
    """Return what a row has as its label: nothing where the column is missing and may be. Raises KeyError otherwise."""
    return row.columns.get(column) if unlabelled == "predict" else row.columns[column]


def with_label(texts: Sequence[str], label: str, row: Row) -> tuple[str, ...]:
    """Return the columns that are read of a row: those of its texts, and that of its label where there is one."""
    return (*texts, label) if label in row.columns else tuple(texts)


def with_pair(values: Any) -> Any:
    """Return a task's definition where `text: [first, second]` is spelled as `text` and `text_pair`.

    Raises TaskError for a list of another length, and for both spellings at once.
    """
    if not isinstance(values, Mapping) or not isinstance(values.get("text"), list | tuple):
        return values
    texts = values["text"]
    if len(texts) != 2:
        raise TaskError(
            "this task cannot be used:\n  text: should be one template, or a list of two for a pair of texts, found "
            f"{shorten(texts)}"
        )
    if values.get("text_pair") is not None:
        raise TaskError(
            "this task cannot be used:\n  text_pair: should not be given beside a list of two in text, found "
            f"{shorten(values['text_pair'])}"
        )
    return {**values, "text": texts[0], "text_pair": texts[1]}


def check_finite(example: Example, scores: "np.ndarray") -> None:
    """Raise NotFiniteError for scores that are not finite: servers' answers are checked before they get here, so these
    come from the local norm or head."""
    import numpy as np

    if not np.isfinite(scores).all():
        raise NotFiniteError(
            f"example {example.key}: expected finite scores, found {scores.tolist()}. The local norm or head "
            "overflowed, or its weights are damaged: try --dtype float32, and check the adapter and the model."
        )


def no_tokens(rows: Rows, row: Row, text: str) -> DataError:
    """Return the error for a text without tokens."""
    return DataError(f"{rows.where(row)}: this tokenizer makes no token of the text {text!r:.80}. Remove the row.")
