"""How far a lossy wire moves the answers of each kind of task."""

from types import SimpleNamespace

import torch

from petals_eval.config import CallSettings
from petals_eval.data import rows_of
from petals_eval.evaluation.prepare import Variant
from petals_eval.evaluation.wire_error import WINDOWS, compared, note_sample, shortened
from petals_eval.runs import RunFolder, WireSample
from petals_eval.tasks import GenerationTask
from petals_eval.tasks.requests import Example, Request
from petals_eval.tasks.windows import Windows
from tests.fake_model import TASK
from tests.runs.samples import manifest


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


def test_of_texts_nothing_is_measured_and_so_none_is_generated_for_it(tmp_path):
    task = GenerationTask(name="stories", text="{begin}")
    blocks = SimpleNamespace(settings=CallSettings(wire="float16"))
    model = SimpleNamespace(blocks=blocks)  # asked for anything it would fail
    prepared = SimpleNamespace(variants=[Variant("prompts", None, task)], rows=rows_of([{"begin": "One"}]), seed=0)
    with RunFolder.create(tmp_path / "run", manifest(), task="stories") as folder:
        note_sample(prepared, folder, model, on_tick=lambda: None)
        sample = folder.manifest.wire.sample
    assert (sample.adapter, sample.examples, sample.changed) == ("prompts", 0, None)
    assert sample.note.startswith("not measured: texts are generated in sessions, which are lossless")


def test_of_a_long_document_the_first_windows_are_compared():
    windows = Windows("0", range(1000), start=1, longest=10)
    document = Example("0", None, windows, windows.n_tokens, False, "text")
    assert shortened(document).requests == windows[:WINDOWS]
    assert shortened(example("0", parts=2 * WINDOWS)) == example("0", parts=2 * WINDOWS)
