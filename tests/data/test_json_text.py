"""JSON files: every value is what is written there, in whatever shape the objects stand, and errors name the line."""

import json
import random
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from petals_eval.data import DataSource, Rows, json_text, load_rows
from petals_eval.errors import DataError
from petals_eval.tasks.template import Template

NUMBERS = (
    *("0", "-0", "7", "-7", "4.0", "4.50", "-0.0", "1e3", "1E3", "1e+03", "1E-2", "0e0", "0.1e1", "100", "1e999"),
    *("9007199254740993", "9007199254740993.0", "123456789012345678901234567890", "-18446744073709551616"),
    *("0.1000000000000000055511151231257827", "NaN", "Infinity", "-Infinity"),
)


def load(folder: Path, text: str, name: str = "a.jsonl", **reading) -> Rows:
    path = folder / name
    path.write_bytes(text.encode(reading.get("encoding", "utf-8")))
    return load_rows(DataSource(path=str(path), **reading))


def fails(folder: Path, text: str) -> str:
    with pytest.raises(DataError) as caught:
        load(folder, text)
    message = str(caught.value)
    assert message.startswith("a.jsonl cannot be read: expected one JSON object a line, or an array of objects; line ")
    return message


@pytest.mark.parametrize("written", NUMBERS)
def test_a_number_is_shown_as_it_is_written(tmp_path, written):
    [row] = load(tmp_path, f'{{"n": {written}, "list": [{written}], "map": {{"n": {written}}}}}\n')
    number = row.columns["n"]
    assert (str(number), repr(number), f"{number}") == (written,) * 3
    assert str(row.columns["list"]) == f"[{written}]"
    assert str(row.columns["map"]) == f"{{'n': {written}}}"
    expected = json.loads(written)
    assert isinstance(number, float) if isinstance(expected, float) else isinstance(number, int | float)
    assert number == expected or str(expected) == "nan"


def test_one_column_may_hold_everything(tmp_path):
    written = ["4", "4.5", '"4"', "true", "null", "[4]", '{"a": 4}', '"2020-01-01"', "9007199254740993", '""']
    rows = list(load(tmp_path, "".join(f'{{"x": {one}}}\n' for one in written)))
    for row, one in zip(rows, written, strict=True):
        expected = json.loads(one)
        assert row.columns["x"] == expected and isinstance(row.columns["x"], type(expected))
    assert [row.line for row in rows] == list(range(1, 11))


def test_columns_are_all_keys_in_the_order_of_their_first_appearance(tmp_path):
    rows = load(tmp_path, '{"b": 1, "a": 2}\n{"a": 3, "c": 4}\n{}\n')
    assert rows.columns == ("b", "a", "c")
    assert [dict(row.columns) for row in rows] == [
        {"b": 1, "a": 2, "c": None},
        {"b": None, "a": 3, "c": 4},
        {"b": None, "a": None, "c": None},
    ]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ('{"a": 1}\n{"a": 2}', [1, 2]),
        ('\n\n{"a": 1}\n \t\r\n{"a": 2}\r\n\n', [3, 5]),
        ('{"a": 1}{"a": 2}', [1, 1]),
        ('{"a": 1} {"a": 2}\n', [1, 1]),
        ('{\n "a":\n 1\n}\n{\n\n "a": 2}\n', [1, 5]),
        ('[{"a": 1}, {"a": 2}]', [1, 1]),
        ('\ufeff[\n{"a": 1}\n,\n{"a":\n2}\n]\n', [2, 4]),
        ('{"a": 1}\r{"a": 2}\r', [1, 1]),
    ],
)
@pytest.mark.parametrize("at_once", [1, 5, 1 << 20])
def test_the_shapes_that_objects_stand_in(tmp_path, monkeypatch, text, lines, at_once):
    monkeypatch.setattr(json_text, "_CHARACTERS_AT_ONCE", at_once)
    rows = list(load(tmp_path, text, "a.json"))
    assert [row.columns["a"] for row in rows] == [1, 2]
    assert [row.line for row in rows] == lines


