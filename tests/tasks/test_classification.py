"""Examples and predictions of a task with a trained head."""

from itertools import islice

import numpy as np
import pytest
import torch

from petals_eval.data import load_rows, rows_of
from petals_eval.data.rows import IN_MEMORY
from petals_eval.errors import AdapterError, DataError, NotFiniteError, PetalsEvalError, TaskError
from petals_eval.tasks import ClassificationTask, Example, Request, Task, load_task, resolve_source


def task_of(**changes) -> ClassificationTask:
    values = {"name": "t", "text": "{text}", "label_column": "label", "label_names": ["no", "yes"], **changes}
    return ClassificationTask(**values)


def examples(task, records, tokenizer) -> list[Example]:
    return list(task.examples(rows_of(records), tokenizer))


def example(labels: int = 2, parts: int = 1) -> Example:
    return Example("7", 1, tuple(Request("7", part, (1, 2)) for part in range(parts)), 2 * parts, False, "x")


@pytest.mark.parametrize(
    ("name", "file", "count"), [("trec", "trec/TREC.test.all", 500), ("sst2", "sst2/dev.tsv", 872)]
)
def test_the_tokens_are_those_of_the_tokenizer_cut_to_96(realdata, tokenizer, name, file, count):
    task = load_task(name)
    rows = load_rows(resolve_source(task, realdata / file))
    found = list(task.examples(rows, tokenizer))
    assert len(found) == count
    column = "text" if name == "trec" else "sentence"
    label_column = {"trec": "coarse_label", "sst2": "label"}[name]
    for row, made in zip(rows, found, strict=True):
        expected = tokenizer(row.columns[column], truncation=True, max_length=96)["input_ids"]
        whole = tokenizer(row.columns[column])["input_ids"]
        assert made.requests[0].input_ids == tuple(expected)
        assert made.requests[0].input_ids[0] == tokenizer.bos_token_id
        assert made.n_tokens == len(expected) <= 96
        assert made.truncated == (len(whole) > 96)
        assert (made.key, made.label) == (str(row.index), int(row.columns[label_column]))
        assert made.requests[0].targets == ()
    assert any(made.truncated for made in found) == (name == "sst2")


@pytest.mark.parametrize("changes", [{}, {"label_words": [" no", " yes"]}, {"instruction": "Judge. "}])
def test_a_hidden_test_set_without_the_column_of_labels_is_predicted(tokenizer, changes):
    with pytest.raises(DataError, match="has no column label"):
        examples(task_of(**changes), [{"text": "a"}], tokenizer)
    [made] = examples(task_of(unlabelled="predict", **changes), [{"text": "a"}], tokenizer)
    assert (made.label, len(made.requests[0].input_ids) > 0, len(made.row_hash)) == (None, True, 16)


def test_the_first_tokens_stay_whatever_side_the_tokenizer_cuts(tokenizer):
    tokenizer.truncation_side = "left"
    try:
        [made] = examples(task_of(max_length=4), [{"text": "one two three four", "label": 1}], tokenizer)
        assert tokenizer.truncation_side == "left"
    finally:
        tokenizer.truncation_side = "right"
    assert made.requests[0].input_ids == tuple(tokenizer("one two three four")["input_ids"][:4])
    assert made.truncated and made.n_tokens == 4


def test_a_template_of_several_columns(tokenizer):
    task = task_of(text="{{{a}}}: {b} </s> {a}")
    [made] = examples(task, [{"a": "x", "b": 2, "label": "yes"}], tokenizer)
    assert made.text == "{x}: 2 </s> x"
    assert tokenizer.eos_token_id in made.requests[0].input_ids


def test_examples_are_made_as_they_are_asked_for(tokenizer):
    class Counting:
        asked = 0

        def __call__(self, texts, **settings):
            self.asked += len(texts)
            return tokenizer(texts, **settings)

    counting = Counting()
    rows = rows_of([{"text": f"row {number}", "label": number % 2} for number in range(3000)])
    made = task_of().examples(rows, counting)
    assert [one.key for one in islice(made, 3)] == ["0", "1", "2"]
    assert counting.asked <= 512
    assert len(list(made)) == 2997


