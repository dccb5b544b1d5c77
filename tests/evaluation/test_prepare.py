"""A run before it begins: data is read once, and mistakes are told before anything is started or connected."""

from types import SimpleNamespace

import pytest

import petals_eval
import petals_eval.data.files
from petals_eval.config import CallSettings
from petals_eval.demo import demo_paths
from petals_eval.errors import AdapterError, ConfigError, DataError, RunFolderError, TaskError
from petals_eval.evaluation.prepare import prepare
from petals_eval.local_swarm import LocalSwarm
from petals_eval.remote_model import LocalSide, load_local
from petals_eval.swarm import SwarmConnection
from petals_eval.tasks import ChoiceTask, ClassificationTask, ContinuationTask, PerplexityTask
from tests.cli.invoking import invoke
from tests.fake_model import TASK, FakeModel, evaluate, write_rows

TWO = """name: two
text: "{text}"
label_column: label
label_names: [bad, good]
"""


@pytest.fixture
def reads(monkeypatch):
    """What is done with data: a file that is read, a row whose text is looked at by the check."""
    seen = SimpleNamespace(files=[], checked=[])
    load_file, check = petals_eval.data.files.load_file, ClassificationTask.check

    def load(source):
        seen.files.append(source.path)
        return load_file(source)

    def looked(task, rows):
        before = len(rows.passed)
        check(task, rows)
        seen.checked += [len(rows)] if len(rows.passed) > before else []

    monkeypatch.setattr(petals_eval.data.files, "load_file", load)
    monkeypatch.setattr(ClassificationTask, "check", looked)
    return seen


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """Nothing may be started or connected. What the test leaves lies in a folder of its own."""

    def refuse(*arguments, **options):
        raise AssertionError("a swarm was started or connected")

    monkeypatch.setattr(SwarmConnection, "connect", refuse)
    monkeypatch.setattr(LocalSwarm, "__enter__", refuse)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("more", [["--without-prompts"], ["--dry-run"]], ids=["run", "dry run"])
def test_a_command_reads_and_checks_its_data_once(reads, realdata, tmp_path, monkeypatch, more):
    monkeypatch.chdir(tmp_path)
    model, adapters, data = realdata / "stories260K-hf", realdata / "adapters", realdata / "trec" / "TREC.test.all"
    command = ["run", "--model", model, "--adapter", adapters / "trec-ptune", adapters / "trec-deep_ptune"]
    outcome = invoke(*command, "--task", "trec", "--data", data, "--limit", 9, "--local-swarm", 1, *more)
    assert outcome.code == 0
    assert reads.files == [str(data)]
    assert reads.checked == [9]


def test_an_evaluation_from_python_reads_and_checks_its_data_once(reads, tmp_path):
    source = write_rows(tmp_path / "rows.csv")
    evaluate(FakeModel(), source, tmp_path / "run")
    assert reads.files == [source.path]
    assert reads.checked == [6]


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "dry run"])
@pytest.mark.parametrize(
    ("adapters", "flags", "said"),
    [
        (["trec-deep_ptune"], [], "the head gives (6,) scores, but task two has 2 labels"),
        ([], [], "there is no trained head"),
        (["trec-ptune", "trec-ptune"], [], "found 'trec-ptune' 2 times"),
        (["sst2-deep_ptune"], ["--fail-under", "acuracy=1"], "Did you mean accuracy"),
        (["sst2-deep_ptune"], ["--shard", "3/2"], "shard: expected I/N with I from 1 to N"),
        (["sst2-deep_ptune"], ["--out", "full"], "Expected full to be empty"),
        (["sst2-deep_ptune"], ["--verify-local", "3:9"], "expected a span within 0:5"),
        (["sst2-deep_ptune"], ["--verify-local", "0:1", "--active-adapter", "x"], "have no LoRA adapter"),
        (["sst2-deep_ptune"], ["--device", "cuda:77"], "device: expected one that torch can use here"),
        (["sst2-deep_ptune"], ["--max-length", "0"], "max_length: expected more than 0"),
        ([], ["--without-prompts"], "--without-prompts: expected tuned prompts to leave out, found no --adapter"),
    ],
)
def test_mistakes_are_told_before_anything_is_started(alone, realdata, adapters, flags, said, more):
    (alone / "two.yaml").write_text(TWO)
    (alone / "full").mkdir()
    (alone / "full" / "thesis.tex").write_text("x")
    data = write_rows(alone / "rows.csv").path
    prompts = [part for name in adapters for part in ("--adapter", realdata / "adapters" / name)]
    command = ["run", "--model", realdata / "stories260K-hf", "--local-swarm", 2, "--task", "two.yaml", "--data", data]
    outcome = invoke(*command, *prompts, *flags, *more)
    assert outcome.code == 2
    assert said in outcome.error
    assert not (alone / "runs").exists()


