"""Rows that depend on each other: named by a column of the data, kept with predictions, reckoned with in intervals."""

import json
from pathlib import Path

import numpy as np
import pytest
from statsmodels.api import OLS

import petals_eval
from petals_eval.data import rows_of
from petals_eval.errors import DataError, RunFolderError, TaskError
from petals_eval.metrics import KINDS, measure
from petals_eval.metrics.estimates import FEW_CLUSTERS, are_few_clusters, mean_of
from petals_eval.metrics.scored_rows import CLUSTER, ScoredRows
from petals_eval.runs import Manifest
from petals_eval.tasks import load_task
from petals_eval.tasks.clusters import check_clusters, clustered_examples
from tests.evaluation.test_noise import MovingModel
from tests.fake_model import FakeModel, evaluate
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.task_definitions import DEFINITIONS

TASK = {"text": "{text}", "label_column": "label", "label_names": ["bad", "good"], "metrics": ["accuracy", "f1_macro"]}


def reviews(count: int, films: int) -> list[dict[str, object]]:
    return [
        {"text": "fine " * (1 + n % 3), "label": ("bad", "good")[n % 2], "of": f"film {n % films}"}
        for n in range(count)
    ]


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_takes_a_cluster_column_which_changes_neither_answer_nor_hash(kind: str) -> None:
    plain, rows = DEFINITIONS[kind]
    rows = [{**row, "of": index // 2} for index, row in enumerate(rows)]
    task = load_task({**plain, "cluster_column": "of"})
    assert task.fingerprint() == load_task(plain).fingerprint()
    found = list(clustered_examples(task, rows_of(rows), byte_tokenizer()))
    without = list(load_task(plain).examples(rows_of(rows), byte_tokenizer()))
    assert [each.row_hash for each in found] == [each.row_hash for each in without]
    assert [each.cluster for each in without] == [None] * len(rows)
    numbers = [each.cluster for each in found]
    assert numbers[0] == numbers[1] != numbers[2]
    assert all(number == int(number) and 0 <= number < 2**48 for number in numbers)
    # One number for one value, whatever other rows there are.
    assert numbers[2:] == [each.cluster for each in clustered_examples(task, rows_of(rows[2:]), byte_tokenizer())]


@pytest.mark.parametrize("missing", [None, "", " ", float("nan"), [1]])
def test_a_row_that_does_not_say_its_cluster_is_named(missing: object) -> None:
    task = load_task({**TASK, "cluster_column": "of"})
    first = [2] if isinstance(missing, list) else "1"
    rows = rows_of([{"text": "a", "label": "bad", "of": each} for each in (first, missing)])
    with pytest.raises(DataError, match=r"row [01]: column of should say of which cluster the row is"):
        check_clusters(task, rows)
    with pytest.raises(DataError, match=r"ha(s|ve) no column off, which the task"):
        check_clusters(load_task({**TASK, "cluster_column": "off"}), rows)
    pages = {"kind": "perplexity", "text": "{text}", "rows_per_document": 2, "cluster_column": "of"}
    with pytest.raises(TaskError, match="cluster_column: documents of several rows have none"):
        load_task(pages)


def test_a_run_keeps_the_clusters_and_its_intervals_go_by_them(tmp_path: Path) -> None:
    rows, out = reviews(30, 10), tmp_path / "run"
    result = evaluate(FakeModel(), rows, out, task={**TASK, "cluster_column": "of"})
    plain = evaluate(FakeModel(), rows, tmp_path / "plain", task=TASK)
    manifest = Manifest.read(out / "manifest.json")
    assert manifest.answer_columns == ("score", CLUSTER) and manifest.task["cluster_column"] == "of"
    clusters = [line["cluster"] for line in lines(out / "predictions.jsonl")]
    assert len(set(clusters)) == 10 and clusters[:10] == clusters[10:20]
    assert "film" not in (out / "predictions.jsonl").read_text() + (out / "manifest.json").read_text()
    assert (result.first.n_clusters, plain.first.n_clusters) == (10, None)
    assert result.metrics["accuracy"].value == plain.metrics["accuracy"].value
    assert result.metrics["accuracy"].is_rough and not plain.metrics["accuracy"].is_rough
    assert result.metrics["accuracy"].ci95 != plain.metrics["accuracy"].ci95
    assert json.loads((out / "metrics.json").read_text())["n_clusters"] == 10
    report = (out / "report.md").read_text()
    assert "intervals are cluster-robust: rows depend on each other within 10 clusters" in report
    # An unfinished run goes on with the same clusters alone.
    unfinished = json.loads((out / "manifest.json").read_text()) | {"finished": None}
    (out / "manifest.json").write_text(json.dumps(unfinished))
    with pytest.raises(RunFolderError, match=r"task.cluster_column: was of, now nothing"):
        evaluate(FakeModel(), rows, out, task=TASK)


def test_comparisons_go_by_clusters_and_say_how_many(tmp_path: Path) -> None:
    rows, clustered = reviews(30, 10), {**TASK, "cluster_column": "of"}
    evaluate(FakeModel(), rows, tmp_path / "one", task=clustered)
    evaluate(FakeModel(), rows, tmp_path / "plain", task=TASK)
    predictions = [f"{n},{('bad', 'good')[n % 5 == 0]}" for n in range(30)]
    (tmp_path / "other.csv").write_text("\n".join(["key,prediction", *predictions, ""]))
    found = petals_eval.compare(tmp_path / "plain", tmp_path / "one")
    assert found.to_json()["clusters"] == 10  # one of them knows
    found = petals_eval.compare(tmp_path / "one", tmp_path / "other.csv")
    assert found.to_json()["clusters"] == 10
    accuracy = found.of("no prompts", "other")["accuracy"]
    assert accuracy.method == "cluster-robust errors of 10 clusters, Student's t"
    assert accuracy.note == "10 clusters are few, or of very unequal sizes: it may cover less than 95%"
    elsewhere = [{**row, "of": index} for index, row in enumerate(rows)]
    evaluate(FakeModel(), elsewhere, tmp_path / "two", task=clustered)
    with pytest.raises(DataError, match=r"the same rows in other clusters. Evaluate both with the same cluster_column"):
        petals_eval.compare(tmp_path / "one", tmp_path / "two")


def test_without_skewness_the_interval_is_that_of_statsmodels() -> None:
    random = np.random.default_rng(0)
    half, sizes = random.normal(size=200), random.integers(0, 30, 200)
    terms, clusters = np.concatenate([half, -half]) + 3, np.concatenate([sizes, sizes + 30])
    fitted = OLS(terms, np.ones(400)).fit(
        cov_type="cluster", cov_kwds={"groups": clusters, "use_correction": True, "df_correction": True}, use_t=True
    )
    found = mean_of("m", terms, clusters, limits=(-np.inf, np.inf), may_be_heavy=False)
    # statsmodels' correction is G / (G - 1) (n - 1) / (n - k), which with one mean to be fitted is G / (G - 1).
    assert found.ci95 == pytest.approx(tuple(fitted.conf_int()[0]))


def test_few_clusters_and_very_unequal_ones_are_marked() -> None:
    assert are_few_clusters(np.repeat(np.arange(FEW_CLUSTERS - 1), 10))
    assert not are_few_clusters(np.repeat(np.arange(FEW_CLUSTERS), 10))
    assert are_few_clusters(np.concatenate([np.arange(300), np.repeat([300, 301, 302], 100)]))


def test_intervals_of_clustered_rows_cover_where_those_of_single_rows_do_not() -> None:
    """As `scripts/interval_coverage.py` has it, at one place and with fewer sets."""
    random, covered = np.random.default_rng(1), {True: [], False: []}
    for _ in range(400):
        chances = random.beta(0.75 * 7 / 3, 0.25 * 7 / 3, size=60)  # correlation within a cluster: 0.3
        right = random.random((60, 8)) < chances[:, None]
        values = np.column_stack(
            [np.zeros(480), right.ravel(), np.ones(480), np.ones(480), np.repeat(np.arange(60), 8)]
        )
        columns = ("log_likelihood", "is_greedy", "tokens", "characters", CLUSTER)
        nothing, starts = np.full(480, np.nan), np.arange(481)
        for is_clustered, found in covered.items():
            width = 5 if is_clustered else 4
            rows = ScoredRows(nothing, nothing, values[:, :width], starts, columns[:width])
            low, high = measure("continuation", ["acc"], rows)["acc"].ci95
            found.append(low <= 0.75 <= high)
    assert np.mean(covered[True]) >= 0.92
    assert np.mean(covered[False]) < 0.8


def test_numerical_noise_is_that_of_the_same_rows_without_clusters(tmp_path: Path) -> None:
    rows = reviews(200, 40)
    clustered = evaluate(MovingModel(), rows, tmp_path / "one", task={**TASK, "cluster_column": "of"}).first.noise
    assert clustered is not None and clustered.unsure > 0
    assert clustered == evaluate(MovingModel(), rows, tmp_path / "other", task=TASK).first.noise
