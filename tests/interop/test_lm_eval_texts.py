"""The shipped tasks ask what lm-evaluation-harness 0.4.13 asks of the same rows, character for character.

The rows are our own, with the columns of the data sets; the harness reads them in place of its own.
"""

import pytest

from petals_eval.data import load_rows
from petals_eval.tasks import Example, list_tasks, load_task, resolve_source
from tests.interop.lm_eval_tasks import COUNTERPARTS, ROWS, ask_lm_eval
from tests.support.byte_tokenizer import byte_tokenizer

CHOICES = [name for name in COUNTERPARTS if name not in ("lambada", "wikitext", "gsm8k")]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """What the harness asks of each row, and what is right: {task: {"requests", "right"}}."""
    wanted = [counterpart.wanted(name) for name, counterpart in COUNTERPARTS.items()]
    return ask_lm_eval({"tasks": wanted}, tmp_path_factory.mktemp("lm-eval"))


def examples_of(name: str) -> list[Example]:
    task = load_task(name)
    rows = load_rows(resolve_source(task, ROWS / COUNTERPARTS[name].rows))
    assert len(rows) >= 5
    return list(task.examples(rows, byte_tokenizer()))


def asked(example: Example) -> list[list[str]]:
    """The context and the continuation of each of its requests, read back from their tokens."""
    tokenizer, found = byte_tokenizer(), []
    for request in example.requests:
        first = request.targets[0][0]
        continuation = tokenizer.decode([token for _, token in request.targets])
        found.append([tokenizer.decode(request.input_ids[: first + 1]), continuation])
    return found


def moved(context: str, continuation: str) -> list[str]:
    """Blanks at the end of a context are scored with what follows: so the harness does before it makes tokens."""
    kept = context.rstrip()
    return [kept, context[len(kept) :] + continuation]


def test_every_shipped_task_that_asks_the_word_head_has_a_counterpart():
    assert {task.name for task in list_tasks() if task.head == "lm"} == set(COUNTERPARTS)


@pytest.mark.parametrize("name", [*CHOICES, "lambada"])
def test_contexts_and_continuations(name, theirs):
    found = [asked(example) for example in examples_of(name)]
    assert found == [[moved(*request) for request in row] for row in theirs[name]["requests"]]


@pytest.mark.parametrize("name", CHOICES)
def test_what_is_right(name, theirs):
    assert [example.label for example in examples_of(name)] == theirs[name]["right"]
