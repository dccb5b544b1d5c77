"""What crosses the doors of the task room: examples and requests on the way out, predictions on the way back."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from petals_eval.errors import ExampleError, PetalsEvalError

if TYPE_CHECKING:
    import numpy as np
    import torch

__all__ = [
    "Decoding",
    "Example",
    "Finish",
    "Generated",
    "Label",
    "Prediction",
    "Request",
    "RowText",
    "TokenLikelihoods",
    "Values",
    "as_float64",
]

Label = int | float | None
"""What is right: the position of a label or a choice, a number for a regression, None where nobody says."""

Values = tuple[tuple[float, ...], ...]
"""Numbers of a prediction, (items, columns): what an item is is the kind's, and the task names its columns."""

Finish = Literal["end", "stop", "length"]
"""Why a generated text ends: the model's own end, a stop sequence, or as many tokens as there may be."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """How a text is to be generated.

    max_new_tokens: at most. stop: texts that end it; they are not part of it.
    temperature: 0 takes the likeliest token each time; otherwise tokens are drawn, and the others say from which.
    top_k: from the so many likeliest; 0 from all. top_p: from the likeliest that have this probability together.
    seed: of the draws; with the request's key and part it gives the same text whatever else is computed.
    likeliest: how many of the likeliest tokens are told of at each step, with the likelihood of the chosen one; 0: no
        likelihoods are.
    """

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    likeliest: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """What a task asks of the model once: a forward pass, or with `decoding` a generated text.

    key: the key of the example it belongs to.
    part: its position among the example's requests, from 0.
    input_ids: the tokens of the text, without tuned prompts and without padding.
    targets: pairs (position, token): the log-likelihood wanted is that of `token` right after `input_ids[position]`.
        Empty, and no `decoding`: the class logits of the trained head at the last token are wanted instead.
    asks_greedy: whether it is also asked of each target if it is the token that greedy decoding would choose.
    decoding: how to go on from the tokens; None: not at all.

    The model answers with one float32 tensor: (labels,) class logits, (len(targets),) natural-log likelihoods, or with
    `asks_greedy` (len(targets), 2), likelihoods and 1.0 or 0.0; and with a `Generated` where there is a decoding.
    """

    key: str
    part: int
    input_ids: tuple[int, ...]
    targets: tuple[tuple[int, int], ...] = ()
    asks_greedy: bool = False
    decoding: Decoding | None = None

    @property
    def new_tokens(self) -> int:
        """How many tokens may be generated."""
        return 0 if self.decoding is None else self.decoding.max_new_tokens

    @property
    def positions(self) -> int:
        """How many tokens the model reads at most: those of the text, and of the new ones all but the last."""
        return len(self.input_ids) + max(0, self.new_tokens - 1)


@dataclass(frozen=True, slots=True)
class TokenLikelihoods:
    """How likely a new token was, and the likeliest ones in its place, by the model itself: temperature and what tokens
    are drawn from are not in it.

    log_likelihood: natural log. likeliest: (token, log-likelihood), the likeliest first.
    """

    log_likelihood: float
    likeliest: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Generated:
    """A text that was generated.

    token_ids: the new tokens, in which a stop sequence may end. text: decoded, without the stop sequence.
    likelihoods: of each new token, where the decoding asks for them.
    """

    token_ids: tuple[int, ...]
    text: str
    finish: Finish
    likelihoods: tuple[TokenLikelihoods, ...] = ()


def as_float64(answer: "torch.Tensor | Generated") -> "np.ndarray":
    """Return the numbers of an answer. Raises PetalsEvalError for a text: whoever asked for it has no numbers."""
    if isinstance(answer, Generated):
        raise PetalsEvalError("expected an answer of numbers, found a generated text.")
    numbers: np.ndarray = answer.detach().double().cpu().numpy()
    return numbers


@dataclass(frozen=True, slots=True)
class Example:
    """A row, ready to be computed.

    key: stable within a data set (it is the row's index there, before sampling); the journal's key.
    label: what is right. requests: one or more; their answers together give the prediction. A long document makes its
        own as they are asked for.
    n_tokens: text tokens of all requests, without tuned prompts and padding.
    truncated: whether text was cut to the task's maximum length.
    text: the text as the model reads it.
    row_hash: of what the row says (`petals_eval.data.rows.row_hash`): the same row in another run has the same.
    reference: what `predict` needs of the row besides the answers, such as the right texts or the choices' lengths.
    error: why nothing can be asked for this row: it has no requests then, and a run notes it as a failure.
    cluster: a number for the cluster that the row is of; None where rows depend on no others.
    """

    key: str
    label: Label
    requests: Sequence[Request]
    n_tokens: int
    truncated: bool
    text: str
    row_hash: str = ""
    reference: object = None
    error: ExampleError | None = None
    cluster: float | None = None

    def predicted(
        self, prediction: float | None, values: Sequence[Sequence[float]], generated: Generated | None = None
    ) -> "Prediction":
        """Return what was predicted of this example, as the journal has it."""
        return Prediction(
            key=self.key,
            label=self.label,
            prediction=prediction,
            values=tuple(map(tuple, values)),
            n_tokens=self.n_tokens,
            n_requests=len(self.requests),
            row_hash=self.row_hash,
            text=None if generated is None else generated.text,
            finish=None if generated is None else generated.finish,
        )


@dataclass(frozen=True, slots=True)
class RowText:
    """What a person reads of a row, without what stands around it: no shots, no instruction.

    text: what is asked; the texts of a pair are one a line. answers: the choices, the target, or the right texts.
    row_hash: of what the row says, as `Example.row_hash`.
    """

    text: str
    answers: tuple[str, ...] = ()
    row_hash: str = ""


@dataclass(frozen=True, slots=True)
class Prediction:
    """A scored example, as the journal stores it.

    prediction: the position of the label or choice with the best score, or a number; None for kinds that have none.
    values: float64 numbers from which every metric of the kind is computed, under the task's `columns`.
    text, finish: what was generated, and why it ends.
    """

    key: str
    label: Label
    prediction: float | None
    values: Values
    n_tokens: int
    n_requests: int = 1
    row_hash: str = ""
    text: str | None = None
    finish: Finish | None = None

    @property
    def scores(self) -> tuple[float, ...]:
        """The first column of the values: a classification's scores, the likelihoods of choices."""
        return tuple(item[0] for item in self.values)

    @property
    def probabilities(self) -> tuple[float, ...]:
        """The softmax of the scores."""
        scores = self.scores
        highest = max(scores)
        powers = [math.exp(score - highest) for score in scores]
        total = sum(powers)
        return tuple(power / total for power in powers)
