"""What a value in the label column means; nothing is guessed."""

import math
import re
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petals_eval.data import rows_of
from petals_eval.data.json_text import WrittenFloat, value_of
from petals_eval.errors import DataError
from petals_eval.tasks import ClassificationTask
from petals_eval.tasks.labels import Labels, other_spellings, spelled

SENTIMENT = Labels(("negative", "positive"), {})
TREC = Labels(
    ("description", "entity", "abbreviation"), {"DESC": "description", "ENTY": "entity", "ABBR": "abbreviation"}
)
HUB_TREC = Labels(TREC.names, TREC.mapping, ("ABBR", "ENTY", "DESC"))
STARS = Labels(("1", "2", "3"), {})
BOOLQ = Labels(("no", "yes"), {"false": "no", "true": "yes"})
TURNED = Labels(("yes", "no"), {"false": "no", "true": "yes"})
ZEROS = Labels(("bad", "good"), {"00": "good", "01": "bad"})
FROM_ONE = Labels(("bad", "good"), {"1": "bad", "2": "good"})
SIGNED = Labels(("neg", "neu", "pos"), {"-1": "neg", "0": "neu", "1": "pos"})
FLOATS = Labels(("bad", "good"), {"1.0": "bad", "0.0": "good"})
SPACED = Labels((" bad", "good "), {" G ": "good"})


def read(labels: Labels, value: object) -> int:
    return labels.index(value, where="data, row 3", column="label")


def refused(labels: Labels, value: object) -> str:
    with pytest.raises(DataError) as caught:
        read(labels, value)
    assert str(caught.value).startswith("data, row 3: the label in column label is ")
    return str(caught.value)


@pytest.mark.parametrize(
    ("labels", "value", "index"),
    [
        (SENTIMENT, 0, 0),
        (SENTIMENT, 1, 1),
        (SENTIMENT, "1", 1),
        (SENTIMENT, " 1 ", 1),
        (SENTIMENT, 1.0, 1),
        (SENTIMENT, "1.0", 1),
        (SENTIMENT, value_of("1e0"), 1),
        (SENTIMENT, Decimal("1.00"), 1),
        (SENTIMENT, True, 1),
        (SENTIMENT, False, 0),
        (SENTIMENT, "true", 1),
        (SENTIMENT, "False", 0),
        (SENTIMENT, "positive", 1),
        (SENTIMENT, "\tpositive ", 1),
        (BOOLQ, True, 1),
        (BOOLQ, "True", 1),
        (BOOLQ, "0", 0),
        (TURNED, True, 0),
        (TURNED, "False", 1),
        (TREC, "0", 0),
        (TREC, "DESC", 0),
        (TREC, "abbreviation", 2),
        (STARS, 1, 0),
        (STARS, "3", 2),
        (STARS, 2.0, 1),
        (STARS, "2.0", 1),
        # A key is compared as it is spelled, and 1 is not 01.
        (ZEROS, "00", 1),
        (ZEROS, "01", 0),
        (FROM_ONE, "1", 0),
        (FROM_ONE, "2.0", 1),
        (FROM_ONE, value_of("2e0"), 1),
        (SIGNED, -1.0, 0),
        (FLOATS, 1, 0),
        (FLOATS, "0", 1),
        (FLOATS, 1.0, 0),
        (Labels(("a", "b"), {"1000": "a", "1e3": "b"}), value_of("1E3"), 0),
        (Labels(("a", "b"), {"1000": "a", "1e3": "b"}), value_of("1e3"), 1),
        (Labels(("a", "b"), {"0.5": "b"}), value_of("0.50"), 1),
        (Labels(("a", "b"), {"9007199254740993": "b", "9007199254740992": "a"}), value_of("9007199254740993.0"), 1),
        (Labels(("a", "b"), {"1": "a", "1.0": "b"}), "1.0", 1),
        (Labels(("a", "b"), {"1": "a", "1.0": "b"}), 1, 0),
        (Labels(("a", "1"), {"1": "a"}), "1", 0),  # the exact key comes before the exact name
        (Labels(("1.0", "b"), {"1": "b"}), "1.0", 0),  # and both before another spelling
        (Labels(("a", "b"), {"": "b"}), "  ", 1),
        (SPACED, "bad", 0),
        (SPACED, " good", 1),
        (SPACED, "G", 1),
        # The hub's numbers stand for its names, not for positions: its 0 is our 2.
        (HUB_TREC, 0, 2),
        (HUB_TREC, 1, 1),
        (HUB_TREC, 2, 0),
        (Labels(("no", "yes"), {"false": "yes", "true": "no"}, ("False", "True")), 1, 0),
    ],
)
def test_values_that_are_labels(labels, value, index):
    assert read(labels, value) == index


