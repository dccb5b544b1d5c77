"""Continuations: how likely a text is to follow another, and whether greedy decoding would write it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from petals_eval.data.rows import Row, Rows
from petals_eval.errors import DataError, PetalsEvalError
from petals_eval.tasks.likelihood import Asked, LikelihoodTask, Scored, template_of
from petals_eval.tasks.prompted import Turn
from petals_eval.tasks.requests import Example, Generated, Prediction

if TYPE_CHECKING:
    import torch

__all__ = ["ContinuationTask"]


class ContinuationTask(LikelihoodTask):
    """The likelihood of one text after another, as LAMBADA asks it. A wrong definition raises TaskError.

    text: template of what stands before; empty where the target stands alone.
    target: template of what follows. Between the two stands the delimiter, a blank unless told otherwise, so that
        `text: "{context}"` and `target: "{word}"` read as they are.
    delimiter, max_length, too_long: as `LikelihoodTask` has them.

    There is no label and no prediction. Values: the sum of the natural-log likelihoods of the target's tokens (the
    delimiter's among them), 1.0 where each of these is the one that greedy decoding would choose and otherwise 0.0,
    their number, and the characters of the target.
    """

    kind: Literal["continuation"] = "continuation"
    text: str
    target: str = Field(min_length=1)
    metrics: tuple[str, ...] = Field(default=("perplexity", "acc"), min_length=1)

    asks_greedy: ClassVar[bool] = True
    without_labels: ClassVar[str | None] = "has a target in every row, and no labels that could be missing"

    @field_validator("text", "target")
    @classmethod
    def _well_formed(cls, text: str) -> str:
        template_of(text)
        return text

    def _disagreement(self) -> str | None:
        if not self.columns_read:
            return (
                "text and target: should hold a placeholder such as {context} in one of them; nothing is read of a row"
            )
        return None

    @property
    def columns(self) -> tuple[str, ...]:
        return ("log_likelihood", "is_greedy", "tokens", "characters")

    @property
    def label_names(self) -> tuple[str, ...]:
        return ()

    @property
    def columns_read(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*template_of(self.text).columns, *template_of(self.target).columns]))

    def turn(self, row: Row, where: str) -> Turn:
        """Return the text and its target."""
        asked = self._read(row, where, self.shot_rows)
        return Turn(asked.questions[0], asked.answers[0], self.delimiter)

    def asked(self, rows: Rows, row: Row) -> Asked:
        return self._read(row, rows.where(row), rows)

    def predict(self, example: Example, answers: "Sequence[torch.Tensor | Generated]") -> Prediction:
        """Return the values of the target, in float64.

        answers: one float32 tensor (targets, 2) of log-likelihoods and of 1.0 for a greedy token.
        Raises NotFiniteError for likelihoods that are not finite.
        """
        scored = example.reference
        if not isinstance(scored, Scored):
            raise PetalsEvalError(f"example {example.key} is not one of a continuation task.")
        [numbers] = self._likelihoods(example, answers)
        [place], [(characters, _)] = scored.places, scored.counted
        total, is_greedy = float(numbers[:, 0].sum()), float(numbers[:, 1].all())
        return example.predicted(None, [(total, is_greedy, place.tokens, characters)])

    def _read(self, row: Row, where: str, source: Rows | None) -> Asked:
        """Return a row as it is asked. Raises DataError, with `where` in front."""
        truth_words = ("False", "True") if source is None else source.truth_words
        question, target = (
            template_of(text).render(row.columns, where=where, truth_words=truth_words)
            for text in (self.text, self.target)
        )
        if not target.strip():
            raise DataError(f"{where}: the target is empty, and nothing else is scored. Remove the row.")
        return Asked((question,), (target,), (target,))
