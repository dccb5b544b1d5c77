"""Perplexity: how likely a model finds texts, rows or whole documents of any length, in rolling windows."""

import math
import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from petals_eval.data.documents import joined_rows
from petals_eval.data.rows import Row, Rows
from petals_eval.errors import ExampleError, NotFiniteError, PetalsEvalError, TaskError
from petals_eval.tasks.prompted import PromptedTask
from petals_eval.tasks.requests import Example, Generated, Prediction, RowText, as_float64
from petals_eval.tasks.template import Template
from petals_eval.tasks.tokens import encode, start_token
from petals_eval.tasks.windows import Windows

if TYPE_CHECKING:
    import torch

__all__ = ["PerplexityTask"]

_WINDOW_WITHOUT_LIMIT = 2048  # tokens, for a model that reads any number (ALiBi); lm-evaluation-harness takes as many
_CHUNK_CHARACTERS = 1 << 18  # of texts that are tokenised together


@dataclass(frozen=True, slots=True)
class _Size:
    """What perplexities of a document are divided by, besides its tokens."""

    words: int
    bytes: int

    @classmethod
    def of(cls, text: str) -> "_Size":
        """Count as lm-evaluation-harness does: a text with blanks at an end has an empty word there."""
        return cls(len(re.split(r"\s+", text)), len(text.encode("utf-8", "surrogatepass")))