@pytest.mark.parametrize(
    "value",
    [
        *(2, -1, "2", "Positive", "neutral", 0.5, "", None, [1], "²", "01", "+1", "1.00", "1e0", "-0", "TRUE", "yes"),
        *(float("nan"), float("inf"), value_of("1e999"), value_of("1e99999999999"), b"1", {"a": 1}, "1_0", "0x1", "٠"),
        *(value_of("1e9999999999999999999"), value_of("1e-9999999999999999999"), value_of("0.1e-99999999")),
    ],
)
def test_values_that_are_none(value):
    message = refused(SENTIMENT, value)
    assert repr(value) in message
    assert "Expected one of: 0 negative, 1 positive." in message


@pytest.mark.parametrize(
    ("labels", "value", "known"),
    [
        (STARS, 0, "Expected one of: 1, 2, 3."),  # a file that counts from 0: its 1 and 2 would pass for the names
        (STARS, "0", "Expected one of: 1, 2, 3."),
        (FROM_ONE, "0", "Expected one of: bad, good, or a key of label_map: '1', '2'."),
        (FROM_ONE, 0.0, "a key of label_map: '1', '2'."),
        (SIGNED, "2", "a key of label_map: '-1', '0', '1'."),
        (ZEROS, "0", "a key of label_map: '00', '01'."),
        (ZEROS, 1, "a key of label_map: '00', '01'."),
        (FLOATS, "2", "a key of label_map: '1.0', '0.0'."),
        (Labels(("a", "b"), {"+1": "a"}), "1", "a key of label_map: '+1'."),
        (Labels(("a", "b"), {"1e3": "a"}), 1, "a key of label_map: '1e3'."),
        (Labels(("a", "b"), {".5": "a"}), 1, "a key of label_map: '.5'."),
        (Labels(("a", "2024"), {}), 1, "Expected one of: a, 2024."),
    ],
)
def test_where_keys_or_names_are_numbers_none_is_read_by_position(labels, value, known):
    message = refused(labels, value)
    assert known in message and "no number is read as a position" in message
    assert f'{{"{spelled(value)}": ...}}' in message


@pytest.mark.parametrize(
    ("labels", "value"),
    [
        (Labels(("bad", "good"), {"true": "good"}), False),
        (Labels(("bad", "good"), {"True": "good"}), "false"),
        (Labels(("true", "other"), {}), "False"),
        (Labels(("bad", "good"), {"1": "bad", "0": "good"}), True),
        (STARS, True),
        (Labels(("a", "b", "c"), {}), True),
        (TURNED, 1),
        (TURNED, "0"),
    ],
)
def test_truth_values_are_no_positions_where_that_would_be_half_a_guess(labels, value):
    refused(labels, value)


def test_several_labels_that_could_be_meant_are_shown():
    labels = Labels(("low", "high"), {"1000": "low", "1000.0": "high"})
    message = refused(labels, value_of("1e3"))
    assert "meant for 1000 (low) and 1000.0 (high)" in message and '{"1e3": ...}' in message
    message = refused(Labels(("1.0", "high"), {"1.0": "high"}), "1")
    assert "meant for 1.0 (high) and 1.0 (1.0)" in message


@pytest.mark.parametrize(
    ("value", "advice"),
    [
        (None, "The row has no label"),
        ("  ", "The row has no label"),
        (float("nan"), "The row has no label"),
        (value_of("NaN"), "The row has no label"),
        (-1, "hidden label"),
        ("-1.0", "hidden label"),
        ("good", 'label_map, with quotes: {"good": ...}'),
        ("01", "A position is a whole number without a sign and without zeros before it."),
        ("+1", "A position is a whole number without a sign and without zeros before it."),
        ("Positive", "It differs from 'positive' in capital letters"),
        ([0, 1], "A label is one value"),
        ("x" * 500, '{"...": ...}'),
    ],
)
def test_the_advice_fits_the_value(value, advice):
    message = refused(SENTIMENT, value)
    assert advice in message and len(message) < 400


def test_the_same_letters_composed_otherwise_are_named():
    message = refused(Labels(("cafe\u0301", "the\u0301"), {}), "caf\u00e9")
    assert "in how Unicode composes its letters" in message


def test_many_keys_are_not_all_listed():
    message = refused(Labels(("a", "b"), {f"key {number}": "a" for number in range(5000)}), "x")
    assert "'key 19' and 4980 more." in message


def test_class_names_that_the_task_does_not_know_are_never_read_by_their_number():
    labels = Labels(("negative", "positive"), {}, ("pos", "neg"))
    with pytest.raises(DataError, match="is 0, which this source calls 'pos'"):
        read(labels, 0)


