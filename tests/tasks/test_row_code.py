"""The function that prepares rows runs only where that is allowed, and what it does wrong is told with the row."""

import sys

import pytest

from petals_eval.data import rows_of
from petals_eval.errors import DataError, TaskError
from petals_eval.tasks.row_code import load_row_code

CODE = """
import pathlib
pathlib.Path(__file__).with_name("ran").touch()

def lower(row):
    return {**row, "text": row["text"].lower()}

def fail(row):
    return {"text": row["text"] + 1}

def nothing(row):
    return None

def uneven(row):
    return row if row["text"] != "C" else {"text": "c", "more": 1}

def spoil(row):
    row["text"] = "spoilt"
    return {"text": "new"}

number = 3
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "words.py").write_text(CODE)
    return tmp_path


def loaded(name, folder, *, is_allowed=True):
    return load_row_code(name, task="t", folder=folder, is_allowed=is_allowed)


def rows():
    return rows_of([{"text": text} for text in "ABC"])


def test_nothing_runs_that_is_not_allowed(folder):
    with pytest.raises(TaskError) as refused:
        loaded("words:lower", folder, is_allowed=False)
    assert f"the function lower in the module words of {folder / 'words.py'}. Nothing of it has run" in str(
        refused.value
    )
    assert "--allow-task-code (in Python: allow_task_code=True)" in str(refused.value)
    assert not (folder / "ran").exists()


def test_rows_are_prepared_as_they_are_read(folder):
    code = loaded("words:lower", folder)
    prepared = code.of(rows())
    assert [row.columns["text"] for row in prepared] == ["a", "b", "c"]
    assert [row.index for row in prepared] == [0, 1, 2]
    assert prepared.fingerprint == rows().fingerprint
    import numpy as np

    assert [(row.index, row.columns["text"]) for row in prepared.at(np.array([0, 2]))] == [(0, "a"), (2, "c")]
    before = code.sha256
    (folder / "words.py").write_text(CODE + "\n")
    assert loaded("words:lower", folder).sha256 != before


def test_a_function_does_not_reach_the_rows_themselves(folder):
    plain = rows()
    assert [row.columns["text"] for row in loaded("words:spoil", folder).of(plain)] == ["new"] * 3
    assert [row.columns["text"] for row in plain] == ["A", "B", "C"]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("fail", r"data, row 0: words:fail fails on it: TypeError: .* Mend the function, or remove the row"),
        ("nothing", r"data, row 0: words:nothing should return a mapping of column names to values, found None"),
        ("uneven", r"data, row 2: words:uneven made the columns text, more, but of the first row text"),
    ],
)
def test_mistakes_of_the_function_name_the_row(folder, function, reason):
    with pytest.raises(DataError, match=reason):
        list(loaded(f"words:{function}", folder).of(rows()))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("words:missing", "the module words has no function missing"),
        ("words:number", "the module words has no function number"),
        ("wrods:lower", r"the module wrods cannot be imported \(ModuleNotFoundError.*looked for as .*wrods.py or"),
        ("petals_eval.tasks.library:lower", "has no function lower"),
        ("petals_eval.tasks.library:resources", "has no function resources"),
        ("petals_eval.tasks.library:read_yaml", "has no function read_yaml"),
    ],
)
def test_functions_that_are_not_there(folder, name, reason):
    with pytest.raises(TaskError, match=reason):
        loaded(name, folder)


def test_a_module_that_cannot_be_imported_leaves_nothing_behind(folder):
    (folder / "broken.py").write_text("1 / 0")
    before = set(sys.modules)
    with pytest.raises(
        TaskError, match=r"the module broken cannot be imported \(ZeroDivisionError: division by zero\)"
    ):
        loaded("broken:f", folder)
    assert set(sys.modules) == before


def test_two_files_of_one_name_are_two_modules(tmp_path):
    for name, value in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "words.py").write_text(f"def f(row): return {{'text': {value}}}")
    both = [loaded("words:f", tmp_path / name).function({}) for name in ("one", "two")]
    assert both == [{"text": 1}, {"text": 2}]


def test_the_packages_own_functions_need_no_permission(monkeypatch):
    import petals_eval.tasks.library as module

    def own(row):
        return {"text": row["text"] * 2}

    own.__module__ = "petals_eval.tasks.library"
    monkeypatch.setattr(module, "own", own, raising=False)
    code = loaded("petals_eval.tasks.library:own", None, is_allowed=False)
    assert [row.columns["text"] for row in code.of(rows())] == ["AA", "BB", "CC"]
    assert code.sha256 is None
