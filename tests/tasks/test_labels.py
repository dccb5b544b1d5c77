"""What a value in the label column means; nothing is guessed."""

import pytest

from petals_eval.errors import DataError
from petals_eval.tasks.labels import Labels

SENTIMENT = Labels(("negative", "positive"), {})
TREC = Labels(
    ("description", "entity", "abbreviation"), {"DESC": "description", "ENTY": "entity", "ABBR": "abbreviation"}
)
HUB_TREC = Labels(TREC.names, TREC.mapping, ("ABBR", "ENTY", "DESC"))
STARS = Labels(("1", "2", "3"), {})


def read(labels: Labels, value: object) -> int:
    return labels.index(value, where="data, row 3", column="label")


@pytest.mark.parametrize(
    ("labels", "value", "index"),
    [
        (SENTIMENT, 0, 0),
        (SENTIMENT, 1, 1),
        (SENTIMENT, "1", 1),
        (SENTIMENT, " 1 ", 1),
        (SENTIMENT, 1.0, 1),
        (SENTIMENT, True, 1),
        (SENTIMENT, False, 0),
        (SENTIMENT, "positive", 1),
        (Labels(("no", "yes"), {"false": "no", "true": "yes"}), True, 1),
        (Labels(("yes", "no"), {"false": "no", "true": "yes"}), True, 0),
        (TREC, "0", 0),
        (TREC, "DESC", 0),
        (TREC, "abbreviation", 2),
        (STARS, 1, 0),
        (STARS, "3", 2),
        # The hub's numbers stand for its names, not for positions: its 0 is our 2.
        (HUB_TREC, 0, 2),
        (HUB_TREC, 1, 1),
        (HUB_TREC, 2, 0),
    ],
)
def test_values_that_are_labels(labels, value, index):
    assert read(labels, value) == index


@pytest.mark.parametrize("value", [2, -1, "2", "Positive", "neutral", 0.5, "", None, [1], "²"])
def test_values_that_are_none(value):
    with pytest.raises(DataError) as caught:
        read(SENTIMENT, value)
    message = str(caught.value)
    assert "data, row 3: the label in column label is" in message
    assert repr(value) in message
    assert "Expected one of: 0 negative, 1 positive." in message


def test_numbers_that_are_names_are_never_read_by_their_position():
    with pytest.raises(DataError, match=r"Expected one of: 1, 2, 3\."):
        read(STARS, 0)  # a file that counts from 0: its 1 and 2 would pass for the names, one too low


def test_the_advice_fits_the_value():
    for value, advice in ((None, "The row has no label"), (-1, "hidden label"), ("good", "label_map")):
        with pytest.raises(DataError, match=advice):
            read(SENTIMENT, value)


def test_class_names_that_the_task_does_not_know_are_never_read_by_their_number():
    labels = Labels(("negative", "positive"), {}, ("pos", "neg"))
    with pytest.raises(DataError, match="is 0, which this source calls 'pos'"):
        read(labels, 0)