def test_rows_in_memory_obey_the_same_rules():
    task = ClassificationTask(
        name="t", text="{text}", label_column="label", label_names=("bad", "good"), label_map={1: "bad", 2.5: "good"}
    )

    def labels(*values):
        found = Labels(task.label_names, task.label_map)
        return [read(found, row.columns["label"]) for row in rows_of([{"label": value} for value in values])]

    assert labels(1, 2.5) == labels("1", "2.5") == labels(1.0, 2.5) == [0, 1]
    with pytest.raises(DataError, match=r"is 0\. Expected one of: bad, good, or a key of label_map: '1', '2\.5'"):
        labels(1, 0)


# A model of the rules, made the other way round: which of the words that are known stand for this value?

_CANONICAL = re.compile(r"(0|-?[1-9]\d*)(\.0)?", re.ASCII)
_NUMERIC = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_TRUTH = {"true": True, "True": True, "false": False, "False": False}


def stands_for(word: str, value: object) -> bool:
    """Whether a word is a spelling of a value, the exact one or another."""
    if word == spelled(value):
        return True
    if spelled(value) in _TRUTH:
        return _TRUTH.get(word) == _TRUTH[spelled(value)]
    if isinstance(value, str):
        return bool(_CANONICAL.fullmatch(word) and _CANONICAL.fullmatch(value.strip())) and float(word) == float(value)
    if isinstance(value, float) and not math.isfinite(value):
        return False
    if isinstance(value, float) and word == repr(float(value)):
        return Decimal(word) == Decimal(str(value))
    return bool(_CANONICAL.fullmatch(word)) and Decimal(word) == Decimal(str(value))


def modelled(names: list[str], mapping: dict[str, str], value: object) -> int | None:
    if value is None:
        return None
    known = [(word, names.index(name)) for word, name in mapping.items()] + [
        (word, at) for at, word in enumerate(names)
    ]
    for word, index in known:
        if word == spelled(value):
            return index
    fitting = {index for word, index in known if stands_for(word, value)}
    if fitting:
        return fitting.pop() if len(fitting) == 1 else None
    if any(_NUMERIC.fullmatch(word) for word, _ in known):
        return None
    truths = {word: index for word, index in reversed(known) if word in _TRUTH}  # a key counts before a name
    if spelled(value) in _TRUTH:
        return int(_TRUTH[spelled(value)]) if len(names) == 2 and not truths else None
    for position in range(len(names)):
        if stands_for(str(position), value) or stands_for(f"{position}.0", value):
            turned = any(_TRUTH[word] != index for word, index in truths.items())
            return None if turned and position < 2 else position
    return None


WORDS = (
    *("0", "1", "2", "3", "-1", "00", "01", "+1", "1.0", "0.0", "2.0", "1.00", "1e0", "1e3", "1000", "1000.0", "0.5"),
    *(
        "0.50",
        "true",
        "True",
        "TRUE",
        "false",
        "False",
        "yes",
        "no",
        "on",
        "null",
        "NaN",
        "good",
        "bad",
        "Good",
        "2.5e0",
    ),
)
JSON_NUMBERS = (
    *("0", "1", "2", "-1", "1.0", "1.00", "0.0", "-0", "1e0", "1E0", "1e3", "1000", "0.5", "0.50", "2.0", "NaN"),
)
values = (
    st.sampled_from(WORDS)
    | st.sampled_from([f" {word}\t" for word in WORDS])
    | st.sampled_from([value_of(written) for written in JSON_NUMBERS])
    | st.sampled_from([0, 1, 2, -1, 1000, 0.0, 1.0, 2.0, 0.5, 1000.0, float("inf"), True, False, None, Decimal("1.0")])
)


@settings(max_examples=3000, deadline=None, derandomize=True)
@given(
    names=st.lists(st.sampled_from(("a", "b", "c", *WORDS)), min_size=2, max_size=4, unique=True),
    keys=st.lists(st.sampled_from(WORDS), max_size=4, unique=True),
    value=values,
    data=st.data(),
)
def test_random_maps_are_read_as_a_model_of_the_rules_reads_them(names, keys, value, data):
    mapping = {key: data.draw(st.sampled_from(names)) for key in keys}
    expected = modelled(names, mapping, value)
    labels = Labels(tuple(names), mapping)
    if expected is None:
        refused(labels, value)
    else:
        assert read(labels, value) == expected


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    st.integers().map(str)
    | st.floats(allow_nan=False, allow_infinity=False).map(repr)
    | st.from_regex(r"-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,5})?([eE][+-]?[0-9]{1,3})?", fullmatch=True)
)
def test_other_spellings_have_the_same_value_to_the_last_digit(written):
    number = value_of(written)
    for other in other_spellings(number):
        assert other != written and Decimal(other) == Decimal(written)
    if isinstance(number, WrittenFloat) and Decimal(written) == Decimal(repr(float(number))):
        assert repr(float(number)) in (written, *other_spellings(number))
    assert set(other_spellings(written)) <= {written.removesuffix(".0"), f"{written}.0"}
