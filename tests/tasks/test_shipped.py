"""The shipped tasks on rows of their data sets' form: what the functions that prepare them make, and refuse.

Texts and numbers of those that ask the word head are held against lm-evaluation-harness in tests/interop.
"""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from petals_eval.data import Rows, load_rows, rows_of
from petals_eval.errors import DataError
from petals_eval.evaluation.shots import row_code_of
from petals_eval.tasks import Example, list_tasks, resolve_source
from petals_eval.tasks.library import DefinedTask

ROWS = Path(__file__).with_name("rows")
TRAINED = [task.name for task in list_tasks() if task.head == "class"]
# As the hub names the classes of each, in the order of their numbers.
CLASSES = {
    "cola": ["unacceptable", "acceptable"],
    "sst2": ["negative", "positive"],
    "rte": ["entailment", "not_entailment"],
    "mrpc": ["not_equivalent", "equivalent"],
    "qnli": ["entailment", "not_entailment"],
    "qqp": ["not_duplicate", "duplicate"],
    "mnli": ["entailment", "neutral", "contradiction"],
    "wic": ["False", "True"],
    "cb": ["entailment", "contradiction", "neutral"],
    "copa": ["choice1", "choice2"],
    "boolq_choice": ["False", "True"],
}


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ROWS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def shipped(name: str) -> DefinedTask:
    return next(task for task in list_tasks() if task.name == name)


def examples(name: str, rows: Rows, tokenizer: Any) -> list[Example]:
    task = shipped(name)
    code = row_code_of(task, is_allowed=False)
    return list(task.examples(rows if code is None else code.of(rows), tokenizer))


@pytest.mark.parametrize("name", TRAINED)
def test_rows_for_a_trained_head(name, tokenizer):
    task = shipped(name)
    rows = load_rows(resolve_source(task, ROWS / f"{name}.jsonl"))
    assert len(rows) >= 5
    found = examples(name, rows, tokenizer)
    assert {example.label for example in found} == set(range(len(task.label_names)))
    assert isinstance(task.text, str)
    for example, row in zip(found, read(name), strict=True):
        assert not example.truncated and example.text == task.text.format(**row)


@pytest.mark.parametrize(("data", "names"), CLASSES.items())
def test_the_hubs_class_names_are_those_of_the_tasks(data, names, tokenizer):
    """The hub's classes are numbers with names, and names decide: a task that has others would read other labels."""
    table = datasets.Dataset.from_list(read(data)).cast_column("label", datasets.ClassLabel(names=names))
    for task in (data, f"{data}_choice"):
        if task in {each.name for each in list_tasks()}:
            found = examples(task, rows_of(table), tokenizer)
            assert [example.label for example in found] == [row["label"] for row in read(data)]


@pytest.mark.parametrize(
    ("name", "data", "changes", "said"),
    [
        (
            "hellaswag",
            "hellaswag",
            {"endings": None},
            "has no column endings, which petals_eval.tasks.shipped:hellaswag",
        ),
        ("copa", "copa", {"question": "why"}, "question should be cause or effect, found 'why'"),
        ("arc_easy", "arc_easy", {"answerKey": "F"}, "answerKey should be one of A, B, C, D, found 'F'"),
        ("winogrande", "winogrande", {"sentence": "Ann asked Mia."}, "sentence should have a gap, written as _"),
        ("wikitext", "wikitext", {"page": None, "text": "a"}, "has no column page"),
    ],
)
def test_rows_of_another_form_are_named(name, data, changes, said, tokenizer):
    first = read(data)[0] | changes
    wrong = {column: value for column, value in first.items() if value is not None}
    with pytest.raises(DataError, match="row 0") as caught:
        examples(name, rows_of([wrong]), tokenizer)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("arc_challenge", {"answerKey": ""}),
        ("winogrande", {"answer": ""}),
        ("hellaswag", {"label": ""}),
        ("piqa", {"label": -1}),
        ("copa", {"label": -1}),
        ("boolq_choice", {"label": -1}),
    ],
)
def test_hidden_labels_can_be_left_out_of_the_metrics(name, hidden, tokenizer):
    rows = [row | hidden for row in read(name)]
    task = shipped(name)
    code = row_code_of(task, is_allowed=False)
    prepared = rows_of(rows) if code is None else code.of(rows_of(rows))
    with pytest.raises(DataError, match="--unlabelled predict"):
        list(task.examples(prepared, tokenizer))
    found = list(task.model_copy(update={"unlabelled": "predict"}).examples(prepared, tokenizer))
    assert [example.label for example in found] == [None] * len(rows)