def test_only_newline_ends_a_line_and_texts_keep_every_character(tmp_path):
    text = "a\u2028b\x85c\x7f\x00\U0001f600é"
    rows = list(load(tmp_path, f'{{"t": {json.dumps(text, ensure_ascii=False)}}}\r\n{{"t": {json.dumps(text)}}}\r\n'))
    assert [row.columns["t"] for row in rows] == [text, text]
    assert [row.line for row in rows] == [1, 2]


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1", "utf-8-sig", "U8"])
def test_encodings(tmp_path, encoding):
    [row] = load(tmp_path, '{"t": "é"}\n', encoding=encoding)
    assert row.columns["t"] == "é"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"t": "a"}\nnot json\n', "line 2 is not JSON (Expecting value): 'not json'."),
        ('{"t": "a"},\n{"t": "b"}\n', "line 1 has a comma between objects that stand one a line: leave it out."),
        (
            "{'t': 'secret', 'l': 1}\n",
            "line 1 is not JSON (Expecting property name enclosed in double quotes): \"'t'\".",
        ),
        ('{"t": "a"\n{"t": "b"}\n', "line 2 is not JSON (Expecting ',' delimiter): '{'."),
        ('{"t": "a",\n"l": 01}\n', "line 2 is not JSON (Expecting ',' delimiter): '1'."),
        ('{"t": "a"}\n{"t": "never closed\n{"t": "b"}\n', "line 2 is not JSON (Invalid control character at)"),
        ('{"t": "a", "l":\n', "line 1 is not JSON (Expecting value): it ends there."),
        ('{"t": 1}\n{"t": 2, "u": 3, "t": 4}\n', "line 2 gives the key 't' twice in one object."),
        ('{"t": {"u": 1, "v": 2, "u": 3}}\n', "line 1 gives the key 'u' twice in one object."),
        ('{"t": 1}\n\nnull\n', "line 3 should begin an object, found null."),
        ('{"t": 1}\n"x"\n', "line 2 should begin an object, found a text."),
        ('{"t": 1}\n[{"t": 1}]\n', "line 2 should begin an object, found an array."),
        ("17\n", "line 1 should begin an object, found a number."),
        ('[{"t": 1}, 2]\n', "line 1 should begin an object, found a number."),
        ('[\n{"t": 1},\n]\n', "line 3 is not JSON (Expecting value): ']'."),
        ('[{"t": 1}\n{"t": 2}]\n', "line 2 has neither a comma nor the end of the array behind an object."),
        ('[{"t": 1}]\n[{"t": 2}]\n', "line 2 goes on behind the end of the array."),
        ('[{"t": 1}\n', "line 2 has neither a comma nor the end of the array behind an object."),
        ('{"t": "a"}\n{"t": "half \\ud83d"}\n', "line 2 holds half of a surrogate pair"),
        ('{"\\udc00": "a"}\n', "line 1 holds half of a surrogate pair"),
        ('{"t": ' + "[" * 100_000, "line 1 holds values within values within values"),
        ('{"t": ' + "9" * 5000 + "}\n", "line 1 holds a number of more digits than Python reads."),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path, text, expected):
    assert expected in fails(tmp_path, text)


def test_a_whole_pair_and_an_escaped_backslash_are_no_half(tmp_path):
    [row] = load(tmp_path, '{"t": "\\ud83d\\ude00 \\\\ud83d"}\n')
    assert row.columns["t"] == "\U0001f600 \\ud83d"


def test_a_message_shows_one_value_at_most_and_cuts_it(tmp_path):
    secret = "a private text that goes on and on " * 20
    message = fails(tmp_path, f'{{"t": {json.dumps(secret)}, "u": {secret}}}\n')
    assert len(message) < 300 and message.count("a private text") == 2  # one value, cut to 80 characters


@pytest.mark.parametrize("text", ["[]", " \n[ ]\n", "\n\n", " "])
def test_no_objects_are_no_rows(tmp_path, text):
    with pytest.raises(DataError, match="is empty: expected at least one row"):
        load(tmp_path, text)


def test_a_template_writes_numbers_and_truth_values_as_the_file_does(tmp_path):
    rows = load(tmp_path, '{"n": 4, "b": true}\n{"n": 4.50, "b": false}\n{"n": 1e3, "b": "x"}\n')
    template = Template.parse("{n} {b}")
    found = [template.render(row.columns, where="here", truth_words=rows.truth_words) for row in rows]
    assert found == ["4 true", "4.50 false", "1e3 x"]


