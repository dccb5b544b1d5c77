"""Classification, by a trained head or by label words that the model's own word head scores."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from petals_eval.data.rows import Row, Rows, row_hash
from petals_eval.errors import (
    AdapterError,
    ExampleError,
    PetalsEvalError,
    RequestTooLargeError,
    TaskError,
)
from petals_eval.tasks.headed import (
    HeadedTask,
    HeadTexts,
    check_finite,
    columns_needed,
    label_of,
    no_tokens,
    with_label,
)
from petals_eval.tasks.labels import Labels, spelled_keys
from petals_eval.tasks.prompted import Turn
from petals_eval.tasks.requests import Example, Generated, Prediction, Request, as_float64
from petals_eval.tasks.template import Template
from petals_eval.tasks.tokens import CHUNK_ROWS, Continued, continue_texts, cut, encode
from petals_eval.text import plural
from petals_eval.validation import shorten

if TYPE_CHECKING:
    import numpy as np
    import torch

__all__ = ["ClassificationTask"]


class ClassificationTask(HeadedTask):
    """One label out of several. A wrong definition raises TaskError.

    label_column: the column of the labels. Its values may be label names, positions in `label_names` (also as text),
        or true and false; where the source names its classes, these names decide and not their numbers.
        `petals_eval.tasks.labels.Labels` has the rules.
    label_names: in the order of the head's outputs. Outer blanks do not tell labels apart.
    label_map: for other values, which label name each stands for. A key is the value as the data spell it: 00 is not
        0. Where a key or a label name is a number, no number is read as a position.
    label_words: None for an adapter with a trained head. Otherwise one word a label, and the model's own word head
        says how likely each is to follow the text. A word follows exactly as written: begin it with a space unless
        the text ends in one. Score of a label: the sum of the natural-log likelihoods of its word's tokens;
        normalize="mean" divides by their number, so that a long word is not at a disadvantage.
    The others are those of `HeadedTask`.

    What `Prompting` has stands around the text: a shot shows a text and its label word, or for a trained head, after a
    blank, its label name.

    A text that is too long keeps its first tokens; of a pair the longer one is cut first. With label words the
    template's fixed end and the word keep their place too, and the text before them is cut. Where anything stands
    around the text nothing is cut: an example that is too long fails, for its shots or its question would not be whole.
    """

    kind: Literal["classification"] = "classification"
    label_names: tuple[str, ...] = Field(min_length=2)
    label_map: Annotated[dict[str, str], BeforeValidator(spelled_keys)] = Field(default_factory=dict)
    metrics: tuple[str, ...] = Field(default=("accuracy", "f1_macro"), min_length=1)
    label_words: tuple[str, ...] | None = None
    normalize: Literal["sum", "mean"] = "sum"

    @field_validator("label_names")
    @classmethod
    def _distinct_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        """Refuse names that differ in outer blanks alone: labels in the data are compared without them."""
        words = {name.strip() for name in names}
        if len(words) < len(names) or "" in words:
            raise ValueError("should be different from each other, also without outer blanks, and none of them empty")
        return names

    @field_validator("label_words")
    @classmethod
    def _distinct_words(cls, words: tuple[str, ...] | None) -> tuple[str, ...] | None:
        """Refuse a word given twice. A blank makes another word, for it makes other tokens."""
        if words is not None and (len(set(words)) < len(words) or not all(word.strip() for word in words)):
            raise ValueError("should be different from each other, and none of them empty")
        return words

    def _disagreement(self) -> str | None:
        """Return what of the definition does not fit the label names, or None."""
        known = {name.strip() for name in self.label_names}
        for value, name in self.label_map.items():
            if name.strip() not in known:
                labels = ", ".join(self.label_names)
                return f"label_map.{value}: should be one of the label names ({labels}), found {shorten(name)}"
        if self.label_words is not None and len(self.label_words) != len(self.label_names):
            return (
                f"label_words: should be one word for each of the {len(self.label_names)} labels, "
                f"found {len(self.label_words)}"
            )
        if self.label_words is not None and self.text_pair is not None:
            return (
                "text_pair: should be left out where there are label_words, which follow one text: write both columns "
                f"into text, found {shorten(self.text_pair)}"
            )
        return None

    def prompt_problem(self) -> str | None:
        """Return why this task cannot have what is asked for here, or None: of a pair only one text would be read."""
        if self.text_pair is not None and self.is_prompted:
            return (
                "text_pair: should be left out where shots, an instruction or a chat template stand around the text: "
                f"write both columns into text, found {shorten(self.text_pair)}"
            )
        return super().prompt_problem()

    @property
    def head(self) -> Literal["class", "lm"]:
        return "class" if self.label_words is None else "lm"

    def fingerprint(self) -> dict[str, object]:
        """Return all that changes an answer: neither the name nor the metrics, and not where the data lies."""
        changing = {"kind", "text", "label_column", "label_names", "label_map", "max_length"}
        if self.text_pair is not None:
            changing.add("text_pair")
        if self.label_words is not None:
            changing |= {"label_words", "normalize"}
        own = self.model_dump(mode="json", include=changing)
        return {"head": self.head, **own, **self.prompt_fingerprint()}

    def turn(self, row: Row, where: str) -> Turn:
        """Return a row with its right answer: its label word, or its label name for a trained head."""
        rows, template = self.shot_rows, Template.parse(self.text)
        classes = None if rows is None else rows.class_names.get(self.label_column)
        labels = Labels(self.label_names, self.label_map, classes)
        value, told = label_of(row, self.label_column, self.unlabelled), {"where": where, "column": self.label_column}
        index = labels.index(value, **told, unlabelled=self.unlabelled)
        truth_words = ("False", "True") if rows is None else rows.truth_words
        text = template.render(row.columns, where=where, truth_words=truth_words)
        if index is None or self.label_words is None:
            return Turn(text, None if index is None else self.label_names[index])
        return Turn(text, self.label_words[index], delimiter="")

    def examples(self, rows: Rows, tokenizer: Any) -> Iterator[Example]:
        """Yield examples in the order of `rows`, tokenised a few hundred at a time as they are asked for.

        All of them are checked before the first one comes out. Raises DataError as `check` does.
        """
        self.check(rows)
        texts = HeadTexts.parse(self.text, self.text_pair)
        labels = self._labels(rows)
        source = iter(rows)
        while chunk := list(islice(source, CHUNK_ROWS)):
            found = [self._label(row, labels, rows) for row in chunk]
            if self.is_prompted:
                yield from self._prompted(rows, chunk, found, texts.first, tokenizer)
            elif self.label_words is None:
                yield from texts.examples(rows, chunk, found, tokenizer, self.max_length, self.label_column)
            else:
                yield from self._for_label_words(rows, chunk, found, texts.first, tokenizer, self.label_words)

    def check(self, rows: Rows) -> None:
        """Look at the columns, labels and texts of all rows: a wrong label in the last one should not end a run of
        hours. Raises DataError, which names the row, what was found there and what was expected.

        Rows that passed, and parts of them, are not looked at again.
        """
        reading = (self.text, self.text_pair, self.label_column, self.label_names, self.unlabelled)
        read_as = (*reading, *self.label_map.items())
        if read_as in rows.passed:
            return
        texts = HeadTexts.parse(self.text, self.text_pair)
        rows.check_columns(columns_needed(texts.columns, self.label_column, self.unlabelled), self.name)
        labels = self._labels(rows)
        for row in rows:
            self._label(row, labels, rows)
            texts.render(row, rows)
        rows.passed.add(read_as)

    def check_outputs(self, shape: tuple[int, ...]) -> None:
        """Raise AdapterError where a head that answers with scores of this shape was trained for other labels."""
        if shape == (1,):
            raise AdapterError(
                f"the head gives one number, as one for regression does, but task {self.name} has "
                f"{len(self.label_names)} labels ({', '.join(self.label_names)}). Use the adapter that was trained for "
                "this task, or a task with kind: regression."
            )
        if shape != (len(self.label_names),):
            raise AdapterError(
                f"the head gives {shape} scores, but task {self.name} has {len(self.label_names)} labels "
                f"({', '.join(self.label_names)}). Use the adapter that was trained for this task."
            )

    def predict(self, example: Example, answers: "Sequence[torch.Tensor | Generated]") -> Prediction:
        """Return the label with the highest score, the first of equals, and the scores in float64.

        answers: one float32 tensor a request: (labels,) logits of the trained head or one log-likelihood a label;
            or, where a label word has several tokens, one tensor (tokens,) a label.
        Raises AdapterError when the head has another number of labels, and NotFiniteError for scores that are not
        finite: servers' answers are checked before they get here, so these come from the local norm or head.
        """
        scores = self._scores(example, [as_float64(answer) for answer in answers])
        check_finite(example, scores)
        return example.predicted(int(scores.argmax()), scores[:, None].tolist())

    def _scores(self, example: Example, answers: "list[np.ndarray]") -> "np.ndarray":
        import numpy as np

        if len(answers) != len(example.requests):
            raise PetalsEvalError(
                f"example {example.key}: expected {len(example.requests)} answers, found {len(answers)}."
            )
        if len(answers) > 1:
            reduce = np.sum if self.normalize == "sum" else np.mean
            return np.array([reduce(answer) for answer in answers])
        self.check_outputs(answers[0].shape)
        return answers[0]

    def _labels(self, rows: Rows) -> Labels:
        return Labels(self.label_names, self.label_map, rows.class_names.get(self.label_column))

    def row_labels(self, rows: Rows) -> Iterator[tuple[str, int | None]]:
        """Yield the key and the label of each of `rows`. Raises DataError as `check` does."""
        labels = self._labels(rows)
        return ((str(row.index), self._label(row, labels, rows)) for row in rows)

    def _label(self, row: Row, labels: Labels, rows: Rows) -> int | None:
        value, where = label_of(row, self.label_column, self.unlabelled), rows.where(row)
        return labels.index(value, where=where, column=self.label_column, unlabelled=self.unlabelled)

    def _for_label_words(
        self,
        rows: Rows,
        chunk: list[Row],
        found: list[int | None],
        template: Template,
        tokenizer: Any,
        words: tuple[str, ...],
    ) -> Iterator[Example]:
        texts = [_text(template, rows, row) for row in chunk]
        bodies = [_text(template, rows, row, with_tail=False) for row in chunk]
        for row, label, text, continued in zip(
            chunk, found, texts, continue_texts(tokenizer, texts, bodies, words), strict=True
        ):
            if not continued.context:
                raise no_tokens(rows, row, text)
            self._check_words(continued, words)
            if continued.error is not None:
                row_hash = self._row_hash(row, template)
                yield Example(
                    str(row.index), label, (), len(continued.context), False, text, row_hash, error=continued.error
                )
                continue
            try:
                context, truncated = cut(continued, self.max_length)
            except ValueError:
                raise TaskError(
                    f"task {self.name}: max_length {self.max_length} has no room for any text beside the template's "
                    "end and the label words. Raise it."
                ) from None
            requests = _word_requests(str(row.index), context, continued.words)
            n_tokens = sum(len(request.input_ids) for request in requests)
            row_hash = self._row_hash(row, template)
            yield Example(str(row.index), label, requests, n_tokens, truncated, text, row_hash)

    def _prompted(
        self, rows: Rows, chunk: list[Row], found: list[int | None], template: Template, tokenizer: Any
    ) -> Iterator[Example]:
        """Yield examples whose text stands in a prompt: whole, or as failures."""
        texts: list[str] = []
        errors: list[ExampleError | None] = []
        for row in chunk:
            question = _text(template, rows, row)
            try:
                [text], error = self.contexts([question], row, tokenizer), None
            except ExampleError as failure:
                text, error = question, failure
            texts.append(text)
            errors.append(error)
        tokens = self._prompted_tokens(tokenizer, texts)
        for row, label, text, error, (context, words, merged) in zip(chunk, found, texts, errors, tokens, strict=True):
            error = error or merged
            key, row_hash = str(row.index), self._row_hash(row, template)
            n_tokens = len(context) + max(map(len, words), default=0)
            if not context:
                raise no_tokens(rows, row, text)
            if error is None and n_tokens > self.max_length:
                shots = self.shots.number if self.shots is not None else 0
                error = RequestTooLargeError(
                    f"its prompt has {n_tokens} tokens with {plural(shots, 'shot')}, and max_length of {self.name} "
                    f"is {self.max_length}. Ask for fewer shots, or raise max_length as far as the model reads."
                )
            if error is not None:
                yield Example(key, label, (), n_tokens, False, text, row_hash, error=error)
                continue
            requests = _word_requests(key, context, words) if words else (Request(key, 0, context),)
            n_tokens = sum(len(request.input_ids) for request in requests)
            yield Example(key, label, requests, n_tokens, False, text, row_hash)

    def _prompted_tokens(
        self, tokenizer: Any, texts: list[str]
    ) -> Iterator[tuple[tuple[int, ...], tuple[tuple[int, ...], ...], ExampleError | None]]:
        """Yield the tokens of each whole text, those of each label word after it, and what is wrong with these."""
        if self.label_words is None:
            # A chat template has written its special tokens itself, and the text does not end in a closing one.
            uncut = encode(tokenizer, texts) if self.chat else _ids(tokenizer(texts, verbose=False)["input_ids"])
            yield from ((ids, (), None) for ids in uncut)
            return
        opened = encode(tokenizer, texts)
        continued = continue_texts(tokenizer, texts, texts, self.label_words)
        for context, after in zip(opened, continued, strict=True):
            self._check_words(after, self.label_words)
            yield context, after.words, after.error

    def _row_hash(self, row: Row, template: Template) -> str:
        return row_hash(row.columns, with_label(template.columns, self.label_column, row))

    def _check_words(self, continued: Continued, words: tuple[str, ...]) -> None:
        seen: dict[tuple[int, ...], str] = {}
        for word, ids in zip(words, continued.words, strict=True):
            if not ids:
                raise TaskError(f"task {self.name}: this tokenizer gives no token for the label word {word!r}.")
            if ids in seen:
                raise TaskError(
                    f"task {self.name}: this tokenizer gives the label words {seen[ids]!r} and {word!r} the same "
                    f"tokens {list(ids)}, so nothing can tell them apart. Choose other words."
                )
            seen[ids] = word


def _word_requests(key: str, context: tuple[int, ...], words: tuple[tuple[int, ...], ...]) -> tuple[Request, ...]:
    """Return one request that asks for every word where each is one token; else one a word, its last token left out."""
    last = len(context) - 1
    if all(len(word) == 1 for word in words):
        return (Request(key, 0, context, tuple((last, word[0]) for word in words)),)
    return tuple(
        Request(key, part, context + word[:-1], tuple((last + at, token) for at, token in enumerate(word)))
        for part, word in enumerate(words)
    )


def _ids(found: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    return [tuple(ids) for ids in found]


def _text(template: Template, rows: Rows, row: Row, *, with_tail: bool = True) -> str:
    where = rows.where(row)
    return template.render(row.columns, where=where, with_tail=with_tail, truth_words=rows.truth_words)
