"""Groups of tasks: what a file or a program may name, and what of it cannot be used."""

import pytest

from petals_eval.errors import TaskError
from petals_eval.tasks import TaskGroup, load_group, load_task

TASK = """text: "{text}"
label_column: label
label_names: [bad, good]
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "films.yaml").write_text(TASK + "data: {path: films.csv}\n")
    (tmp_path / "films.csv").write_text("text,label\nfine,good\n")
    (tmp_path / "books.csv").write_text("text,label\nfine,good\n")
    return tmp_path


def group(folder, text):
    (folder / "group.yaml").write_text(text)
    return load_group(folder / "group.yaml")


def test_the_members_of_a_groups_file(folder):
    found = group(
        folder,
        """group: mine
description: what I look at
metric: accuracy
tasks:
  - sst2
  - films.yaml
  - {task: films.yaml, name: books, data: {path: books.csv}, shots: 2}
  - {task: cola, max_length: 99}
  - {name: inline, text: "{a}", label_column: b, label_names: [x, y], label_map: {null: x}, data: {path: books.csv}}
""",
    )
    assert (found.name, found.metric, found.description) == ("mine", "accuracy", "what I look at")
    assert [task.name for task in found.tasks] == ["sst2", "films", "books", "cola", "inline"]
    sst2, films, books, cola, inline = found.tasks
    assert sst2 == load_task("sst2")
    assert films.data.path == str(folder / "films.csv")
    assert books.data.path == str(folder / "books.csv")
    assert (books.text, books.shots.number, films.shots) == ("{text}", 2, None)
    assert {**dict(load_task("cola")), "max_length": 99} == dict(cola)
    assert inline.data.path == str(folder / "books.csv")
    assert inline.label_map == {"null": "x"}


def test_a_group_from_a_program(folder):
    films = load_task(folder / "films.yaml")
    assert load_group(TaskGroup("g", ("sst2", films))).tasks == (load_task("sst2"), films)
    assert [task.name for task in load_group({"group": "g", "tasks": ["sst2", films]}).tasks] == ["sst2", "films"]


def test_what_is_no_group(folder):
    for other in ("sst2", folder / "films.yaml", folder / "nothing.yaml", load_task("sst2"), {"text": "{a}"}, 3):
        assert load_group(other) is None
    assert group(folder, "text: [") is None  # load_task says what is wrong


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("group: g\n", "tasks: should be a list of tasks, such as .sst2, cola., found None"),
        ("group: g\ntasks: []\n", "tasks: should be a list of tasks"),
        ("group: g\ntasks: sst2\n", "tasks: should be a list of tasks"),
        ("group: g\ntask: [sst2]\n", "task: unknown key of a group. Did you mean tasks?"),
        ("group: [g]\ntasks: [sst2]\n", "group: should be text"),
        ("group: g\ntasks: [sst3]\n", "there is no task sst3. Did you mean sst2?"),
        ("group: g\ntasks: [[sst2]]\n", "task 1: should be a task's name, its file, or its keys and values"),
        ("group: g\ntasks: [{text: x}]\n", "task 1: name: missing"),
        ("group: g\ntasks: [sst2, {task: sst2, max_length: 0}]\n", "task 2: this task cannot be used"),
        ("group: g\ntasks: [{task: [sst2]}]\n", "task 1: task: should be a task's name or its file"),
        ("group: g\ntasks: [sst2, sst2]\n", "expected tasks of different names, found 2 called 'sst2'"),
        ("group: g\ntasks: [{task: sst2, metrics: [bleu]}]\n", "task 1: metrics: Expected the name of a metric"),
    ],
)
def test_groups_that_cannot_be_used(folder, text, reason):
    with pytest.raises(TaskError) as refused:
        group(folder, text)
    assert reason.replace(".sst2, cola.", "[sst2, cola]") in str(refused.value)


def test_a_group_without_tasks():
    with pytest.raises(TaskError, match="group g: expected at least one task"):
        TaskGroup("g", ())
