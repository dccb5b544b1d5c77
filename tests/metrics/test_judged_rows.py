"""How wrong rows are and how sure the model was, of every kind; and groups that go wrong more often than the others."""

import math

import numpy as np
import pytest
from scipy.special import log_softmax
from scipy.stats import fisher_exact, mannwhitneyu

from petals_eval.metrics import KINDS, measure
from petals_eval.metrics.groups import p_values_of_groups
from petals_eval.metrics.judged_rows import LOSSES, judged, ordered
from petals_eval.metrics.scored_rows import ScoredRows
from tests.metrics.test_differences import label_names, rows_of


@pytest.mark.parametrize("kind", ["classification", "choice"])
def test_scores_become_probabilities_of_what_is_predicted_and_of_what_is_right(kind: str) -> None:
    rows = rows_of(kind, 80, 1)
    found = judged(kind, rows)
    shares = log_softmax(rows.values[:, 0].reshape(80, 3), axis=1)
    labels = rows.labels.astype(int)
    assert found.predictions.tolist() == shares.argmax(axis=1).tolist()
    assert found.confidence == pytest.approx(np.exp(shares.max(axis=1)))
    assert found.loss == pytest.approx(-shares[np.arange(80), labels])
    assert found.of_label == pytest.approx(np.exp(shares[np.arange(80), labels]))
    ranked = np.sort(np.exp(shares), axis=1)
    assert found.margin == pytest.approx(ranked[:, 2] - ranked[:, 1])
    assert found.runner_up.tolist() == np.argsort(shares, axis=1)[:, 1].tolist()
    name = "accuracy" if kind == "classification" else "acc"
    accuracy = measure(kind, [name], rows, label_names=label_names(kind))[name].value
    assert 1 - found.is_wrong.mean() == pytest.approx(accuracy)


def test_rows_may_have_any_number_of_choices_and_no_label() -> None:
    scores = np.array([-1.0, -2.0, -900.0, -3.0, -3.0, -1e4, 0.0])
    rows = ScoredRows(np.array([1.0, math.nan, 0.0]), np.zeros(3), scores[:, None], np.array([0, 3, 5, 7]), ("x",))
    found = judged("choice", rows)
    assert found.predictions.tolist() == [0, 0, 1] and found.runner_up.tolist() == [1, 1, 0]
    assert found.is_wrong[0] == 1 and math.isnan(found.is_wrong[1]) and math.isnan(found.loss[1])
    assert found.margin[1] == 0 and found.loss[2] == pytest.approx(1e4) and found.of_label[2] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_judged_as_its_metrics_are(kind: str) -> None:
    rows = rows_of(kind, 60, 2)
    found, known = judged(kind, rows), ~np.isnan(judged(kind, rows).loss)
    assert len(found) == 60 and kind in LOSSES and known.any()
    loss = found.loss[known].mean()
    if kind == "regression":
        assert loss == pytest.approx(measure(kind, ["mae"], rows)["mae"].value)
        assert found.errors == pytest.approx(rows.predictions - rows.labels)
    elif kind == "continuation":
        assert math.exp(loss) == pytest.approx(measure(kind, ["perplexity"], rows)["perplexity"].value)
        assert 1 - found.is_wrong.mean() == pytest.approx(measure(kind, ["acc"], rows)["acc"].value)
    elif kind == "perplexity":
        weights = rows.column("tokens")
        tokens = measure(kind, ["token_perplexity"], rows)["token_perplexity"].value
        assert math.exp(np.average(found.loss, weights=weights)) == pytest.approx(tokens)
    elif kind == "generation":
        exact = measure(kind, ["exact_match"], rows)["exact_match[strict]"].value
        assert 1 - np.nanmean(found.is_wrong) == pytest.approx(exact)
        assert known.tolist() == [at % 7 != 0 for at in range(60)]
    empty = judged(kind, rows.at(np.zeros(0, dtype=np.int64)))
    assert len(empty) == 0


def test_of_equal_values_the_first_comes_first() -> None:
    values = np.array([1.0, 3.0, math.nan, 3.0, 2.0])
    every = np.ones(5, dtype=bool)
    assert ordered(values, every, highest=True) == [1, 3, 4, 0]
    assert ordered(values, values != 1, highest=False, most=2) == [4, 1]


def test_groups_are_tested_as_scipy_tests_them_and_corrected_together() -> None:
    random = np.random.default_rng(0)
    wrong, loss = (random.random(90) < 0.3).astype(float), random.normal(size=90)
    wrong[:30], loss[:30] = 1, loss[:30] + 2
    members = {name: np.arange(90) // 30 == at for at, name in enumerate("abc")}
    for values, test in ((wrong, "fisher"), (loss, "mann")):
        by_hand = {}
        for name, inside in members.items():
            one, other = values[inside], values[~inside]
            counts = [[each.sum(), (1 - each).sum()] for each in (one, other)]
            by_hand[name] = (fisher_exact(counts) if test == "fisher" else mannwhitneyu(one, other)).pvalue
        found = p_values_of_groups(members, values)
        assert found["a"] == pytest.approx(3 * min(by_hand.values())) and found["a"] < 1e-6
        assert all(found[name] >= by_hand[name] for name in members)
    assert p_values_of_groups({"all": np.ones(90, dtype=bool)}, wrong) == {}
    assert p_values_of_groups({}, wrong) == {}


def test_groups_that_are_alike_are_seldom_told_apart() -> None:
    """In 5 of 100 data sets at most some group stands out of five that are alike."""
    random, members = np.random.default_rng(1), {str(at): np.arange(100) // 20 == at for at in range(5)}
    found = [min(p_values_of_groups(members, (random.random(100) < 0.3) * 1.0).values()) < 0.05 for _ in range(200)]
    assert np.mean(found) <= 0.06
