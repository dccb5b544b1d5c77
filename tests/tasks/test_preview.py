"""What a dry run shows: positions count the tuned prompt."""

import json

from petals_eval.data import rows_of
from petals_eval.tasks import ClassificationTask, describe_example, show_example


def task_of(**changes) -> ClassificationTask:
    values = {"name": "t", "text": "{text}", "label_column": "label", "label_names": ["no", "yes"], **changes}
    return ClassificationTask(**values)


def test_a_trained_head_reads_the_last_token(tokenizer):
    [made] = task_of().examples(rows_of([{"text": "How far is it", "label": 1}]), tokenizer)
    described = describe_example(made, tokenizer, 8, ("no", "yes"))
    [request] = described["requests"]
    assert request["tokens"] == ["<s>", "▁H", "ow", "▁f", "ar", "▁", "is", "▁it"]
    assert request["prompt_positions"] == [0, 8]
    assert request["text_positions"] == [8, 16]
    assert request["pooled_position"] == 15
    assert (described["label"], described["text"]) == ("yes", "How far is it")
    assert json.loads(json.dumps(described)) == described
    shown = show_example(made, tokenizer, 8, ("no", "yes"))
    assert "positions 0-7: prompt" in shown and "the head reads position 15: ▁it" in shown


def test_label_words_name_position_and_token(tokenizer):
    task = task_of(label_words=[" a", " the"])
    [made] = task.examples(rows_of([{"text": "It is", "label": 0}]), tokenizer)
    described = describe_example(made, tokenizer, 4)
    [request] = described["requests"]
    last = 4 + len(made.requests[0].input_ids) - 1
    assert request["targets"] == [[last, "▁a"], [last, "▁the"]]
    assert described["label"] == 0
    assert f"the word head is asked for ▁a after position {last}" in show_example(made, tokenizer, 4)


def test_without_a_prompt_the_text_begins_at_0(tokenizer):
    [made] = task_of(max_length=2).examples(rows_of([{"text": "long text", "label": 0}]), tokenizer)
    assert describe_example(made, tokenizer)["requests"][0]["pooled_position"] == 1
    assert "2 text tokens, cut" in show_example(made, tokenizer)


def test_a_row_without_a_label_says_so(tokenizer):
    [made] = task_of(unlabelled="predict").examples(rows_of([{"text": "It is", "label": -1}]), tokenizer)
    assert describe_example(made, tokenizer, 0, ("no", "yes"))["label"] is None
    assert show_example(made, tokenizer, 0, ("no", "yes")).startswith("example 0  no label  ")
