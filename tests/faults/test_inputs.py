"""Every input of a public bug report that bears on numbers, with its right answer and the reason.

The answers were worked out by hand, and are held against pandas, Python's json module and pyarrow where these can read
the file. No case may give another number: a file is read as it is written, or there is an error that says what to do.
"""

import csv
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import pyarrow.parquet
import pytest

from petals_eval.data import DataSource, Rows, load_rows
from petals_eval.errors import DataError, PetalsEvalError
from petals_eval.metrics import compute_metrics
from petals_eval.tasks import ClassificationTask, Task, load_task, resolve_source

INPUTS = Path(__file__).parent / "inputs"
QUESTIONS = ("description", "entity", "abbreviation", "human", "location", "number")
REVIEWS = ("bad", "good")


@dataclass(frozen=True)
class Right:
    """What must come: the position of each row's label among the names, and the text that the model reads."""

    labels: list[int]
    texts: list[str]


@dataclass(frozen=True)
class Wrong:
    """What the message must hold: what was found, where, and what to do."""

    words: tuple[str, ...]

    def __init__(self, *words: str):
        object.__setattr__(self, "words", words)


@dataclass(frozen=True)
class Case:
    file: str
    reason: str
    answer: Right | Wrong
    names: tuple[str, ...] = QUESTIONS
    text: str = "{text}"
    reading: dict[str, object] = field(default_factory=dict)

    def task(self) -> ClassificationTask:
        return ClassificationTask(name="t", text=self.text, label_column="label", label_names=self.names)

    def rows(self) -> Rows:
        return load_rows(resolve_source(self.task(), INPUTS / "data" / self.file, **self.reading))


def letters(texts: str | list[str], **settings: object) -> dict[str, list]:
    """A tokenizer that makes a token of every letter."""
    if isinstance(texts, str):
        return {"input_ids": [ord(letter) for letter in texts]}
    return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def answers(task: Task, rows: Rows) -> Right:
    """Labels and texts as a run reads them."""
    found = list(task.examples(rows, letters))
    assert [example.key for example in found] == [str(at) for at in range(len(found))]
    return Right([example.label for example in found], [example.text for example in found])


def said(error: pytest.ExceptionInfo[PetalsEvalError]) -> str:
    assert error.value.exit_code == 2
    message = str(error.value)
    assert "Traceback" not in message and "pydantic" not in message and len(message) < 1200
    return message


THREE = Right([5, 3, 0], ["How far is it ?", "Who wrote it ?", "What is a cat ?"])
TWO = Right([5, 3], ["How far", "Who"])
NO_LABEL = "The row has no label."

