"""How wrong each row is, and how sure the model was of it: what an analysis of errors is made of, whatever the kind."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from petals_eval.metrics.choices import first_highest
from petals_eval.metrics.scored_rows import CLUSTER, Floats, ScoredRows

__all__ = ["LOSSES", "JudgedRows", "judged", "ordered"]

_COUNTS = ("new_tokens", "stopped_by_length", CLUSTER)  # of generated texts: not what they are worth

LOSSES = {
    "classification": "-ln p of the right label",
    "choice": "-ln p of the right choice",
    "continuation": "-ln p of the target",
    "perplexity": "nats a token",
    "regression": "absolute error",
    "generation": "1 - score",
}
"""What the loss of a row is, by kind of task."""


@dataclass(frozen=True, eq=False)
class JudgedRows:
    """n rows, float64 (n,) each; NaN where something is not known, or the kind does not have it.

    is_wrong: 1 or 0. loss: `LOSSES`, the higher the worse. labels, predictions: positions, or numbers of a regression.
    confidence: probability of the prediction. of_label: that of the right answer.
    margin: by how much the most probable answer is above the next one. runner_up: the position of that one.
    errors: prediction minus label, of a regression.
    """

    is_wrong: Floats
    loss: Floats
    labels: Floats
    predictions: Floats
    confidence: Floats
    of_label: Floats
    margin: Floats
    runner_up: Floats
    errors: Floats

    def __len__(self) -> int:
        return len(self.loss)


def judged(kind: str, rows: ScoredRows) -> JudgedRows:
    """Judge rows of a kind of task. Raises DataError for rows that have not its columns.

    Of choices it is the sum of the log-likelihoods that counts, as for `acc`; of generated texts the first metric that
    compares them says which are wrong, and the mean of all that do is the score. What corpora are scored by is none.
    """
    if kind in ("classification", "choice"):
        return _of_scores(rows)
    nothing = np.full(len(rows), np.nan)
    found = dict.fromkeys(JudgedRows.__dataclass_fields__, nothing)
    found |= {"labels": rows.labels, "predictions": rows.predictions}
    if kind == "regression":
        found["errors"] = rows.predictions - rows.labels
        found["loss"] = np.abs(found["errors"])
    elif kind == "continuation":
        found["loss"] = -rows.column("log_likelihood")
        found["of_label"] = np.exp(rows.column("log_likelihood"))
        found["is_wrong"] = 1 - rows.column("is_greedy")
    elif kind == "perplexity":
        found["loss"] = -rows.column("log_likelihood") / rows.column("tokens")
    else:
        compared = [name for name in rows.columns if name not in _COUNTS and "/" not in name]
        if compared:
            scores = np.stack([rows.column(name) for name in compared])
            found["loss"] = 1 - scores.mean(axis=0)
            found["is_wrong"] = np.where(np.isnan(scores[0]), np.nan, scores[0] < 1)
    return JudgedRows(**found)


def _of_scores(rows: ScoredRows) -> JudgedRows:
    scores, starts, items = rows.values[:, 0], rows.starts[:-1], rows.items
    if len(rows) == 0:
        return JudgedRows(*[np.zeros(0)] * len(JudgedRows.__dataclass_fields__))
    best = first_highest(scores, rows.starts)
    powers = np.exp(scores - np.repeat(np.maximum.reduceat(scores, starts), items))
    shares = powers / np.repeat(np.add.reduceat(powers, starts), items)
    others = scores.copy()
    others[starts + best] = -np.inf
    second = first_highest(others, rows.starts)
    is_known = rows.is_labelled
    of_label = np.full(len(rows), np.nan)
    places = starts[is_known] + rows.labels[is_known].astype(np.int64)
    of_label[is_known] = shares[places]
    loss = np.full(len(rows), np.nan)
    # Not of the share, which may be 0 where the logarithm still is a number.
    highest = np.maximum.reduceat(scores, starts)[is_known]
    loss[is_known] = np.log(np.add.reduceat(powers, starts)[is_known]) + highest - scores[places]
    confidence, next_one = shares[starts + best], shares[starts + second]
    return JudgedRows(
        is_wrong=np.where(is_known, (best != rows.labels).astype(np.float64), np.nan),
        loss=loss,
        labels=rows.labels,
        predictions=best.astype(np.float64),
        confidence=confidence,
        of_label=of_label,
        margin=confidence - next_one,
        runner_up=second.astype(np.float64),
        errors=np.full(len(rows), np.nan),
    )


def ordered(values: Floats, among: NDArray[np.bool_], *, highest: bool, most: int | None = None) -> Sequence[int]:
    """Return the positions of the highest or the lowest of the values that are `among` them and known.

    Of equal ones the first comes first.

    >>> ordered(np.array([0.5, 0.9, np.nan, 0.9]), np.ones(4, dtype=bool), highest=True, most=2)
    [1, 3]
    """
    chosen = np.flatnonzero(among & ~np.isnan(values))
    keys = -values[chosen] if highest else values[chosen]
    return [int(each) for each in chosen[np.argsort(keys, kind="stable")][:most]]
