"""What crosses the doors of the task room: examples and requests on the way out, predictions on the way back."""

from dataclasses import dataclass

__all__ = ["Example", "Prediction", "Request"]


@dataclass(frozen=True, slots=True)
class Request:
    """One forward pass that a task asks of the model.

    key: the key of the example it belongs to.
    part: its position among the example's requests, from 0.
    input_ids: the tokens of the text, without tuned prompts and without padding.
    targets: pairs (position, token): the log-likelihood wanted is that of `token` right after `input_ids[position]`.
        Empty: the class logits of the trained head at the last token are wanted instead.

    The model answers with one float32 tensor: (labels,) class logits, or (len(targets),) natural-log likelihoods.
    """

    key: str
    part: int
    input_ids: tuple[int, ...]
    targets: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Example:
    """A labelled row, ready to be computed.

    key: stable within a data set (it is the row's index there, before sampling); the journal's key.
    label: index into the task's label names.
    requests: one or more; their answers together give the prediction.
    n_tokens: text tokens of all requests, without tuned prompts and padding.
    truncated: whether text was cut to the task's maximum length.
    text: the text as the model reads it.
    """

    key: str
    label: int
    requests: tuple[Request, ...]
    n_tokens: int
    truncated: bool
    text: str


@dataclass(frozen=True, slots=True)
class Prediction:
    """A scored example, as the journal stores it.

    scores: (labels,) what the model gave, logits or natural-log likelihoods.
    probabilities: (labels,) their softmax.
    """

    key: str
    label: int
    prediction: int
    scores: tuple[float, ...]
    probabilities: tuple[float, ...]
    n_tokens: int
