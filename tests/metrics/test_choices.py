"""Metrics of choices and of continuations, against loops in plain Python and scipy's functions."""

import math
import random

import numpy as np
import pytest
import scipy.special
import scipy.stats
import sklearn.metrics

from petals_eval.errors import ConfigError
from petals_eval.metrics import KINDS, ScoredRows, available_metrics, check_metric_names, measure

CHOICES = ("log_likelihood", "characters", "bytes", "tokens", "unconditioned")
CONTINUATION = ("log_likelihood", "is_greedy", "tokens", "characters")


def scored(examples, columns) -> ScoredRows:
    """Rows of (label, items)."""
    return ScoredRows.of(((label, None, np.array(items, "<f8").tobytes()) for label, items in examples), columns)


def some_choices(rows=200, most=6):
    """Examples with two to `most` choices; some likelihoods are equal, some rows have no label."""
    draw = random.Random(3)
    examples = []
    for index in range(rows):
        items = []
        for _ in range(draw.randint(2, most)):
            characters = draw.randint(1, 12)
            values = (draw.randint(-9, -1) / 2, characters, characters + draw.randint(0, 3), draw.randint(1, 4))
            items.append((*values, draw.randint(-9, -1) / 2))
        examples.append((None if index % 17 == 0 else draw.randrange(len(items)), items))
    return examples


SCORES = {
    "acc": lambda item: item[0],
    "acc_norm": lambda item: item[0] / item[1],
    "acc_bytes": lambda item: item[0] / item[2],
    "acc_tokens": lambda item: item[0] / item[3],
    "acc_mutual_info": lambda item: item[0] - item[4],
}


@pytest.mark.parametrize("name", SCORES)
def test_shares_of_right_choices(name):
    examples = some_choices()
    known = [(label, items) for label, items in examples if label is not None]
    assert len(known) < len(examples)
    right = 0
    for label, items in known:
        scores = [SCORES[name](item) for item in items]
        right += scores.index(max(scores)) == label
    metric = measure("choice", [name], scored(examples, CHOICES))[name]
    assert metric.value == right / len(known)
    interval = scipy.stats.binomtest(right, len(known)).proportion_ci(method="wilson")
    assert metric.ci95 == pytest.approx((interval.low, interval.high), abs=1e-9)


def test_the_five_differ():
    found = measure("choice", list(SCORES), scored(some_choices(), CHOICES))
    assert len({metric.value for metric in found.values()}) == 5


def test_every_metric_of_the_kinds_is_held_here():
    named = {spec.name for spec in KINDS["choice"]} - set(available_metrics("classification"))
    assert named == set(SCORES)
    assert set(available_metrics("continuation")) == {"perplexity", "token_perplexity", "acc"}


def test_one_row_has_an_interval_and_none_has_no_value():
    [row] = some_choices(18)[17:]
    found = measure("choice", ["acc"], scored([(1, row[1])], CHOICES))["acc"]
    assert found.ci95 is not None and found.ci95 != (found.value, found.value)
    assert measure("choice", ["acc"], scored([], CHOICES))["acc"].note == "no example was scored"
    assert measure("choice", ["acc"], scored([(None, row[1])], CHOICES))["acc"].note == "no example has a label"


def test_what_was_not_asked_gives_no_number():
    rows = scored([(0, [(-1.0, 3, 3, 1, math.nan), (-2.0, 3, 3, 1, math.nan)])], CHOICES)
    metric = measure("choice", ["acc_mutual_info"], rows)["acc_mutual_info"]
    assert metric.value is None and "the likelihood that this needs" in metric.note
    assert measure("choice", ["acc"], rows)["acc"].value == 1.0


