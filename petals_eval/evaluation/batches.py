"""The batches of a PyTorch program's own evaluation loop, over the swarm: a plain dict of numbers comes back."""

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from petals_eval.config import Positive, Settings
from petals_eval.data.batches import BatchRow, read_batches
from petals_eval.errors import AdapterError, ConfigError, DataError, ExampleError, NotFiniteError
from petals_eval.evaluation.evaluate import check_progress, display_of, is_remote_model
from petals_eval.evaluation.scoring import Progress
from petals_eval.tasks.requests import Request, as_float64
from petals_eval.validation import closest, shorten

if TYPE_CHECKING:
    import torch

    from petals_eval.model import Adapter
    from petals_eval.remote_model import RemoteModel, RequestAnswer

__all__ = ["evaluate_batches"]

_log = logging.getLogger("petals_eval")


class _Values(Settings):
    """The arguments of `evaluate_batches` that are plain values."""

    average: Literal["macro", "micro", "weighted", "binary"]
    adapter: str | None
    limit_batches: Positive | None
    tokens_per_micro_batch: Positive | None


def evaluate_batches(
    model: "RemoteModel | torch.nn.Module",
    loader: Iterable[Any],
    *,
    average: Literal["macro", "micro", "weighted", "binary"] = "macro",
    adapter: str | None = None,
    limit_batches: int | None = None,
    tokens_per_micro_batch: int | None = None,
    progress: Progress | bool | None = None,
) -> dict[str, float]:
    """Evaluate a model on the batches that a PyTorch evaluation loop has.

        petals_eval.evaluate_batches(model, DataLoader(rows, batch_size=32, collate_fn=collator))

    model: a RemoteModel, or a Petals model as it lives in a training loop, as for `petals_eval.evaluate`.
    loader: an iterable of mappings with `input_ids`, `attention_mask` (unless nothing is padded) and `labels`, as
        tensors, arrays or lists, padded on either side (`petals_eval.data.batches.read_batches` has the rules).
        Its batches are not sent as they are: rows of similar length travel together, without their padding.
    average: of F1 over the classes, as scikit-learn has it.
    adapter: the name of one of the model's adapters; None: the first one, or the model as it is where there are none.
    limit_batches: of the loader, from its beginning; None: all.
    progress: told how far it is, as by `petals_eval.evaluate`.

    Returns, for `labels` (batch,) of classes, which the trained head decides: "accuracy", "f1" and "n", how many rows
    were scored. For `labels` (batch, seq) of tokens, which the word head scores: "loss", the mean of -ln p(token) over
    all tokens scored in all batches, "perplexity", its exponential, and "n_tokens". The label at a position is held
    against what the model predicts at the position before, as in Hugging Face's models. Positions of tuned prompts are
    never scored; nor is a text's first token, before which there is no text.

    The model is in the mode it was in before, and torch's random generator stands where it stood, when this returns or
    raises. It needs about 12 bytes of memory a token, for what was computed by a server that turns out to be wrong, or
    to answer differently each time, is computed again elsewhere.

    Raises DataError for batches that cannot be meant (padding between tokens, labels of another shape, tokens or
    classes that the model does not have), naming batch and row; ConfigError, AdapterError, ModelError;
    RequestTooLargeError and NotFiniteError for a row that cannot be computed; SwarmError when the swarm cannot.
    """
    import torch

    chosen = _Values(
        average=average, adapter=adapter, limit_batches=limit_batches, tokens_per_micro_batch=tokens_per_micro_batch
    )
    check_progress(progress)
    if not isinstance(loader, Iterable):
        raise ConfigError(
            f"loader: expected an iterable of batches, such as a torch DataLoader, found {type(loader).__name__}"
        )
    # A DataLoader draws from torch's generator as soon as its iterator is made, and a training around this goes on.
    with torch.random.fork_rng(devices=[]), _opened(model) as remote, display_of(progress, None) as told:
        run = _Run(remote, _adapter(remote, adapter), tokens_per_micro_batch, told)
        rows = read_batches(islice(loader, chosen.limit_batches), remote.local.embeddings.weight.shape[0])
        first = next(rows, None)
        if first is None:
            raise DataError(
                "expected batches with labels to score, found none: an empty loader, or labels of -100 alone."
            )
        if first.label is None:
            return _token_metrics(run.tokens(chain([first], rows)))
        return _class_metrics(run.classes(chain([first], rows), chosen.average), chosen.average)


@contextlib.contextmanager
def _opened(model: Any) -> "Iterator[RemoteModel]":
    if is_remote_model(model):
        yield model
        return
    from petals_eval import live_model

    with live_model.opened(model) as remote:
        yield remote


def _adapter(model: "RemoteModel", name: str | None) -> "Adapter | None":
    if name is None:
        return model.adapters[0] if model.adapters else None
    names = [adapter.name for adapter in model.adapters]
    if name not in names:
        known = f"one of {', '.join(names)}" if names else "none, for this model has no adapters"
        raise ConfigError(f"adapter: expected {known}, found {name!r}.{closest(name, names)}")
    return model.adapters[names.index(name)]


@dataclass(frozen=True, slots=True, eq=False)
class _Answered:
    """A row with what came of it: the class predicted, or the sum of its tokens' log-likelihoods. peers: who computed
    it."""

    row: BatchRow
    value: float
    peers: frozenset[str]