CSV = [
    Case("ok.csv", "a plain file", THREE),
    Case("upper.CSV", "the suffix decides, in capital letters too", THREE),
    Case("bom.csv", "a byte order mark is no part of the first name", THREE),
    Case("bom.csv", "nor under another name of utf-8", THREE, reading={"encoding": "cp65001"}),
    Case("crlf.csv", "line ends of Windows are no part of the label", THREE),
    Case("nul.csv", "a zero byte is a character", Right([5, 3, 0], ["How f\0ar is it ?", *THREE.texts[1:]])),
    Case("one.csv", "one row is a data set", Right([5], ["How far"])),
    Case("na.csv", "NA, null, None and nan are texts here", Right([5, 3, 3, 3], ["NA", "null", "None", "nan"])),
    Case(
        "q6.csv",
        "a comma in quotation marks is text",
        Right(
            [5, 4, 3, 0, 1, 5],
            [
                "How far is it from Denver to Aspen ?",
                "What county is Modesto , California in ?",
                "Who was Galileo ?",
                "What is an atom ?",
                "x",
                "When did Hawaii become a state and what happened in the years that followed it all over the islands "
                "and the sea ?",
            ],
        ),
    ),
    Case(
        "quoted_nl.csv",
        "a line end in quotation marks is text, and a doubled mark is one",
        Right([5, 3], ["How far\nis it ?", 'Who "wrote" it, and why ?']),
    ),
    Case(
        "rtl.csv",
        "no character and no brace of a cell has a meaning",
        Right(
            [3, 3, 3],
            [
                "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645",
                "\U0001f468\u200d\U0001f469\u200d\U0001f467 family {text} {0} {{x}}",
                "\u202egnirts",
            ],
        ),
    ),
    Case(
        "sub.csv", "only a newline ends a line", Right([5, 3, 3, 3], ["How\x1a far", "Who\x0cx", "Wh\u2028y", "A\x85b"])
    ),
    Case("empty_header.csv", "the index that pandas writes is a column without a name", TWO),
    Case("space_label.csv", "outer blanks of a label do not count", Right([5, 3], ["a", "b"])),
    Case("float_label.csv", "pandas writes 1 as 1.0 where a column has gaps", Right([1, 0], ["a", "b"])),
    Case("pandas_bool.csv", "pandas writes truth values so", Right([1, 0], ["good", "bad"]), REVIEWS),
    Case("semicolon.csv", "with its delimiter", THREE, reading={"delimiter": ";"}),
    Case("semicolon.csv", "without it there is one column", Wrong("no column text", "Columns found: text;label")),
    Case("utf16.csv", "with its encoding", THREE, reading={"encoding": "utf-16"}),
    Case("utf16.csv", "no guess of an encoding", Wrong("is not utf-8", "Say how it is written")),
    Case("utf16le_nobom.csv", "with its encoding", THREE, reading={"encoding": "utf-16-le"}),
    Case("utf16le_nobom.csv", "its zero bytes are valid utf-8", Wrong("a zero byte", "Is it text?")),
    Case("cp1252.csv", "with its encoding", Right([3], ["\u201cquoted\u201d"]), reading={"encoding": "cp1252"}),
    Case("cp1252.csv", "no guess of an encoding", Wrong("is not utf-8", "Say how it is written")),
    Case("latin1.csv", "with its encoding", Right([3], ["caf\u00e9"]), reading={"encoding": "latin-1"}),
    Case("latin1.csv", "no guess of an encoding", Wrong("is not utf-8", "encoding: latin-1")),
    Case(
        "inner_quote.csv",
        "text behind a closing mark is a slip",
        Wrong("line 3 is not well-formed csv", "quoting: fal"),
    ),
    Case(
        "inner_quote.csv",
        "without quoting a mark is a character",
        Right([5, 3], ['5" pipe', '"a"b']),
        reading={"quoting": False},
    ),
    Case(
        "unclosed.csv", "an open mark would swallow the rest", Wrong("line 3 is not well-formed csv", "quoting: false")
    ),
    Case("emptyrow.csv", "a row of delimiters is a row, as in pandas: Who is row 2", Wrong("row 1 (line 3)", NO_LABEL)),
    Case("blanktext.csv", "a row without text", Wrong("row 1 (line 3) is empty", "no text in text")),
    Case("neg1.csv", "-1 stands for a hidden label", Wrong("row 0 (line 2)", "'-1'", "hidden label")),
    Case(
        "plus.csv", "+1 and 01 are no spellings of pandas", Wrong("row 0 (line 2)", "'+1'", "without a sign", '{"+1"')
    ),
    Case("dupcol.csv", "which of them is text nobody knows", Wrong("'text' twice")),
    Case("empty_header2.csv", "two columns of one name, none", Wrong("'' twice")),
    Case("spaces_header.csv", "names are compared as written", Wrong("no column label", "Did you mean  label?")),
    Case("comment.csv", "a comment is no header", Wrong("row 0 (line 2)", "expected 1 columns (# made by x)")),
    Case("excelsep.csv", "Excel's first line is no header", Wrong("no column text", "sep=")),
    Case("trailing_comma.csv", "one cell too many", Wrong("row 0 (line 2): expected 2 columns (text, label), found 3")),
    Case("cr.csv", "line ends of old Macs, as pandas reads them", THREE),
    Case("cr.csv", "also where a quotation mark is a character", THREE, reading={"quoting": False}),
    Case("gz.csv.gz", "a compressed file is what was compressed, as in pandas and datasets", THREE),
    Case("empty.csv", "no bytes", Wrong("is empty: expected at least one row")),
    Case("blank_only.csv", "blank lines are no rows", Wrong("has no rows: it holds only blank lines")),
    Case("header_only.csv", "a header is no row", Wrong("is empty: expected at least one row")),
    Case("vt.tsv", "in tsv a quotation mark is a character", Right([5, 3], ["How far", '"quoted"'])),
]

