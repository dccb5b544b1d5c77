"""Rows at hand as what is evaluated, and predictions in the result. No swarm."""

import json
import tracemalloc
from types import SimpleNamespace

import datasets
import pandas
import pytest

import petals_eval
from petals_eval.errors import ConfigError, DataError
from petals_eval.runs.journal import Journal
from petals_eval.tasks.requests import Prediction
from tests.fake_model import TASK, FakeModel, answers_of, evaluate, fake_adapter, write_rows

RECORDS = [{"text": " ".join(["fine"] * (1 + index)), "label": ("good", "bad")[index % 2]} for index in range(6)]
MAPPING = {"text": "{text}", "label_column": "label", "label_names": ["bad", "good"], "metrics": ["accuracy"]}
NUMBERS = {"kind": "regression", "text": "{text}", "label_column": "label", "metrics": ["pearson", "mse"]}


def run(data, model=None, **options):
    return petals_eval.evaluate(model or FakeModel(), **({"task": TASK, "data": data} | options))


@pytest.mark.parametrize(
    "form",
    [
        lambda records: records,
        iter,
        lambda records: pandas.DataFrame(records, index=range(100, 100 + len(records))),
        datasets.Dataset.from_list,
        lambda records: datasets.Dataset.from_list(records).to_iterable_dataset(),
    ],
)
def test_rows_in_memory_are_evaluated_as_those_of_a_file(form, tmp_path):
    from_file = evaluate(FakeModel(), write_rows(tmp_path / "rows.csv", range(1, 7)), tmp_path / "file")
    result = run(form(RECORDS), out=tmp_path / "memory")
    assert result.metrics == from_file.metrics
    assert result.predictions == from_file.predictions
    assert [each.key for each in result.predictions] == ["0", "1", "2", "3", "4", "5"]
    for name in ("predictions.jsonl", "failures.jsonl"):
        written = [tmp_path / folder / name for folder in ("file", "memory")]
        assert len({path.read_text() if path.exists() else None for path in written}) == 1
    data = json.loads((tmp_path / "memory" / "manifest.json").read_text())["data"]
    assert (data["name"], data["rows"]) == ("rows in memory", 6)
    assert data["fingerprint"] == petals_eval.data.rows_of(RECORDS).fingerprint


def test_a_run_of_rows_in_memory_goes_on_with_the_same_rows_alone(tmp_path):
    with pytest.raises(petals_eval.errors.DeadlineError):
        run(RECORDS, FakeModel(until=2), out=tmp_path / "run")
    with pytest.raises(petals_eval.errors.RunFolderError, match=r"data\.fingerprint: was"):
        run(RECORDS[::-1], out=tmp_path / "run")
    model = FakeModel()
    assert run(iter(RECORDS), model, out=tmp_path / "run").first.n_scored == 6
    assert len(model.sent) == 4


def test_a_limit_and_a_shard_of_rows_in_memory():
    whole, part = run(RECORDS, limit=4, seed=2), run(RECORDS, limit=4, seed=2, shard="1/2")
    assert len(whole.predictions) == 4 and len(part.predictions) == 2
    assert {each.key for each in part.predictions} < {each.key for each in whole.predictions}


def test_the_task_may_be_a_mapping():
    assert run(RECORDS, task=MAPPING).metrics == run(RECORDS, task={**MAPPING, "name": "mine"}).metrics
    assert run(RECORDS, task=MAPPING).task == "task"


@pytest.mark.parametrize("out", [None, "run"])
def test_predictions_are_in_the_result_for_each_adapter(out, tmp_path):
    adapters = [fake_adapter("first"), fake_adapter("second")]
    result = run(RECORDS, FakeModel(adapters=adapters), out=out and tmp_path / out)
    assert list(result.adapters) == ["first", "second"]
    for adapter in result.adapters.values():
        assert [type(each) for each in adapter.predictions] == [Prediction] * 6
        assert [(each.label, each.prediction, each.scores) for each in adapter.predictions] == [
            (1, 1, (0.0, 1.0)),
            (0, 1, (0.0, 1.0)),
        ] * 3
        assert all(type(each.label) is type(each.prediction) is int for each in adapter.predictions)
    assert result.predictions is result.first.predictions
    assert "predictions" not in repr(result) and "predictions" not in result.to_json()


def test_failures_are_no_predictions():
    result = run(RECORDS, FakeModel(takes=4))
    assert [each.key for each in result.predictions] == ["0", "1", "2", "3"]
    assert [each.key for each in result.first.failures] == ["4", "5"]
    assert all("tokens" in each.reason for each in result.first.failures)
    assert result.first.n_failed == 2