class PerplexityTask(PromptedTask):
    """How likely a model finds documents, by token, word and byte. A wrong definition raises TaskError.

    text: template of a document. counted: template of the text whose words and bytes are counted; None: the document
        itself. Where `text` is made readable first, as WikiText is, the original is what others count.
    rows_per_document: so many consecutive rows are one document, or all of them; `prepare` is applied to each row.
        Sampling, parts of a run and resuming know whole documents alone. The last one may have fewer rows.
        separator: between two of its rows.
    context: how many tokens of the preceding window each window sees. 1 is the way of lm-evaluation-harness; more
        brings the numbers closer to those of a model that reads everything, for more windows: one of n tokens scores
        n - context + 1.
    max_length: tokens of a window at most, tuned prompts not among them. None: as many as the model reads beside the
        longest prompts, so that all variants of a run read the same windows; 2,048 where nothing limits the model.
    bos: whether a beginning-of-text token belongs to the document: auto, where the tokenizer puts one there. The start
        token stands before the document in any case, so with one of its own it begins twice and the second is scored:
        lm-evaluation-harness does so, and bos: never is its add_bos_token=False.

    A document is scored in float64 from the float32 likelihoods of its tokens. Its windows are computed independently,
    but what is kept of an interrupted run is whole documents: one that is all of a file begins anew.
    """

    without_shots: ClassVar[str | None] = "has no questions"
    without_labels: ClassVar[str | None] = "has documents alone, and no labels that could be missing"

    kind: Literal["perplexity"] = "perplexity"
    text: str
    counted: str | None = None
    rows_per_document: int | Literal["all"] = 1
    separator: str = "\n\n"
    context: int = Field(default=1, ge=1)
    max_length: int | None = Field(default=None, ge=1)
    metrics: tuple[str, ...] = Field(
        default=("token_perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"), min_length=1
    )

    @field_validator("text", "counted")
    @classmethod
    def _well_formed(cls, text: str | None) -> str | None:
        if text is not None:
            Template.parse(text)
        return text

    @field_validator("rows_per_document", mode="before")
    @classmethod
    def _some_or_all(cls, rows: Any) -> Any:
        number = int(rows) if isinstance(rows, str) and rows.isdecimal() else rows  # a task file has texts alone
        if rows != "all" and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
            raise ValueError("should be a whole number of 1 or more, or all")
        return number

    def _disagreement(self) -> str | None:
        if self.cluster_column is not None and self.rows_per_document != 1:
            return "cluster_column: documents of several rows have none. Leave it out, or write one row for a document"
        if self.max_length is not None and self.context > self.max_length:
            return f"context: should be at most max_length ({self.max_length}), found {self.context}"
        return None

    @property
    def columns(self) -> tuple[str, ...]:
        return ("log_likelihood", "tokens", "words", "bytes")

    @property
    def label_names(self) -> tuple[str, ...]:
        return ()

    @property
    def longest_window(self) -> int:
        """Tokens of a window at most."""
        if self.max_length is not None:
            return self.max_length
        return _WINDOW_WITHOUT_LIMIT if self._context is None else self._context

    def bound_to(self, context: int | None) -> "PerplexityTask":
        bound = super().bound_to(context)
        longest = bound.longest_window
        if context is not None and longest > context:
            raise TaskError(
                f"task {self.name}: max_length: should be at most {context}, the tokens that this model reads beside "
                f"its prompts, found {longest}. Leave it out to use all of them."
            )
        if self.context > longest:
            raise TaskError(
                f"task {self.name}: context: should be at most {longest}, the tokens of a window of this model, found "
                f"{self.context}."
            )
        return bound

    def fingerprint(self) -> dict[str, object]:
        """Return all that changes an answer: neither the name nor the metrics, and not where the data lies."""
        changing = {"kind", "text", "counted", "rows_per_document", "separator", "bos", "context"}
        changed = self.model_dump(mode="json", include=changing)
        return {"head": self.head, **changed, "max_length": self.longest_window, **self.prompt_fingerprint()}

    def documents(self, rows: Rows) -> Rows:
        """Return the documents that these rows are, each as a row."""
        if self.rows_per_document == 1:
            return rows
        return joined_rows(rows, None if self.rows_per_document == "all" else self.rows_per_document, self.separator)

    @property
    def columns_read(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(column for template in self._templates() for column in template.columns))

    @property
    def read_as(self) -> Hashable:
        return (self.kind, *self._templates())

    def check_row(self, rows: Rows, row: Row) -> None:
        for template in self._templates():
            self._render(template, rows, row)

    def row_text(self, rows: Rows, row: Row) -> RowText:
        """Return what a person reads of one of `rows`. Raises DataError."""
        text, _ = self._templates()
        return RowText(self._render(text, rows, row), row_hash=self.row_hash(row))

    def examples(self, rows: Rows, tokenizer: Any) -> Iterator[Example]:
        """Yield a document at a time, in the order of the rows; a few short ones are tokenised together.

        All are checked before the first one comes out. A document that the tokenizer makes nothing of is an example
        with an error. Raises DataError as `check` does, ModelError where nothing can stand before a text.
        """
        self.check(rows)
        text, _ = self._templates()
        start = start_token(tokenizer)
        chunk: list[tuple[Row, str]] = []
        characters = 0
        for row in rows:
            chunk.append((row, self._render(text, rows, row)))
            characters += len(chunk[-1][1])
            if characters >= _CHUNK_CHARACTERS:
                yield from self._examples(rows, chunk, start, tokenizer)
                chunk, characters = [], 0
        yield from self._examples(rows, chunk, start, tokenizer)

    def predict(self, example: Example, answers: "Sequence[torch.Tensor | Generated]") -> Prediction:
        """Return the document's log-likelihood, in nats, with what it may be divided by.

        answers: float32 (targets,) for each window. Raises NotFiniteError for likelihoods that are not finite: servers'
        answers are checked before they get here, so these come from the local norm or head.
        """
        if len(answers) != len(example.requests) or not isinstance(example.reference, _Size):
            raise PetalsEvalError(
                f"document {example.key}: expected {len(example.requests)} answers, found {len(answers)}."
            )
        windows = [as_float64(answer) for answer in answers]
        likelihood = math.fsum(float(window.sum()) for window in windows)
        if not math.isfinite(likelihood):
            raise NotFiniteError(
                f"document {example.key}: expected a finite log-likelihood, found {likelihood}. The local norm or head "
                "overflowed, or its weights are damaged: try --dtype float32, and check the adapter and the model."
            )
        tokens = sum(len(window) for window in windows)
        return example.predicted(None, [(likelihood, tokens, example.reference.words, example.reference.bytes)])

    def _examples(self, rows: Rows, chunk: list[tuple[Row, str]], start: int, tokenizer: Any) -> Iterator[Example]:
        _, counted = self._templates()
        for (row, document), ids in zip(
            chunk, encode(tokenizer, [document for _, document in chunk], self.bos), strict=True
        ):
            key, hashed = str(row.index), self.row_hash(row)
            if not ids:
                error = ExampleError(f"this tokenizer makes no token of the text {document!r:.80}.")
                yield Example(key, None, (), 0, False, document, hashed, error=error)
                continue
            windows = Windows(key, ids, start=start, longest=self.longest_window, context=self.context)
            size = _Size.of(self._render(counted, rows, row))
            yield Example(key, None, windows, windows.n_tokens, False, document, hashed, reference=size)

    def _templates(self) -> tuple[Template, Template]:
        return Template.parse(self.text), Template.parse(self.text if self.counted is None else self.counted)

    def _render(self, template: Template, rows: Rows, row: Row) -> str:
        return template.render(row.columns, where=self._where(rows, row), truth_words=rows.truth_words)

    def _where(self, rows: Rows, row: Row) -> str:
        what = "row" if self.rows_per_document == 1 else "document"
        return rows.where(row, what)