def test_a_head_of_another_task_is_told_in_python_before_anything_is_sent(tmp_path):
    model = FakeModel()
    model.local.class_outputs = lambda adapter: 6
    with pytest.raises(AdapterError, match=r"the head gives \(6,\) scores, but task tiny has 2 labels"):
        evaluate(model, write_rows(tmp_path / "rows.csv"), tmp_path / "run")
    assert not model.sent
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "asked",
    [
        PerplexityTask(name="t", text="{text}"),
        ContinuationTask(name="t", text="{text}", target="{label}"),
    ],
    ids=lambda task: task.kind,
)
def test_rows_without_a_label_are_asked_for_where_there_are_labels(asked, tmp_path):
    source = write_rows(tmp_path / "rows.csv")
    with pytest.raises(
        ConfigError, match=f"task t: unlabelled: a task of kind {asked.kind} has .* Leave unlabelled out"
    ):
        petals_eval.evaluate(FakeModel(), task=asked, data=source, unlabelled="predict")
    with pytest.raises(TaskError, match=f"unlabelled: a task of kind {asked.kind} has "):
        type(asked)(**asked.model_dump(exclude_unset=True), unlabelled="predict")


def test_a_label_column_that_nobody_has_is_told_where_rows_may_lack_it(tmp_path):
    local, _ = load_local(str(demo_paths().model), str(demo_paths().prompts))
    side = LocalSide(local, (), CallSettings(), "demo")
    task = ChoiceTask(
        name="t", text="{text}", choices=["bad", "good"], delimiter=" ", label_column="lable", unlabelled="predict"
    )
    found = prepare(lambda: side, task=task, data=write_rows(tmp_path / "rows.csv"), is_kept=False)
    assert found.notes == (
        "rows.csv has no column 'lable' of labels (its columns: 'text', 'label'): "
        "every row is predicted, and nothing is scored",
    )
    task = task.model_copy(update={"label_column": "label"})
    assert prepare(lambda: side, task=task, data=write_rows(tmp_path / "rows.csv"), is_kept=False).notes == ()


@pytest.mark.parametrize("openings", [1, 2])
def test_texts_that_begin_twice_are_told_of(tmp_path, openings):
    local, _ = load_local(str(demo_paths().model), str(demo_paths().prompts))
    side = LocalSide(local, (), CallSettings(), "demo")
    text = local.tokenizer.bos_token * openings + "{text}"
    task = ContinuationTask(name="t", text=text, target=" {label}", bos="never")
    found = prepare(lambda: side, task=task, data=write_rows(tmp_path / "rows.csv"), is_kept=False)
    assert any("more than one beginning-of-text token" in note for note in found.notes) is (openings == 2)


def test_what_lies_here_is_checked_before_the_model_is_looked_for(tmp_path):
    def not_yet():
        raise AssertionError("the model was looked for")

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    source = write_rows(tmp_path / "rows.csv")
    with pytest.raises(RunFolderError, match="to be empty"):
        prepare(not_yet, task=TASK, data=source, out=tmp_path / "full")
    (tmp_path / "rows.csv").write_text("text,label\nfine,good\nfine,goood\n")
    with pytest.raises(DataError, match="goood"):
        prepare(not_yet, task=TASK, data=source)


def test_a_finished_folder_gives_its_result_and_refuses_other_settings_before_anything_is_sent(tmp_path):
    source = write_rows(tmp_path / "rows.csv")
    first = evaluate(FakeModel(), source, tmp_path / "run")
    model = FakeModel()
    again = evaluate(model, source, tmp_path / "run")
    assert (again.to_json(), again.predictions) == (first.to_json(), first.predictions)
    with pytest.raises(RunFolderError, match=r"(?s)finished run in .* to be this one; found another.*data\.limit"):
        evaluate(model, source, tmp_path / "run", limit=3)
    assert not model.sent


def test_a_dry_run_shows_a_pair_as_the_tokenizer_has_it_and_a_row_without_a_label(alone, realdata):
    (alone / "pairs.yaml").write_text(TWO.replace('"{text}"', '["{text}", "{other}"]') + "max_length: 9\n")
    (alone / "rows.csv").write_text("text,other,label\nit is a dog and it ran,no,good\nit is,no cat,\n")
    command = ["run", "--model", realdata / "stories260K-hf", "--local-swarm", 1, "--task", "pairs.yaml", "--dry-run"]
    command += ["--adapter", realdata / "adapters" / "sst2-deep_ptune", "--data", "rows.csv"]
    refused = invoke(*command)
    assert refused.code == 2 and "row 1 (line 3): the label in column label is ''" in refused.error
    assert "--unlabelled predict" in refused.error
    shown = invoke(*command, "--unlabelled", "predict").out.splitlines()
    first, second = (at for at, line in enumerate(shown) if line.startswith("example "))
    assert shown[first].startswith("example 0  label good  9 text tokens, cut")
    assert shown[first + 1 : first + 3] == ["  | it is a dog and it ran", "  | no"]
    [tokens] = [line for line in shown[first:second] if line.startswith("  positions 8-16:")]
    # Of the longer text the end is gone, and the tokenizer put its own token in front of each.
    assert tokens.split(": ")[1] == "<s> ▁it ▁ is ▁a ▁do <s> ▁n o"
    assert shown[second].startswith("example 1  no label  ") and "cut" not in shown[second]
    assert any("of a pair that is too long, tokens go from the end of the longer text first" in line for line in shown)