def test_a_wrong_label_in_the_last_row_is_found_before_the_first_example(tokenizer):
    records = [{"text": "a", "label": "yes"}] * 700 + [{"text": "a", "label": "maybe"}]
    with pytest.raises(DataError, match="data, row 700: the label in column label is 'maybe'"):
        next(task_of().examples(rows_of(records), tokenizer))


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"text": None, "label": 0}, "row 1 has no text in column text"),
        ({"text": "  ", "label": 0}, "row 1 is empty: no text in text"),
        ({"text": "a", "label": 2}, "row 1: the label in column label is 2. Expected one of: 0 no, 1 yes."),
        ({"text": "a", "label": None}, "The row has no label"),
    ],
)
def test_a_bad_row_is_named(tokenizer, record, expected):
    with pytest.raises(DataError) as caught:
        examples(task_of(), [{"text": "good", "label": 0}, record], tokenizer)
    assert expected in str(caught.value)


@pytest.mark.parametrize("value", [None, float("nan"), "", "  ", -1, "-1"])
def test_a_row_without_a_label_is_predicted_where_that_is_asked_for(tokenizer, value):
    records = [{"text": "a", "label": "yes"}] * 2 if isinstance(value, str) else [{"text": "a", "label": 1}] * 2
    records.append({"text": "a", "label": value})
    made = examples(task_of(unlabelled="predict"), records, tokenizer)
    assert [one.label for one in made] == [1, 1, None]
    assert task_of().predict(made[-1], [torch.tensor([0.0, 1.0])]).label is None
    with pytest.raises(DataError, match=r"row 2: the label .* --unlabelled predict"):
        examples(task_of(), records, tokenizer)
    # Rows that passed where labels may be missing have not passed where they may not.
    rows = rows_of(records)
    task_of(unlabelled="predict").check(rows)
    with pytest.raises(DataError):
        task_of().check(rows)


def test_what_is_a_label_stays_one_and_a_wrong_one_stays_an_error(tokenizer):
    signed = task_of(label_map={"-1": "no", "1": "yes", "": "yes"}, unlabelled="predict")
    records = [{"text": "a", "label": label} for label in ("-1", "1", "")]
    assert [one.label for one in examples(signed, records, tokenizer)] == [0, 1, 1]
    for wrong in ("maybe", "-2", "2"):
        with pytest.raises(DataError, match="row 0: the label in column label is"):
            examples(task_of(unlabelled="predict"), [{"text": "a", "label": wrong}], tokenizer)


def test_text_that_is_no_text(tokenizer):
    with pytest.raises(DataError, match="row 0: column text should hold text, found list"):
        examples(task_of(), [{"text": ["a"], "label": 0}], tokenizer)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"text": "{sentense}"}, "no column sentense, which task t reads. Columns found: sentence, lable."),
        (
            {"text": "{sentence}"},
            "no column label, which task t reads. Columns found: sentence, lable. Did you mean lable?",
        ),
    ],
)
def test_a_missing_column(tokenizer, changes, expected):
    with pytest.raises(DataError) as caught:
        examples(task_of(**changes), [{"sentence": "a", "lable": 1}], tokenizer)
    assert expected in str(caught.value)


def test_a_text_without_tokens():
    with pytest.raises(DataError, match="makes no token of the text 'a'"):
        examples(task_of(), [{"text": "a", "label": 0}], lambda texts, **settings: {"input_ids": [[] for _ in texts]})


def test_a_prediction_is_the_softmax_in_float64():
    made = task_of(label_names=["a", "b", "c"]).predict(example(), [torch.tensor([1.0, 3.0, 2.0])])
    expected = np.exp([1.0, 3.0, 2.0]) / np.exp([1.0, 3.0, 2.0]).sum()
    assert np.allclose(made.probabilities, expected, rtol=0, atol=1e-15)
    assert (made.prediction, made.label, made.key, made.n_tokens) == (1, 1, "7", 2)
    assert made.scores == (1.0, 3.0, 2.0)
    assert all(type(value) is float for value in made.scores + made.probabilities)


def test_large_scores_do_not_overflow_and_equal_ones_take_the_first():
    made = task_of().predict(example(), [torch.tensor([5000.0, 5000.0])])
    assert (made.prediction, made.probabilities) == (0, (0.5, 0.5))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite(bad):
    with pytest.raises(NotFiniteError, match=r"example 7: expected finite scores, found .* --dtype float32"):
        task_of().predict(example(), [torch.tensor([0.0, bad])])


