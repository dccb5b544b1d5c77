"""Hold every interval that is printed against a simulation, and print the tables of petals_eval/guides/formulae.md.

    scripts/interval_coverage.py [--sets 10000] [--seed 1] > tables.md

Each line is so many data sets that are drawn from one known population (a tenth of them for ROC AUC, numbers,
documents and clusters). It says how many of their 95% intervals hold the number that the metric has there, and in
brackets in which share of the sets an interval is printed, where that is not always so. "~" stands where most are
marked as rough. It takes about half an hour of one processor. The seed is that of all draws.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from petals_eval.metrics.accuracy import balanced_accuracies
from petals_eval.metrics.answers import Answers, Metric
from petals_eval.metrics.correlation import resampled_mcc
from petals_eval.metrics.estimates import FEW_OF_ALL, are_extreme, share_of
from petals_eval.metrics.fscores import FEW_OF_LABEL, FEWEST_ROWS, resampled_average
from petals_eval.metrics.intervals import Floats, Tallies, wilson
from petals_eval.metrics.probabilistic import FEW_ERRORS
from petals_eval.metrics.ranking import measure_roc_auc, roc_auc
from petals_eval.metrics.registry import measure
from petals_eval.metrics.scored_rows import ScoredRows
from petals_eval.metrics.skewness import Bounds, cells_influences, fewest_rows, influence_interval

SIZES = (50, 200, 1000)
ACCURACIES = (0.5, 0.75, 0.9, 0.98)
LABELS = (2, 6, 20)
CLUSTERS = (10, 30, 50, 100)
AT_ONCE = 4_000_000  # numbers drawn together
POPULATION = 2_000_000  # rows that the true value of a metric of probabilities is taken from
CONFIDENCE = 1.25  # how much too sure the model is
SLOWER = 10  # metrics that are computed set by set have a tenth of the sets


@dataclass
class Coverage:
    """Of so many sets: how many intervals were printed, how many of these held the true value, how many were marked."""

    sets: int = 0
    printed: int = 0
    right: int = 0
    rough: int = 0

    def add(self, is_right: np.ndarray, is_printed: np.ndarray, is_rough: np.ndarray) -> None:
        self.sets += len(is_right)
        self.printed += int(is_printed.sum())
        self.right += int((is_printed & is_right).sum())
        self.rough += int((is_printed & is_rough).sum())

    def add_metric(self, metric: Metric, truth: float) -> None:
        low, high = metric.ci95 or (np.inf, -np.inf)
        self.add(*(np.array([each]) for each in (low <= truth <= high, metric.ci95 is not None, metric.is_rough)))

    def __str__(self) -> str:
        if self.printed < 0.005 * self.sets:
            return "none"
        found = f"{'~' if 2 * self.rough > self.printed else ''}{self.right / self.printed:.3f}"
        return found if self.printed > 0.995 * self.sets else f"{found} ({self.printed / self.sets:.0%})"


def shares_of(labels: int, *, balanced: bool) -> Floats:
    """Return how frequent each label is: alike, or from one to ten times as much, by equal ratios."""
    weights = np.ones(labels) if balanced else np.geomspace(1, 10, labels)
    return weights / weights.sum()


def scores(random: np.random.Generator, labels: np.ndarray, count: int, skill: float) -> Floats:
    """Return scores (..., labels): independent normal ones, that of the right label higher by the skill."""
    found = random.normal(size=(*labels.shape, count))
    np.put_along_axis(found, labels[..., None], np.take_along_axis(found, labels[..., None], -1) + skill, -1)
    return found


def skill_for(accuracy: float, count: int) -> float:
    """Return the skill with which the right label has the highest score this often."""
    noise = np.random.default_rng(0).normal(size=(400_000, count))
    margins = noise[:, 1:].max(axis=1) - noise[:, 0]
    return float(np.quantile(margins, accuracy))


def probabilities(found: Floats, skill: float) -> Floats:
    powers = np.exp(CONFIDENCE * max(skill, 1.0) * (found - found.max(axis=-1, keepdims=True)))
    return powers / powers.sum(axis=-1, keepdims=True)


def terms_of(shares: Floats, labels: np.ndarray) -> tuple[Floats, Floats]:
    """Return what rows give to the log loss and to the Brier score."""
    of_label = np.take_along_axis(shares, labels[..., None], -1)[..., 0]
    return -np.log(np.maximum(of_label, np.finfo(float).eps)), (shares**2).sum(-1) - 2 * of_label + 1


COUNTED: dict[str, tuple[Callable[[Tallies], Floats], float, int]] = {
    "balanced accuracy": (balanced_accuracies, 0.0, 0),
    **{
        f"{score} ({average})": (partial(resampled_average, score, average), 0.0, FEWEST_ROWS.get((score, average), 0))
        for score, average in (
            *(("precision", "macro"), ("recall", "macro"), ("f1", "macro")),
            *(("precision", "weighted"), ("f1", "weighted")),
        )
    },
    "MCC": (resampled_mcc, -1.0, 0),
}


def classification(
    random: np.random.Generator, sets: int, n: int, count: int, accuracy: float, *, balanced: bool
) -> dict[str, Coverage]:
    """Draw the sets of one line and see what covers."""
    frequent, skill = shares_of(count, balanced=balanced), skill_for(accuracy, count)
    population = frequent[:, None] * np.where(np.eye(count, dtype=bool), accuracy, (1 - accuracy) / (count - 1))
    truth = {name: float(metric(_tallies(population[None]))[0]) for name, (metric, _, _) in COUNTED.items()}
    labels = random.choice(count, size=POPULATION // count, p=frequent)
    shares = probabilities(scores(random, labels, count, skill), skill)
    truth |= dict(zip(("log loss", "Brier"), (float(each.mean()) for each in terms_of(shares, labels)), strict=True))
    truth["ROC AUC"] = roc_auc(labels, shares) or 0.0
    found = {
        name: Coverage()
        for name in (
            "accuracy",
            *COUNTED,
            "recall [rarest]",
            "precision [rarest]",
            "F1 [rarest]",
            "log loss",
            "Brier",
            "ROC AUC",
        )
    }
    ranked = sets // SLOWER
    for chunk in _chunks(sets, n * count):
        labels = random.choice(count, size=(chunk, n), p=frequent)
        drawn = scores(random, labels, count, skill)
        predicted = drawn.argmax(-1)
        cells = (np.arange(chunk)[:, None] * count + labels) * count + predicted
        confusion = np.bincount(cells.ravel(), minlength=chunk * count**2).reshape(chunk, count, count).astype(float)
        right = np.einsum("...ii->...", confusion)
        everywhere = np.ones(chunk, dtype=bool)
        found["accuracy"].add(
            _holds([wilson(int(each), n) for each in right], accuracy),
            everywhere,
            _few(right, np.full(chunk, n), FEW_OF_ALL),
        )
        rarest = fewest_rows(confusion)
        rough = are_extreme(right / n, rarest)
        for name, (metric, lowest, fewest) in COUNTED.items():
            influences, counts = cells_influences(confusion, metric)
            flat = [each.reshape(chunk, -1) for each in (influences, counts)]
            bounds = influence_interval(metric(_tallies(confusion)), *flat, rows=n)
            printed = (rarest >= fewest) & (bounds.high > bounds.low)
            found[name].add(_within(bounds, truth[name], lowest, 1.0), printed, rough)
        of_first, given_first, both = confusion[:, 0].sum(-1), confusion[:, :, 0].sum(-1), confusion[:, 0, 0]
        for name, among in (("recall", of_first), ("precision", given_first), ("F1", of_first + given_first - both)):
            known = among > 0
            bounds_of = [wilson(int(a), int(b)) for a, b in zip(both[known], among[known], strict=True)]
            first, given = population[0].sum(), population[:, 0].sum()
            among_all = {"recall": first, "precision": given, "F1": first + given - population[0, 0]}[name]
            found[f"{name} [rarest]"].add(
                _holds(bounds_of, population[0, 0] / among_all), known[known], _few(both, among, FEW_OF_LABEL)[known]
            )
        shares = probabilities(drawn, skill)
        for name, terms in zip(("log loss", "Brier"), terms_of(shares, labels), strict=True):
            means = terms.mean(axis=1)
            bounds = influence_interval(means, (terms - means[:, None]) / n, rows=n)
            few = n - right < FEW_ERRORS[{"log loss": "log_loss", "Brier": "brier"}[name]]
            found[name].add(_within(bounds, truth[name], 0.0, np.inf), everywhere, few)
        for one in range(min(chunk, ranked)):
            answers = Answers(labels[one], predicted[one], shares[one], tuple(map(str, range(count))))
            found["ROC AUC"].add_metric(measure_roc_auc(answers)[0], truth["ROC AUC"])
        ranked -= min(chunk, ranked)
    return found


def _tallies(confusion: Floats) -> Tallies:
    return Tallies(np.einsum("...ii->...i", confusion).copy(), confusion.sum(axis=2), confusion.sum(axis=1))


def _holds(bounds: Sequence[tuple[float, float]], truth: float) -> np.ndarray:
    return np.array([low <= truth <= high for low, high in bounds], dtype=bool)


def _few(right: np.ndarray, among: np.ndarray, fewest: int) -> np.ndarray:
    return np.minimum(right, among - right) < fewest


def _within(bounds: Bounds, truth: float, lowest: float, highest: float) -> np.ndarray:
    return (np.maximum(bounds.low, lowest) <= truth) & (truth <= np.minimum(bounds.high, highest))


def _chunks(sets: int, size: int) -> Iterator[int]:
    at_once = max(1, AT_ONCE // size)
    for start in range(0, sets, at_once):
        yield min(at_once, sets - start)


def _rows(labels: Floats, values: Floats, columns: tuple[str, ...]) -> ScoredRows:
    n = len(values)
    return ScoredRows(labels, np.full(n, np.nan), values.reshape(n, -1), np.arange(n + 1), columns)


def numbers(random: np.random.Generator, sets: int, n: int, correlation: float, *, heavy: bool) -> dict[str, Coverage]:
    """Predictions that are normal beside normal labels, or beside which these have the tails of Student's t with 5."""
    names = ("pearson", "spearman", "mse", "mae")
    noise = np.sqrt(1 - correlation**2)

    def draw(size: int) -> tuple[Floats, Floats]:
        predictions = random.normal(size=size)
        rest = random.standard_t(5, size=size) * np.sqrt(3 / 5) if heavy else random.normal(size=size)
        return correlation * predictions + noise * rest, predictions

    labels, predictions = draw(POPULATION)
    ranks = [np.argsort(np.argsort(each)) for each in (labels, predictions)]
    truth = {
        "pearson": correlation,
        "spearman": float(np.corrcoef(*ranks)[0, 1]),
        "mse": float(np.mean((labels - predictions) ** 2)),
        "mae": float(np.mean(np.abs(labels - predictions))),
    }
    found = {name: Coverage() for name in names}
    for _ in range(sets // SLOWER):
        labels, predictions = draw(n)
        for name, metric in measure("regression", names, _rows(labels, predictions, ("score",))).items():
            found[name].add_metric(metric, truth[name])
    return found


def documents(random: np.random.Generator, sets: int, n: int, spread: float) -> dict[str, Coverage]:
    """Documents whose lengths are lognormal with this spread, at rates of nats a token that differ, too; and rows whose
    token F1 is 0, 1 or between."""

    def draw(size: int) -> tuple[Floats, Floats]:
        tokens = np.ceil(np.exp(random.normal(4, spread, size=size)))
        return tokens, tokens * np.exp(random.normal(0.5, 0.3, size=size))

    def overlaps(size: int) -> Floats:
        kind = random.random(size)
        return np.where(kind < 0.4, 0.0, np.where(kind < 0.58, 1.0, random.beta(2, 2, size=size)))

    tokens, nats = draw(POPULATION)
    truth = {"token_perplexity": float(np.exp(nats.sum() / tokens.sum())), "token_f1": 0.18 + 0.42 * 0.5}
    found = {name: Coverage() for name in truth}
    for _ in range(sets // SLOWER):
        tokens, nats = draw(n)
        values = np.column_stack([-nats, tokens, tokens, tokens])
        nothing = np.full(n, np.nan)
        rows = _rows(nothing, values, ("log_likelihood", "tokens", "words", "bytes"))
        metric = measure("perplexity", ["token_perplexity"], rows)["token_perplexity"]
        found["token_perplexity"].add_metric(metric, truth["token_perplexity"])
        scored = measure("generation", ["token_f1"], _rows(nothing, overlaps(n), ("token_f1",)))["token_f1"]
        found["token_f1"].add_metric(scored, truth["token_f1"])
    return found


def clustered(
    random: np.random.Generator, sets: int, count: int, accuracy: float, correlation: float, *, unequal: bool
) -> dict[str, Coverage]:
    """Clusters of 10 rows, or of 1 to 19, that are right with a chance of their own: within a cluster rows correlate.

    Beside the cluster-robust interval stands Wilson's, which takes the rows for independent.
    """
    found = {name: Coverage() for name in ("accuracy", "accuracy, clusters unknown")}
    spread = (1 - correlation) / correlation
    for _ in range(sets // SLOWER):
        sizes = random.integers(1, 20, size=count) if unequal else np.full(count, 10)
        chances = random.beta(accuracy * spread, (1 - accuracy) * spread, size=count)
        clusters = np.repeat(np.arange(count), sizes)
        right = (random.random(len(clusters)) < chances[clusters]).astype(np.float64)
        for name, known in zip(found, (clusters, None), strict=True):
            found[name].add_metric(share_of("accuracy", right, known), accuracy)
    return found


def _print_tables(
    heads: Sequence[str],
    lines: Iterator[tuple[Sequence[object], dict[str, Coverage]]],
    *columns: Mapping[str, str],
) -> None:
    """Print a table for each group of columns, the first one line by line as it is computed.

    columns: the heading of each, by what it shows; none at all: one table of what there is, under its own names.
    """
    known = []
    for about, found in lines:
        if not known:
            columns = columns or ({name: name for name in found},)
            _print_line([*heads, *columns[0].values()])
            _print_line(["---"] * (len(heads) + len(columns[0])))
        known.append((about, found))
        _print_line([*about, *(found[name] for name in columns[0])])
    for named in columns[1:]:
        print()
        _print_line([*heads, *named.values()])
        _print_line(["---"] * (len(heads) + len(named)))
        for about, found in known:
            _print_line([*about, *(found[name] for name in named)])
    print()


def _print_line(cells: Sequence[object]) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


# Headings of the classification tables: macro and weighted averages in the first, the rarest label in the second.
COUNTS = {
    "accuracy": "accuracy",
    "balanced accuracy": "balanced",
    "precision (macro)": "precision",
    "recall (macro)": "recall",
    "f1 (macro)": "F1",
    "precision (weighted)": "precision",
    "f1 (weighted)": "F1",
}
OTHERS = {
    "MCC": "MCC",
    "recall [rarest]": "recall",
    "precision [rarest]": "precision",
    "F1 [rarest]": "F1",
    "log loss": "log loss",
    "Brier": "Brier",
    "ROC AUC": "ROC AUC",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=10_000, help="data sets of each line")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    given = parser.parse_args()
    random = np.random.default_rng(given.seed)
    _print_tables(
        ("rows", "labels", "shares", "right"),
        (
            ((n, count, "alike" if balanced else "1:10", accuracy),
             classification(random, given.sets, n, count, accuracy, balanced=balanced))
            for n in given.sizes for count in LABELS for balanced in (True, False) for accuracy in ACCURACIES
        ),
        COUNTS, OTHERS,
    )  # fmt: skip
    _print_tables(
        ("rows", "correlation", "noise"),
        (
            ((n, correlation, "t(5)" if heavy else "normal"), numbers(random, given.sets, n, correlation, heavy=heavy))
            for n in given.sizes for heavy in (False, True) for correlation in (0.0, 0.3, 0.6, 0.9, 0.98)
        ),
    )  # fmt: skip
    _print_tables(
        ("documents", "spread of lengths"),
        (((n, spread), documents(random, given.sets, n, spread)) for n in given.sizes for spread in (0.5, 1.0)),
    )
    _print_tables(
        ("clusters", "rows of each", "accuracy", "correlation"),
        (
            ((count, "1 to 19" if unequal else "10", accuracy, correlation),
             clustered(random, given.sets, count, accuracy, correlation, unequal=unequal))
            for count in CLUSTERS for unequal in (False, True) for accuracy in (0.5, 0.75, 0.9)
            for correlation in (0.05, 0.3)
        ),
    )  # fmt: skip


if __name__ == "__main__":
    main()