def test_predictions_take_less_than_a_kilobyte_each(tmp_path):
    """Six labels: the journal's rows as they stand in the result."""
    with Journal(tmp_path / "journal.sqlite", create=True) as journal:
        for index in range(5000):
            values = tuple((index + 0.5 * score,) for score in range(6))
            journal.add("a", Prediction(str(index), index % 6, 5, values, 20, row_hash=f"{index:016x}"))
        tracemalloc.start()
        kept = tuple(journal.predictions("a"))
        size, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert len(kept) == 5000 and size / 5000 < 1000


# -- rows without a label


def test_rows_without_a_label_are_predicted_and_not_scored(tmp_path):
    records = [
        *RECORDS,
        {"text": "fine", "label": None},
        {"text": "fine", "label": "-1"},
        {"text": "fine", "label": ""},
    ]
    with pytest.raises(DataError, match=r"rows in memory, row 6: .* --unlabelled predict"):
        run(records)
    result = run(records, unlabelled="predict", out=tmp_path / "run")
    assert (result.first.n_scored, result.first.n_unlabelled, len(result.predictions)) == (9, 3, 9)
    assert result.metrics == run(RECORDS).metrics
    assert [each.label for each in result.predictions[6:]] == [None] * 3
    lines = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert [(line["label"], line["prediction"]) for line in lines[5:]] == [(0, 1), (None, 1), (None, 1), (None, 1)]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["n_unlabelled"] == 3
    assert "3 without a label" in (tmp_path / "run" / "report.md").read_text()
    assert str(result).endswith("n 9, without a label 3")


def test_where_no_row_has_a_label_every_metric_says_so():
    records = [{"text": "fine", "label": None}, {"text": "so fine", "label": None}]
    result = run(pandas.DataFrame(records), task={**MAPPING, "unlabelled": "predict"})
    assert {metric.note for metric in result.metrics.values()} == {"no example has a label"}
    assert result.first.confusion == ((0, 0), (0, 0))
    assert [each.prediction for each in result.predictions] == [1, 1]


def test_a_task_without_labels_has_none_that_could_be_missing():
    members = {"name": "own", "kind": "classification", "columns": ("score",), "label_names": ("a", "b"), "head": "lm"}
    own = SimpleNamespace(**members, metrics=("mcc",), examples=iter, predict=id, fingerprint=dict)
    with pytest.raises(ConfigError, match="--unlabelled: task own has no labels that could be missing"):
        run(RECORDS, task=own, unlabelled="predict")


# -- regression


class OneOutput(FakeModel):
    """Answers each request with how many tokens it has."""

    def __init__(self, outputs=1, **options):
        super().__init__(**options)
        self.local.class_outputs = lambda adapter: outputs

    def compute(self, requests, adapter, *, on_tick, on_failed, **options):
        for request in requests:
            yield from answers_of("a", [request], (float(len(request.input_ids)),))


def test_a_regression_from_rows_to_the_folder(tmp_path):
    records = [{"text": "fine " * count, "label": count + 0.5} for count in (1, 2, 4, 7)] + [
        {"text": "x", "label": None}
    ]
    result = run(records, OneOutput(), task=NUMBERS, unlabelled="predict", out=tmp_path / "run")
    assert result.metrics["pearson"].value == pytest.approx(1.0)
    assert result.metrics["mse"].value == 0.25
    assert [(each.label, each.prediction) for each in result.predictions] == [
        (1.5, 1.0),
        (2.5, 2.0),
        (4.5, 4.0),
        (7.5, 7.0),
        (None, 1.0),
    ]
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert found["n_unlabelled"] == 1 and "confusion_matrix" not in found
    lines = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert (lines[0]["label"], lines[0]["prediction"], lines[0]["score"]) == (1.5, 1.0, 1.0)
    report = (tmp_path / "run" / "report.md").read_text()
    assert "Pearson correlation" in report and "Confusion" not in report


def test_heads_that_do_not_fit_are_refused_before_anything_is_sent():
    model = OneOutput(outputs=6)
    with pytest.raises(petals_eval.errors.AdapterError, match="is a regression, which needs a head with one output"):
        run([{"text": "x", "label": 1.0}], model, task=NUMBERS)
    with pytest.raises(petals_eval.errors.AdapterError, match="one number, as one for regression does"):
        run(RECORDS, OneOutput())
