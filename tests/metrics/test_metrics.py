"""Every metric against a reference, on every case."""

import time
import warnings
from functools import partial

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from petals_eval.errors import ConfigError, DataError
from petals_eval.metrics import (
    DEFAULT_METRICS,
    METRICS,
    accuracy,
    available_metrics,
    balanced_accuracy,
    check_metric_names,
    compute_metrics,
    confusion_matrix,
    mcc,
    precision_recall_f1,
    wilson,
    with_order_doubted,
)
from petals_eval.metrics.accuracy import balanced_accuracies
from petals_eval.metrics.correlation import resampled_mcc
from petals_eval.metrics.fscores import AVERAGES, SCORES, resampled_average, resampled_per_class
from petals_eval.metrics.intervals import Tallies, percentile_interval, row_weights
from petals_eval.metrics.ranking import _Ranking
from tests.metrics.metric_tester import CASES, REFERENCES, Case, random_case, reference


def compute(names, case: Case):
    return compute_metrics(names, case.labels, case.predictions, case.probabilities, label_names=case.label_names)


def by_name(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def test_every_metric_has_a_reference() -> None:
    per_class = {f"{score}_per_class" for score in SCORES}
    assert set(REFERENCES) | per_class | {"confusion_matrix"} == set(available_metrics())
    assert set(DEFAULT_METRICS) <= set(METRICS)


@by_name(CASES)
@pytest.mark.parametrize("name", REFERENCES)
def test_the_value_is_the_reference(name: str, case: Case) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a metric that is not defined says so in its note, not on stderr
        metric = compute([name], case)[name]
    expected = reference(name, case)
    assert metric.value == (None if expected is None else pytest.approx(expected, abs=1e-12))
    assert (metric.value is not None) or metric.note
    if metric.ci95 is not None:
        assert metric.ci95[0] <= metric.ci95[1]
        assert metric.ci95[0] - 1e-12 <= metric.value <= metric.ci95[1] + 1e-12


@by_name(CASES)
@pytest.mark.parametrize("score", SCORES)
def test_one_value_a_label(score: str, case: Case) -> None:
    found = compute([f"{score}_per_class"], case)
    assert list(found) == [f"{score}[{name}]" for name in case.label_names]
    expected = getattr(sklearn.metrics, f"{score}_score")(
        case.labels, case.predictions, labels=range(len(found)), average=None, zero_division=0
    )
    occurs, predicted = (np.bincount(x, minlength=len(found)) > 0 for x in (case.labels, case.predictions))
    defined = {"precision": predicted, "recall": occurs, "f1": occurs | predicted}[score]
    for index, metric in enumerate(found.values()):
        assert metric.value == (pytest.approx(expected[index]) if defined[index] else None)
        assert defined[index] or metric.note


@by_name(CASES)
def test_the_cheap_formulas_of_the_bootstrap_are_the_metrics(case: Case) -> None:
    """On the examples themselves (every one drawn once) and on a resample written out."""
    drawn = np.random.default_rng(5).integers(0, len(case.labels), len(case.labels))
    for rows in (np.arange(len(case.labels)), drawn):
        again = Case(case.name, case.labels[rows], case.predictions[rows], case.probabilities[rows])
        tallies = Tallies.of(again.labels, again.predictions, len(case.label_names))
        assert balanced_accuracies(tallies)[0] == pytest.approx(reference("balanced_accuracy", again))
        assert resampled_mcc(tallies)[0] == pytest.approx(reference("mcc", again), abs=1e-12)
        for score in SCORES:
            for average in AVERAGES:
                expected = reference(f"{score}_{average}", again)
                assert resampled_average(score, average, tallies)[0] == pytest.approx(expected)
            each = getattr(sklearn.metrics, f"{score}_score")(
                again.labels, again.predictions, labels=range(len(case.label_names)), average=None, zero_division=0
            )
            assert np.nan_to_num(resampled_per_class(score, tallies)[0]) == pytest.approx(each)
        weights = np.bincount(rows, minlength=len(case.labels))
        for label in np.unique(again.labels):
            if len(np.unique(again.labels)) > 1:
                area = _Ranking(case.labels == label, case.probabilities[:, label]).area(weights)
                expected = sklearn.metrics.roc_auc_score(again.labels == label, again.probabilities[:, label])
                assert area == pytest.approx(expected)


def test_wilson_is_scipys() -> None:
    for right, total in ((0, 1), (1, 1), (0, 50), (50, 50), (368, 500), (501, 872), (1, 100_000)):
        expected = scipy.stats.binomtest(right, total).proportion_ci(0.95, method="wilson")
        assert wilson(right, total) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_accuracy_of_the_trec_run_has_the_interval_of_its_counts() -> None:
    labels, predictions = np.zeros(500, int), np.repeat([0, 1], [368, 132])
    metric = compute_metrics(["accuracy"], labels, predictions, np.full((500, 2), 0.5), label_names=["a", "b"])
    assert metric["accuracy"].value == 0.736
    assert metric["accuracy"].ci95 == pytest.approx((0.6957, 0.7728), abs=1e-4)
    assert metric["majority_baseline"].value == 1.0
    assert metric["majority_baseline"].note == "always answering 'a'"


@pytest.mark.parametrize("name", [name for name in REFERENCES if name not in ("majority_baseline", "ece")])
def test_of_many_rows_the_interval_is_that_of_a_bootstrap_written_out(name: str) -> None:
    """A plain loop over resamples: they agree to the noise of 1,000 of them."""
    case = random_case("bootstrap", 250, 3)

    def statistic(rows) -> float:
        value = reference(name, Case("resample", case.labels[rows], case.predictions[rows], case.probabilities[rows]))
        return float("nan") if value is None else value

    random = np.random.default_rng(77)
    plain = [statistic(random.integers(0, 250, 250)) for _ in range(1000)]
    low, high = np.percentile(plain, [2.5, 97.5])
    metric = compute([name], case)[name]
    assert metric.ci95 == pytest.approx((low, high), abs=0.2 * (high - low))


def test_an_interval_does_not_depend_on_what_else_is_asked() -> None:
    case = random_case("alone", 300, 4)
    everything = compute(available_metrics(), case)
    for name in REFERENCES:
        assert compute([name], case)[name] == everything[name]


def test_the_first_resamples_do_not_depend_on_how_many_there_are() -> None:
    few, many = list(row_weights(50, 3, 9)), list(row_weights(50, 8, 9))
    assert all((a == b).all() for a, b in zip(few, many, strict=False))
    assert all(weights.sum() == 50 for weights in many)


def test_ten_thousand_rows_take_seconds() -> None:
    case = random_case("timed", 10_000, 6)
    compute(["accuracy"], case)  # scikit-learn's import is not what is measured
    start = time.process_time()
    compute(available_metrics(), case)
    assert time.process_time() - start < 20


def test_a_metric_that_is_not_defined_says_why() -> None:
    case = next(case for case in CASES if case.name == "one label only")
    found = compute(["roc_auc", "mcc", "recall_per_class"], case)
    assert found["roc_auc"].to_json() == {
        "value": None,
        "ci95": None,
        "note": "not defined: every example is 'label-2'",
    }
    assert found["mcc"].note == "0 by convention: all labels are the same"
    assert found["recall[label-0]"].note == "no such example"
    absent = compute(["roc_auc"], next(case for case in CASES if case.name == "a label that does not occur"))
    assert absent["roc_auc"].note == "without 'label-2': no such example"


def test_one_example_has_no_interval_but_that_of_a_share() -> None:
    case = next(case for case in CASES if case.name == "one example, right")
    found = compute(["accuracy", "f1_macro", "log_loss"], case)
    assert found["accuracy"].ci95 == pytest.approx((0.2065, 1.0), abs=1e-4)
    assert found["f1_macro"].ci95 is None and found["f1_macro"].note == "no interval from one example"


def test_nothing_scored_gives_no_value_but_every_name() -> None:
    found = compute_metrics(available_metrics(), [], [], [], label_names=["a", "b"])
    assert {"accuracy", "majority_baseline", "f1[a]", "f1[b]", "ece"} <= set(found)
    assert {(m.value, m.ci95, m.note) for m in found.values()} == {(None, None, "no example was scored")}
    assert list(compute_metrics(["accuracy"], [], [], [], label_names=["a", "b"])) == ["accuracy", "majority_baseline"]


def test_undefined_resamples_are_left_out_until_they_are_half() -> None:
    nan = float("nan")
    assert percentile_interval([1.0, 1.0, nan]) == (1.0, 1.0)
    assert percentile_interval([1.0, nan]) is None


@by_name(CASES)
def test_confusion_matrix_counts_every_example(case: Case) -> None:
    counts = confusion_matrix(case.labels, case.predictions, len(case.label_names))
    assert counts.sum() == len(case.labels)
    assert np.trace(counts) == (case.labels == case.predictions).sum()
    assert (counts.sum(axis=1) == np.bincount(case.labels, minlength=len(counts))).all()
    assert confusion_matrix([], [], 3).tolist() == [[0] * 3] * 3


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("f1", "f1_macro or f1_micro"),
        ("acuracy", "Did you mean accuracy"),
        ("f1_makro", "f1_macro"),
        ("bleu-4-of-nothing", "There are: accuracy, "),
    ],
)
def test_an_unknown_name_is_refused_with_what_comes_close(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"found '{name}'") as refused:
        check_metric_names(["accuracy", name])
    assert hint in str(refused.value)
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"labels": [0, 2]}, "labels between 0 and 1 .* row 1 holds 2"),
        ({"predictions": [-1, 0]}, "predictions between 0 and 1 .* row 0 holds -1"),
        ({"predictions": [0]}, "one prediction and 2 probabilities for each of the 2 labels"),
        ({"labels": [0.5, 1.0]}, "labels as integers"),
        ({"probabilities": [[0.5, 0.5], [0.5, 0.9]]}, "sum to 1; row 1"),
        ({"probabilities": [[0.5, 0.5], [float("nan"), 1.0]]}, "sum to 1; row 1"),
        ({"probabilities": [[1.5, -0.5], [0.0, 1.0]]}, "0 or more"),
        ({"label_names": ["only"]}, "at least two label names"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changed: dict, message: str) -> None:
    given = {
        "labels": [0, 1],
        "predictions": [0, 1],
        "probabilities": [[0.5, 0.5], [0.5, 0.5]],
        "label_names": ["a", "b"],
    } | changed
    with pytest.raises(DataError, match=message):
        compute_metrics(["accuracy"], **given)


