"""Every text of a task file means what is written there, in quotes or without; numbers and truth values are made of
text where a key wants them."""

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from petals_eval.errors import TaskError
from petals_eval.tasks import ClassificationTask, load_task

# What YAML 1.1 takes for truth values, numbers, times, dates and nothing.
RETYPED = (
    *("no", "Yes", "on", "OFF", "true", "False", "null", "Null", "~", "=", ".inf", ".nan"),
    *("0", "00", "01", "08", "0x1F", "0b1", "+1", "-1", "1.0", "1e3", "1.5e+3", "1_000", "9007199254740993"),
    *("1:30", "190:20:30", "2020-01-01", "2020-01-01 10:00:00", "2024_01", "0012345"),
)

# Each {} is a place for a text; the numbers after them keep labels, words and columns apart.
FILE = """
name: {0}
description: {0}
text: "{{column}}"
label_column: {0}
label_names: [{0}, {1}]
label_map: {{{0}: {1}, {1}: {0}}}
label_words:
- {0}
- {1}
data:
  path: {0}
  subset: {0}
  split: {0}
  revision: {0}
  token: {0}
formats:
  csv: {{column_names: [{0}, {1}]}}
"""


def load(folder: Path, one: str, other: str) -> ClassificationTask:
    path = folder / "task.yaml"
    path.write_text(FILE.format(one, other), encoding="utf-8")
    task = load_task(path)
    assert isinstance(task, ClassificationTask)
    return task


def check_texts(task: ClassificationTask, one: str, other: str) -> None:
    assert (task.name, task.description, task.label_column) == (one, one, one)
    assert task.label_names == task.label_words == (one, other)
    assert task.label_map == {one: other, other: one}
    assert task.data is not None and task.data.token is not None
    assert task.data.path in (one, str(Path.home()))  # where it is ~
    found = (task.data.subset, task.data.split, task.data.revision, task.data.token.get_secret_value())
    assert found == (one,) * 4
    assert task.formats["csv"].column_names == (one, other)


@pytest.mark.parametrize("written", [text for text in RETYPED if text.lower() not in ("null", "~")])
def test_what_yaml_would_retype_is_text(tmp_path, written):
    check_texts(load(tmp_path, written, f"{written}x"), written, f"{written}x")
    check_texts(load(tmp_path, f"'{written}'", f'"{written}x"'), written, f"{written}x")


@pytest.mark.parametrize("null", ["null", "Null", "NULL", "~"])
def test_null_is_a_text_except_where_a_setting_may_be_left_out(tmp_path, null):
    task = load(tmp_path, null, "x")
    assert (task.name, task.label_column, task.label_names, task.label_words) == (null, null, (null, "x"), (null, "x"))
    assert task.label_map == {null: "x", "x": null}
    assert task.formats["csv"].column_names == (null, "x")
    assert task.data is not None and task.data.path in (null, str(Path.home()))
    assert [task.data.subset, task.data.split, task.data.revision, task.data.token] == [None] * 4
    check_texts(load(tmp_path, f"'{null}'", "x"), null, "x")


def _is_one_scalar(written: str) -> bool:
    try:
        nodes = [yaml.compose(shape) for shape in (f"[{written}, x]", f"{{{written}: x}}", f"a: {written}\nb: x\n")]
    except yaml.YAMLError:
        return False
    first = (nodes[0].value[0], nodes[1].value[0][0], nodes[2].value[0][1])
    return all(isinstance(node, yaml.ScalarNode) and node.value == written and not node.style for node in first)


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.one_of(
        st.text("0123456789abcdefxyzNOno.+-_:/ ~=", min_size=1, max_size=8),
        st.integers().map(str),
        st.floats().map(repr),
        st.dates().map(str),
        st.times().map(str),
        st.from_regex(r"[+-]?[0-9_]*\.?[0-9_]*([eE][+-]?[0-9]+)?", fullmatch=True),
        st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1, max_size=6),
    )
)
def test_any_plain_scalar_is_its_spelling_in_every_place(tmp_path, written):
    assume(written not in ("null", "Null", "NULL", "~", "<<") and _is_one_scalar(written))
    assume(not Path(tmp_path, written).exists())  # it would be the path of something beside the file
    check_texts(load(tmp_path, written, "<another>"), written, "<another>")


def test_numbers_and_truth_values_are_made_of_text_where_they_are_wanted(tmp_path):
    path = tmp_path / "task.yaml"
    path.write_text(
        'text: "{t}"\nlabel_column: l\nlabel_names: [no, yes]\nmax_length: 096\n'
        "formats:\n  csv: {quoting: no, delimiter: ;}\n  tsv: {quoting: on, delimiter: null, pattern: ~}\n"
    )
    task = load_task(path)
    assert isinstance(task, ClassificationTask)
    assert task.max_length == 96
    assert (task.formats["csv"].quoting, task.formats["csv"].delimiter) == (False, ";")
    assert task.formats["tsv"].model_dump(include={"quoting", "delimiter", "pattern"}) == {
        "quoting": True,
        "delimiter": None,
        "pattern": None,
    }


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("label_map: {' a': x, a: y}", "label_map: has the key 'a' twice: outer blanks do not count"),
        (
            "label_map:\n  ?\n  : x",
            "label_map: should have text as keys, and one of them is missing: put an empty text in q",
        ),
        ("label_map: {a: }", "label_map.a: should be a valid string, found nothing"),
        ("max_length: 1e2", "max_length: should be a valid integer"),
        ("max_length: 1:30", "max_length: should be a valid integer"),
        ("description:", "description: should be a valid string, found nothing"),
        ("formats: {csv: {quoting: 2}}", "formats.csv.quoting: should be a valid boolean"),
        ("formats: {csv: null}", "formats.csv: should be keys and values"),
    ],
)
def test_what_cannot_be_meant_is_an_error(tmp_path, line, expected):
    path = tmp_path / "task.yaml"
    path.write_text(f'text: "{{t}}"\nlabel_column: l\nlabel_names: [x, y]\n{line}\n')
    with pytest.raises(TaskError, match=re.escape(expected)):
        load_task(path)


@pytest.mark.parametrize(
    ("names", "expected"), [([" good", "good "], "different from each other, also without"), ([" ", "x"], "none of th")]
)
def test_label_names_differ_without_their_outer_blanks(names, expected):
    with pytest.raises(TaskError, match=expected):
        ClassificationTask(name="t", text="{t}", label_column="l", label_names=names)


def test_keys_of_a_python_program_are_spelled_as_values_are():
    mapping = {1: "y", "01": "y", 2.0: "x"}
    task = ClassificationTask(name="t", text="{t}", label_column="l", label_names=("x", "y"), label_map=mapping)
    assert task.label_map == {"1": "y", "01": "y", "2.0": "x"}
    task = ClassificationTask(name="t", text="{t}", label_column="l", label_names=("x", "y"), label_map={False: "x"})
    assert task.label_map == {"false": "x"}
    with pytest.raises(TaskError, match="label_map: has the key '1' twice"):
        ClassificationTask(name="t", text="{t}", label_column="l", label_names=("x", "y"), label_map={1: "x", "1": "y"})
