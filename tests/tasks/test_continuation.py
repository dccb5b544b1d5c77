"""Continuation tasks: definitions, requests and values."""

import pytest
import torch

from petals_eval.data import rows_of
from petals_eval.errors import DataError, TaskError
from petals_eval.tasks import ContinuationTask, Task, load_task

ROW = {"context": "Lily had a red", "word": "ball"}


def task_of(**changes) -> ContinuationTask:
    return ContinuationTask(**{"name": "t", "text": "{context}", "target": "{word}", **changes})


def only(task, row, tokenizer):
    [made] = task.examples(rows_of([row]), tokenizer)
    return made


def test_lambadas_form_reads_as_it_is(tmp_path, tokenizer):
    path = tmp_path / "words.yaml"
    path.write_text('kind: continuation\ntext: "{context}"\ntarget: "{word}"\n')
    task = load_task(path)
    assert isinstance(task, ContinuationTask) and isinstance(task, Task)
    assert (task.kind, task.head, task.label_names, task.metrics) == ("continuation", "lm", (), ("perplexity", "acc"))
    rows = rows_of([ROW])
    [row] = rows
    assert task.pairs(rows, row, tokenizer) == [("Lily had a red", " ball")]
    turn = task.turn(row, "row 0")
    assert (turn.question, turn.answer, turn.delimiter) == ("Lily had a red", "ball", " ")


def test_one_request_that_asks_if_it_is_greedy(tokenizer):
    made = only(task_of(), ROW, tokenizer)
    [request] = made.requests
    whole, context = tokenizer.encode("Lily had a red ball"), tokenizer.encode("Lily had a red")
    assert list(request.input_ids) == whole[:-1]
    assert request.targets == tuple((at - 1, whole[at]) for at in range(len(context), len(whole)))
    assert request.asks_greedy and made.label is None
    assert made.text == "Lily had a red[ ball]"


def test_a_target_alone(tokenizer):
    [request] = only(task_of(text=""), ROW, tokenizer).requests
    assert request.input_ids[0] == tokenizer.bos_token_id
    assert [token for _, token in request.targets] == tokenizer.encode(" ball", add_special_tokens=False)


@pytest.mark.parametrize(("greedy", "expected"), [((1.0, 1.0), 1.0), ((1.0, 0.0), 0.0)])
def test_the_values_of_a_target(tokenizer, greedy, expected):
    task = task_of()
    made = only(task, ROW, tokenizer)
    tokens = len(made.requests[0].targets)
    assert tokens >= 2
    answer = torch.stack([torch.full((tokens,), -0.5), torch.tensor([*greedy[:1] * (tokens - 1), greedy[1]])], dim=1)
    found = task.predict(made, [answer])
    assert found.values == ((-0.5 * tokens, expected, tokens, 4),)
    assert (found.prediction, found.label) == (None, None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text": "x", "target": "y"}, "nothing is read of a row"),
        ({"target": "{word"}, "target: "),
        ({"target": ""}, "target: "),
        ({"label_column": "label"}, "label_column: unknown key"),
    ],
)
def test_a_wrong_definition(changes, said):
    with pytest.raises(TaskError) as caught:
        task_of(**changes)
    assert said in str(caught.value)


def test_bad_rows():
    with pytest.raises(DataError, match="row 0 has no text in column word"):
        task_of().check(rows_of([{**ROW, "word": None}]))
    with pytest.raises(DataError, match="data has no column word"):
        task_of().check(rows_of([{"context": "x"}]))
