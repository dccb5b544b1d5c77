"""Perplexities of documents against their definitions, and the interval against a bootstrap written out."""

import math

import numpy as np
import pytest

from petals_eval.errors import DataError
from petals_eval.metrics import KINDS, ScoredRows, available_metrics, measure
from petals_eval.metrics.intervals import RESAMPLES, row_weights

COLUMNS = ("log_likelihood", "tokens", "words", "bytes")
NAMES = available_metrics("perplexity")


def rows_of(values) -> ScoredRows:
    given = np.asarray(values, np.float64)
    nothing = np.full(len(given), np.nan)
    return ScoredRows(nothing, nothing, given, np.arange(len(given) + 1), COLUMNS)


def random_documents(count: int) -> np.ndarray:
    random = np.random.default_rng(count)
    tokens = random.integers(1, 4000, count)
    nats = random.uniform(1.0, 3.0, count) * tokens
    return np.column_stack([-nats, tokens, np.maximum(1, tokens // 2), tokens * 3])


def by_definition(name: str, values: np.ndarray) -> float:
    total = math.fsum(values[:, 0])
    if name == "bits_per_byte":
        return -total / math.fsum(values[:, 3]) / math.log(2)
    return math.exp(-total / math.fsum(values[:, COLUMNS.index(f"{name.partition('_')[0]}s")]))


@pytest.mark.parametrize("count", [1, 2, 50, 400])
@pytest.mark.parametrize("name", NAMES)
def test_long_documents_weigh_more(name, count):
    values = random_documents(count)
    found = measure("perplexity", [name], rows_of(values))[name]
    assert found.value == pytest.approx(by_definition(name, values), rel=1e-12)
    assert (found.ci95 is None) == (count == 1)
    if found.ci95 is not None:
        assert found.ci95[0] <= found.value <= found.ci95[1]


def test_the_harness_takes_the_same_means():
    """lm_eval.api.metrics: weighted_perplexity and bits_per_byte are means weighted by words and bytes."""
    values = random_documents(7)
    words, size = values[:, 2], values[:, 3]
    found = measure("perplexity", NAMES, rows_of(values))
    assert found["word_perplexity"].value == pytest.approx(math.exp(-sum(values[:, 0]) / sum(words)), rel=1e-12)
    assert found["bits_per_byte"].value == pytest.approx(-(sum(values[:, 0]) / sum(size)) / math.log(2), rel=1e-12)
    assert found["byte_perplexity"].value == pytest.approx(2 ** found["bits_per_byte"].value, rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_interval_is_over_documents(name):
    values = random_documents(400)
    drawn = [np.repeat(values, weights, axis=0) for weights in row_weights(400, RESAMPLES, seed=4)]
    low, high = np.percentile([by_definition(name, each) for each in drawn], [2.5, 97.5])
    found = measure("perplexity", [name], rows_of(values))[name]
    assert found.ci95 == pytest.approx((low, high), abs=0.1 * (high - low))
    assert found.note is None


def test_a_perplexity_that_no_number_holds():
    found = measure("perplexity", NAMES, rows_of([[-5000.0, 900, 1, 4000], [-4000.0, 800, 1, 3000]]))
    assert found["word_perplexity"].value is None
    assert found["word_perplexity"].note == "e to the power of 4500, more than a number holds"
    assert found["byte_perplexity"].value == pytest.approx(math.exp(9000 / 7000))


def test_an_interval_that_no_number_holds():
    found = measure("perplexity", ["word_perplexity"], rows_of([[-1.0, 9, 9, 9]] * 9 + [[-900.0, 9, 9, 9]]))
    assert found["word_perplexity"].value == pytest.approx(math.exp(909 / 90))
    assert found["word_perplexity"].ci95 is not None
    found = measure("perplexity", ["word_perplexity"], rows_of([[-1.0, 9, 9, 9]] * 9 + [[-60000.0, 9, 9, 9]]))
    assert found["word_perplexity"].value == pytest.approx(math.exp(60009 / 90))
    assert found["word_perplexity"].ci95 is None
    assert found["word_perplexity"].note == "no interval: it reaches more than a number holds"


def test_documents_without_a_unit():
    found = measure("perplexity", NAMES, rows_of([[-5.0, 3, 0, 0], [-4.0, 2, 0, 0]]))
    assert found["word_perplexity"].note == "the documents have no words"
    assert found["token_perplexity"].value == pytest.approx(math.exp(9 / 5))


def test_no_documents():
    found = measure("perplexity", NAMES, rows_of(np.zeros((0, 4))))
    assert {metric.note for metric in found.values()} == {"no example was scored"}


def test_rows_of_another_kind_are_refused():
    rows = ScoredRows(np.zeros(1), np.zeros(1), np.zeros((1, 1)), np.arange(2), ("score",))
    with pytest.raises(DataError, match="these rows have no values for log_likelihood; they have score"):
        measure("perplexity", ["bits_per_byte"], rows)


def test_all_are_better_when_lower_and_none_has_a_best():
    assert all(not spec.higher_is_better and spec.best is None for spec in KINDS["perplexity"])
