"""Rows at hand, and reproducible samples of them."""

from collections import OrderedDict
from types import MappingProxyType

import datasets
import numpy as np
import pandas
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from petals_eval.data import rows_of, sample
from petals_eval.errors import ConfigError, DataError


def numbered(count: int):
    return rows_of([{"text": f"t{number}", "label": number % 2} for number in range(count)])


def test_rows_from_dictionaries_and_data_sets_are_the_same():
    records = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    one, other = rows_of(records), rows_of(datasets.Dataset.from_list(records))
    assert one.columns == other.columns == ("text", "label")
    assert [(row.index, dict(row.columns)) for row in one] == list(enumerate(records))
    assert one.fingerprint == other.fingerprint != rows_of(records[:1]).fingerprint


RECORDS = [{"text": "a", "label": 1}, {"text": "b", "label": 0}, {"text": "c", "label": 1}]


@pytest.mark.parametrize(
    "form",
    [
        tuple,
        iter,
        lambda records: (MappingProxyType(record) for record in records),
        lambda records: [OrderedDict(record) for record in records],
        lambda records: [{"label": np.int64(each["label"]), "text": np.str_(each["text"])} for each in records],
        lambda records: [{"text": each["text"], "label": torch.tensor(each["label"])} for each in records],
        pandas.DataFrame,
        lambda records: pandas.DataFrame(records, index=[7, 7, 3]),
        lambda records: pandas.DataFrame(records).astype({"text": "category", "label": "Int64"}),
        lambda records: pandas.DataFrame(records).set_index("text", drop=False),
        datasets.Dataset.from_list,
        lambda records: datasets.Dataset.from_list(records).with_format("torch"),
        lambda records: datasets.Dataset.from_list(records).to_iterable_dataset(),
        lambda records: datasets.IterableDataset.from_generator(lambda: iter(records)),
        lambda records: rows_of(records),
    ],
)
def test_every_form_of_rows_is_the_same_rows(form):
    found = rows_of(form(RECORDS))
    if found.columns == ("text", "label"):
        assert found.fingerprint == rows_of(RECORDS).fingerprint
    assert [(row.index, dict(row.columns), row.line) for row in found] == [(i, r, None) for i, r in enumerate(RECORDS)]
    assert all(type(row.columns["label"]) is int and type(row.columns["text"]) is str for row in found)


def test_what_is_missing_is_missing_whoever_says_so():
    frame = pandas.DataFrame(
        {"text": ["a", None], "score": [1.5, float("nan")], "label": pandas.array([1, None], "Int64")}
    )
    expected = [{"text": "a", "score": 1.5, "label": 1}, {"text": None, "score": None, "label": None}]
    assert [dict(row.columns) for row in rows_of(frame)] == expected
    assert [dict(row.columns) for row in rows_of(frame.to_dict("records"))] == expected
    later = pandas.DataFrame({"when": [pandas.Timestamp("2026-01-02"), pandas.NaT]})
    assert [row.columns["when"] for row in rows_of(later)][1] is None


def test_lists_and_mappings_in_a_row_are_plain_too():
    choices = {"text": np.array(["x", "y"], object), "label": ["A", "B"]}
    [row] = rows_of([{"choices": choices, "scores": np.array([0.5, 1.0]), "ids": torch.tensor([1, 2])}])
    assert row.columns == {"choices": {"text": ["x", "y"], "label": ["A", "B"]}, "scores": [0.5, 1.0], "ids": [1, 2]}


def test_class_names_of_a_data_set_count_also_where_it_is_read_once():
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    data = datasets.Dataset.from_list(RECORDS, features=features)
    for each in (data, data.to_iterable_dataset()):
        assert rows_of(each).class_names == {"label": ("no", "yes")}
    assert rows_of(data).fingerprint == rows_of(data.to_iterable_dataset()).fingerprint != rows_of(RECORDS).fingerprint


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (7, "data: expected a list of mappings, a pandas DataFrame or a datasets.Dataset, found int"),
        ("rows", "data: expected a list of mappings, .* found str"),
        ([1, 2], r"data, row 0: expected a mapping of column names to values, found int \(1\)"),
        ([{"a": 1}, ("a", 2)], "data, row 1: expected a mapping .* found tuple"),
        ([{1: "a"}], "data, row 0: expected text as names of columns, found 1"),
        ({"text": ["a"], "label": [1]}, r"data: expected rows, found one mapping \(text, label\)"),
        (
            datasets.DatasetDict(test=datasets.Dataset.from_list(RECORDS)),
            r"several \(test\): give one, as data\['test'\]",
        ),
        (pandas.DataFrame([[1, 2]]), "text as names of a DataFrame's columns, each once, found 0 among 0, 1"),
        (pandas.DataFrame([[1, 2]], columns=["a", "a"]), "each once, found one name twice among a, a"),
        (pandas.DataFrame({"a": []}), "data is empty"),
        ((row for row in ()), "data is empty"),
        ([{"a": object()}], "data: every column needs values of one type"),
        ([{"a": {1, 2}}, {"a": 3}], "data: every column needs values of one type"),
    ],
)
def test_what_is_no_rows(data, said):
    with pytest.raises(DataError, match=said):
        rows_of(data)


