"""Resamples of rows, or of whole clusters of rows, shared by all metrics and all sides that are compared.

The bootstrap (Efron, "Bootstrap methods: another look at the jackknife", 1979) draws n rows with replacement and
computes a metric again. A resample is kept as the number of times that each row is in it. Sides that are compared are
computed on the same resamples, which makes the bootstrap of their difference a paired one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from petals_eval.metrics.intervals import RESAMPLES, Floats, row_weights

__all__ = ["Draws", "Resampler", "every_row", "resampled_rows"]

_VALUES_AT_ONCE = 4_000_000  # bounds memory, changes no draw


@dataclass(frozen=True, eq=False)
class Draws:
    """Some resamples of n rows. weights: float64 (n, draws), how often each row is in each of them."""

    weights: Floats
    _computed: dict[object, Any] = field(default_factory=dict, repr=False)

    def first(self, count: int) -> "Draws":
        """Return the first so many of them."""
        return self if count >= self.weights.shape[1] else Draws(self.weights[:, :count])

    def once(self, what: object, compute: Callable[[], Any]) -> Any:
        """Return what `compute` gives, computed once for all that ask for the same thing of these resamples."""
        if what not in self._computed:
            self._computed[what] = compute()
        return self._computed[what]

    def sums(self, terms: Floats) -> Floats:
        """Return (draws,) sums of terms (n,), or (draws, m) of (n, m)."""
        return self.weights.T @ terms

    def means(self, terms: Floats) -> Floats:
        """Return (draws,) means of those terms (n,) that are not NaN; NaN where there are none."""
        known = ~np.isnan(terms)
        if known.all():
            return self.sums(terms) / self.once("rows", lambda: self.weights.sum(axis=0))
        counts = self.sums(known.astype(np.float64))
        sums = self.sums(np.where(known, terms, 0.0))
        return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)

    def each(self, compute: Callable[[Floats], float]) -> Floats:
        """Return (draws,) of what is computed from the weights (n,) of one resample."""
        return np.array([compute(np.ascontiguousarray(weights)) for weights in self.weights.T])


Resampler = Callable[[Draws], dict[str, Floats]]
"""Gives metrics by name, (draws,) each, NaN where a metric is not defined."""


def every_row(n: int) -> Draws:
    """Return the n rows themselves, each drawn once."""
    return Draws(np.ones((n, 1)))


def resampled_rows(n: int, seed: int, clusters: NDArray[np.int64] | None = None) -> Iterator[Draws]:
    """Yield `RESAMPLES` resamples of n rows, some at a time.

    clusters: int64 (n,), from 0: whole clusters are drawn, as many as there are: their rows may depend on each other.
    """
    drawn = n if clusters is None else int(clusters.max()) + 1
    at_once = max(1, _VALUES_AT_ONCE // n)
    every = row_weights(drawn, RESAMPLES, seed)
    for start in range(0, RESAMPLES, at_once):
        weights = np.empty((n, min(at_once, RESAMPLES - start)))
        for column in range(weights.shape[1]):
            counts = next(every)
            weights[:, column] = counts if clusters is None else counts[clusters]
        yield Draws(weights)
