"""Differences of two sides on the same rows, in every metric of every kind."""

import math

import numpy as np
import pytest
from scipy.stats import bootstrap, norm, t
from sklearn.metrics import matthews_corrcoef
from statsmodels.api import OLS

from petals_eval.metrics import KINDS, measure
from petals_eval.metrics.differences import Difference, Side, differences, pairs_of
from petals_eval.metrics.paired import mcnemar, newcombe_paired
from petals_eval.metrics.resampling import Draws, every_row, resampled_rows
from petals_eval.metrics.scored_rows import ScoredRows

LABELS = ("no", "maybe", "yes")
COLUMNS = {
    "classification": ("score",),
    "regression": ("score",),
    "choice": ("log_likelihood", "characters", "bytes", "tokens", "unconditioned"),
    "continuation": ("log_likelihood", "is_greedy", "tokens", "characters"),
    "perplexity": ("log_likelihood", "tokens", "words", "bytes"),
    "generation": (
        "new_tokens",
        "stopped_by_length",
        "exact_match[strict]",
        "exact_match[loose]",
        "token_f1",
        *(
            "bleu/text_length",
            "bleu/reference_length",
            *(f"bleu/{w}_{n}" for w in ("right", "of") for n in range(1, 5)),
        ),
    ),
}


def rows_of(kind: str, n: int, seed: int) -> ScoredRows:
    """Rows of a kind; labels are drawn by n alone, so that two seeds are two sides."""
    labels = np.random.default_rng(n).integers(0, 3, n).astype(float)
    random = np.random.default_rng([n, seed])
    items = 3 if kind in ("classification", "choice") else 1
    values = random.normal(size=(n, items, len(COLUMNS[kind])))
    if items == 3:
        values[np.arange(n), labels.astype(int), 0] += 1.0
        values[:, :, 1:] = random.integers(1, 9, size=values[:, :, 1:].shape)
    predictions = values[:, :, 0].argmax(axis=1).astype(float)
    if kind == "regression":
        values[:, 0, 0] += labels
        predictions = values[:, 0, 0]
    elif kind in ("continuation", "perplexity"):
        values[:, 0, 0] = -10 * random.random(n) - 1
        values[:, 0, 1:] = random.integers(1, 20, size=(n, len(COLUMNS[kind]) - 1))
        if kind == "continuation":
            values[:, 0, 1] = random.integers(0, 2, n)
        labels, predictions = np.full(n, math.nan), np.full(n, math.nan)
    elif kind == "generation":
        values[:, 0, :] = random.integers(0, 2, size=(n, len(COLUMNS[kind])))
        values[:, 0, 5:7] = 20
        values[:, 0, 7:11] = random.integers(1, 5, size=(n, 4))
        values[:, 0, 11:] = 8
        values[::7, 0, 2:5] = math.nan
        labels, predictions = np.full(n, math.nan), np.full(n, math.nan)
    starts = np.arange(n + 1) * items
    return ScoredRows(labels, predictions, values.reshape(n * items, -1), starts, COLUMNS[kind])


def names_of(kind: str) -> list[str]:
    names = [spec.name for spec in KINDS[kind] if spec.terms or spec.resampler]
    known = {column.partition("[")[0].partition("/")[0] for column in COLUMNS["generation"]}
    return [name for name in names if kind != "generation" or name in known]


def sides(kind: str, n: int = 120, count: int = 2) -> list[Side]:
    return [Side(name, kind, (rows_of(kind, n, seed),)) for seed, name in enumerate("abcde"[:count])]


def label_names(kind: str) -> tuple[str, ...]:
    return LABELS if kind in ("classification", "choice") else ()


@pytest.mark.parametrize("kind", KINDS)
def test_a_metric_on_resamples_is_the_metric_of_those_rows(kind: str) -> None:
    rows, names = rows_of(kind, 60, 1), names_of(kind)
    drawn = np.random.default_rng(2).integers(0, 60, 60)
    weights = np.bincount(drawn, minlength=60)[:, None].astype(float)
    for draws, written_out in ((every_row(60), rows), (Draws(weights), rows.at(np.sort(drawn)))):
        expected = measure(kind, names, written_out, label_names=label_names(kind))
        seen = set()
        for spec in KINDS[kind]:
            if spec.name in names:
                resampler = spec.on_draws(spec.view(rows, label_names(kind)))
                assert resampler is not None
                for name, value in resampler(draws).items():
                    assert value[0] == pytest.approx(expected[name].value, rel=1e-9), name
                    seen.add(name)
        assert seen == expected.keys() - {"majority_baseline"}


