"""Perplexities of documents: by token, by word and by byte, weighted as lm-evaluation-harness weights them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from petals_eval.metrics.answers import Metric
from petals_eval.metrics.estimates import ratio_of
from petals_eval.metrics.intervals import Floats
from petals_eval.metrics.resampling import Draws, Resampler
from petals_eval.metrics.scored_rows import ScoredRows

__all__ = ["Documents", "bits_per_unit", "nats_per_unit", "perplexity", "perplexity_per"]

Unit = Literal["tokens", "words", "bytes"]


def nats_per_unit(log_likelihoods: ArrayLike, units: ArrayLike) -> float:
    """Return minus the sum of natural-log likelihoods (n,) over the sum of units (n,): long documents weigh more.

    >>> nats_per_unit([-6.0, -3.0], [2, 1])
    3.0
    """
    return float(-np.sum(np.asarray(log_likelihoods, np.float64)) / np.sum(np.asarray(units, np.float64)))


def perplexity(log_likelihoods: ArrayLike, units: ArrayLike) -> float:
    """Return e to the power of `nats_per_unit`; infinity where no float64 holds it.

    >>> round(perplexity([-6.0, -3.0], [2, 1]), 4)
    20.0855
    """
    return _exp(nats_per_unit(log_likelihoods, units))


def bits_per_unit(log_likelihoods: ArrayLike, units: ArrayLike) -> float:
    """Return `nats_per_unit` in bits.

    >>> round(bits_per_unit([-6.0, -3.0], [2, 1]), 4)
    4.3281
    """
    return nats_per_unit(log_likelihoods, units) / math.log(2)


@dataclass(frozen=True, eq=False)
class Documents:
    """Scored documents.

    log_likelihoods: (n,) natural-log, of whole documents. units: (n,) of each unit, how many it has.
    clusters: int64 (n,), of documents that may depend on each other; None: of none.
    """

    log_likelihoods: Floats
    units: dict[Unit, Floats]
    clusters: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.log_likelihoods)

    @classmethod
    def of(cls, rows: ScoredRows, label_names: Sequence[str]) -> "Documents":
        """Read rows of one item. Raises DataError where there are no such columns."""
        return cls(
            rows.column("log_likelihood"),
            {"tokens": rows.column("tokens"), "words": rows.column("words"), "bytes": rows.column("bytes")},
            rows.clusters,
        )


def measured(name: str, unit: Unit, *, in_bits: bool = False) -> Callable[[Documents], list[Metric]]:
    """Return what measures the perplexity by a unit, or the bits."""
    return partial(_measure, name, unit, (lambda nats: nats / math.log(2)) if in_bits else _exp)


def on_draws(name: str, unit: Unit, *, in_bits: bool = False) -> Callable[[Documents], Resampler]:
    """Return the resampler of the perplexity by a unit, or of the bits."""
    return lambda documents: perplexity_on_draws(
        name, documents.log_likelihoods, documents.units[unit], in_bits=in_bits
    )


def perplexity_on_draws(name: str, log_likelihoods: Floats, units: Floats, *, in_bits: bool = False) -> Resampler:
    """Return the resampler of the perplexity of texts by any unit, as `perplexity_per`; or of the bits."""
    columns = np.column_stack([log_likelihoods, units])

    def resampler(draws: Draws) -> dict[str, Floats]:
        sums = draws.sums(columns)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            nats = -sums[:, 0] / sums[:, 1]
            found = nats / math.log(2) if in_bits else np.exp(nats)
        return {name: np.where(np.isfinite(found), found, np.nan)}

    return resampler


def perplexity_per(
    name: str, log_likelihoods: Floats, units: Floats, clusters: NDArray[np.int64] | None = None
) -> list[Metric]:
    """Measure the perplexity of texts by any unit. log_likelihoods: (n,), natural. units: (n,), how many each has."""
    return _measure(name, "tokens", _exp, Documents(log_likelihoods, {"tokens": units}, clusters))


def _measure(name: str, unit: Unit, of_nats: Callable[[float], float], documents: Documents) -> list[Metric]:
    units = documents.units[unit]
    if not units.sum() > 0:
        return [Metric(name, None, None, f"the documents have no {unit}")]
    nats = nats_per_unit(documents.log_likelihoods, units)
    if not math.isfinite(of_nats(nats)):
        return [Metric(name, None, None, f"e to the power of {nats:.0f}, more than a number holds")]
    # The interval is found in nats: their sums are what rows add to, and their order is that of the values.
    found = ratio_of(name, -documents.log_likelihoods, units, documents.clusters, back=of_nats)
    if found.ci95 is not None and not math.isfinite(found.ci95[1]):
        return [replace(found, ci95=None, is_rough=False, note="no interval: it reaches more than a number holds")]
    return [found]


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
