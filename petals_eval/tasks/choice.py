"""Choices: which of several texts the model finds likeliest after another."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from petals_eval.data.rows import Row, Rows
from petals_eval.errors import DataError, ExampleError, PetalsEvalError
from petals_eval.tasks.choice_labels import ChoiceLabels
from petals_eval.tasks.labels import Labels, spelled_keys
from petals_eval.tasks.likelihood import Asked, LikelihoodTask, Scored, constant_text, template_of
from petals_eval.tasks.prompted import Turn
from petals_eval.tasks.requests import Example, Generated, Prediction
from petals_eval.tasks.template import Template
from petals_eval.validation import shorten

if TYPE_CHECKING:
    import torch

__all__ = ["ChoiceTask"]


class ChoiceTask(LikelihoodTask):
    """Which of several answers is the right one, by their likelihoods. A wrong definition raises TaskError.

    text: template of the question, with a {column} for each value that is read; empty where the choices stand alone.
    choices: a template for each choice, such as "{choice1}", or a text that is the same for every row.
    choices_column: instead, the column that holds a list of texts, as many as each row likes.
    contexts, contexts_column: instead of text and choices, where it is the text before the answer that differs, as in
        WinoGrande: a template for each choice, or a column that holds a list of texts. continuation: template of the
        one answer, which is scored after each of them.
    label_column: the column of the right choice: its position from 0, its text, or a key of `label_map`; or, where the
        choices have names, as a classification reads labels. `petals_eval.tasks.choice_labels.ChoiceLabels` and
        `petals_eval.tasks.labels.Labels` have the rules.
    label_names: names of the choices that all rows share, where there are such. Choices that are the same for every row
        name themselves. With names there are the metrics of a classification, too.
    label_map: for other values, which label name each stands for, or without names which position.
    unlabelled: "predict": rows without a label (missing, empty, or -1 where that is no label) are predicted, and are in
        no metric; their column may be missing altogether. "error": they end a run before it begins.
    delimiter, max_length, too_long: as `LikelihoodTask` has them.

    Prediction: the choice with the greatest sum of its tokens' natural-log likelihoods, the first of equals. Values:
    for each choice this sum, its characters, its UTF-8 bytes, its tokens, and the likelihood of the answer with nothing
    before it, which is asked only where `acc_mutual_info` is among the metrics. Characters and bytes are those of the
    choice, where contexts differ those of the context, without the delimiter, as in lm-evaluation-harness; the tokens
    are those whose likelihood is summed.
    """

    kind: Literal["choice"] = "choice"
    text: str | None = None
    choices: tuple[str, ...] | None = Field(default=None, min_length=2)
    choices_column: str | None = Field(default=None, min_length=1)
    context_templates: tuple[str, ...] | None = Field(default=None, min_length=2, alias="contexts")
    contexts_column: str | None = Field(default=None, min_length=1)
    continuation: str | None = None
    label_column: str = Field(min_length=1)
    label_names: tuple[str, ...] = ()
    label_map: Annotated[dict[str, str | int], BeforeValidator(spelled_keys)] = Field(default_factory=dict)
    metrics: tuple[str, ...] = Field(default=("acc",), min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _choices_name_themselves(cls, values: Any) -> Any:
        """Let choices that are the same for every row be the label names."""
        if not isinstance(values, Mapping) or values.get("label_names"):
            return values
        choices = values.get("choices")
        texts = [constant_text(choice) for choice in choices] if isinstance(choices, list | tuple) else []
        names = [text.strip() for text in texts if text is not None]
        return {**values, "label_names": names} if names and len(names) == len(texts) else values

    @field_validator("text", "continuation")
    @classmethod
    def _well_formed(cls, text: str | None) -> str | None:
        if text is not None:
            template_of(text)
        return text

    @field_validator("choices", "context_templates")
    @classmethod
    def _all_well_formed(cls, texts: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for text in texts or ():
            template_of(text)
        return texts

    def _disagreement(self) -> str | None:
        ways = {
            "choices": self.choices,
            "choices_column": self.choices_column,
            "contexts": self.context_templates,
            "contexts_column": self.contexts_column,
        }
        given = [key for key, value in ways.items() if value is not None]
        if len(given) != 1:
            return f"expected one of {', '.join(ways)}, found {' and '.join(given) or 'none of them'}"
        wanted, other = ("text", "continuation") if given[0].startswith("choices") else ("continuation", "text")
        if getattr(self, wanted) is None:
            return f"{wanted}: missing, and with {given[0]} it must be given"
        if getattr(self, other) is not None:
            return f"{other}: has no meaning with {given[0]}, whose texts stand {_PLACES[other]}"
        return self._texts_disagree() or self._labels_disagree(given[0])

    def _texts_disagree(self) -> str | None:
        if not self._text_columns:
            return "text and choices: should hold a placeholder such as {question}; nothing is read of a row"
        key, texts = ("contexts", self.context_templates) if self.choices is None else ("choices", self.choices)
        for at, text in enumerate(texts or ()):
            if not text.strip():
                return f"{key}.{at}: should hold a text"
            if text in (texts or ())[:at]:
                return f"{key}.{at}: should differ from the others, found {shorten(text)} twice"
        if self.continuation is not None and not self.continuation.strip():
            return "continuation: should hold a text, for it is what is scored"
        if self.continuation is not None and self.asks_without_context:
            return (
                "metrics: acc_mutual_info takes the answer's likelihood without context away, and here that is the "
                "same for all choices; acc is that number"
            )
        return None

    def _labels_disagree(self, way: str) -> str | None:
        names = self.label_names
        if not names:
            for value, place in self.label_map.items():
                if not isinstance(place, int) and not place.strip().isdecimal():
                    return (
                        f"label_map.{value}: should be the position of a choice, from 0, for these choices have no "
                        f"label_names, found {shorten(place)}"
                    )
            count = len(self.choices or self.context_templates or ())
            for value, position in self._positions.items():
                if position < 0 or (count and position >= count):
                    return f"label_map.{value}: should be the position of a choice, from 0, found {position}"
            return None
        known = {name.strip() for name in names}
        if len(known) < len(names) or "" in known:
            return "label_names: should be different from each other, also without outer blanks, and none of them empty"
        fixed = self.choices or self.context_templates
        if fixed is None:
            return f"label_names: have no meaning with {way}, where each row has choices of its own"
        if len(fixed) != len(names):
            return f"label_names: should be one for each of the {len(fixed)} {way}, found {len(names)}"
        for value, name in self.label_map.items():
            if str(name).strip() not in known:
                return (
                    f"label_map.{value}: should be one of the label names ({', '.join(names)}), found {shorten(name)}"
                )
        return None

    @property
    def columns(self) -> tuple[str, ...]:
        return ("log_likelihood", "characters", "bytes", "tokens", "unconditioned")

    @property
    def asks_without_context(self) -> bool:
        return "acc_mutual_info" in self.metrics

    @property
    def columns_read(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*self._text_columns, self.label_column]))

    @property
    def columns_needed(self) -> tuple[str, ...]:
        columns = self.columns_read
        return columns if self.unlabelled == "error" else tuple(name for name in columns if name != self.label_column)

    @property
    def _text_columns(self) -> list[str]:
        texts = [self.text, self.continuation, *(self.choices or ()), *(self.context_templates or ())]
        columns = [column for text in texts if text is not None for column in template_of(text).columns]
        lists = [column for column in (self.choices_column, self.contexts_column) if column is not None]
        return [*columns, *lists]

    def fingerprint(self) -> dict[str, object]:
        """Return all that changes an answer, what is asked for `acc_mutual_info` among it."""
        return {**super().fingerprint(), "asks_without_context": self.asks_without_context}

    def turn(self, row: Row, where: str) -> Turn:
        """Return a row with its right choice: the text and the choice, or the right context and what follows it."""
        asked = self._read(row, where, self.shot_rows)
        if asked.label is None:
            return Turn("\n".join(asked.questions), None, self.delimiter)
        question = asked.questions[asked.label if len(asked.questions) > 1 else 0]
        return Turn(question, asked.answers[asked.label], self.delimiter)

    def asked(self, rows: Rows, row: Row) -> Asked:
        return self._read(row, rows.where(row), rows)

    def predict(self, example: Example, answers: "Sequence[torch.Tensor | Generated]") -> Prediction:
        """Return the choice with the greatest likelihood, the first of equals, and the values of each, in float64.

        answers: one float32 tensor (targets,) of log-likelihoods a request.
        Raises NotFiniteError for likelihoods that are not finite.
        """
        import numpy as np

        scored = example.reference
        if not isinstance(scored, Scored):
            raise PetalsEvalError(f"example {example.key} is not one of a choice task.")
        numbers = self._likelihoods(example, answers)
        sums = [float(numbers[place.part][place.start : place.stop].sum()) for place in scored.places]
        alone = [float(numbers[place.part][place.start : place.stop].sum()) for place in scored.without_context]
        values = [
            (total, characters, size, place.tokens, before)
            for total, (characters, size), place, before in zip(
                sums, scored.counted, scored.places, alone or [float("nan")] * len(sums), strict=True
            )
        ]
        return example.predicted(int(np.argmax(sums)), values)

    def _read(self, row: Row, where: str, source: Rows | None) -> Asked:
        """Return a row as it is asked. Raises DataError, with `where` in front."""
        truth_words = ("False", "True") if source is None else source.truth_words

        def rendered(text: str) -> str:
            return template_of(text).render(row.columns, where=where, truth_words=truth_words)

        texts = self.choices or self.context_templates
        column = self.choices_column or self.contexts_column
        if texts is not None:
            differing = tuple(map(rendered, texts))
        else:
            differing = _list_of_texts(row.columns[str(column)], str(column), where, truth_words)
        _check_choices(differing, where)
        label = self._label(row, differing, where, source)
        error = None
        if label is not None and differing.count(differing[label]) > 1:
            error = ExampleError(
                f"the right choice, {shorten(differing[label])}, is there {differing.count(differing[label])} times: "
                "no likelihood tells its copies apart."
            )
        if self.continuation is None:
            return Asked((rendered(self.text or ""),), differing, differing, label, error)
        answer = rendered(self.continuation)
        if not answer.strip():
            raise DataError(f"{where}: the continuation is empty, and nothing else is scored. Remove the row.")
        return Asked(differing, (answer,) * len(differing), differing, label, error)

    def _label(self, row: Row, choices: Sequence[str], where: str, source: Rows | None) -> int | None:
        value = row.columns.get(self.label_column)
        class_names = None if source is None else source.class_names.get(self.label_column)
        told: dict[str, Any] = {"where": where, "column": self.label_column, "unlabelled": self.unlabelled}
        if self.label_names:
            return _labels(self.label_names, tuple(self.label_map.items()), class_names).index(value, **told)
        return ChoiceLabels(self._positions, class_names).position(value, choices, **told)

    @property
    def _positions(self) -> dict[str, int]:
        """The label map of choices without names."""
        return {key: int(position) for key, position in self.label_map.items()}


_PLACES = {"text": "before the answer", "continuation": "after the text"}


@lru_cache(maxsize=64)
def _labels(
    names: tuple[str, ...], label_map: tuple[tuple[str, str | int], ...], class_names: tuple[str, ...] | None
) -> Labels:
    """Return what reads the labels of choices with names: one for all rows."""
    return Labels(names, {key: str(name) for key, name in label_map}, class_names)


def _list_of_texts(value: object, column: str, where: str, truth_words: tuple[str, str]) -> tuple[str, ...]:
    """Return the texts of a list. Raises DataError for what is no list, and for what is no text in it."""
    if not isinstance(value, list | tuple):
        raise DataError(
            f"{where}: column {column} should hold a list of texts, one for each choice, found {shorten(value)}. A csv "
            "or tsv file has no lists: use jsonl or parquet, or a column for each choice (choices: ['{a}', '{b}'])."
        )
    each = Template((("", column),), "")
    return tuple(
        each.render({column: text}, where=f"{where}, choice {at}", truth_words=truth_words)
        for at, text in enumerate(value)
    )


def _check_choices(choices: Sequence[str], where: str) -> None:
    if len(choices) < 2:
        raise DataError(f"{where}: expected two choices or more, found {len(choices)}. Remove the row.")
    empty = next((at for at, choice in enumerate(choices) if not choice.strip()), None)
    if empty is not None:
        raise DataError(f"{where}: choice {empty} is empty. Remove the row, or fill it in.")
