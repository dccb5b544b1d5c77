"""How often the right one of several answers is the likeliest: as it is, or by the length of each answer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from petals_eval.metrics.answers import Metric
from petals_eval.metrics.estimates import share_of
from petals_eval.metrics.scored_rows import Floats, ScoredRows
from petals_eval.metrics.spec import MetricSpec

__all__ = ["CHOICE_METRICS", "CHOICE_SCORES", "ScoredChoices", "first_highest"]


@dataclass(frozen=True, eq=False)
class ScoredChoices:
    """n rows of which it is known which choice is right.

    labels: int64 (n,), positions among a row's own choices. rows: their values, one item a choice.
    """

    labels: NDArray[np.int64]
    rows: ScoredRows

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def of(cls, rows: ScoredRows, label_names: Sequence[str]) -> "ScoredChoices":
        """Return the labelled ones of rows of the kind "choice"."""
        known = rows.labelled()
        return cls(known.labels.astype(np.int64), known)


def first_highest(scores: Floats, starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the position of each row's highest score among the row's own, the first of equals: int64 (n,).

    scores: (items,), those of a row after those of the one before. starts: (n + 1,), as `ScoredRows` has them; every
    row has an item at least.

    >>> first_highest(np.array([0.1, 0.3, 0.3, -2.0, -1.0]), np.array([0, 3, 5])).tolist()
    [1, 1]
    """
    items = np.diff(starts)
    positions = np.arange(len(scores)) - np.repeat(starts[:-1], items)
    is_highest = scores == np.repeat(np.maximum.reduceat(scores, starts[:-1]), items)
    return np.minimum.reduceat(np.where(is_highest, positions, len(scores)), starts[:-1])


def _is_right(choices: ScoredChoices, score: Callable[[ScoredRows], Floats]) -> NDArray[np.bool_] | None:
    """Return of which rows the right choice has the highest score, (n,); None where a score is not known."""
    scores = score(choices.rows)
    return None if np.isnan(scores).any() else first_highest(scores, choices.rows.starts) == choices.labels


def _terms(name: str, score: Callable[[ScoredRows], Floats]) -> Callable[[ScoredChoices], dict[str, Floats]]:
    def terms(choices: ScoredChoices) -> dict[str, Floats]:
        right = _is_right(choices, score)
        return {} if right is None else {name: right.astype(np.float64)}

    return terms


def _share_of_right(name: str, score: Callable[[ScoredRows], Floats]) -> Callable[[ScoredChoices], list[Metric]]:
    """Return the measure of how often the right choice has the highest score, (items,)."""

    def measure(choices: ScoredChoices) -> list[Metric]:
        is_right = _is_right(choices, score)
        if is_right is None:
            return [Metric(name, None, None, "not every choice has the likelihood that this needs")]
        return [share_of(name, is_right.astype(np.float64), choices.rows.clusters)]

    return measure


def _spec(name: str, title: str, about: str) -> MetricSpec:
    score = CHOICE_SCORES.get(name, lambda rows: rows.column("log_likelihood"))
    return MetricSpec(
        name,
        title,
        about,
        _share_of_right(name, score),
        is_share=True,
        view=ScoredChoices.of,
        terms=_terms(name, score),
        needs_scores=name != "acc",
    )


def _by(column: str) -> Callable[[ScoredRows], Floats]:
    return lambda rows: rows.column("log_likelihood") / rows.column(column)


CHOICE_SCORES: Mapping[str, Callable[[ScoredRows], Floats]] = {
    "acc_norm": _by("characters"),
    "acc_bytes": _by("bytes"),
    "acc_tokens": _by("tokens"),
    "acc_mutual_info": lambda rows: rows.column("log_likelihood") - rows.column("unconditioned"),
}
"""By what the metrics choose that do not go by the log-likelihood alone, (items,)."""

# Those of these names are lm-evaluation-harness 0.4.13's (`ConfigurableTask.process_results`); acc_tokens is our own.
CHOICE_METRICS = (
    _spec("acc", "acc", "share of rows whose right choice is the likeliest"),
    _spec("acc_norm", "acc (per character)", "acc by the log-likelihood over the choice's characters"),
    _spec("acc_bytes", "acc (per byte)", "acc by the log-likelihood over the choice's UTF-8 bytes"),
    _spec("acc_tokens", "acc (per token)", "acc by the log-likelihood over the answer's tokens"),
    _spec(
        "acc_mutual_info",
        "acc (mutual information)",
        "acc by the log-likelihood less that of the answer without context, which is asked for, too",
    ),
)