def test_memory_is_bounded_by_a_batch(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for number in range(600):
            file.write(json.dumps({"n": number, "t": "x" * 100_000}) + "\n")
    tracemalloc.start()
    try:
        rows = load_rows(DataSource(path=str(path)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(rows) == 600
    assert peak < 30e6  # of a file of 60 MB


number = st.from_regex(r"-?(0|[1-9][0-9]{0,25})(\.[0-9]{1,20})?([eE][+-]?[0-9]{1,3})?", fullmatch=True)
text_value = st.text(st.characters(codec="utf-8"), max_size=8).flatmap(
    lambda text: st.sampled_from([json.dumps(text), json.dumps(text, ensure_ascii=False)])
)
scalar = number | text_value | st.sampled_from(["true", "false", "null"])
value = st.recursive(
    scalar,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda parts: f"[{', '.join(parts)}]")
        | st.dictionaries(st.sampled_from("abc"), inner, max_size=3).map(
            lambda parts: "{" + ",".join(f'"{key}" : {one}' for key, one in parts.items()) + "}"
        )
    ),
    max_leaves=4,
)
objects = st.lists(st.dictionaries(st.sampled_from(["t", "n", "\u00e9", "", "d"]), value, max_size=4), min_size=1)


def _written_numbers(text: str) -> Any:
    """The value of a JSON text with ("number", spelling) for its numbers, by Python's own reader."""
    spelled = lambda written: ("number", written)  # noqa: E731
    return json.loads(text, parse_int=spelled, parse_float=spelled)


def _spelled(found: object) -> object:
    if isinstance(found, dict):
        return {key: _spelled(one) for key, one in found.items()}
    if isinstance(found, list):
        return [_spelled(one) for one in found]
    return ("number", str(found)) if isinstance(found, int | float) and not isinstance(found, bool) else found


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=objects, seed=st.integers(0, 2**20), at_once=st.sampled_from([1, 30, 1 << 20]))
def test_any_rows_are_what_pythons_json_reads_with_numbers_as_written(tmp_path, rows, seed, at_once):
    drawn = random.Random(seed)
    blank = lambda: drawn.choice(["", "", " ", "\n", "\r\n", "\t"])  # noqa: E731
    texts = [
        "{" + ",".join(f"{blank()}{json.dumps(key)}{blank()}:{blank()}{one}" for key, one in row.items()) + "}"
        for row in rows
    ]
    array = drawn.random() < 0.3
    between = [blank() + ("," if array else drawn.choice(["\n", ""])) + blank() for _ in texts[1:]] + [blank()]
    whole = blank() + ("[" if array else "")
    starts = []
    for text, gap in zip(texts, between, strict=True):
        starts.append(whole.count("\n") + 1)
        whole += text + gap
    whole += "]" if array else ""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(json_text, "_CHARACTERS_AT_ONCE", at_once)
        loaded = load(tmp_path, whole)
    expected = [_written_numbers(text) for text in texts]
    columns = list(dict.fromkeys(key for row in expected for key in row))
    found = list(loaded)
    assert list(loaded.columns) == columns
    assert [_spelled(dict(row.columns)) for row in found] == [
        {column: row.get(column) for column in columns} for row in expected
    ]
    assert [row.line for row in found] == starts
    assert [row.index for row in found] == list(range(len(rows)))


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.text('{}[]",:\\ud8u\n\r 01.eE-truefalsn', max_size=40), st.integers(0, 60), st.sampled_from([1, 1 << 20]))
def test_anything_else_is_an_error_with_a_line(tmp_path, noise, place, at_once):
    good = '{"t": "a\\ud83d\\ude00", "n": -1.5e3}\n{"t": "b", "n": [true, null]}\n'
    text = good[:place] + noise + good[place:]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(json_text, "_CHARACTERS_AT_ONCE", at_once)
        try:
            rows = list(load(tmp_path, text))
        except DataError as error:
            line = re.search(r"; line (\d+) ", str(error))
            assert line is not None and 1 <= int(line.group(1)) <= text.count("\n") + 1
            return
    # What is read is what Python's own reader finds in it, object after object.
    reader, at, expected = json.JSONDecoder(), 0, []
    source = text.strip(" \t\r\n")
    if source.startswith("["):
        expected = json.loads(source)
    else:
        while at < len(source):
            one, at = reader.raw_decode(source, at)
            expected.append(one)
            at += len(source[at:]) - len(source[at:].lstrip(" \t\r\n"))
    columns = list(dict.fromkeys(key for row in expected for key in row))
    assert [dict(row.columns) for row in rows] == [{key: row.get(key) for key in columns} for row in expected]
