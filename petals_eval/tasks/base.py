"""What every task is: rows in, requests out, and predictions from the answers."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from petals_eval.data.rows import Rows
from petals_eval.tasks.requests import Example, Generated, Prediction

if TYPE_CHECKING:
    import torch

__all__ = ["Task"]


@runtime_checkable
class Task(Protocol):
    """Turns rows into requests and answers into predictions. Any object with these members is a task.

    A task may also have `data: DataSource | None`, what it evaluates unless told otherwise, and
    `formats: Mapping[str, FileReading]`, how it reads a local file of each format. So that mistakes show before a swarm
    is asked for anything, it may have `check(rows)`, which raises DataError for rows that `examples` would refuse, and
    `check_outputs(shape)`, which raises AdapterError for a trained head whose scores `predict` would refuse.

    Where what it evaluates is not the rows themselves, it has `documents(rows)`, which makes other rows of all of them,
    prepared if they are to be, before any is drawn. Where its requests depend on the model it has `bound_to(context)`,
    which gives the task for a model that reads so many tokens of text beside the longest of its prompts (None: any
    number). For an analysis of errors it may have `row_text(rows, row)`, which gives what a person reads of a row, a
    `RowText`.
    """

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str:
        """One of `petals_eval.metrics.KINDS`: it says what the values of a prediction are, and which metrics there
        are."""
        ...

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns of a prediction's values."""
        ...

    @property
    def label_names(self) -> tuple[str, ...]:
        """The names of the labels, in the order of the head's outputs; empty where rows have no common labels."""
        ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of metrics that `petals_eval.metrics` knows for the kind."""
        ...

    @property
    def head(self) -> Literal["class", "lm"]:
        """Whether the requests ask the adapter's trained head (class) or the model's own word head (lm)."""
        ...

    def examples(self, rows: Rows, tokenizer: Any) -> Iterator[Example]:
        """Yield the examples in the order of the rows, made as they are asked for. Raises DataError with the row."""
        ...

    def predict(self, example: Example, answers: "Sequence[torch.Tensor | Generated]") -> Prediction:
        """Return the prediction from one answer a request of `example`, in the order of `part` (`Request` says what
        an answer is).

        Raises ExampleError where these answers give none: the run notes a failure and goes on.
        """
        ...

    def fingerprint(self) -> dict[str, object]:
        """Return all of the task's definition that changes an answer, as values that JSON can hold."""
        ...