JSON = [
    Case("ok.jsonl", "a plain file", TWO),
    Case("bom.jsonl", "a byte order mark is no JSON", TWO),
    Case("crlf.jsonl", "line ends of Windows are blanks", TWO),
    Case("file.json", "an array of objects", TWO),
    Case("pretty.json", "over several lines", TWO),
    Case("utf16.jsonl", "with its encoding", TWO, reading={"encoding": "utf-16"}),
    Case("utf16.jsonl", "no guess of an encoding", Wrong("is not utf-8", "Say how it is written")),
    Case("u2028.jsonl", "only a newline ends a line", Right([5, 3], ["How\u2028far\x85 x", "Who"])),
    Case("surrogatepair.jsonl", "a whole pair is a character", Right([5, 3], ["How far \U0001f600", "Who"])),
    Case(
        "surrogate.jsonl", "half of one is none, and no tokenizer takes it", Wrong("line 1 holds half of a surrogate p")
    ),
    Case(
        "zero_tok.jsonl",
        "texts are texts, whatever a tokenizer makes of them",
        Right([3] * 5, ["\u200b", "\ufeff", "\0", "</s></s>", "<s>"]),
    ),
    Case("dates.jsonl", "in quotes a date is text", Right([5, 3], ["2020-01-01 00:00:00", "2021-05-05 10:00:00"])),
    Case("dates2.jsonl", "in quotes a date is text", Right([5, 3], ["2020-01-01", "2021-05-05"])),
    Case(
        "year.jsonl",
        "no time is added to a date",
        Right([3, 3], ["2021-03-04: Markets rise", "2021-03-05: Markets fall"]),
        text="{date}: {text}",
    ),
    Case("date_meta.jsonl", "nobody reads that column", TWO),
    Case("mixedmeta.jsonl", "1 and b in a column that nobody reads", TWO),
    Case("nesteddata.jsonl", "nested values that nobody reads", TWO),
    Case("extrakey.jsonl", "a key that only the second row has", TWO),
    Case(
        "extrakey.jsonl",
        "which a template cannot read",
        Wrong("row 0 (line 1) has no text in column extra"),
        text="{extra}",
    ),
    Case(
        "ids.jsonl",
        "4 stays 4 beside 4.5, and no digit is lost above 2^53",
        Right([3, 3], ["9007199254740993 4 stars. good", "9007199254740995 4.5 stars. good"]),
        text="{id} {stars} stars. {text}",
    ),
    Case("numtext.jsonl", "123 stays 123 beside 4.5", Right([5, 3], ["123", "4.5"])),
    Case(
        "bigint.jsonl",
        "no number is too large",
        Right([1, 1], ["123456789012345678901234567890 How far", "2 Who"]),
        text="{id} {text}",
    ),
    Case("booltext.jsonl", "a truth value is spelled as in JSON", Right([5], ["true"])),
    Case("boollabel.jsonl", "true and false of two labels", Right([1, 0], ["a", "b"]), REVIEWS),
    Case("mixbool.jsonl", 'true and "false"', Right([1, 0], ["a good meal", "a bad meal"]), REVIEWS),
    Case("mixedlabel.jsonl", "a position and a name", TWO),
    Case("mixedlabel2.jsonl", "a name and a position", TWO),
    Case("floatlabel.jsonl", "1.0 is the whole number 1", Right([1, 2], ["How far", "Who"])),
    Case("floatfrac.jsonl", "1.5 is no position", Wrong("row 0 (line 1)", "is 1.5", '{"1.5": ...}')),
    Case("nan.jsonl", "NaN is no label", Wrong("row 0 (line 1)", "is NaN", NO_LABEL)),
    Case("nulllabel.jsonl", "null is no label", Wrong("row 0 (line 1)", NO_LABEL)),
    Case("missingkey.jsonl", "neither is a key that is not there", Wrong("row 1 (line 2)", NO_LABEL)),
    Case("nulltext.jsonl", "null is no text", Wrong("row 0 (line 1) has no text in column text")),
    Case("mixnum_text.jsonl", "numbers are texts, null is none", Wrong("row 2 (line 3) has no text in column text")),
    Case("listlabel.jsonl", "a label is one value", Wrong("row 0 (line 1)", "['number']", "A label is one value")),
    Case("onehot.jsonl", "a label is one value", Wrong("row 0 (line 1)", "[0, 0, 1]", "A label is one value")),
    Case("dupkey.jsonl", "which of two labels nobody knows", Wrong("line 1 gives the key 'label' twice")),
    Case("single_quotes.jsonl", "Python's quotes are no JSON", Wrong("line 1 is not JSON", "double quotes")),
    Case(
        "trailing.jsonl",
        "a comma between lines is no JSON",
        Wrong("line 1 has a comma between objects", "leave it out"),
    ),
    Case("colon_keys.jsonl", "a name may hold a colon", Wrong("no column text", "Did you mean text:a?")),
    Case(
        "columns.json", "columns instead of rows: the label is a list", Wrong("row 0 (line 1)", "A label is one value")
    ),
    Case("nested.json", "rows below a key", Wrong("no column text", "Columns found: data")),
    Case("pandas_records_idx.json", "rows below their numbers", Wrong("no column text", "Columns found: 0, 1")),
]