@pytest.mark.parametrize("kind", KINDS)
def test_differences_are_those_of_the_two_values(kind: str) -> None:
    one, other = sides(kind)
    names = names_of(kind)
    values = [measure(kind, names, side.draws[0], label_names=label_names(kind)) for side in (one, other)]
    found = differences([one, other], names, label_names=label_names(kind))
    assert {each.metric for each in found} == values[0].keys() - {"majority_baseline"}
    for each in found:
        assert each.value == pytest.approx(values[0][each.metric].value - values[1][each.metric].value), each.metric
        assert each.ci95 is not None and each.ci95[0] <= each.value <= each.ci95[1]
        assert 0 <= each.p_value <= 1 and each.p_holm == each.p_value
        is_share = next(
            spec.is_share for spec in KINDS[kind] if each.metric.partition("[")[0] in (spec.name, spec.score)
        )
        assert (each.only_first is not None) == is_share
    back = {each.metric: each for each in differences([other, one], names, label_names=label_names(kind))}
    for each in found:
        assert back[each.metric].value == pytest.approx(-each.value)
        assert back[each.metric].ci95 == pytest.approx((-each.ci95[1], -each.ci95[0]), abs=1e-9)


def test_a_share_has_the_exact_test_and_newcombes_interval() -> None:
    one, other = sides("classification")
    right = [side.draws[0].predictions == side.draws[0].labels for side in (one, other)]
    cells = [int((right[0] == a).__and__(right[1] == b).sum()) for a, b in ((1, 1), (1, 0), (0, 1), (0, 0))]
    [found] = differences([one, other], ["accuracy"], label_names=LABELS)
    assert (found.only_first, found.only_second) == (cells[1], cells[2])
    assert found.p_value == mcnemar(cells[1], cells[2])
    assert found.ci95 == newcombe_paired(*cells)


def test_the_paired_bootstrap_is_that_of_scipy() -> None:
    one, other = sides("regression", 150)
    terms = [(side.draws[0].labels - side.draws[0].predictions) ** 2 for side in (one, other)]
    found = differences([one, other], ["mse"])[0]
    drawn = bootstrap(
        (terms[0] - terms[1],), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(1)
    )
    width = drawn.confidence_interval.high - drawn.confidence_interval.low
    assert found.ci95 == pytest.approx(tuple(drawn.confidence_interval), abs=0.08 * width)
    assert found.p_value == pytest.approx(2 * norm.sf(abs(found.value) / drawn.standard_error), abs=0.03)
    assert found.minimum_detectable == pytest.approx(2.8016 * drawn.standard_error, rel=0.08)


def test_clusters_have_robust_errors_and_are_drawn_whole() -> None:
    one, other = sides("classification", 120)
    clusters = np.random.default_rng(5).integers(0, 15, 120)
    names = ["accuracy", "log_loss", "mcc"]
    found = {each.metric: each for each in differences([one, other], names, label_names=LABELS, clusters=clusters)}
    right = [(side.draws[0].predictions == side.draws[0].labels).astype(float) for side in (one, other)]
    fitted = OLS(right[0] - right[1], np.ones(120)).fit(cov_type="cluster", cov_kwds={"groups": clusters}, use_t=True)
    assert found["accuracy"].p_value == pytest.approx(float(fitted.pvalues[0]))
    assert found["accuracy"].ci95 == pytest.approx(tuple(fitted.conf_int()[0]))
    assert found["accuracy"].only_first is not None
    assert "15 clusters" in found["log_loss"].method and "15 clusters" in found["mcc"].method
    # A cluster written twice is one cluster: nothing is learned from it.
    twice = [Side(side.name, side.kind, (side.draws[0].at(np.repeat(np.arange(120), 2)),)) for side in (one, other)]
    again = {
        each.metric: each for each in differences(twice, names, label_names=LABELS, clusters=np.repeat(clusters, 2))
    }
    for name in names:
        assert again[name].ci95 == pytest.approx(found[name].ci95, abs=1e-9)
    [single] = differences([one, other], ["accuracy"], label_names=LABELS, clusters=np.zeros(120, dtype=np.int64))
    assert single.ci95 is None and single.note == "no interval of one cluster"
    assert t.ppf(0.975, 14) > norm.ppf(0.975)


def test_resamples_of_clusters_hold_whole_clusters() -> None:
    clusters = np.array([0, 0, 1, 2, 2, 2])
    first = next(iter(resampled_rows(6, 0, clusters)))
    for draw in first.weights.T:
        assert len({*draw[:2]}) == 1 and len({*draw[3:]}) == 1
        assert draw[0] + draw[2] + draw[3] == 3


def test_equal_sides_differ_by_nothing_and_nothing_is_claimed_of_it() -> None:
    rows = rows_of("classification", 50, 1)
    both = [Side(name, "classification", (rows,)) for name in "ab"]
    for each in differences(both, ["accuracy", "f1_macro"], label_names=LABELS):
        assert (each.value, each.p_value, each.minimum_detectable) == (0, 1.0, None)
    f1 = differences(both, ["f1_macro"], label_names=LABELS)[0]
    assert f1.ci95 is None and f1.note == "no interval: all resamples have the same difference"


