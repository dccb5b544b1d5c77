"""What metrics are computed from, and what a metric is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from petals_eval.errors import DataError
from petals_eval.metrics.intervals import Floats, Tallies
from petals_eval.metrics.resampling import Draws
from petals_eval.metrics.scored_rows import ScoredRows

__all__ = ["Answers", "Metric", "Spread"]

# Probabilities come from a float32 softmax: their sum is 1 to about 1e-6. Beyond this it is not rounding any more.
SUM_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Spread:
    """A number measured several times, such as with several draws of shots: all of its values, in their order."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def standard_deviation(self) -> float:
        """That of a sample: divided by one less than there are values; 0 of one value."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else 0.0

    def to_json(self) -> dict[str, object]:
        """
        >>> Spread((0.5, 0.75)).to_json()
        {'min': 0.5, 'max': 0.75, 'standard_deviation': 0.1767766952966369, 'values': [0.5, 0.75]}
        """
        return {
            "min": min(self.values),
            "max": max(self.values),
            "standard_deviation": self.standard_deviation,
            "values": list(self.values),
        }


@dataclass(frozen=True, slots=True)
class Metric:
    """One number and how sure it is.

    value: None where the metric is not defined on these examples; `note` says why.
    ci95: (low, high) 95% interval, None where there is none.
    note: what a reader must know about this number.
    draws: of a mean over several draws of shots, the values that it is the mean of.
    is_rough: whether the interval may cover less than 95%, for it rests on few rows or few errors.
    """

    name: str
    value: float | None
    ci95: tuple[float, float] | None = None
    note: str | None = None
    draws: Spread | None = None
    is_rough: bool = False

    def to_json(self) -> dict[str, object]:
        """Return `{"value", "ci95"}`, and "is_rough", "note" and "draws" where there are any."""
        entry: dict[str, object] = {"value": self.value, "ci95": None if self.ci95 is None else list(self.ci95)}
        if self.is_rough:
            entry["is_rough"] = True
        if self.note is not None:
            entry["note"] = self.note
        if self.draws is not None:
            entry["draws"] = self.draws.to_json()
        return entry


@dataclass(frozen=True, eq=False)
class Answers:
    """Checked arrays, one row an example that was scored.

    labels, predictions: int64 (n,), indices into `label_names`.
    probabilities: float64 (n, labels), rows sum to 1.
    clusters: int64 (n,), from 0, of rows that may depend on each other; None: of none.
    """

    labels: NDArray[np.int64]
    predictions: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    label_names: tuple[str, ...]
    clusters: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def n_labels(self) -> int:
        return len(self.label_names)

    @cached_property
    def counts(self) -> Floats:
        """The confusion matrix, (labels, labels); row = label."""
        cells = np.bincount(self.labels * self.n_labels + self.predictions, minlength=self.n_labels**2)
        return cells.reshape(self.n_labels, self.n_labels).astype(np.float64)

    def tallies(self, draws: Draws) -> Tallies:
        """Return the tallies of resamples of these rows."""
        found: Tallies = draws.once(self, lambda: self._weighted(draws.weights))
        return found

    @cached_property
    def _weighted(self) -> Callable[[Floats], Tallies]:
        return Tallies.weighted(self.labels, self.predictions, self.n_labels)

    @classmethod
    def of(cls, rows: ScoredRows, label_names: Sequence[str]) -> "Answers":
        """Return the labelled ones of rows whose first column is a score for each label; probabilities: the softmax of
        these. Raises DataError where rows have scores for another number of labels."""
        known = rows.labelled()
        odd = known.items != len(label_names)
        if odd.any():
            row = int(np.argmax(odd))
            raise DataError(
                f"Metrics need a score for each of the {len(label_names)} labels ({', '.join(label_names)}); row {row} "
                f"has {known.items[row]}."
            )
        scores = known.values[:, 0].reshape(len(known), len(label_names))
        powers = np.exp(scores - scores.max(axis=1, keepdims=True)) if len(known) else scores
        powers /= powers.sum(axis=1, keepdims=True)
        labels, predictions = known.labels.astype(np.int64), scores.argmax(axis=1)
        return cls.checked(labels, predictions, powers, label_names, known.clusters)

    @classmethod
    def checked(
        cls,
        labels: ArrayLike,
        predictions: ArrayLike,
        probabilities: ArrayLike,
        label_names: Sequence[str],
        clusters: NDArray[np.int64] | None = None,
    ) -> "Answers":
        """Check shapes and ranges once, so that no metric has to. Rows are divided by their sum in float64.

        Raises DataError.
        """
        names = tuple(label_names)
        if len(names) < 2:
            raise DataError(f"Metrics need at least two label names; found {len(names)}. Name every label of the task.")
        truth = _indices("labels", labels, names)
        predicted = _indices("predictions", predictions, names)
        shares = np.asarray(probabilities, dtype=np.float64)
        if len(truth) == 0:
            shares = shares.reshape(0, len(names))
        if len(predicted) != len(truth) or shares.shape != (len(truth), len(names)):
            raise DataError(
                f"Metrics need one prediction and {len(names)} probabilities for each of the {len(truth)} labels; "
                f"found predictions of shape {predicted.shape} and probabilities of shape {shares.shape}."
            )
        sums = shares.sum(axis=1, keepdims=True)
        wrong = ~(np.isfinite(shares).all(axis=1) & (shares >= 0).all(axis=1) & (abs(sums[:, 0] - 1) <= SUM_TOLERANCE))
        if wrong.any():
            row = int(np.argmax(wrong))
            raise DataError(
                f"Metrics need probabilities of 0 or more that sum to 1; row {row} holds {shares[row].tolist()}."
            )
        return cls(truth, predicted, shares / sums, names, clusters)


def _indices(what: str, values: ArrayLike, names: tuple[str, ...]) -> NDArray[np.int64]:
    given = np.asarray(values)
    if given.size == 0:
        return np.zeros(0, dtype=np.int64)
    if given.ndim != 1 or not np.issubdtype(given.dtype, np.integer):
        raise DataError(f"Metrics need {what} as integers of shape (n,); found {given.dtype} of shape {given.shape}.")
    outside = (given < 0) | (given >= len(names))
    if outside.any():
        row = int(np.argmax(outside))
        raise DataError(
            f"Metrics need {what} between 0 and {len(names) - 1} ({', '.join(names)}); row {row} holds {given[row]}."
        )
    return given.astype(np.int64)
