"""What rounding may do to predictions: how far margins move when rows are computed again, and what would come of that.

A margin is how much the best answer of a row is ahead of the runner-up. Where it moves by d, without preference for a
side, and f is the density of margins at 0, a share f E|d| / 2 of all predictions goes to the runner-up. A row is called
unsure where its margin is below the noise, `FACTOR` times the mean of |d|: that is a share f `FACTOR` E|d|, two and a
half times as many as are to be expected to change, so that chance brings more in 1 of 20 runs at most, and hardly ever
fewer than a fifth of them. The largest |d| of a sample, which grows with its size, gives 6 to 20 times as many
(`scripts/noise_coverage.py` counts).
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from petals_eval.metrics.choices import CHOICE_SCORES, first_highest
from petals_eval.metrics.registry import measure
from petals_eval.metrics.scored_rows import Floats, ScoredRows

__all__ = ["FACTOR", "MARGIN", "changes", "margins", "noise_ranges", "numbers_of"]

FACTOR = 1.25
MARGIN = "margin"
"""The number by which a prediction is chosen; other numbers are called by the metric that chooses by them."""

Number = Callable[[ScoredRows], Floats]


def _first_column(rows: ScoredRows) -> Floats:
    return rows.values[:, 0]


def numbers_of(kind: str, metrics: Sequence[str]) -> Mapping[str, Number]:
    """Return the numbers of a kind of task that are compared, each (items,), by name; none of generated texts.

    Where one of several answers is chosen these are the scores that it is chosen by (`MARGIN`, and the metrics of
    choices that choose otherwise); of a regression the prediction; of documents and continuations the log-likelihood.

    >>> list(numbers_of("choice", ["acc", "acc_norm"])), list(numbers_of("perplexity", []))
    (['margin', 'acc_norm'], ['log_likelihood'])
    """
    if kind in ("classification", "choice"):
        others = {name: CHOICE_SCORES[name] for name in metrics if kind == "choice" and name in CHOICE_SCORES}
        return {MARGIN: _first_column, **others}
    alone = {"regression": "prediction", "continuation": "log_likelihood", "perplexity": "log_likelihood"}
    return {alone[kind]: _first_column} if kind in alone else {}


def margins(scores: Floats, starts: NDArray[np.int64], best: NDArray[np.int64] | None = None) -> Floats:
    """Return how much each row's best answer is ahead of all of its others, (n,); infinity where there are none.

    scores: (items,), starts: (n + 1,), as `ScoredRows` has them. best: (n,) which of a row's answers is meant; None:
    the one with the highest score, the first of equals.

    >>> margins(np.array([0.25, 1.0, 0.5, -2.0]), np.array([0, 3, 4])).tolist()
    [0.5, inf]
    """
    best = first_highest(scores, starts) if best is None else best
    return scores[starts[:-1] + best] - np.maximum.reduceat(_without(scores, starts, best), starts[:-1])


def _without(scores: Floats, starts: NDArray[np.int64], best: NDArray[np.int64]) -> Floats:
    rest = scores.copy()
    rest[starts[:-1] + best] = -np.inf
    return rest


def changes(number: str, before: Floats, after: Floats, starts: NDArray[np.int64]) -> Floats:
    """Return by how much a number of each row moved, (n,), float64 of 0 or more.

    number: its name (`numbers_of`); before, after: (items,) in the same order. Of scores it is the margin of the answer
    that was the best one before.
    """
    if number == MARGIN or number in CHOICE_SCORES:
        best = first_highest(before, starts)
        before, after = margins(before, starts, best), margins(after, starts, best)
    moved: Floats = np.abs(after - before)
    return moved[np.isfinite(moved)]


def noise_ranges(
    kind: str,
    rows: ScoredRows,
    noise: Mapping[str, float],
    metrics: Sequence[str],
    label_names: Sequence[str],
    values: Mapping[str, float],
) -> tuple[NDArray[np.bool_], dict[str, tuple[float, float]]]:
    """Return which rows are unsure, (n,), and between which values each metric lies if they go to their runner-up.

    noise: of each number (`numbers_of`), in its unit. values: of the metrics, by name, as the rows have them now.
    The range spans what comes of it if only those rows change that are right now, only those that the change makes
    right, and all. A metric of choices that goes by a number of its own is counted by that one.
    Raises as `measure` does.
    """
    scores, starts = _first_column(rows), rows.starts
    unsure = margins(scores, starts) < noise[MARGIN]
    found = {name: [value] for name, value in values.items() if name not in CHOICE_SCORES or name in noise}
    best = first_highest(scores, starts)
    second = first_highest(_without(scores, starts, best), starts)
    by_scores = [name for name in metrics if name not in CHOICE_SCORES]
    for changed in (unsure & (best == rows.labels), unsure & (second == rows.labels), unsure):
        if changed.any() and by_scores:
            told = measure(kind, by_scores, _exchanged(rows, changed, best, second), label_names=label_names)
            for name, metric in told.items():
                if name in found and metric.value is not None:
                    found[name].append(metric.value)
    for name in noise.keys() & found.keys():
        found[name] += _shares(rows.labelled(), CHOICE_SCORES[name], noise[name])
    return unsure, {name: (min(each), max(each)) for name, each in found.items()}


def _exchanged(
    rows: ScoredRows, changed: NDArray[np.bool_], best: NDArray[np.int64], second: NDArray[np.int64]
) -> ScoredRows:
    """Return rows in which the two best answers of some have exchanged their scores."""
    values, predictions = rows.values.copy(), rows.predictions.copy()
    at = rows.starts[:-1][changed]
    first, runner_up = at + best[changed], at + second[changed]
    values[first, 0], values[runner_up, 0] = rows.values[runner_up, 0], rows.values[first, 0]
    predictions[changed] = second[changed]
    return ScoredRows(rows.labels, predictions, values, rows.starts, rows.columns)


def _shares(rows: ScoredRows, number: Number, noise: float) -> list[float]:
    """Return the least and the greatest share of right choices by a number that moves by so much."""
    scores, starts = number(rows), rows.starts
    best = first_highest(scores, starts)
    second = first_highest(_without(scores, starts, best), starts)
    unsure = margins(scores, starts) < noise
    right = best == rows.labels
    return [float((right & ~unsure).mean()), float((right | (unsure & (second == rows.labels))).mean())]