def test_rows_can_be_read_again():
    rows = numbered(1203)
    assert len(rows) == 1203
    assert [row.index for row in rows] == [row.index for row in rows] == list(range(1203))


def test_rows_at_hand_that_do_not_fit_together():
    with pytest.raises(DataError, match="row 1 has the columns text, but row 0 has text, label"):
        rows_of([{"text": "a", "label": 1}, {"text": "b"}])
    with pytest.raises(DataError, match="every column needs values of one type"):
        rows_of([{"text": "a"}, {"text": 1}])
    with pytest.raises(DataError, match="data is empty"):
        rows_of([])


def test_numbers_at_hand_keep_their_kind_and_their_digits():
    records = [{"n": 4, "big": 2**70, "mixed": 2**53 + 1}, {"n": 4.5, "big": -1, "mixed": None}]
    records.append({"n": None, "big": None, "mixed": 1e22})
    found = [dict(row.columns) for row in rows_of(records)]
    assert found == records
    assert [str(row["n"]) for row in found] == ["4", "4.5", "None"]
    assert [type(row["mixed"]) for row in found] == [int, type(None), float]
    other = [{**row, "n": str(row["n"])} for row in records]
    assert rows_of(records).fingerprint != rows_of(other).fingerprint
    assert rows_of(records).fingerprint == rows_of([dict(row) for row in records]).fingerprint


@pytest.mark.parametrize("odd", ["a", True, [1]])
def test_numbers_beside_something_else_are_no_column(odd):
    with pytest.raises(DataError, match="every column needs values of one type"):
        rows_of([{"n": 1}, {"n": odd}])


def test_a_known_sample_stays_what_it_is():
    """These positions must never change: they are what a seed in a paper stands for."""
    assert [row.index for row in sample(numbered(1000), 8, 0)] == [11, 196, 269, 403, 600, 850, 855, 921]


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 60), limit=st.integers(1, 80), seed=st.integers(0, 2**40))
def test_a_sample_is_a_part_in_order(count, limit, seed):
    rows = numbered(count)
    drawn = [row.index for row in sample(rows, limit, seed)]
    assert len(drawn) == min(limit, count)
    assert drawn == sorted(set(drawn)) and set(drawn) <= set(range(count))
    assert drawn == [row.index for row in sample(rows, limit, seed)]
    assert {row.index for row in sample(rows, max(1, limit // 2), seed)} <= set(drawn)


def test_a_sample_keeps_values_and_source_positions():
    rows = numbered(2000)
    part = sample(sample(rows, 1500, 1), 700, 2)
    assert len(part) == 700
    assert all(row.columns["text"] == f"t{row.index}" for row in part)


def test_rows_that_are_left_out_do_not_change_the_luck_of_the_others():
    rows = numbered(100)
    whole = [row.index for row in sample(rows, 20, 3)]
    left_out = whole[::4]
    kept = [row.index for row in sample(rows, 20, 3, leave_out=left_out)]
    assert len(kept) == 20
    assert not set(kept) & set(left_out)
    assert set(whole) - set(left_out) <= set(kept)
    assert [row.index for row in sample(rows, None, 3, leave_out=[0, 99])] == list(range(1, 99))
    with pytest.raises(DataError, match="expected more rows than the 100 that are left out"):
        sample(rows, None, 3, leave_out=range(100))


def test_seeds_and_limits_change_the_fingerprint():
    rows = numbered(50)
    prints = {sample(rows, limit, seed).fingerprint for limit, seed in ((None, 0), (10, 0), (10, 1), (11, 0))}
    assert len(prints) == 4
    assert sample(rows, 50, 3).fingerprint == rows.fingerprint


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_below_one(limit):
    with pytest.raises(ConfigError, match=f"limit should be at least 1, found {limit}"):
        sample(numbered(3), limit, 0)


def test_a_negative_seed():
    with pytest.raises(ConfigError, match="seed should be 0 or more, found -1"):
        sample(numbered(3), 2, -1)