def test_probabilities_of_float32_are_taken_as_they_are() -> None:
    case = random_case("float32", 300, 6)
    single = compute_metrics(
        ["log_loss", "brier"],
        case.labels,
        case.predictions,
        case.probabilities.astype(np.float32),
        label_names=case.label_names,
    )
    assert single["log_loss"].value == pytest.approx(reference("log_loss", case), rel=1e-6)


def test_binary_scores_are_scikit_learns() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        labels, predictions = random.integers(0, 2, (2, random.integers(1, 9)))
        found = precision_recall_f1(labels, predictions, "binary")
        expected = sklearn.metrics.precision_recall_fscore_support(
            labels, predictions, average="binary", zero_division=0
        )
        assert found == pytest.approx(expected[:3])
    with pytest.raises(ConfigError, match="average: expected one of macro, micro, weighted or binary; found 'samples'"):
        precision_recall_f1([0, 1], [0, 1], "samples")


@pytest.mark.parametrize(
    ("labels", "predictions", "message"),
    [
        ([0, 1], [0], r"labels of shape \(2,\) and predictions of shape \(1,\)"),
        ([], [], r"labels of shape \(0,\)"),
        ([0, -1], [0, 1], "found -1 to 1"),
        ([0.5, 1.0], [0, 1], "as whole numbers; found float64"),
    ],
)
def test_functions_of_plain_arrays_refuse_what_numpy_would_count_somewhere(labels, predictions, message) -> None:
    for metric in (accuracy, balanced_accuracy, mcc, partial(precision_recall_f1, average="macro")):
        with pytest.raises(DataError, match=message):
            metric(labels, predictions)
    with pytest.raises(DataError, match="from 0 to 1; found 0 to 2"):
        confusion_matrix([0, 1], [0, 2], 2)


