"""Rows joined into documents: what a document holds, where it begins, and that it is the same document everywhere."""

import numpy as np
import pytest

from petals_eval.data import DataSource, load_rows, rows_of, sample
from petals_eval.data.documents import joined_rows

LINES = "one\n\ntwo\nthree\n\n\nfour\nfive\n"


@pytest.fixture
def lines(tmp_path):
    (tmp_path / "lines.txt").write_text(LINES)
    return load_rows(DataSource(path=str(tmp_path / "lines.txt")))


def texts(rows) -> list[tuple[int, object, int | None]]:
    return [(row.index, row.columns["text"], row.line) for row in rows]


def test_consecutive_rows_are_one_and_the_last_are_those_left_over(lines):
    assert texts(joined_rows(lines, 2, "\n\n")) == [(0, "one\n\ntwo", 1), (1, "three\n\nfour", 4), (2, "five", 8)]
    assert texts(joined_rows(lines, 5, " ")) == [(0, "one two three four five", 1)]
    assert texts(joined_rows(lines, 99, "")) == [(0, "onetwothreefourfive", 1)]


def test_all_rows_are_one_document(lines):
    assert texts(joined_rows(lines, None, " / ")) == [(0, "one / two / three / four / five", 1)]


def test_a_sample_is_of_whole_documents_that_keep_their_place(lines):
    documents = joined_rows(lines, 2, " ")
    assert texts(documents.at(np.array([1]))) == [(1, "three four", 4)]
    drawn = sample(documents, 2, seed=3)
    assert len(drawn) == 2 and set(texts(drawn)) < set(texts(documents))


def test_the_fingerprint_is_of_the_rows_and_of_how_they_are_joined(lines):
    prints = {
        lines.fingerprint,
        joined_rows(lines, 2, " ").fingerprint,
        joined_rows(lines, 3, " ").fingerprint,
        joined_rows(lines, 2, "\n").fingerprint,
        joined_rows(lines.at(np.array([0, 1, 2])), 2, " ").fingerprint,
    }
    assert len(prints) == 5
    assert joined_rows(lines, 2, " ").fingerprint in prints
    assert joined_rows(lines, None, " ").fingerprint == joined_rows(lines, len(lines), " ").fingerprint


def test_values_that_are_no_texts():
    rows = rows_of(
        [
            {"text": "a", "number": 4, "truth": True, "list": ["x"], "gap": None},
            {"text": "", "number": 5, "truth": False, "list": [], "gap": "y"},
        ]
    )
    [document] = joined_rows(rows, 2, "|")
    assert document.columns == {
        "text": "a|",
        "number": "4|5",
        "truth": "True|False",
        "list": [["x"], []],
        "gap": None,
    }
