"""Batches into rows: padding on either side, with and without a mask, in every form that programs have them."""

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from petals_eval.data.batches import read_batches
from petals_eval.errors import DataError

LEFT = {
    "input_ids": [[9, 9, 1, 5, 6], [1, 7, 8, 2, 3]],
    "attention_mask": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]],
    "labels": [[-100, -100, -100, 5, 6], [1, -100, 8, -100, 3]],
}
RIGHT = {
    "input_ids": [[1, 5, 6, 9, 9], [1, 7, 8, 2, 3]],
    "attention_mask": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]],
    "labels": [[-100, 5, 6, -100, -100], [1, -100, 8, -100, 3]],
}
TEXTS = [[1, 5, 6], [1, 7, 8, 2, 3]]
TARGETS = [[[0, 5], [1, 6]], [[1, 8], [3, 3]]]


def read(*batches, vocabulary: int = 10):
    return list(read_batches(batches, vocabulary))


def as_they_come(batch):
    """One batch in the forms that programs have it."""
    yield batch
    yield {name: torch.tensor(value) for name, value in batch.items()}
    yield {name: np.array(value, np.int32) for name, value in batch.items()}
    yield {name: [torch.tensor(row) for row in value] for name, value in batch.items()}
    yield BatchEncoding(batch, tensor_type="pt")
    yield {**batch, "attention_mask": torch.tensor(batch["attention_mask"], dtype=torch.bfloat16), "position_ids": None}
    yield {**batch, "attention_mask": torch.tensor(batch["attention_mask"]).bool()}


@pytest.mark.parametrize("batch", [LEFT, RIGHT], ids=["left", "right"])
def test_tokens_are_scored_at_the_position_before_them_and_padding_is_gone(batch):
    for form in as_they_come(batch):
        rows = read(form)
        assert [row.input_ids.tolist() for row in rows] == TEXTS
        assert [row.targets.tolist() for row in rows] == TARGETS
        assert [row.label for row in rows] == [None, None]


@pytest.mark.parametrize("batch", [LEFT, RIGHT], ids=["left", "right"])
def test_a_class_each(batch):
    for form in as_they_come({**batch, "labels": [2, 0]}):
        rows = read(form, form)
        assert [row.input_ids.tolist() for row in rows] == TEXTS * 2
        assert [row.label for row in rows] == [2, 0] * 2
        assert [row.place for row in rows] == ["batch 0, row 0", "batch 0, row 1", "batch 1, row 0", "batch 1, row 1"]
        assert all(row.targets.shape == (0, 2) for row in rows)


def test_without_a_mask_there_is_no_padding_and_lists_may_differ_in_length():
    rows = read({"input_ids": TEXTS, "labels": TEXTS})
    assert [row.input_ids.tolist() for row in rows] == TEXTS
    assert [row.targets.tolist() for row in rows] == [[[0, 5], [1, 6]], [[0, 7], [1, 8], [2, 2], [3, 3]]]


def test_what_is_not_scored_is_left_out_and_keeps_its_place():
    classes = {"input_ids": [[1, 2], [1, 3], [1, 4]], "labels": torch.tensor([-100, 1, -100])}
    [row] = read({"input_ids": [], "labels": []}, classes)
    assert (row.batch, row.row, row.label) == (1, 1, 1)
    assert read({"input_ids": [[1, 2], [1]], "labels": [[1, -100], [1]]}) == []


def test_batches_are_taken_as_rows_are_asked_for():
    taken = []

    def loader():
        for number in range(5):
            taken.append(number)
            yield {"input_ids": [[1, 2]], "labels": [0]}

    rows = read_batches(loader(), 10)
    next(rows)
    assert taken == [0]


