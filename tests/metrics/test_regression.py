"""Metrics of numbers against scipy and scikit-learn, and their intervals against a plain bootstrap."""

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from petals_eval.errors import ConfigError, DataError
from petals_eval.metrics import ScoredRows, available_metrics, mae, measure, mse, pearson, spearman
from petals_eval.metrics.intervals import row_weights
from petals_eval.metrics.regression import _correlation, _Ranks

NAMES = ("pearson", "spearman", "mse", "mae")
REFERENCES = {
    "pearson": lambda labels, found: scipy.stats.pearsonr(labels, found).statistic,
    "spearman": lambda labels, found: scipy.stats.spearmanr(labels, found).statistic,
    "mse": sklearn.metrics.mean_squared_error,
    "mae": sklearn.metrics.mean_absolute_error,
}


def numbers(n: int, *, ties: bool = False, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.uniform(0, 5, size=n)
    found = (
        0.5 * labels + random.normal(size=n) + 1e6 * (seed == 7)
    )  # far from 0, where a careless formula loses digits
    return (np.round(labels), np.round(found)) if ties else (labels, found)


def rows(labels, found) -> ScoredRows:
    each = np.asarray(found, dtype=np.float64)
    return ScoredRows(np.asarray(labels, float), each, each[:, None], np.arange(len(each) + 1), ("score",))


@pytest.mark.parametrize("case", [numbers(300), numbers(200, ties=True), numbers(50, seed=7), numbers(2)])
def test_the_values_are_those_of_scipy_and_scikit_learn(case):
    found = measure("regression", NAMES, rows(*case))
    for name, function in zip(NAMES, (pearson, spearman, mse, mae), strict=True):
        expected = pytest.approx(float(REFERENCES[name](*case)), rel=1e-9)
        assert function(*case) == found[name].value == expected
    assert available_metrics("regression") == NAMES


@pytest.mark.parametrize("ties", [False, True])
def test_the_formulas_of_the_bootstrap_are_those_of_a_resample_written_out(ties):
    labels, found = numbers(60, ties=ties)
    ranks = _Ranks(labels), _Ranks(found)
    for weights in row_weights(60, 20, 3):
        drawn = np.repeat(np.arange(60), weights)
        expected = scipy.stats.pearsonr(labels[drawn], found[drawn]).statistic
        assert _correlation(labels, found, weights) == pytest.approx(expected)
        expected = scipy.stats.spearmanr(labels[drawn], found[drawn]).statistic
        assert _correlation(ranks[0].of(weights), ranks[1].of(weights), weights) == pytest.approx(expected)


@pytest.mark.parametrize("name", NAMES)
def test_of_many_rows_the_interval_is_scipys_percentile_bootstrap(name):
    """Another generator and a plain loop: they agree to its noise, and to how unevenly rows weigh."""
    labels, found = numbers(250)
    bootstrap = scipy.stats.bootstrap(
        (labels, found),
        REFERENCES[name],
        paired=True,
        vectorized=False,
        n_resamples=1000,
        method="percentile",
        rng=np.random.default_rng(1),
    )
    expected = bootstrap.confidence_interval
    metric = measure("regression", [name], rows(labels, found))[name]
    width = expected.high - expected.low
    assert metric.ci95 == pytest.approx((expected.low, expected.high), abs=0.2 * width)
    assert metric.ci95[0] < metric.value < metric.ci95[1] and metric.note is None
    assert measure("regression", NAMES, rows(labels, found))[name] == metric  # whatever else is asked for


def test_what_is_not_defined_says_why():
    constant = measure("regression", NAMES, rows([1, 2, 3], [0.1, 0.1, 0.1]))
    assert (constant["pearson"].value, constant["spearman"].value) == (None, None)
    assert constant["pearson"].note == "not defined: all predictions are the same"
    assert constant["mse"].value is not None
    both = measure("regression", ["spearman"], rows([1, 1], [2, 2]))["spearman"]
    assert both.note == "not defined: all labels and predictions are the same"
    one = measure("regression", NAMES, rows([1], [2]))
    assert (one["pearson"].note, one["mse"].value, one["mse"].ci95) == ("not defined for one example", 1.0, None)


def test_rows_without_a_label_are_in_no_metric():
    labels, found = numbers(40)
    hidden = rows([*labels, np.nan, np.nan], [*found, 100.0, -100.0])
    assert measure("regression", NAMES, hidden) == measure("regression", NAMES, rows(labels, found))
    none = measure("regression", NAMES, rows([np.nan], [1.0]))
    assert {metric.note for metric in none.values()} == {"no example has a label"}


def test_what_is_no_regression():
    two = ScoredRows(np.zeros(1), np.zeros(1), np.zeros((2, 1)), np.array([0, 2]), ("score",))
    with pytest.raises(DataError, match="one number a row; row 0 has 2"):
        measure("regression", ["mse"], two)
    with pytest.raises(ConfigError, match="a metric of regression; found 'accuracy'"):
        measure("regression", ["accuracy"], rows([1], [2]))