def test_choices_with_names_have_the_metrics_of_classes_too():
    examples = [(label, items) for label, items in some_choices(100, most=2) if label is not None]
    names = ("no", "yes")
    found = measure(
        "choice", ["acc", "accuracy", "f1_macro", "mcc", "log_loss"], scored(examples, CHOICES), label_names=names
    )
    labels = [label for label, _ in examples]
    scores = np.array([[item[0] for item in items] for _, items in examples])
    predictions = scores.argmax(axis=1)
    assert found["acc"].value == found["accuracy"].value == sklearn.metrics.accuracy_score(labels, predictions)
    assert found["f1_macro"].value == pytest.approx(sklearn.metrics.f1_score(labels, predictions, average="macro"))
    assert found["mcc"].value == pytest.approx(sklearn.metrics.matthews_corrcoef(labels, predictions))
    shares = scipy.special.softmax(scores, axis=1)
    assert found["log_loss"].value == pytest.approx(sklearn.metrics.log_loss(labels, shares))


def test_choices_without_names_do_not():
    with pytest.raises(ConfigError, match="f1_macro needs choices that all rows share"):
        measure("choice", ["f1_macro"], scored(some_choices(), CHOICES))
    with pytest.raises(ConfigError, match=r"found 'acc_nrom.\. Did you mean acc_norm"):
        check_metric_names(["acc_nrom"], "choice")


# -- continuations


def some_continuations(rows=150):
    draw = random.Random(5)
    return [(None, [(-draw.random() * 8, float(draw.random() < 0.3), draw.randint(1, 5), 4)]) for _ in range(rows)]


def test_perplexities_and_the_share_of_greedy_ones():
    examples = some_continuations()
    found = measure("continuation", ["perplexity", "token_perplexity", "acc"], scored(examples, CONTINUATION))
    likelihoods = [items[0][0] for _, items in examples]
    tokens = sum(items[0][2] for _, items in examples)
    assert found["perplexity"].value == pytest.approx(math.exp(-sum(likelihoods) / len(likelihoods)), rel=1e-12)
    assert found["token_perplexity"].value == pytest.approx(math.exp(-sum(likelihoods) / tokens), rel=1e-12)
    greedy = sum(items[0][1] == 1 for _, items in examples)
    assert found["acc"].value == greedy / len(examples)
    interval = scipy.stats.binomtest(int(greedy), len(examples)).proportion_ci(method="wilson")
    assert found["acc"].ci95 == pytest.approx((interval.low, interval.high), abs=1e-9)


@pytest.mark.parametrize("name", ["perplexity", "token_perplexity"])
def test_of_many_rows_the_intervals_are_those_of_scipys_bootstrap(name):
    examples = some_continuations()
    likelihoods = np.array([items[0][0] for _, items in examples])
    counts = np.array([items[0][2] if name == "token_perplexity" else 1.0 for _, items in examples])
    theirs = scipy.stats.bootstrap(
        (likelihoods, counts),
        lambda values, of, axis=-1: np.exp(-values.sum(axis) / of.sum(axis)),
        paired=True,
        vectorized=True,
        n_resamples=4000,
        method="percentile",
        random_state=0,
    ).confidence_interval
    ours = measure("continuation", [name], scored(examples, CONTINUATION))[name]
    width = theirs.high - theirs.low
    assert ours.ci95 == pytest.approx((theirs.low, theirs.high), abs=0.1 * width)
    assert ours.ci95[0] < ours.value < ours.ci95[1]


def test_what_is_more_than_a_number_holds_says_so():
    rows = scored([(None, [(-5000.0, 0.0, 1000, 4)]), (None, [(-4000.0, 0.0, 1000, 4)])], CONTINUATION)
    found = measure("continuation", ["perplexity", "token_perplexity"], rows)
    assert (
        found["perplexity"].value is None
        and found["perplexity"].note == "e to the power of 4500, more than a number holds"
    )
    assert found["token_perplexity"].value == pytest.approx(math.exp(4.5))
    rows = scored([(None, [(-900.0, 0.0, 1, 4)]), (None, [(-100.0, 0.0, 1, 4)])], CONTINUATION)
    metric = measure("continuation", ["perplexity"], rows)["perplexity"]
    assert metric.value == pytest.approx(math.exp(500)) and metric.ci95 is None and "no interval" in metric.note


def test_one_row_has_a_perplexity_and_no_interval():
    metric = measure("continuation", ["perplexity"], scored(some_continuations(1), CONTINUATION))["perplexity"]
    assert metric.value is not None and metric.ci95 is None and metric.note == "no interval from one example"
