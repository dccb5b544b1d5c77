"""The shipped tasks ask what lm-evaluation-harness 0.4.13 asks of the same rows, character for character.

The rows are our own, with the columns of the data sets; the harness reads them in place of its own.
"""

import functools

import pytest

from petals_eval.config import PromptSettings
from petals_eval.data import load_rows
from petals_eval.evaluation.shots import row_code_of, rows_and_shots, with_prompt
from petals_eval.tasks import Example, list_tasks, load_task, resolve_source
from petals_eval.tasks.likelihood import Scored
from petals_eval.tasks.prompted import PromptedTask
from tests.interop.lm_eval_tasks import COUNTERPARTS, ROWS
from tests.support.byte_tokenizer import byte_tokenizer

pytestmark = pytest.mark.timeout(600)  # the harness computes everything before the first of them

CHOICES = [name for name in COUNTERPARTS if name not in ("lambada", "wikitext", "gsm8k")]


@functools.cache
def examples_of(name: str) -> list[Example]:
    """What the shipped task makes of the rows, with the harness's shots."""
    counterpart = COUNTERPARTS[name]
    shots = None if counterpart.shots is None else str(ROWS / counterpart.shots)
    task = with_prompt(load_task(name), PromptSettings(shots_data=shots))
    assert isinstance(task, PromptedTask)
    source = resolve_source(task, ROWS / counterpart.rows)
    code = row_code_of(task, is_allowed=False)
    found = rows_and_shots(task, load_rows(source), source, code, limit=None, seed=0, draws=1)
    assert len(found.rows) >= 5
    shown = [task.showing(draw) for draw in found.draws] or [task]
    return list(shown[0].bound_to(None).examples(found.rows, byte_tokenizer()))


def asked(example: Example) -> list[list[str]]:
    """The context and the continuation of each answer, read back from the tokens; several may share a request."""
    tokenizer, found = byte_tokenizer(), []
    assert isinstance(example.reference, Scored)
    for place in example.reference.places:
        request = example.requests[place.part]
        targets = request.targets[place.start : place.stop]
        continuation = tokenizer.decode([token for _, token in targets])
        found.append([tokenizer.decode(request.input_ids[: targets[0][0] + 1]), continuation])
    return found


def moved(context: str, continuation: str) -> list[str]:
    """Blanks at the end of a context are scored with what follows: so the harness does before it makes tokens."""
    kept = context.rstrip()
    return [kept, context[len(kept) :] + continuation]


def test_every_shipped_task_that_asks_the_word_head_has_a_counterpart():
    assert {task.name for task in list_tasks() if task.head == "lm"} == set(COUNTERPARTS)


@pytest.mark.parametrize("name", [*CHOICES, "lambada"])
def test_contexts_and_continuations(name, lm_eval):
    found = [asked(example) for example in examples_of(name)]
    assert found == [[moved(*request) for request in row] for row in lm_eval[name]["requests"]]


@pytest.mark.parametrize("name", CHOICES)
def test_what_is_right(name, lm_eval):
    assert [example.label for example in examples_of(name)] == lm_eval[name]["right"]


def test_documents(lm_eval):
    examples = examples_of("wikitext")
    tokenizer = byte_tokenizer()
    tokens = [[token for request in example.requests for _, token in request.targets] for example in examples]
    expected = [text for [[text]] in lm_eval["wikitext"]["requests"]]
    assert [tokenizer.decode(ids) for ids in tokens] == [example.text for example in examples] == expected


def test_texts_to_go_on_from_with_the_shots_that_the_harness_draws(lm_eval):
    tokenizer, examples = byte_tokenizer(), examples_of("gsm8k")
    found = [tokenizer.decode(example.requests[0].input_ids) for example in examples]
    assert found == [context for [[context, _]] in lm_eval["gsm8k"]["requests"]]
    assert len(set(found)) == len(examples) and all(context.count("Question:") == 6 for context in found)
    assert [example.reference for example in examples] == [(right,) for right in lm_eval["gsm8k"]["right"]]
    for example, [[_, settings]] in zip(examples, lm_eval["gsm8k"]["requests"], strict=True):
        decoding = example.requests[0].decoding
        assert list(decoding.stop) == settings["until"] and decoding.temperature == settings["temperature"] == 0