PARQUET = [
    Case("ok.parquet", "a plain file", THREE),
    Case("categorical.parquet", "categories are their texts", THREE),
    Case("categorical_meta.parquet", "a column that nobody reads", THREE),
    Case("dict_meta.parquet", "a column that nobody reads", THREE),
    Case("index.parquet", "the index of pandas is a column more", THREE),
    Case("large_string.parquet", "another type of text", THREE),
    Case("string_view.parquet", "another type of text", THREE),
    Case("float.parquet", "5.0 is the whole number 5", THREE),
    Case("uint8.parquet", "a small type of whole numbers", THREE),
    Case("decimal.parquet", "5 as a decimal number", THREE),
    Case("boolean.parquet", "true and false of two labels", Right([1, 0, 1], THREE.texts), REVIEWS),
    Case("Int64null.parquet", "the third label is missing", Wrong("row 2", "is None", NO_LABEL)),
    Case("nulllabel_float.parquet", "the third label is missing", Wrong("row 2", "is None", NO_LABEL)),
    Case("nantext.parquet", "the second text is missing", Wrong("row 1 has no text in column text")),
    Case("floatnantext.parquet", "pandas writes NaN for what is missing", Wrong("row 1 has no text in column text")),
    Case("listlabel.parquet", "a label is one value", Wrong("row 0", "['number']", "A label is one value")),
    Case("binary.parquet", "bytes are no text", Wrong("row 0: column text should hold text, found bytes")),
    Case(
        "datetext.parquet",
        "a date of its own type is no text",
        Wrong("row 0: column text should hold text, found date"),
    ),
    Case("norows.parquet", "no rows", Wrong("is empty: expected at least one row")),
    Case("dupcol.parquet", "which of them is text nobody knows", Wrong("two columns of the name 'text'", "rename one")),
    Case("odd_types.parquet", "a type that datasets does not know, in a column that nobody reads", THREE),
    Case("actually_csv.parquet", "csv under a wrong name", Wrong("expected a parquet file")),
    Case("lfs_pointer.parquet", "a pointer of git lfs", Wrong("it is a pointer of git lfs", "git lfs pull")),
    Case("truncated.parquet", "half a file", Wrong("expected a parquet file")),
]


def _id(case: Case) -> str:
    return f"{case.file}: {case.reason}"


@pytest.mark.parametrize("case", [*CSV, *JSON, *PARQUET], ids=_id)
def test_a_data_file(case: Case) -> None:
    if isinstance(case.answer, Right):
        rows = case.rows()
        assert answers(case.task(), rows) == case.answer
        assert [row.index for row in rows] == list(range(len(case.answer.labels)))
        return
    with pytest.raises(DataError) as caught:
        answers(case.task(), case.rows())
    message = said(caught)
    assert [word for word in case.answer.words if word not in message] == []


