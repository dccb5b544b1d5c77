"""A number for each row, by a head with one output."""

from decimal import Decimal

import datasets
import pytest
import torch

from petals_eval.data import rows_of
from petals_eval.errors import AdapterError, DataError, NotFiniteError, PetalsEvalError, TaskError
from petals_eval.evaluation.shots import row_code_of
from petals_eval.model import LocalModel
from petals_eval.tasks import RegressionTask, Task, load_task
from tests.model.reference import classifier, full_logits, local_answers
from tests.support.tiny_models import make_tiny


def task_of(**changes) -> RegressionTask:
    values = {"name": "t", "text": ["{a}", "{b}"], "label_column": "score", "label_range": [0, 5], **changes}
    return RegressionTask(**values)


def labels(values, **changes):
    rows = rows_of([{"a": "one", "b": "two", "score": value} for value in values])
    return [made.label for made in task_of(**changes).examples(rows, letters)]


def letters(texts, pairs=None, **settings):
    both = zip(texts, pairs, strict=True) if pairs is not None else zip(texts, strict=True)
    return {"input_ids": [[ord(letter) for text in each for letter in text] for each in both]}


def test_it_is_a_task():
    task = task_of()
    assert isinstance(task, Task)
    assert (task.head, task.columns, task.label_names) == ("class", ("score",), ())
    assert load_task({"kind": "regression", **task.model_dump(exclude={"kind"}, exclude_none=True)}) == task
    for changes in ({"text": "{a}"}, {"label_range": None}, {"label_column": "other"}, {"max_length": 3}):
        assert task_of(**changes).fingerprint() != task.fingerprint()


def test_labels_are_numbers_in_every_spelling():
    assert labels(["3.2", " 0 ", "5", "1e0"]) == [3.2, 0.0, 5.0, 1.0]
    assert labels([3, 2.5]) == [3.0, 2.5]
    assert labels([Decimal("1.5")]) == [1.5]


@pytest.mark.parametrize("value", [-1.0, "-1", None, "", float("nan")])
def test_a_row_without_a_label_is_predicted_where_that_is_asked_for(value):
    with pytest.raises(DataError, match="--unlabelled predict"):
        labels([value])
    assert labels([value], unlabelled="predict") == [None]


def test_a_hidden_test_set_without_the_column_of_numbers_is_predicted():
    rows = rows_of([{"a": "one", "b": "two"}])
    with pytest.raises(DataError, match="has no column score"):
        list(task_of().examples(rows, letters))
    [made] = task_of(unlabelled="predict").examples(rows, letters)
    assert made.label is None


def test_without_a_range_minus_one_is_a_number():
    assert labels([-1.0, 7.0], label_range=None) == [-1.0, 7.0]


@pytest.mark.parametrize("value", ["5.1", -2, "good", True, "inf", "1e999", 10**400, "3,2", ["3"]])
def test_what_is_no_right_number_is_an_error(value):
    for unlabelled in ("error", "predict"):
        with pytest.raises(DataError, match=r"data, row 0: the label in column score is .* a number from 0 to 5\.$"):
            labels([value], unlabelled=unlabelled)


def test_a_column_of_classes_is_no_column_of_numbers():
    features = datasets.Features(
        {
            "a": datasets.Value("string"),
            "b": datasets.Value("string"),
            "score": datasets.ClassLabel(names=["no", "yes"]),
        }
    )
    rows = rows_of(datasets.Dataset.from_dict({"a": ["x"], "b": ["y"], "score": [1]}, features=features))
    with pytest.raises(DataError, match=r"column score holds classes \(no, yes\), and task t expects numbers there"):
        task_of().check(rows)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"label_range": [5, 0]}, "label_range: should be the lowest and the highest right number"),
        ({"label_range": [0, float("inf")]}, "label_range: should be the lowest"),
        ({"text": ["{a}"]}, "text: should be one template, or a list of two"),
        ({"label_names": ["a", "b"]}, "label_names: unknown key"),
        ({"text": "plain"}, "text: should hold a placeholder"),
        ({"data": {"path": ""}}, "this task.s data: .*\n  path: "),
    ],
)
def test_a_wrong_definition(changes, said):
    with pytest.raises(TaskError, match=said):
        task_of(**changes)


def test_rows_may_be_prepared(tmp_path):
    (tmp_path / "marks.py").write_text("def halved(row):\n    return {**row, 'score': float(row['score']) / 2}\n")
    (tmp_path / "task.yaml").write_text(
        "kind: regression\nname: t\ntext: '{a}'\nlabel_column: score\nprepare: marks:halved\n"
    )
    task = load_task(tmp_path / "task.yaml")
    code = row_code_of(task, is_allowed=True)
    rows = code.of(rows_of([{"a": "one", "score": "3"}]))
    assert [made.label for made in task.examples(rows, letters)] == [1.5]
    assert task.fingerprint() == {**task_of(text="{a}", label_range=None).fingerprint(), "prepare": "marks:halved"}


@pytest.mark.parametrize("changes", [{"shots": 2}, {"chat": True}, {"instruction": "Rate."}, {"system": "You rate."}])
def test_nothing_stands_around_a_text(changes):
    [name] = changes
    with pytest.raises(TaskError, match=f"{name}: a task of kind regression gives its head the text alone"):
        task_of(**changes)


def test_the_prediction_is_the_output_of_the_whole_model(tmp_path):
    """Hugging Face's own classifier with one output, on the tokenizer's own pair."""
    folder = make_tiny("llama", tmp_path, labels=1)
    local, model = LocalModel.from_pretrained(folder), classifier(folder)
    rows = rows_of([{"a": "is it good", "b": "the great yes", "score": 4.0}, {"a": "no", "b": "bad", "score": None}])
    task = task_of(unlabelled="predict")
    for made in task.examples(rows, local.tokenizer):
        a, b = made.text.split("\n")
        assert made.requests[0].input_ids == tuple(local.tokenizer(a, b)["input_ids"])
        answers = local_answers(model, local, None, list(made.requests))
        found = task.predict(made, answers)
        expected = float(full_logits(model, local, None, made.requests[0].input_ids))
        assert found.prediction == found.values[0][0] == pytest.approx(expected, abs=1e-5)
        assert (found.label, found.values) == (made.label, ((found.prediction,),))


def test_heads_and_answers_that_do_not_fit():
    [made] = task_of().examples(rows_of([{"a": "x", "b": "y", "score": 1}]), letters)
    with pytest.raises(AdapterError, match=r"gives \(2,\) scores, but task t is a regression"):
        task_of().predict(made, [torch.zeros(2)])
    with pytest.raises(NotFiniteError, match="example 0: expected finite scores"):
        task_of().predict(made, [torch.tensor([float("nan")])])
    with pytest.raises(PetalsEvalError, match="expected 1 answer, found 2"):
        task_of().predict(made, [torch.zeros(1)] * 2)