def test_a_head_with_other_labels():
    with pytest.raises(AdapterError, match=r"the head gives \(6,\) scores, but task t has 2 labels \(no, yes\)"):
        task_of().predict(example(), [torch.zeros(6)])


def test_a_head_for_regression():
    with pytest.raises(AdapterError, match=r"gives one number, as one for regression does, but task t has 2 labels"):
        task_of().check_outputs((1,))


def test_answers_that_do_not_belong():
    with pytest.raises(PetalsEvalError, match="expected 1 answers, found 2"):
        task_of().predict(example(), [torch.zeros(2), torch.zeros(2)])


def test_the_fingerprint_holds_what_changes_an_answer():
    base = task_of().fingerprint()
    for changes in (
        {"text": "{text}."},
        {"label_column": "other"},
        {"label_names": ["yes", "no"]},
        {"label_map": {"x": "yes"}},
        {"max_length": 9},
        {"text_pair": "{other}"},
        {"label_words": [" no", " yes"]},
    ):
        assert task_of(**changes).fingerprint() != base
    for changes in ({"name": "u"}, {"metrics": ["mcc"]}, {"description": "x"}, {"data": {"path": "a/b"}}):
        assert task_of(**changes).fingerprint() == base
    words = {"label_words": [" no", " yes"]}
    assert task_of(**words).fingerprint() != task_of(**words, normalize="mean").fingerprint()


def test_it_is_a_task():
    assert isinstance(task_of(), Task)
    assert task_of().head == "class"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lable_column": "x"}, "lable_column: unknown key. Did you mean label_column?"),
        ({"max_length": "many"}, "max_length: should be a valid integer"),
        ({"max_length": 0}, "max_length: should be greater than or equal to 1, found 0"),
        ({"label_names": ["a"]}, "label_names: "),
        ({"label_names": ["a", "a"]}, "label_names: should be different from each other"),
        ({"label_names": [False, True]}, "label_names.0: should be a valid string, found False"),
        ({"text": {"text": None}}, "(in YAML a text that begins with { or [ stands in quotes)"),
        ({"metrics": "accuracy"}, "metrics: should be a list, such as [first, second], found 'accuracy'"),
        ({"data": "rows.csv"}, "should be keys and values, such as {path: reviews.csv}, found 'rows.csv'"),
        ({"description": None}, "description: should be a valid string, found nothing"),
        ({"text": "no placeholder"}, "text: should hold a placeholder for each column"),
        ({"text": "{}"}, "text: should hold plain placeholders such as {sentence}"),
        ({"text": "{a:>3}"}, "text: should hold plain placeholders"),
        ({"text": "{a"}, "text: "),
        ({"label_map": {"x": "maybe"}}, "label_map.x: should be one of the label names (no, yes), found 'maybe'"),
        ({"label_words": [" no"]}, "label_words: should be one word for each of the 2 labels, found 1"),
        ({"normalize": "max"}, "normalize: should be 'sum' or 'mean', found 'max'"),
        ({"metrics": []}, "metrics: "),
        ({"data": {"path": "a/b", "splitt": "x"}}, "splitt: unknown key. Did you mean split?"),
        (
            {"formats": {"tsv": {"colum_names": ["a"]}}},
            "formats.tsv.colum_names: unknown key. Did you mean column_names?",
        ),
        ({"formats": {"xml": {}}}, "formats.xml"),
    ],
)
def test_a_wrong_definition_names_the_key(changes, expected):
    with pytest.raises(TaskError) as caught:
        task_of(**changes)
    assert expected in str(caught.value)
    assert "pydantic" not in str(caught.value) and "validation error" not in str(caught.value)


def test_a_definition_with_holes():
    with pytest.raises(TaskError, match="text: missing, and it must be given"):
        ClassificationTask.model_validate({"name": "t", "label_column": "x", "label_names": ["a", "b"]})


def test_a_missing_column_of_rows_in_memory_is_told_without_names_that_nobody_gave() -> None:
    rows = rows_of([{"text": "fine", "label": "good"}], name=IN_MEMORY)
    with pytest.raises(DataError, match=r"^the rows in memory have no column sentiment, which the task reads"):
        rows.check_columns(["sentiment"], "task")