def test_several_are_corrected_metric_by_metric() -> None:
    found = differences(sides("classification", 120, count=4), ["accuracy", "mcc"], label_names=LABELS)
    assert [(each.first, each.second) for each in found[:6]] == pairs_of("abcd")
    for metric in ("accuracy", "mcc"):
        alike = sorted((each for each in found if each.metric == metric), key=lambda each: each.p_value or 0.0)
        assert alike[0].p_holm == pytest.approx(min(1.0, 6 * alike[0].p_value))
        assert [each.p_holm for each in alike] == sorted(each.p_holm or 0.0 for each in alike)


def test_over_draws_of_shots_the_means_are_compared() -> None:
    draws = [Side(name, "classification", tuple(rows_of("classification", 80, s) for s in seeds)) for name, seeds in
             (("a", (1, 2, 3)), ("b", (4, 5, 6)))]  # fmt: skip
    names = ["accuracy", "f1_macro"]
    found = differences(draws, names, label_names=LABELS)
    for each in found:
        of = [[measure("classification", names, rows, label_names=LABELS)[each.metric].value for rows in side.draws]
              for side in draws]  # fmt: skip
        assert each.value == pytest.approx(np.mean(of[0]) - np.mean(of[1]))
        assert each.only_first is None and each.ci95 is not None
    assert found[0].p_value < 1


def test_rows_without_a_label_are_in_no_difference() -> None:
    whole = sides("classification", 90)
    marked = []
    for side in whole:
        labels = side.draws[0].labels.copy()
        labels[::3] = math.nan
        rows = side.draws[0]
        marked.append(
            Side(side.name, side.kind, (ScoredRows(labels, rows.predictions, rows.values, rows.starts, rows.columns),))
        )
    kept = [Side(side.name, side.kind, (side.draws[0].labelled(),)) for side in marked]
    names = ["accuracy", "mcc", "log_loss"]
    assert differences(marked, names, label_names=LABELS) == differences(kept, names, label_names=LABELS)
    assert differences(marked, ["accuracy"], label_names=LABELS)[0].rows == 60


def test_the_bootstrap_of_clusters_is_that_of_clusters_written_out() -> None:
    one, other = sides("classification", 120)
    clusters = np.random.default_rng(5).integers(0, 15, 120)
    [found] = differences([one, other], ["mcc"], label_names=LABELS, clusters=clusters)
    random, rows = np.random.default_rng(9), [side.draws[0] for side in (one, other)]
    members = [np.flatnonzero(clusters == cluster) for cluster in range(15)]
    drawn = []
    for _ in range(400):
        chosen = np.concatenate([members[cluster] for cluster in random.integers(0, 15, 15)])
        first, second = (matthews_corrcoef(each.labels[chosen], each.predictions[chosen]) for each in rows)
        drawn.append(first - second)
    error = np.std(drawn, ddof=1)
    assert found.ci95 == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), abs=0.4 * error)
    assert found.p_value == pytest.approx(2 * norm.sf(abs(found.value) / error), abs=0.06)
    assert found.minimum_detectable == pytest.approx((norm.ppf(0.975) + norm.ppf(0.8)) * error, rel=0.15)


@pytest.mark.soak
def test_what_clusters_can_detect_is_found_in_four_of_five_data_sets() -> None:
    """Errors that share a part within a cluster."""
    random = np.random.default_rng(2)
    clusters = np.repeat(np.arange(40), 6)

    def drawn(difference: float) -> Difference:
        shared = 20 + random.normal(size=(2, 40))[:, clusters] + random.normal(size=(2, 240))
        shared[0] += difference
        both = []
        for name, terms in zip("ab", shared, strict=True):
            rows = ScoredRows(np.zeros(240), terms, terms[:, None], np.arange(241), ("score",))
            both.append(Side(name, "regression", (rows,)))
        return differences(both, ["mae"], clusters=clusters)[0]

    detectable = float(np.mean([drawn(0.0).minimum_detectable for _ in range(100)]))
    assert np.mean([drawn(detectable).p_value < 0.05 for _ in range(600)]) == pytest.approx(0.8, abs=0.04)
    # And of sides that are alike about one in twenty is told apart.
    assert np.mean([drawn(0.0).p_value < 0.05 for _ in range(600)]) == pytest.approx(0.05, abs=0.025)


@pytest.mark.soak
def test_the_paired_bootstrap_covers_and_tells_seldom_apart_what_is_alike() -> None:
    random = np.random.default_rng(4)
    covered, rejected = [], []
    for _ in range(600):
        labels = random.integers(0, 3, 200).astype(float)
        both = []
        for name in "ab":
            scores = random.normal(size=(200, 3))
            scores[np.arange(200), labels.astype(int)] += 1.2
            predictions = scores.argmax(axis=1).astype(float)
            rows = ScoredRows(labels, predictions, scores.reshape(600, 1), np.arange(201) * 3, ("score",))
            both.append(Side(name, "classification", (rows,)))
        [found] = differences(both, ["f1_macro"], label_names=LABELS)
        covered.append(found.ci95[0] <= 0 <= found.ci95[1])
        rejected.append(found.p_value < 0.05)
    assert np.mean(covered) >= 0.93
    assert np.mean(rejected) <= 0.07
