"""Generation: what the model writes after a text, and how good that is beside what is right."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from petals_eval.data.rows import Row, Rows, is_missing
from petals_eval.errors import ConfigError, DataError, ExampleError, PetalsEvalError
from petals_eval.metrics.text_libraries import ROUGE, check_library, corpus_columns, corpus_counts, rouge
from petals_eval.metrics.texts import last_number, numbers_equal, token_f1
from petals_eval.tasks.extraction import Extraction, Normalise, Sampling
from petals_eval.tasks.likelihood import template_of
from petals_eval.tasks.prompted import PromptedTask, Turn
from petals_eval.tasks.requests import Decoding, Example, Generated, Prediction, Request, RowText
from petals_eval.tasks.tokens import CHUNK_ROWS, encode
from petals_eval.validation import shorten

if TYPE_CHECKING:
    import torch

__all__ = ["GenerationTask"]

_COUNTS = ("new_tokens", "stopped_by_length")
_OF_ANSWERS = ("exact_match", "numbers_equal", "token_f1")
_OF_CORPORA = ("bleu", "chrf")


class GenerationTask(PromptedTask):
    """Texts that the model writes, compared with right ones where there are any. A wrong definition raises TaskError.

    text: template of what stands before, with a {column} for each value that is read.
    answer: template of the right text; or
    answer_column: the column of it, or of a list of texts any of which is right. With neither there is nothing right:
        texts are generated and not compared.
    unlabelled: "predict": rows whose right text is missing or empty are generated and not compared; its columns may be
        missing altogether. "error": they end a run before it begins.
    delimiter: between a text and its answer where it is shown as a shot.
    max_new_tokens: at most. How many texts were stopped by it is always counted.
    stop: texts that end one; they are not part of it.
    sampling: how tokens are drawn; without it the likeliest is taken each time.
    too_long: a row whose text leaves no room for the new tokens is a failure (fail), or its first tokens go (cut), the
        one that begins it among them, as in lm-evaluation-harness.
    extract: by a name of yours, where in the text the answer stands (`petals_eval.tasks.extraction.Extraction`). With
        it exact_match, numbers_equal and token_f1 are computed of each answer, as exact_match[name]. The right texts
        are taken as they are.
    normalise: what does not count for exact_match (`Normalise`).
    metrics: by default exact_match where there is something right, otherwise the two counts below.

    There is no label and no prediction. Values: the new tokens (an end token is one), 1.0 where the text was stopped by
    their number, and for each metric that is listed what it is computed from; NaN where there is no right text.
    """

    kind: Literal["generation"] = "generation"
    text: str
    answer: str | None = None
    answer_column: str | None = Field(default=None, min_length=1)
    delimiter: str = " "
    max_new_tokens: int = Field(default=256, ge=1)
    stop: tuple[str, ...] = ()
    sampling: Sampling | None = None
    too_long: Literal["fail", "cut"] = "fail"
    extract: dict[str, Extraction] = Field(default_factory=dict)
    normalise: Normalise = Normalise()
    metrics: tuple[str, ...] = Field(default=("stopped_by_length", "new_tokens"), min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _compare_if_there_is_something_right(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or "metrics" in values or not {"answer", "answer_column"} & values.keys():
            return values
        return {**values, "metrics": ("exact_match",)}

    @field_validator("text", "answer")
    @classmethod
    def _well_formed(cls, text: str | None) -> str | None:
        if text is not None:
            template_of(text)
        return text

    @field_validator("stop")
    @classmethod
    def _are_texts(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if not all(stop):
            raise ValueError("should hold texts, none of them empty")
        return stop

    @field_validator("extract")
    @classmethod
    def _are_named(cls, extract: dict[str, Extraction]) -> dict[str, Extraction]:
        if not all(name.strip() and "[" not in name and "]" not in name for name in extract):
            raise ValueError("should have names as keys, without brackets")
        return extract

    @field_validator("metrics")
    @classmethod
    def _length_counts(cls, metrics: tuple[str, ...]) -> tuple[str, ...]:
        """Count in any case what was stopped by length: such a text says little of what the model would have said."""
        return tuple(dict.fromkeys([*metrics, "stopped_by_length"]))

    def _disagreement(self) -> str | None:
        if not template_of(self.text).segments:
            return "text: should hold a placeholder for each column that is to be read, such as {question}"
        if self.answer is not None and self.answer_column is not None:
            return "answer and answer_column: expected one of them, found both"
        comparing = [name for name in self.metrics if name not in _COUNTS]
        if comparing and self.answer is None and self.answer_column is None:
            return f"metrics: {comparing[0]} needs a right text: give answer or answer_column"
        if self.extract and not any(name in _OF_ANSWERS for name in self.metrics):
            return f"extract: has no meaning without one of {', '.join(_OF_ANSWERS)} among the metrics"
        for name in self.metrics:
            try:
                check_library(name)
            except ConfigError as error:
                return f"metrics: {error}"
        return None

    @property
    def label_names(self) -> tuple[str, ...]:
        return ()

    @property
    def columns(self) -> tuple[str, ...]:
        found = list(_COUNTS)
        for name in self.metrics:
            if name in _OF_ANSWERS:
                found += [f"{name}[{way}]" for way in self.extract] or [name]
            elif name in _OF_CORPORA:
                found += corpus_columns(name)
            elif name in ROUGE:
                found.append(name)
        return tuple(found)

    @property
    def columns_read(self) -> tuple[str, ...]:
        """The columns that are read of every row, each once."""
        texts = [self.text] if self.answer is None else [self.text, self.answer]
        columns = [column for text in texts for column in template_of(text).columns]
        return tuple(dict.fromkeys([*columns, *([self.answer_column] if self.answer_column else [])]))

    @property
    def decoding(self) -> Decoding:
        """How every row's text is generated."""
        draws = {} if self.sampling is None else self.sampling.model_dump()
        return Decoding(self.max_new_tokens, self.stop, **draws)

    def fingerprint(self) -> dict[str, object]:
        """Return all that changes an answer: the metrics too, for of a text the journal has what they need, no more."""
        return {**super().fingerprint(), "columns": list(self.columns)}

    @property
    def columns_needed(self) -> tuple[str, ...]:
        return template_of(self.text).columns if self.unlabelled == "predict" else self.columns_read

    def check_row(self, rows: Rows, row: Row) -> None:
        self._question(row, rows.where(row), rows)
        self._references(row, rows.where(row), rows)

    def row_text(self, rows: Rows, row: Row) -> RowText:
        """Return what a person reads of one of `rows`. Raises DataError."""
        where = rows.where(row)
        return RowText(self._question(row, where, rows), self._references(row, where, rows), self.row_hash(row))

    def turn(self, row: Row, where: str) -> Turn:
        """Return a row with its right text, the first one where there are several."""
        right = self._references(row, where, self.shot_rows)
        return Turn(self._question(row, where, self.shot_rows), right[0] if right else None, self.delimiter)

    def examples(self, rows: Rows, tokenizer: Any) -> Iterator[Example]:
        """Yield examples in the order of `rows`, tokenised a few hundred at a time as they are asked for.

        All of them are checked before the first one comes out. A row that cannot be asked is an example with an error.
        Raises DataError as `check` does, ModelError for a tokenizer that lacks a token.
        """
        self.check(rows)
        source = iter(rows)
        while chunk := list(islice(source, CHUNK_ROWS)):
            texts = [self._context_or_error(rows, row, tokenizer) for row in chunk]
            encoded = iter(encode(tokenizer, [text for text in texts if isinstance(text, str)], self.bos))
            for row, text in zip(chunk, texts, strict=True):
                yield self._example(rows, row, text, next(encoded) if isinstance(text, str) else ())

    def predict(self, example: Example, answers: "Sequence[torch.Tensor | Generated]") -> Prediction:
        """Return what was generated, with the numbers that the metrics need of it."""
        generated = answers[0] if len(answers) == 1 else None
        if not isinstance(generated, Generated):
            raise PetalsEvalError(f"example {example.key}: expected one generated text, found something else.")
        references = example.reference if isinstance(example.reference, tuple) else ()
        values = [float(len(generated.token_ids)), float(generated.finish == "length")]
        values += self._compared(generated.text, references) if references else [float("nan")] * (len(self.columns) - 2)
        return example.predicted(None, [values], generated)

    def _compared(self, text: str, references: tuple[str, ...]) -> list[float]:
        """Return the numbers of a text under the columns after the first two."""
        found: list[float] = []
        answers = [way.answer(text) for way in self.extract.values()] or [text]
        overlaps = rouge(text, references) if any(name in ROUGE for name in self.metrics) else {}
        for name in self.metrics:
            if name == "exact_match":
                found += [self.normalise.exact_match(answer, references) for answer in answers]
            elif name == "numbers_equal":
                found += [numbers_equal(answer, references) for answer in answers]
            elif name == "token_f1":
                found += [token_f1(answer, references) for answer in answers]
            elif name in _OF_CORPORA:
                found += corpus_counts(name, text, references)
            elif name in ROUGE:
                found.append(overlaps[name])
        return found

    def _question(self, row: Row, where: str, source: Rows | None) -> str:
        truth_words = ("False", "True") if source is None else source.truth_words
        return template_of(self.text).render(row.columns, where=where, truth_words=truth_words)

    def _references(self, row: Row, where: str, source: Rows | None) -> tuple[str, ...]:
        """Return the right texts of a row; none where there are none. Raises DataError, with `where` in front."""
        truth_words = ("False", "True") if source is None else source.truth_words
        if self.answer is None and self.answer_column is None:
            return ()
        if self.answer_column is None:
            columns = template_of(self.answer or "").columns
            values = [row.columns.get(column) for column in columns]
            missing = next((column for column, value in zip(columns, values, strict=True) if _has_no_text(value)), None)
            if missing is not None:
                return self._without_answer(missing, where)
            rendered = template_of(self.answer or "").render(row.columns, where=where, truth_words=truth_words)
            found: tuple[str, ...] = (rendered,)
        else:
            value = row.columns.get(self.answer_column)
            if _has_no_text(value):
                return self._without_answer(self.answer_column, where)
            several = value if isinstance(value, list | tuple) else [value]
            for each in several:
                if not isinstance(each, str | int | float) or _has_no_text(each):
                    raise DataError(
                        f"{where}: column {self.answer_column} should hold a text or a list of texts, found "
                        f"{shorten(each)}."
                    )
            found = tuple(truth_words[each] if isinstance(each, bool) else str(each) for each in several)
        if "numbers_equal" in self.metrics and all(last_number(text) is None for text in found):
            raise DataError(
                f"{where}: numbers_equal needs a number in the right text, found none in {shorten(found[0])}."
            )
        return found

    def _without_answer(self, column: str, where: str) -> tuple[str, ...]:
        if self.unlabelled == "predict":
            return ()
        raise DataError(
            f"{where} has no right text in column {column}. Remove the row, or fill it in. To generate for such rows "
            "all the same, and compare nothing: --unlabelled predict."
        )

    def _context_or_error(self, rows: Rows, row: Row, tokenizer: Any) -> str | ExampleError:
        try:
            [context] = self.contexts([self._question(row, rows.where(row), rows)], row, tokenizer)
        except ExampleError as error:
            return error
        return context

    def _example(self, rows: Rows, row: Row, text: str | ExampleError, ids: tuple[int, ...]) -> Example:
        key, hashed = str(row.index), self.row_hash(row)
        right = self._references(row, rows.where(row), rows)
        if isinstance(text, str) and not ids:
            text = ExampleError(
                f"this tokenizer makes no token of the text {text!r:.80}, so there is nothing to go on from."
            )
        if isinstance(text, ExampleError):
            question = self._question(row, rows.where(row), rows)
            return Example(key, None, (), 0, False, question, hashed, right or None, text)
        kept = ids
        if self.too_long == "cut" and self._context is not None:
            room = self._context - self.max_new_tokens
            kept = ids[-room:] if 0 < room < len(ids) else ids
        request = Request(key, 0, kept, decoding=self.decoding)
        return Example(key, None, (request,), len(kept), len(kept) < len(ids), text, hashed, right or None)


def _has_no_text(value: object) -> bool:
    """Return whether a cell holds no right text: nothing, blanks alone, or an empty list."""
    if is_missing(value):
        return True
    return not value if isinstance(value, list | tuple) else isinstance(value, str) and not value.strip()