def doubted(confusion, names=("good", "bad")) -> str | None:
    """The note at the accuracy of predictions with these counts (row = label)."""
    labels, predictions = (
        np.repeat(axis.ravel(), np.asarray(confusion).ravel()) for axis in np.indices(np.shape(confusion))
    )
    found = compute_metrics(
        ["accuracy"], labels, predictions, np.full((len(labels), len(names)), 1 / len(names)), label_names=names
    )
    return with_order_doubted(found, confusion, names)["accuracy"].note


def test_labels_that_are_exchanged_are_noticed() -> None:
    assert doubted([[5, 195], [5, 195][::-1]]) == (
        "below the majority baseline; with the labels exchanged it would be 0.9750. Is label_names in the order of the "
        "head's outputs (output 0 = 'good')?"
    )
    note = doubted([[0, 90, 10], [5, 5, 90], [95, 5, 0]], ("a", "b", "c"))
    assert note is not None and "with label_names [c, a, b] it would be 0.9167" in note
    many = doubted(100 * np.roll(np.eye(12, dtype=int), 1, axis=0), tuple(map(str, range(12))))
    assert many is not None and "with the labels in another order it would be 1.0000" in many


def test_a_poor_model_is_not_taken_for_one_with_its_labels_exchanged() -> None:
    assert doubted([[195, 5], [5, 195]]) is None
    assert doubted([[100, 100], [100, 100]]) is None
    assert doubted([[60, 140], [20, 780]]) is None  # better than nothing in one label
    assert doubted([[20, 80], [480, 420]]) is None  # exchanged it would be below the baseline, too
    random = np.random.default_rng(0)
    for _ in range(200):  # of many orders the best one is above chance by chance
        names = tuple(map(str, range(20)))
        assert doubted(random.multinomial(100, np.full(400, 1 / 400)).reshape(20, 20), names) is None
