"""How far a lossy wire moves the answers of each kind of task."""

import torch

from petals_eval.evaluation.prepare import prepare
from petals_eval.evaluation.wire_error import WINDOWS, compared, note_sample, shortened
from petals_eval.remote_model import LocalSide
from petals_eval.runs import WireSample
from petals_eval.tasks import GenerationTask
from petals_eval.tasks.requests import Example, Request
from petals_eval.tasks.windows import Windows
from tests.fake_model import TASK, FakeModel, write_rows


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


def test_no_text_is_generated_to_measure_a_wire_that_sessions_do_not_use(tmp_path):
    """The model reaches no server: whatever is asked of one fails."""
    model = FakeModel(wire="float16")
    model.local.context = None
    model.local.tokenizer.bos_token = model.local.tokenizer.bos_token_id = None
    task = GenerationTask(name="texts", text="{text}", max_new_tokens=3)
    prepared = prepare(
        lambda: LocalSide(model.local, (), model.blocks.settings, "tiny"),
        task=task,
        data=write_rows(tmp_path / "rows.csv"),
        out=tmp_path / "run",
    )
    with prepared.open_folder() as folder:
        note_sample(prepared, folder, model, on_tick=lambda: None)
        sample = folder.manifest.wire.sample
    assert (sample.examples, sample.largest, sample.changed) == (0, None, None)
    assert sample.note.startswith("not measured: sessions, in which texts are generated, are lossless")


def test_of_a_long_document_the_first_windows_are_compared():
    windows = Windows("0", range(1000), start=1, longest=10)
    document = Example("0", None, windows, windows.n_tokens, False, "text")
    assert shortened(document).requests == windows[:WINDOWS]
    assert shortened(example("0", parts=2 * WINDOWS)) == example("0", parts=2 * WINDOWS)