def test_every_file_has_an_answer() -> None:
    files = {path.name for path in (INPUTS / "data").iterdir()}
    assert {case.file for case in (*CSV, *JSON, *PARQUET)} == files
    assert {name for name, _, _ in TASKS} == {path.name for path in (INPUTS / "tasks").glob("*.yaml")}
    assert {name for name, *_ in METRICS} == {path.name for path in (INPUTS / "metrics").iterdir()}


# The same by other readers


@pytest.mark.parametrize("case", [case for case in CSV if isinstance(case.answer, Right)], ids=_id)
def test_pandas_finds_the_same_cells(case: Case) -> None:
    tab = case.file.endswith(".tsv")
    quoting = csv.QUOTE_MINIMAL if case.reading.get("quoting", not tab) else csv.QUOTE_NONE
    table = pd.read_csv(
        INPUTS / "data" / case.file,
        dtype=str,
        keep_default_na=False,
        sep=str(case.reading.get("delimiter", "\t" if tab else ",")),
        encoding=str(case.reading.get("encoding", "utf-8-sig")),
        quoting=quoting,
    )
    rows = list(case.rows())
    assert [row.index for row in rows] == list(table.index)
    assert [list(row.columns.values()) for row in rows] == table.to_numpy().tolist()


@pytest.mark.parametrize("case", [case for case in JSON if isinstance(case.answer, Right)], ids=_id)
def test_pythons_json_finds_the_same_values_with_numbers_as_written(case: Case) -> None:
    text = (INPUTS / "data" / case.file).read_text(encoding=str(case.reading.get("encoding", "utf-8-sig")))
    texts = text.split("\n") if case.file.endswith(".jsonl") else [text]
    read = [json.loads(one, parse_int=str, parse_float=str) for one in texts if one.strip()]
    expected = read if case.file.endswith(".jsonl") else read[0]
    found = [dict(row.columns) for row in case.rows()]
    assert len(found) == len(expected)
    for row, other in zip(found, expected, strict=True):
        assert {column: _as_written(value) for column, value in row.items() if column in other} == other
        assert all(value is None for column, value in row.items() if column not in other)