GOOD = {"input_ids": [[1, 5], [1, 6]], "attention_mask": [[1, 1], [1, 1]], "labels": [0, 1]}
PADDED = {"input_ids": [[1, 5, 9]], "attention_mask": [[1, 1, 0]]}


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (
            (torch.zeros(2, 3), [0, 1]),
            "batch 1: expected a mapping with input_ids, attention_mask and labels, found tuple",
        ),
        ("input_ids", "batch 1: expected a mapping .* found str .* A single batch goes into a list"),
        ({"labels": [0]}, "batch 1 has no input_ids; it has labels"),
        ({"input_ids": [[1]], "label": [0]}, "batch 1 has no labels; it has input_ids, label"),
        ({**GOOD, "labels": [0]}, "batch 1: expected 2 rows in labels, as in input_ids, found 1"),
        ({**GOOD, "labels": [[0], [1]]}, r"batch 1, row 0: expected labels of shape \(2,\), a class .*, or \(2, 2\)"),
        ({**GOOD, "labels": [0.5, 1.0]}, "batch 1: labels should be whole numbers.* found float64.*is a regression"),
        (
            {**GOOD, "labels": torch.zeros(2, 1, 1).long()},
            r"batch 1: labels should be .* found int64 of shape \(2, 1, 1\)",
        ),
        ({**GOOD, "labels": ["no", "yes"]}, "batch 1: labels should be whole numbers"),
        ({**GOOD, "labels": None}, "batch 1: labels should be whole numbers"),
        ({**GOOD, "labels": [[1, 5], [1, 6]]}, r"batch 1: labels are tokens \(batch, seq\), and those of the batches"),
        ({**GOOD, "attention_mask": [[1, 1]]}, "batch 1: expected 2 rows in attention_mask, as in input_ids, found 1"),
        ({**GOOD, "attention_mask": [[1, 1], [1]]}, "batch 1, row 1: expected 2 numbers in attention_mask, .* found 1"),
        (
            {**GOOD, "attention_mask": [[1, 1], [2, 1]]},
            r"batch 1, row 1: attention_mask should hold 1 and 0 .*\[2, 1\]",
        ),
        ({**GOOD, "attention_mask": [[1, 1], [0.5, 1]]}, "batch 1, row 1: attention_mask should be whole numbers"),
        (
            {**GOOD, "attention_mask": [[1, 1], [0, 0]]},
            "batch 1, row 1 has no token: its attention_mask is 0 everywhere",
        ),
        ({**GOOD, "input_ids": [[1, 5], [1, 10]]}, "batch 1, row 1: input_ids holds the token 10; .* is 0 to 9"),
        ({**GOOD, "input_ids": [[1, 5], [-1, 1]]}, "batch 1, row 1: input_ids holds the token -1"),
        ({**GOOD, "input_ids": [[1.0, 5.0]]}, "batch 1, row 0: input_ids should be whole numbers"),
        ({**GOOD, "input_ids": [1, 5]}, "batch 1, row 0: input_ids should be whole numbers"),
        ({**GOOD, "input_ids": 5}, "batch 1: input_ids should be numbers"),
        ({**GOOD, "input_ids": "text"}, "batch 1: input_ids should be numbers"),
        (
            {"input_ids": [[1, 9, 5]], "attention_mask": [[1, 0, 1]], "labels": [0]},
            "batch 1, row 0: padding at position 1 stands between tokens",
        ),
    ],
)
def test_a_batch_that_cannot_be_meant_is_named(batch, said):
    with pytest.raises(DataError, match=f"^{said}"):
        read(GOOD, batch)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([[-100, 5, 9]], "the label at position 2 stands at padding, where nothing can be scored: set it to -100"),
        ([[-100, 10, -100]], "the label at position 1 is 10; expected a token from 0 to 9, or -100"),
        ([[-100, -1, -100]], "the label at position 1 is -1; expected a token"),
    ],
)
def test_tokens_that_cannot_be_scored(labels, said):
    with pytest.raises(DataError, match=f"^batch 0, row 0: {said}"):
        read({**PADDED, "labels": labels})
