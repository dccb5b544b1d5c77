"""How far a lossy wire moves the answers of each kind of task."""

import pytest
import torch

from petals_eval.evaluation.wire_error import WINDOWS, compared, shortened
from petals_eval.runs import WireSample
from petals_eval.tasks.requests import Example, Generated, Request
from petals_eval.tasks.windows import Windows
from tests.fake_model import TASK


class Predicting:
    """A task that predicts nothing, as one of documents does."""

    def predict(self, example, answers):
        return example.predicted(None, [(float(answers[0].sum()),)])


def example(key, parts=1):
    return Example(key, 0, tuple(Request(key, part, (1, 2)) for part in range(parts)), 2, False, "text")


def moved(task, exact, lossy):
    examples = [example(key, len(answers)) for key, answers in exact.items()]
    return compared(task, "prompts", examples, exact, lossy)


def test_scores_and_what_they_predict():
    exact = {"0": [torch.tensor([0.0, 1.0])], "1": [torch.tensor([2.0, 1.5])]}
    lossy = {"0": [torch.tensor([0.25, 1.0])], "1": [torch.tensor([1.5, 1.75])]}
    assert moved(TASK, exact, lossy) == WireSample("prompts", 2, 0.5, (0.25 + 0.5 + 0.25) / 4, 1)


def test_likelihoods_of_what_predicts_nothing_and_not_whether_they_are_greedy():
    exact = {"0": [torch.tensor([[-1.0, 1.0], [-2.0, 0.0]]), torch.tensor([-3.0])]}
    lossy = {"0": [torch.tensor([[-1.5, 0.0], [-2.0, 1.0]]), torch.tensor([-3.25])]}
    assert moved(Predicting(), exact, lossy) == WireSample("prompts", 1, 0.5, 0.25, None)


@pytest.mark.parametrize(("other", "changed"), [("a text", 0), ("another", 1)])
def test_texts_are_counted_that_differ(other, changed):
    exact = {key: [Generated((5, 6), "a text", "end")] for key in "01"}
    lossy = {"0": exact["0"], "1": [Generated((5, 6), other, "end")]}
    assert moved(Predicting(), exact, lossy) == WireSample("prompts", 2, None, None, changed)


def test_of_a_long_document_the_first_windows_are_compared():
    windows = Windows("0", range(1000), start=1, longest=10)
    document = Example("0", None, windows, windows.n_tokens, False, "text")
    assert shortened(document).requests == windows[:WINDOWS]
    assert shortened(example("0", parts=2 * WINDOWS)) == example("0", parts=2 * WINDOWS)