def _as_written(value: object) -> object:
    if isinstance(value, dict):
        return {key: _as_written(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_as_written(one) for one in value]
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


@pytest.mark.parametrize("case", [case for case in PARQUET if isinstance(case.answer, Right)], ids=_id)
def test_pyarrow_finds_the_same_values(case: Case) -> None:
    expected = pyarrow.parquet.read_table(INPUTS / "data" / case.file).to_pylist()
    assert [dict(row.columns) for row in case.rows()] == expected


# Files that are too large, or too simple, to lie here


def test_a_key_that_comes_after_twenty_thousand_rows(tmp_path: Path) -> None:
    """No row is refused for a key that the task does not read, wherever it first appears."""
    path = tmp_path / "late_key.jsonl"
    good = "".join(json.dumps({"text": f"text {at} " * 40, "label": at % 6}) + "\n" for at in range(20_000))
    path.write_text(good + json.dumps({"text": "last", "label": "human", "note": "late"}) + "\n")
    rows = load_rows(DataSource(path=str(path)))
    found = answers(Case("", "", THREE).task(), rows)
    assert rows.columns == ("text", "label", "note") and len(rows) == 20_001
    assert found.labels == [at % 6 for at in range(20_000)] + [3]
    path.write_text('{"text": null, "label": 3, "note": null}\n' * 3 + '{"text": "a", "label": 3, "note": "late"}\n')
    assert [row.columns["note"] for row in load_rows(DataSource(path=str(path)))] == [None, None, None, "late"]


def test_a_huge_cell_is_a_cell(tmp_path: Path) -> None:
    """The csv module takes 131,072 characters unless it is told; pandas and JSON have no limit."""
    huge = "x" * 2_000_000
    (tmp_path / "huge.csv").write_text(f'text,label\na,human\n{huge},number\n"{huge}",number\n')
    rows = list(load_rows(DataSource(path=str(tmp_path / "huge.csv"))))
    assert [row.columns["text"] for row in rows] == ["a", huge, huge]
    (tmp_path / "huge.jsonl").write_text(json.dumps({"text": huge, "label": "number"}))
    [row] = load_rows(DataSource(path=str(tmp_path / "huge.jsonl")))
    assert row.columns["text"] == huge


ODD_NAMES = (
    *("data[1]", "a*b", "what?", "a b", "a#b", "a%20b", "x::y", "a@b", "zip:", "\u00e9\u65e5\u672c", "{a,b}", "a,b"),
    *("train.test", "-dash", "a=1/b=2/part", "..hidden", ".hidden", "a\nb", "data-00000-of-00001", "test", "~"),
)


@pytest.mark.sample(12)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet", ".JSONL", ".ndjson", ".pq", ".csv.gz"])
@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_of_files(tmp_path: Path, name: str, suffix: str) -> None:
    """No part of a name is a pattern, an address or a protocol."""
    kinds = {".csv": "ok.csv", ".parquet": "ok.parquet", ".pq": "ok.parquet", ".csv.gz": "gz.csv.gz"}
    path = tmp_path / f"{name}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((INPUTS / "data" / kinds.get(suffix, "ok.jsonl")).read_bytes())
    assert answers(Case("", "", THREE).task(), load_rows(DataSource(path=str(path)))).labels[:2] == [5, 3]


# Task files

GOOD_BAD = ["A good meal", "A bad meal"]

TASKS: list[tuple[str, str, Right | Wrong]] = [
    ("bom.yaml", "a byte order mark is no part of the first key", Right([1, 0], GOOD_BAD)),
    ("crlf.yaml", "line ends of Windows are blanks", Right([1, 0], GOOD_BAD)),
    ("words.yaml", "label words do not change labels", Right([1, 0], GOOD_BAD)),
    ("map_00.yaml", "00 is good, as the map says, and not the number 0", Right([1, 0, 1], [*GOOD_BAD, "Fine"])),
    ("map_zeros.yaml", "01 and 02 are keys as written", Right([0, 1], GOOD_BAD)),
    ("map_yesno.yaml", "yes and no are words", Right([1, 0, 1], [*GOOD_BAD, "Fine food"])),
    ("map_onoff.yaml", "on and off are words", Right([1, 0], GOOD_BAD)),
    ("map_True.yaml", "True is the text that pandas writes", Right([1, 0, 1], [*GOOD_BAD, "Fine food"])),
    ("map_float.yaml", "1.0 is a key as written", Right([1, 0], GOOD_BAD)),
    ("map_null.yaml", "null and a date are texts", Right([1, 0], GOOD_BAD)),
    ("names_bool.yaml", "no and yes are names", Right([1, 0, 1], [*GOOD_BAD, "Fine food"])),
    ("no_map_True.yaml", "True and False of two labels", Right([1, 0, 1], [*GOOD_BAD, "Fine food"])),
    ("names_spaced.yaml", "outer blanks do not count", Right([1, 0], GOOD_BAD)),
    ("dotname.yaml", "the name of a task has no part in its labels", Right([1, 0], GOOD_BAD)),
    ("slashname.yaml", "the name of a task has no part in its labels", Right([1, 0], GOOD_BAD)),
    (
        "map_onebased.yaml",
        "0 is no key, and no position beside number keys",
        Wrong("onebased.csv, row 0 (line 2)", "is '0'", "a key of label_map: '1', '2'", '{"0": ...}'),
    ),
    (
        "map_pm1.yaml",
        "2 is no key, and no position beside number keys",
        Wrong("num3.csv, row 2 (line 4)", "is '2'", "a key of label_map: '-1', '0', '1'", '{"2": ...}'),
    ),
    (
        "names_int.yaml",
        "01 is neither 0 nor 1",
        Wrong("zeros.csv, row 0 (line 2)", "is '01'", "Expected one of: 0, 1."),
    ),
    ("case.yaml", "capital letters count", Wrong("is 'good'", "It differs from 'Good' in capital letters")),
    ("nfd.yaml", "letters composed otherwise are others", Wrong("row 0 (line 2)", "how Unicode composes its letters")),
    ("dupkey.yaml", "which of the two orders nobody knows", Wrong("line 4", "'label_names' is given twice", "line 3")),
    ("sci.yaml", "1e2 is no whole number", Wrong("max_length: should be a valid integer", "'1e2'")),
    ("unquoted_text.yaml", "braces are a mapping", Wrong("text: should be a valid string", "stands in quotes")),
    ("datastr.yaml", "data is a mapping", Wrong("should be keys and values, such as {path: ", "'case.csv'")),
    ("metricstr.yaml", "metrics are a list", Wrong("metrics: should be a list, such as ", "'accuracy'")),
    ("metricname.yaml", "metrics have names of their own", Wrong("'Accuracy'", "Did you mean accuracy")),
    ("tab.yaml", "YAML takes no tab there", Wrong("line 4", "not valid YAML")),
    ("twodocs.yaml", "a second document", Wrong("line 5", "another document")),
    ("weird_names.yaml", "it has no data of its own", Wrong("give --data")),
]


@pytest.mark.parametrize(("name", "reason", "answer"), TASKS, ids=[f"{name}: {reason}" for name, reason, _ in TASKS])
def test_a_task_file(name: str, reason: str, answer: Right | Wrong) -> None:
    def read() -> Right:
        task = load_task(INPUTS / "tasks" / name)
        return answers(task, load_rows(resolve_source(task)))

    if isinstance(answer, Right):
        assert read() == answer
        return
    with pytest.raises(PetalsEvalError) as caught:
        read()
    message = said(caught)
    assert [word for word in answer.words if word not in message] == []


def test_names_of_any_characters_are_names() -> None:
    task = load_task(INPUTS / "tasks" / "weird_names.yaml")
    assert task.label_names == ("a|b", "c\nd", "*e*", "\u597d", "\\x1b[31mred", "<script>")
    rows = load_rows(resolve_source(task, INPUTS / "metrics" / "two_of_six.txt"))
    assert answers(task, rows).labels == [3, 5, 3, 5]


# Metrics of few labels. The model always answers 3, with a probability of one half.

PATTERN = r"(?P<label>\d) (?P<text>.*)"
GALILEO = "Who was Galileo ?"
ALWAYS = [0.1, 0.1, 0.1, 0.5, 0.1, 0.1]

METRICS: list[tuple[str, str, list[int], dict[str, float | None]]] = [
    (
        "one_row.txt",
        "one right answer; a label alone has no area under a curve",
        [3],
        {"accuracy": 1.0, "majority_baseline": 1.0, "f1_macro": 1.0, "roc_auc": None, "log_loss": math.log(2)},
    ),
    (
        "one_class.txt",
        "three right answers of one label",
        [3, 3, 3],
        {"accuracy": 1.0, "majority_baseline": 1.0, "f1_macro": 1.0, "roc_auc": None, "log_loss": math.log(2)},
    ),
    (
        "two_of_six.txt",
        "two labels of six: F1 is 2/3 for one and 0 for the other, and labels that do not occur do not count",
        [3, 5, 3, 5],
        {"accuracy": 0.5, "balanced_accuracy": 0.5, "f1_macro": 1 / 3, "log_loss": (math.log(2) + math.log(10)) / 2},
    ),
    (
        "dup_rows.txt",
        "thirty times the same row are thirty rows",
        [3] * 30 + [5],
        {"accuracy": 30 / 31, "majority_baseline": 30 / 31, "f1_macro": 30 / 61, "balanced_accuracy": 0.5},
    ),
]


@pytest.mark.parametrize(("name", "reason", "labels", "expected"), METRICS, ids=[name for name, *_ in METRICS])
def test_metrics_of_few_labels(name: str, reason: str, labels: list[int], expected: dict[str, float | None]) -> None:
    case = Case("", reason, THREE)
    source = DataSource(path=str(INPUTS / "metrics" / name), pattern=PATTERN, encoding="latin-1")
    found = answers(case.task(), load_rows(source))
    lines = (INPUTS / "metrics" / name).read_text(encoding="latin-1").splitlines()
    assert found == Right([int(line[0]) for line in lines], [line[2:] for line in lines])
    assert found.labels == labels
    wanted = [metric for metric in expected if metric != "majority_baseline"]
    metrics = compute_metrics(wanted, labels, [3] * len(labels), [ALWAYS] * len(labels), label_names=QUESTIONS)
    assert {metric: metrics[metric].value for metric in expected} == pytest.approx(expected, abs=1e-12)
