"""Intervals by influences: where they come from, against what is written out, and whether they cover."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest, t

from petals_eval.metrics import KINDS, ScoredRows, compute_metrics, measure, wilson
from petals_eval.metrics.accuracy import balanced_accuracies
from petals_eval.metrics.correlation import resampled_mcc
from petals_eval.metrics.fscores import resampled_average
from petals_eval.metrics.intervals import Tallies, student_quantile
from petals_eval.metrics.ranking import _Ranking
from petals_eval.metrics.skewness import cells_influences, degrees_of_freedom, influence_interval
from tests.metrics.metric_tester import random_case
from tests.metrics.test_differences import COLUMNS, LABELS, label_names, names_of, rows_of

ROOT = Path(__file__).resolve().parents[2]


def test_of_a_share_it_is_wilsons_interval() -> None:
    for right, total in ((10, 500), (368, 500), (990, 1000), (3, 100)):
        terms = np.repeat([0.0, 1.0], [total - right, right])
        share = right / total
        low, high, _ = influence_interval(share, (terms - share) / total, rows=total)
        assert (low, high) == pytest.approx(wilson(right, total), abs=4 / total**1.5)
        assert wilson(right, total) == pytest.approx(tuple(binomtest(right, total).proportion_ci(method="wilson")))


def test_without_skewness_it_is_students() -> None:
    terms = np.array([-2.0, -1.0, 0.0, 1.0, 2.0]) + 7
    low, high, skewness = influence_interval(7.0, (terms - 7) / 5, rows=5)
    assert skewness == 0
    assert (high - low) / 2 == pytest.approx(2.7764 * math.sqrt((terms - 7) @ (terms - 7)) / 5, rel=1e-4)


@pytest.mark.parametrize("metric", [balanced_accuracies, resampled_mcc, lambda t: resampled_average("f1", "macro", t)])
def test_influences_are_what_one_row_more_does(metric) -> None:
    random = np.random.default_rng(1)
    confusion = random.integers(20, 60, size=(1, 3, 3)).astype(float) * 1000
    influences, table = cells_influences(confusion, metric)
    tallies = Tallies(np.einsum("...ii->...i", table).copy(), table.sum(2), table.sum(1))
    for label in range(3):
        for prediction in range(3):
            more = table.copy()
            more[0, label, prediction] += 1
            after = Tallies(np.einsum("...ii->...i", more).copy(), more.sum(2), more.sum(1))
            assert metric(after)[0] - metric(tallies)[0] == pytest.approx(
                influences[0, label, prediction], rel=1e-2, abs=1e-9
            )


def test_a_label_without_a_mistake_still_has_an_interval() -> None:
    labels = np.repeat([0, 1], [100, 100])
    shares = np.eye(2)[labels] * 0.8 + 0.1
    found = compute_metrics(["balanced_accuracy", "f1_macro", "mcc"], labels, labels, shares, label_names=["a", "b"])
    for metric in found.values():
        assert metric.value == 1.0 and metric.ci95 is not None and metric.is_rough
        assert 0.9 < metric.ci95[0] < 1.0 and metric.ci95[1] == 1.0


def test_the_influences_of_an_area_are_delongs() -> None:
    case = random_case("area", 60, 2)
    positive, scores = case.labels == 1, np.round(case.probabilities[:, 1], 1)  # with ties
    ranking = _Ranking(positive, scores)
    influences = ranking.influences()
    pairs = (scores[positive][:, None] > scores[~positive]) + 0.5 * (scores[positive][:, None] == scores[~positive])
    assert influences[positive] == pytest.approx((pairs.mean(1) - pairs.mean()) / positive.sum())
    assert influences[~positive] == pytest.approx((pairs.mean(0) - pairs.mean()) / (~positive).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_a_cluster_written_twice_says_no_more_than_once(kind: str) -> None:
    def clustered(rows: ScoredRows, clusters: np.ndarray) -> ScoredRows:
        values = np.column_stack([rows.values, np.repeat(clusters, rows.items)])
        return ScoredRows(rows.labels, rows.predictions, values, rows.starts, (*rows.columns, "cluster"))

    rows, clusters = rows_of(kind, 240, 1), np.random.default_rng(3).integers(0, 60, 240).astype(float)
    names = [name for name in names_of(kind) if name not in ("bleu", "chrf")]
    once = measure(kind, names, clustered(rows, clusters), label_names=label_names(kind))
    twice_rows = rows.at(np.repeat(np.arange(240), 2))
    twice = measure(kind, names, clustered(twice_rows, np.repeat(clusters, 2)), label_names=label_names(kind))
    plain = measure(kind, names, twice_rows, label_names=label_names(kind))
    for name, metric in once.items():
        if metric.ci95 is not None and name != "majority_baseline":
            assert twice[name].value == pytest.approx(metric.value)
            # A table of counts is smoothed by one row a label, which is less beside twice as many.
            assert twice[name].ci95 == pytest.approx(metric.ci95, abs=0.03 * (metric.ci95[1] - metric.ci95[0])), name
            assert plain[name].ci95[1] - plain[name].ci95[0] < metric.ci95[1] - metric.ci95[0], name
    assert "cluster" not in COLUMNS[kind]


def test_what_rests_on_few_rows_is_marked_or_left_out() -> None:
    labels = np.array([0] * 200 + [1] * 3)
    predictions = labels.copy()
    predictions[:60] = 1
    shares = np.eye(2)[predictions] * 0.6 + 0.2
    names = ["f1_macro", "roc_auc", "log_loss", "ece", "mcc"]
    found = compute_metrics(names, labels, predictions, shares, label_names=["a", "b"])
    assert found["f1_macro"].ci95 is None
    assert found["f1_macro"].note == "no interval: a label has 3 rows, expected 6 at least"
    assert found["roc_auc"].note == "no interval: a label has 3 rows, expected 10 at least"
    assert found["ece"].ci95 is None and found["ece"].note.startswith("no interval: chance adds to it")
    assert found["mcc"].ci95 is not None and not found["log_loss"].is_rough
    few = compute_metrics(["log_loss"], labels[50:], predictions[50:], shares[50:], label_names=["a", "b"])["log_loss"]
    assert few.is_rough and few.to_json()["is_rough"] is True


def test_degrees_of_freedom_are_those_of_how_evenly_rows_weigh() -> None:
    """For s^2 with f degrees its relative variance is 2 / f: held against what it is over many samples."""
    random = np.random.default_rng(3)
    for draw in (random.normal, random.exponential):
        samples = draw(size=(2_000, 1_000))
        squares = samples.var(axis=1)
        expected = 2 * squares.mean() ** 2 / squares.var()
        found = [degrees_of_freedom(each - each.mean()) for each in samples[:400]]
        assert 2 / np.mean(2 / np.array(found)) == pytest.approx(expected, rel=0.2), draw
    assert degrees_of_freedom(np.tile([1.0, -1.0], 50)) == 100 and degrees_of_freedom(np.zeros(7)) == 7


def test_a_few_rows_that_weigh_too_much_have_no_interval() -> None:
    for n, expected in ((100, True), (1200, None)):
        found = np.random.default_rng(0).normal(size=n)
        found[0] = 1000.0
        rows = ScoredRows(np.zeros(n), found, found[:, None], np.arange(n + 1), ("score",))
        metric = measure("regression", ["mse"], rows)["mse"]
        if expected is None:
            assert metric.ci95 is None and metric.note == "no interval: a few rows weigh too much"
        else:
            assert metric.is_rough


@pytest.mark.parametrize(("n", "accuracy"), [(200, 0.75), (200, 0.9), (1000, 0.5)])
def test_the_simulation_draws_what_it_says_and_most_intervals_cover(n: int, accuracy: float) -> None:
    """A small part of what scripts/interval_coverage.py does at length."""
    spec = importlib.util.spec_from_file_location("interval_coverage", ROOT / "scripts" / "interval_coverage.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.__dict__["POPULATION"] = 200_000
    found = script.classification(np.random.default_rng(5), 400, n, 2, accuracy, balanced=True)
    for name in ("accuracy", "balanced accuracy", "f1 (macro)", "MCC", "Brier"):
        assert found[name].right / found[name].printed > 0.92, name
    assert len(LABELS) == 3


def test_students_quantiles_are_those_of_scipy() -> None:
    degrees = np.array([*range(1, 200), 1000, 10**6])
    assert student_quantile(degrees) == pytest.approx(t.ppf(0.975, degrees), rel=2e-7)
