"""Examples that cannot be computed: failures with a reason, never wrong answers, and never a silent list of them."""

import json

import pytest

import petals_eval.evaluation.scoring
from petals_eval.errors import AdapterError, DeadlineError, NotFiniteError, RequestTooLargeError, RunFolderError
from petals_eval.runs import RunFolder
from petals_eval.tasks import ClassificationTask
from tests.fake_model import TASK, FakeModel, answers_of, evaluate, write_rows

WORDS = (1, 3, 9, 2, 12, 1)


def failures(folder):
    return [json.loads(line) for line in (folder / "failures.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("limits", "reason", "sent"),
    [
        ({"context": 5}, "this model reads 5 tokens at most, found 9", ["0", "1", "3", "5"]),
        ({"takes": 5}, "no server takes 9 tokens", ["0", "1", "2", "3", "4", "5"]),
    ],
    ids=["the model", "the servers"],
)
def test_rows_that_are_too_long_fail_and_the_others_are_scored(tmp_path, limits, reason, sent):
    model = FakeModel(**limits)
    result = evaluate(model, write_rows(tmp_path / "rows.csv", WORDS), tmp_path / "run")
    assert (result.first.n_examples, result.first.n_scored, result.first.n_failed) == (6, 4, 2)
    assert result.metrics["accuracy"].value == 1 / 4  # keys 0, 1, 3 and 5 are good, bad, bad, bad; the answer is good
    assert [(each["key"], each["reason"]) for each in failures(tmp_path / "run")] == [
        ("2", reason),
        ("4", reason.replace("9", "12")),
    ]
    assert [key for key, _ in model.sent] == sent
    assert "2 failed" in (tmp_path / "run" / "report.md").read_text()
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["n_failed"] == 2


def test_an_example_of_several_requests_fails_once_and_as_a_whole(tmp_path):
    """The label word of three tokens makes one of its requests too long."""

    class Words:
        truncation_side = "right"

        def __call__(self, texts, **options):
            return {"input_ids": [[len(word) for word in text.split()] for text in texts]}

    task = ClassificationTask(
        name="words",
        text="{text}",
        label_column="label",
        label_names=("bad", "good"),
        label_words=(" no no", " it is really good"),
    )
    model = FakeModel(takes=5)
    model.local.tokenizer = Words()
    compute = model.compute

    def both_words(requests, adapter, **options):
        for answered in compute(requests, adapter, **options):
            yield from answers_of("a", [answered.request], (-1.0,) * len(answered.request.targets))

    model.compute = both_words
    result = evaluate(model, write_rows(tmp_path / "rows.csv", (1, 3, 2)), tmp_path / "run", task=task)
    assert (result.first.n_scored, result.first.n_failed) == (2, 1)
    assert [each["key"] for each in failures(tmp_path / "run")] == ["1"]


def test_an_answer_that_is_not_finite_is_a_failure_and_names_its_servers(tmp_path):
    model = FakeModel()
    compute = model.compute

    def nan_for_the_third(requests, adapter, **options):
        for answered in compute(requests, adapter, **options):
            bad = answered.request.key == "2"
            yield from answers_of("a", [answered.request], (0.0, float("nan") if bad else 1.0))

    model.compute = nan_for_the_third
    result = evaluate(model, write_rows(tmp_path / "rows.csv"), tmp_path / "run")
    assert (result.first.n_scored, result.first.n_failed) == (5, 1)
    [failure] = failures(tmp_path / "run")
    assert "expected finite scores, found [0.0, nan]" in failure["reason"]
    with RunFolder.open(tmp_path / "run") as folder:
        assert [count for _, count in folder.journal.servers()] == [6]


def test_a_mistake_that_concerns_every_row_ends_the_run(tmp_path):
    """A head of another task is not six hundred failures."""
    model = FakeModel()
    model.compute = lambda requests, adapter, **options: answers_of("a", requests, (0.0, 1.0, 2.0))
    with pytest.raises(AdapterError, match="the head gives"):
        evaluate(model, write_rows(tmp_path / "rows.csv"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("limits", [{"context": 5}, {"takes": 5}], ids=["the model", "the servers"])
@pytest.mark.parametrize(("rows", "tried"), [(400, 50), (10, 10)], ids=["many", "few"])
def test_where_every_row_is_too_long_the_run_ends_early_and_says_so(tmp_path, monkeypatch, limits, rows, tried):
    monkeypatch.setattr(petals_eval.evaluation.scoring, "MAX_FAILURES_BEFORE_FIRST_SUCCESS", 50)
    model = FakeModel(**limits)
    with pytest.raises(RequestTooLargeError, match=rf"none of the first {tried} examples can be computed.*\b5|9\b"):
        evaluate(model, write_rows(tmp_path / "rows.csv", (9,) * rows), tmp_path / "run")
    assert len(model.sent) == (tried if "takes" in limits else 0)
    assert not (tmp_path / "run").exists(), "corrected, the run may use the same folder"


def test_one_row_that_fits_gives_hope(tmp_path, monkeypatch):
    monkeypatch.setattr(petals_eval.evaluation.scoring, "MAX_FAILURES_BEFORE_FIRST_SUCCESS", 50)
    result = evaluate(
        FakeModel(context=5), write_rows(tmp_path / "rows.csv", (9,) * 40 + (1,) + (9,) * 100), tmp_path / "run"
    )
    assert (result.first.n_scored, result.first.n_failed) == (1, 140)


def test_a_resumed_run_sends_no_journaled_example_again_and_tries_the_failed_ones(tmp_path):
    source = write_rows(tmp_path / "rows.csv", WORDS * 5)
    said = []

    class Progress:
        def update(self, done, retries=0, servers=0, message=None):
            said.append(message)

        def waiting(self, message):
            pass

    sent = []
    for until in (4, 9, 1):
        model = FakeModel(takes=5, until=until)
        with pytest.raises(DeadlineError) as stopped:
            evaluate(model, source, tmp_path / "run", progress=Progress())
        sent += model.sent
    with RunFolder.open(tmp_path / "run") as folder:
        kept = folder.journal.done_keys("no prompts")
        assert [each.key for each in folder.journal.failures("no prompts")] == ["2", "4", "8", "10"]
    assert f"{len(kept)} of 30 examples are scored and kept" in stopped.value.__notes__[0]
    said.clear()
    model = FakeModel(takes=10)
    result = evaluate(model, source, tmp_path / "run", progress=Progress())
    assert kept.isdisjoint(key for key, _ in model.sent)
    times = {key: [*sent, *model.sent].count((key, 0)) for key, _ in [*sent, *model.sent]}
    assert {key for key, count in times.items() if count > 1} <= {str(key) for key in range(30) if WORDS[key % 6] > 5}
    assert [line for line in said if line] == [
        f"going on with the run in {tmp_path / 'run'}: {len(kept)} of 30 examples are scored, {30 - len(kept)} are left"
        ", and of these 4 that failed are tried again"
    ]
    assert (result.first.n_scored, result.first.n_failed) == (25, 5)
    quiet = evaluate(FakeModel(takes=10), source, tmp_path / "quiet")
    assert quiet.metrics == result.metrics
    assert (tmp_path / "quiet" / "predictions.jsonl").read_text() == (
        tmp_path / "run" / "predictions.jsonl"
    ).read_text()


def test_a_run_does_not_go_on_under_other_code(tmp_path, monkeypatch):
    class Task:
        """A task of the user's own, in this file."""

        data = None

        def __getattr__(self, name):
            return getattr(TASK, name)

    source = write_rows(tmp_path / "rows.csv")
    with pytest.raises(DeadlineError):
        evaluate(FakeModel(until=2), source, tmp_path / "run", task=Task())

    edited = type("Task", (Task,), {})
    monkeypatch.setattr("inspect.getsource", lambda kind: "another source")
    with pytest.raises(RunFolderError, match=r"setting\.task_code: was [0-9a-f]+\.\.\., now [0-9a-f]+\.\.\."):
        evaluate(FakeModel(), source, tmp_path / "run", task=edited())
    monkeypatch.undo()
    monkeypatch.setattr("petals_eval.evaluation.prepare.answering_code", lambda: "0" * 64)
    with pytest.raises(RunFolderError, match=r"to be of this version of petals-eval; found one of another"):
        evaluate(FakeModel(), source, tmp_path / "run", task=Task())
    monkeypatch.undo()
    assert evaluate(FakeModel(), source, tmp_path / "run", task=Task()).first.n_scored == 6


def test_not_finite_is_an_error_of_one_example():
    with pytest.raises(NotFiniteError):
        TASK.predict(next(iter(_examples())), [next(answers_of("a", [None], (0.0, float("inf")))).answer])


def _examples():
    from petals_eval.tasks.requests import Example, Request

    yield Example("0", 0, (Request("0", 0, (1,)),), 1, False, "x")
