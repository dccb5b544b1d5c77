"""Rows at hand, and reproducible samples of them."""

import datasets
import pytest
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
