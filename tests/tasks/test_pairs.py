"""Pairs of texts: the tokenizer's own form, cut as transformers cuts it."""

import pytest

from petals_eval.data import rows_of
from petals_eval.errors import DataError, TaskError
from petals_eval.tasks import ClassificationTask, load_task

ROWS = [
    {"premise": "Once upon a time there was a little girl who liked to run in the park", "hypothesis": "She ran"},
    {"premise": "It rained", "hypothesis": "One day Tim found a big red ball near the old tree and he was very happy"},
    {"premise": "The cat sat", "hypothesis": "The dog ran"},
]
DEFINITION = {"label_column": "label", "label_names": ["no", "yes"], "metrics": ["accuracy"]}


def pair_task(**changes) -> ClassificationTask:
    task = load_task({**DEFINITION, "text": ["{premise}", "So: {hypothesis}"], **changes})
    assert isinstance(task, ClassificationTask)
    return task


def labelled(records=ROWS):
    return rows_of([{**record, "label": index % 2} for index, record in enumerate(records)])


@pytest.mark.parametrize("max_length", [512, 20, 9, 6])
def test_the_tokens_are_those_of_the_tokenizer_cut_longest_first(tokenizer, max_length):
    made = list(pair_task(max_length=max_length).examples(labelled(), tokenizer))
    for row, example in zip(ROWS, made, strict=True):
        pair = row["premise"], f"So: {row['hypothesis']}"
        expected = tokenizer(*pair, truncation=True, max_length=max_length)["input_ids"]
        assert example.requests[0].input_ids == tuple(expected)
        assert example.truncated == (len(tokenizer(*pair)["input_ids"]) > max_length)
        assert example.text == "\n".join(pair)
    if max_length == 512:  # not one text behind the other, for a tokenizer that puts its own token between them
        together = tokenizer(f"{ROWS[0]['premise']} So: {ROWS[0]['hypothesis']}")["input_ids"]
        assert made[0].requests[0].input_ids != tuple(together)


def test_the_last_tokens_go_whatever_side_the_tokenizer_cuts(tokenizer):
    expected = [example.requests for example in pair_task(max_length=9).examples(labelled(), tokenizer)]
    tokenizer.truncation_side = "left"
    try:
        assert [example.requests for example in pair_task(max_length=9).examples(labelled(), tokenizer)] == expected
    finally:
        tokenizer.truncation_side = "right"


def test_both_spellings_are_one_task_and_a_pair_is_another_task_than_one_text():
    apart = load_task({**DEFINITION, "text": "{premise}", "text_pair": "So: {hypothesis}"})
    assert apart == pair_task()
    assert apart.fingerprint() != load_task({**DEFINITION, "text": "{premise}"}).fingerprint()


def test_a_file_may_have_it_too(tmp_path):
    path = tmp_path / "task.yaml"
    path.write_text('text: ["{premise}", "So: {hypothesis}"]\nlabel_column: label\nlabel_names: [no, yes]\n')
    assert load_task(path).fingerprint() == pair_task().fingerprint()


def test_one_of_the_two_may_be_empty_and_not_both(tokenizer):
    [made] = pair_task(text=["{premise}", "{hypothesis}"]).examples(
        labelled([{"premise": "", "hypothesis": "She ran"}]), tokenizer
    )
    assert made.requests[0].input_ids == tuple(tokenizer("", "She ran")["input_ids"])
    for hypothesis, said in ((" ", "is empty: no text in hypothesis"), (None, "has no text in column hypothesis")):
        with pytest.raises(DataError, match=f"data, row 0 {said}"):
            pair_task().check(labelled([{"premise": "", "hypothesis": hypothesis}]))


def test_the_columns_of_both_are_read():
    rows = rows_of([{"premise": "a", "label": 0}])
    with pytest.raises(DataError, match="data has no column hypothesis"):
        pair_task().check(rows)
    hashes = {made.row_hash for made in pair_task().examples(labelled([ROWS[0], ROWS[2]] * 2), _lengths)}
    assert len(hashes) == 2


def _lengths(texts, pairs, **settings):
    return {"input_ids": [[len(one), len(other)] for one, other in zip(texts, pairs, strict=True)]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text": ["{a}"]}, r"text: should be one template, or a list of two for a pair of texts, found \['{a}'\]"),
        ({"text": ["{a}", "{b}", "{c}"]}, "text: should be one template, or a list of two"),
        ({"text": ["{a}", "{b}"], "text_pair": "{b}"}, "text_pair: should not be given beside a list of two in text"),
        ({"text": ["{a}", "b"]}, "text_pair: should hold a placeholder"),
        ({"text": ["{a}", 3]}, "text_pair: should be a valid string"),
        ({"label_words": [" no", " yes"]}, "text_pair: should be left out where there are label_words"),
    ],
)
def test_a_wrong_pair(changes, said):
    with pytest.raises(TaskError, match=said):
        pair_task(**changes)
