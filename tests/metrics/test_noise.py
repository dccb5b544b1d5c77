"""What rounding may do to predictions: margins, the rows that are unsure, and the ranges of metrics."""

import itertools

import numpy as np
import pytest

from petals_eval.metrics import measure
from petals_eval.metrics.noise import FACTOR, MARGIN, changes, margins, noise_ranges, numbers_of
from petals_eval.metrics.scored_rows import ScoredRows

LABELS = ("no", "maybe", "yes")
CHOICE_COLUMNS = ("log_likelihood", "characters", "bytes", "tokens", "unconditioned")


def classified(scores, labels):
    """Rows of a classification. scores: (n, labels)."""
    values = np.asarray(scores, dtype=np.float64)
    rows, items = values.shape
    predictions = values.argmax(axis=1).astype(np.float64)
    starts = np.arange(0, rows * items + 1, items)
    return ScoredRows(np.asarray(labels, dtype=np.float64), predictions, values.reshape(-1, 1), starts, ("score",))


def test_a_margin_is_to_the_runner_up_of_each_rows_own_answers():
    assert margins(np.array([1.0, 1.0, 0.0, 5.0, 2.0, 4.5]), np.array([0, 3, 5, 6])).tolist() == [0.0, 3.0, np.inf]


def test_a_change_is_that_of_the_answer_that_was_ahead_and_counts_where_it_is_behind_then():
    before, after = np.array([1.0, 0.5, 0.0, 2.0, 0.0]), np.array([1.0, 1.25, 0.0, 2.5, 0.25])
    assert changes(MARGIN, before, after, np.array([0, 3, 5])).tolist() == [0.75, 0.25]
    assert changes("log_likelihood", np.array([-3.0]), np.array([-2.5]), np.array([0, 1])).tolist() == [0.5]


def test_the_numbers_of_each_kind():
    assert list(numbers_of("classification", ["accuracy"])) == [MARGIN]
    assert list(numbers_of("choice", ["acc", "acc_bytes", "acc_mutual_info"])) == [
        MARGIN,
        "acc_bytes",
        "acc_mutual_info",
    ]
    assert list(numbers_of("regression", ["mse"])) == ["prediction"]
    assert list(numbers_of("generation", ["exact_match"])) == []


def test_ranges_span_the_worst_and_the_best_of_what_unsure_rows_may_become():
    random = np.random.default_rng(3)
    rows = classified(random.normal(size=(40, 3)), random.integers(0, 3, size=40))
    metrics = ["accuracy", "f1_macro", "mcc", "log_loss"]
    values = {name: each.value for name, each in measure("classification", metrics, rows, label_names=LABELS).items()}
    unsure, ranges = noise_ranges("classification", rows, {MARGIN: 0.15}, metrics, LABELS, values)
    scores = rows.values.reshape(40, 3)
    ordered = np.sort(scores, axis=1)
    assert unsure.tolist() == (ordered[:, -1] - ordered[:, -2] < 0.15).tolist() and 4 <= unsure.sum() <= 10

    # Every way in which unsure rows may go to their runner-up, one by one: accuracy is at its ends in two of them.
    runner_up = np.argsort(scores, axis=1)[:, -2]
    places = np.flatnonzero(unsure)
    found = []
    for turned in itertools.product([False, True], repeat=len(places)):
        predictions = rows.predictions.copy()
        predictions[places[list(turned)]] = runner_up[places[list(turned)]]
        found.append(float((predictions == rows.labels).mean()))
    assert ranges["accuracy"] == pytest.approx((min(found), max(found)))
    for name, (low, high) in ranges.items():
        assert low <= values[name] <= high, name
    assert ranges["majority_baseline"] == (values["majority_baseline"],) * 2
    assert ranges["log_loss"][0] < values["log_loss"] < ranges["log_loss"][1]


def test_without_noise_nothing_is_unsure_not_even_a_tie():
    rows = classified([[1.0, 1.0, 0.0], [2.0, 0.0, 1.0]], [1, 0])
    unsure, ranges = noise_ranges("classification", rows, {MARGIN: 0.0}, ["accuracy"], LABELS, {"accuracy": 0.5})
    assert not unsure.any() and ranges == {"accuracy": (0.5, 0.5)}


def test_a_metric_of_choices_goes_by_its_own_margins():
    # By log-likelihood the first choice is far ahead; by character the two are close, in the second row too far.
    values = np.array([(-2.0, 4, 4, 1), (-4.1, 8, 8, 1), (-2.0, 4, 4, 1), (-9.0, 8, 8, 1)], dtype=np.float64)
    values = np.column_stack([values, np.full(4, np.nan)])
    rows = ScoredRows(np.array([0.0, 0.0]), np.array([0.0, 0.0]), values, np.array([0, 2, 4]), CHOICE_COLUMNS)
    found = {"acc": 1.0, "acc_norm": 1.0, "acc_mutual_info": 0.5}
    noise = {MARGIN: 0.1, "acc_norm": 0.1}
    unsure, ranges = noise_ranges("choice", rows, noise, ["acc", "acc_norm", "acc_mutual_info"], (), found)
    assert not unsure.any()
    assert ranges == {"acc": (1.0, 1.0), "acc_norm": (0.5, 1.0)}


@pytest.mark.parametrize("tails", ["normal", "heavy", "a few large", "of one size"])
def test_as_many_are_unsure_as_change_and_not_five_times_as_many(tails):
    """As `scripts/noise_coverage.py` does on a real model, for changes of many forms."""
    random = np.random.default_rng(7)

    def moved(count):
        if tails == "normal":
            return random.normal(size=count)
        if tails == "heavy":
            return random.standard_t(3, size=count)
        if tails == "a few large":
            return random.normal(size=count) * np.where(random.random(count) < 0.1, 5.0, 1.0)
        return random.choice([-1.0, 1.0], size=count)

    told, came = [], []
    for _ in range(400):
        ahead = random.random(2000) * 400  # as flat as margins are near 0
        noise = FACTOR * float(np.abs(moved(64)).mean())
        told.append(int((ahead < noise).sum()))
        came.append(int((ahead + moved(2000) < 0).sum()))
    pairs = np.array([told, came])
    assert (pairs[0] >= pairs[1]).mean() >= 0.95
    assert (pairs[0] <= max(5 * pairs[1].mean(), 3)).mean() >= 0.9
    assert 2.0 < pairs[0].mean() / pairs[1].mean() < 4
