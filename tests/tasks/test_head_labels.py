"""A model's own head and the task must mean the same by each output."""

import pytest

from petals_eval.errors import TaskError
from petals_eval.tasks import ClassificationTask, check_head_labels

NAMES = ("description", "entity", "abbreviation")


def task_of(names=NAMES, **changes):
    values = {"name": "t", "text": "{text}", "label_column": "label", "label_names": names, **changes}
    return ClassificationTask(**values)


@pytest.mark.parametrize(
    "outputs",
    (
        None,
        NAMES,
        ("Description", " ENTITY ", "abbreviation"),
        ("a", "b", "c"),  # other names say nothing
        ("description", "x", "abbreviation"),
        ("description", "entity"),  # another number of outputs is told elsewhere
        ("description", "entity", "abbreviation", "more"),
    ),
)
def test_outputs_that_do_not_contradict_the_task(outputs):
    check_head_labels(task_of(), outputs)


@pytest.mark.parametrize(
    "outputs",
    (
        ("abbreviation", "entity", "description"),
        ("ENTITY", "Description", "abbreviation"),
        ("x", "y", "description"),
        ("entity",),
        ("x", "description"),
    ),
)
def test_outputs_that_contradict_it(outputs):
    with pytest.raises(TaskError, match=r"(?s)which in task t is label \d.*expected .*found +description, entity"):
        check_head_labels(task_of(), outputs)


def test_keys_of_the_label_map_stand_for_their_labels():
    task = task_of(label_map={"DESC": "description", "ENTY": "entity", "ABBR": "abbreviation"})
    check_head_labels(task, ("DESC", "ENTY", "ABBR"))
    with pytest.raises(TaskError, match="calls output 0 of its head 'ABBR'"):
        check_head_labels(task, ("ABBR", "ENTY", "DESC"))


def test_names_that_differ_in_case_alone_are_told_apart():
    task = task_of(("a", "A"))
    check_head_labels(task, ("a", "A"))
    with pytest.raises(TaskError):
        check_head_labels(task, ("A", "a"))


def test_label_words_need_no_head():
    check_head_labels(task_of(label_words=(" a", " b", " c")), ("abbreviation", "entity", "description"))
