"""What a dry run shows: positions count the tuned prompt."""

import json

from petals_eval.data import rows_of
from petals_eval.errors import ExampleError
from petals_eval.tasks import ClassificationTask, describe_example, show_example
from petals_eval.tasks.requests import Decoding, Example, Request


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


def example_of(*requests: Request, text: str = "text", error: ExampleError | None = None) -> Example:
    return Example("4", None, requests, 0, False, text, error=error)


def test_of_requests_that_begin_alike_only_the_rest_is_shown_again(tokenizer):
    context = tuple(range(20, 32))
    choices = [Request("4", part, (*context, token), ((11, token), (12, 7))) for part, token in enumerate((40, 41))]
    shown = show_example(example_of(*choices), tokenizer, 4).splitlines()
    assert shown[0] == "example 4  no label  0 text tokens"
    first, second, last = tokenizer.convert_ids_to_tokens([40, 41, 7])
    assert shown[2:5] == [
        "  positions 0-3: prompt",
        f"  positions 4-16: {' '.join(tokenizer.convert_ids_to_tokens([*context, 40]))}",
        f"  the word head is asked for {first} after position 15, {last} after position 16",
    ]
    assert shown[6:8] == ["  positions 4-15: as in the request before", f"  positions 16-16: {second}"]


def test_many_targets_many_windows_and_long_texts_are_shortened(tokenizer):
    targets = tuple((position, 20 + position % 30) for position in range(300))
    windows = [Request("4", part, tuple(range(20, 320)), targets, asks_greedy=True) for part in range(20)]
    made = example_of(*windows, text="x" * 5000 + "y" * 5000)
    shown = show_example(made, tokenizer)
    assert len(shown) < 40_000
    assert "300 tokens after positions 0-299: " in shown and ", and whether each is the likeliest" in shown
    assert (
        "... 180 more ..." in shown and "... 2,000 more characters ..." in shown and "... and 12 more requests" in shown
    )
    described = describe_example(made, tokenizer)
    assert (described["n_requests"], len(described["requests"])) == (20, 8)
    assert len(described["requests"][0]["targets"]) == 300


def test_why_an_example_cannot_be_computed_is_shown(tokenizer):
    made = example_of(error=ExampleError("its choice 2 is empty"))
    assert show_example(made, tokenizer).splitlines()[-1] == "  cannot be computed: its choice 2 is empty"
    assert describe_example(made, tokenizer)["error"] == "its choice 2 is empty"


def test_how_a_text_goes_on_is_shown(tokenizer):
    made = example_of(Request("4", 0, (20, 21), decoding=Decoding(1000, ("\n",))))
    assert describe_example(made, tokenizer)["requests"][0]["decoding"] == {"max_new_tokens": 1000, "stop": ["\n"]}
    assert "  goes on for at most 1,000 tokens, or until '\\n'; the likeliest each time" in show_example(
        made, tokenizer
    )


def test_a_row_without_a_label_says_so(tokenizer):
    [made] = task_of(unlabelled="predict").examples(rows_of([{"text": "It is", "label": -1}]), tokenizer)
    assert describe_example(made, tokenizer, 0, ("no", "yes"))["label"] is None
    assert show_example(made, tokenizer, 0, ("no", "yes")).startswith("example 0  no label  ")