class _Run:
    """One call of `evaluate_batches`."""

    def __init__(
        self,
        model: "RemoteModel",
        adapter: "Adapter | None",
        tokens_per_micro_batch: int | None,
        progress: Progress | None,
    ):
        self._model = model
        self._adapter = adapter
        self._tokens_per_micro_batch = tokens_per_micro_batch
        self._progress = progress
        self._done: list[_Answered] = []
        self._retries_before = model.blocks.status().retries
        self._said: set[str] = set()

    def classes(self, rows: Iterable[BatchRow], average: str) -> list[_Answered]:
        """Return each row with the class that the trained head gives the highest score, the first of equals."""
        local = self._model.local
        local.check_head("class", self._adapter)
        outputs = local.class_outputs(self._adapter)
        if outputs is not None:
            _check_outputs(outputs, average)

        def checked() -> Iterator[BatchRow]:
            for row in rows:
                _check_class(row, outputs)
                yield row

        def predicted(row: BatchRow, scores: Any) -> float:
            _check_outputs(len(scores), average)
            _check_class(row, len(scores))
            return float(scores.argmax())

        return self._answers(checked(), predicted)

    def tokens(self, rows: Iterable[BatchRow]) -> list[_Answered]:
        """Return each row with the sum of the log-likelihoods of its tokens."""
        self._model.local.check_head("lm", self._adapter)
        return self._answers(rows, lambda row, scores: math.fsum(scores.tolist()))

    def _answers(self, rows: Iterable[BatchRow], value: Any) -> list[_Answered]:
        """Answer the rows, and again those that a server had computed which was caught meanwhile."""
        waiting = rows
        while True:
            self._compute(waiting, value)
            self._model.blocks.settle(on_tick=self._tick)
            findings = self._model.blocks.status().findings
            caught = {each.server.peer_id for each in findings if not each.is_used}
            again = [each.row for each in self._done if not caught.isdisjoint(each.peers)]
            if not again:
                return self._done
            self._done = [each for each in self._done if caught.isdisjoint(each.peers)]
            waiting = again

    def _compute(self, rows: Iterable[BatchRow], value: Any) -> None:
        asked: dict[str, BatchRow] = {}
        prefix = 0 if self._adapter is None else self._adapter.prefix_length

        def requests() -> Iterator[Request]:
            for number, row in enumerate(rows):
                targets = tuple((position, token) for position, token in row.targets.tolist())
                request = Request(str(number), 0, tuple(row.input_ids.tolist()), targets)
                try:
                    self._model.local.check_request(request, prefix)
                except ExampleError as error:
                    _raise_with_place(row, error)
                asked[request.key] = row
                yield request

        def failed(request: Request, error: ExampleError) -> None:
            _raise_with_place(asked[request.key], error)

        answers = self._model.compute(
            requests(),
            self._adapter,
            tokens_per_micro_batch=self._tokens_per_micro_batch,
            on_tick=self._tick,
            on_failed=failed,
        )
        # Closed by name: while somebody keeps an exception from in here, what is in flight would go on.
        with contextlib.closing(answers):
            for answer in answers:
                row = asked.pop(answer.request.key)
                scores = _finite(row, answer)
                peers = frozenset(hop.peer_id for hop in answer.hops)
                self._done.append(_Answered(row, value(row, scores), peers))

    def _tick(self) -> None:
        status = self._model.blocks.status()
        for notice in status.notices:
            if notice not in self._said:
                self._said.add(notice)
                self._say(notice)
        if self._progress is None:
            return
        if status.waiting is not None:
            self._progress.waiting(f"waiting for the swarm: {status.waiting}")
        else:
            self._progress.update(len(self._done), status.retries - self._retries_before, len(status.servers))

    def _say(self, line: str) -> None:
        if self._progress is None:
            _log.warning(line)
        else:
            self._progress.update(len(self._done), message=line)


def _finite(row: BatchRow, answer: "RequestAnswer") -> Any:
    """Return the numbers of an answer in float64. Raises NotFiniteError, which names the row."""
    import numpy as np

    scores = as_float64(answer.answer)
    if not np.isfinite(scores).all():
        raise NotFiniteError(
            f"{row.place}: expected finite scores, found {shorten(scores.tolist())}. The local norm or head "
            'overflowed, or its weights are damaged: try dtype="float32", and check the adapter and the model.'
        )
    return scores


def _raise_with_place(row: BatchRow, error: ExampleError) -> NoReturn:
    raise type(error)(f"{row.place}: {error}") from error


def _check_outputs(outputs: int, average: str) -> None:
    if outputs == 1:
        raise AdapterError(
            "the head gives one number, as one for regression does, and labels of shape (batch,) are classes. Use the "
            "adapter that was trained for them, or petals_eval.evaluate with a task of kind: regression."
        )
    if average == "binary" and outputs != 2:
        raise ConfigError(
            f"average: binary is for two classes, and the head gives {outputs}; expected macro, micro or weighted"
        )


def _check_class(row: BatchRow, outputs: int | None) -> None:
    label = -1 if row.label is None else row.label
    if label < 0 or (outputs is not None and label >= outputs):
        last = "the head's last output" if outputs is None else str(outputs - 1)
        raise DataError(
            f"{row.place}: the label is {label}; expected a class from 0 to {last}, or -100 where nothing is scored."
        )


def _class_metrics(answered: list[_Answered], average: str) -> dict[str, float]:
    import numpy as np

    from petals_eval.metrics import accuracy, precision_recall_f1

    labels = np.array([each.row.label for each in answered], dtype=np.int64)
    predictions = np.array([each.value for each in answered], dtype=np.int64)
    f1 = precision_recall_f1(labels, predictions, average)[2]
    return {"accuracy": accuracy(labels, predictions), "f1": f1, "n": len(answered)}


def _token_metrics(answered: list[_Answered]) -> dict[str, float]:
    n_tokens = sum(len(each.row.targets) for each in answered)
    loss = -math.fsum(each.value for each in answered) / n_tokens
    try:
        perplexity = math.exp(loss)
    except OverflowError:
        perplexity = math.inf
    return {"loss": loss, "perplexity": perplexity, "n_tokens": n_tokens}
