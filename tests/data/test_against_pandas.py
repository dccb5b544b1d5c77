"""csv, tsv and plain lines give the rows that pandas finds, under the same keys, or an error with a line."""

import io
import re
from pathlib import Path

import pandas as pd
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st

from petals_eval.data import DataSource, Row, load_rows
from petals_eval.errors import DataError

quick = settings(
    max_examples=250, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def ours(folder: Path, name: str, text: str, **reading) -> list[Row]:
    path = folder / name
    path.write_bytes(text.encode())
    return list(load_rows(DataSource(path=str(path), **reading)))


def theirs(text: str, **reading) -> pd.DataFrame:
    return pd.read_csv(io.BytesIO(text.encode()), dtype=str, keep_default_na=False, index_col=False, **reading)


def same(rows: list[Row], table: pd.DataFrame) -> None:
    assert [row.index for row in rows] == list(table.index)
    assert [list(row.columns.values()) for row in rows] == table.to_numpy().tolist()


cell = st.text(st.sampled_from('ab1 \t",;\nNA'), max_size=4) | st.sampled_from(
    ["", " ", "NA", "null", "1.0", "01", "\t"]
)
blank_line = st.sampled_from(["", "", " ", "   "])
ends = st.sampled_from(["\n", "\r\n"])


@st.composite
def tables(draw, quoting: bool, delimiter: str):
    """A header, rows of as many cells as it names, and blank lines between them, as text."""
    width = draw(st.integers(1, 3))

    def written(fields: list[str]) -> str:
        if not quoting:
            return delimiter.join(re.sub(f"[\n{delimiter}]", "", field) for field in fields)
        return delimiter.join(
            '"' + field.replace('"', '""') + '"'
            if set(field) & {'"', "\n", delimiter} or draw(st.booleans())
            else field
            for field in fields
        )

    lines = [written([f"column {number}" for number in range(width)])]
    for fields in draw(st.lists(st.lists(cell, min_size=width, max_size=width), max_size=6)):
        lines += draw(st.lists(blank_line, max_size=2))
        lines.append(written(fields))
    lines += draw(st.lists(blank_line, max_size=2))
    return "".join(line + draw(ends) for line in lines)


@quick
@given(text=tables(quoting=True, delimiter=","))
def test_csv(tmp_path, text):
    table = theirs(text)
    assume(len(table) > 0)
    same(ours(tmp_path, "a.csv", text), table)


@quick
@given(text=tables(quoting=True, delimiter=";"), delimiter=st.just(";"))
def test_csv_with_another_delimiter(tmp_path, text, delimiter):
    table = theirs(text, sep=delimiter)
    assume(len(table) > 0)
    same(ours(tmp_path, "a.csv", text, delimiter=delimiter), table)


@quick
@given(text=tables(quoting=False, delimiter="\t"))
def test_tsv(tmp_path, text):
    table = theirs(text, sep="\t", quoting=3)
    assume(len(table) > 0)
    same(ours(tmp_path, "a.tsv", text), table)


@quick
@given(text=tables(quoting=False, delimiter="\t"))
def test_names_in_the_task_instead_of_a_header(tmp_path, text):
    body = text[text.index("\n") + 1 :]
    names = [f"name {number}" for number in range(text[: text.index("\n")].count("\t") + 1)]
    assume(body.strip(" \r\n"))
    same(ours(tmp_path, "a.tsv", body, column_names=names), theirs(body, sep="\t", quoting=3, header=None, names=names))


@quick
@given(lines=st.lists(st.text(st.sampled_from('ab1 \t,"\x0c\xa0'), max_size=5), max_size=8), end=ends)
def test_plain_lines(tmp_path, lines, end):
    text = "a line\n" + end.join(lines)
    same(ours(tmp_path, "a.txt", text), theirs(text, sep="\1", quoting=3, header=None))


@settings(quick, max_examples=600)
@given(
    text=st.lists(st.sampled_from([*'ab1 \t,"', '""', "\n", "\n", "\r\n", "\x0c", "\xa0"]), max_size=25).map("".join)
)
def test_any_csv_gives_the_same_rows_or_an_error_with_a_line(tmp_path, text):
    try:
        rows = ours(tmp_path, "a.csv", text)
    except DataError as error:
        event("an error of ours")
        of_no_row = ("is empty", "has no rows", "its first line should name the columns")
        assert re.search(r"\bline \d+", str(error)) or any(words in str(error) for words in of_no_row)
        return
    event("rows")
    same(rows, theirs(text))


@quick
@given(text=tables(quoting=True, delimiter=","))
def test_a_row_knows_the_line_where_it_begins(tmp_path, text):
    assume(len(theirs(text)) > 0)
    lines = text.split("\n")
    for row in ours(tmp_path, "a.csv", text):
        first = str(next(iter(row.columns.values())))
        assert row.line is not None
        begin = lines[row.line - 1].rstrip("\r")
        assert begin.startswith((first.split("\n")[0], '"' + first.replace('"', '""').split("\n")[0]))
