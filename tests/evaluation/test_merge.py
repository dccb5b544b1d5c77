"""Parts of a run and their merging: the numbers of the run in one piece, or a refusal that says why."""

import json
import shutil

import pytest

import petals_eval
from petals_eval.errors import ConfigError, DeadlineError, RunFolderError
from petals_eval.runs import RunFolder, Shard
from tests.fake_model import TASK, FakeModel, evaluate, write_rows

WORDS = (1, 3, 2, 9, 4, 1, 5, 12, 1, 1, 2)


@pytest.fixture
def source(tmp_path):
    return write_rows(tmp_path / "rows.csv", WORDS)


@pytest.fixture
def parts(source, tmp_path):
    made = []
    for index in (1, 2, 3):
        made.append(tmp_path / f"part-{index}")
        evaluate(FakeModel(takes=8), source, made[-1], shard=f"{index}/3")
    return made


def refused(parts, out, *expected):
    with pytest.raises(RunFolderError) as error:
        petals_eval.merge(parts, out=out)
    for text in expected:
        assert text in str(error.value)
    assert not out.exists()


def test_parts_are_disjoint_and_whole(parts):
    keys = []
    for part in parts:
        with RunFolder.open(part) as folder:
            keys.append(set(folder.journal.keys("no prompts")))
    assert [len(each) for each in keys] == [4, 4, 3]
    assert set().union(*keys) == {str(key) for key in range(11)}


def test_merged_parts_are_the_run_in_one_piece(parts, source, tmp_path):
    whole = evaluate(FakeModel(takes=8), source, tmp_path / "whole")
    merged = petals_eval.merge([parts[2], parts[0], parts[1]], out=tmp_path / "merged")
    assert merged.metrics == whole.metrics
    assert (merged.first.n_examples, merged.first.n_scored, merged.first.n_failed) == (11, 9, 2)
    assert merged.first.confusion == whole.first.confusion
    for name in ("predictions.jsonl", "failures.jsonl"):
        assert (tmp_path / "merged" / name).read_text() == (tmp_path / "whole" / name).read_text()
    one, other = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("whole", "merged"))
    assert other["finished"] and other["servers"] == one["servers"] and other["data"] == one["data"]
    assert other["run_settings"]["merged_parts"] == 3
    assert "2 failed" in (tmp_path / "merged" / "report.md").read_text()
    with RunFolder.open(tmp_path / "merged") as folder:
        seconds = folder.journal.seconds("no prompts")
    singles = []
    for part in parts:
        with RunFolder.open(part) as folder:
            singles.append(folder.journal.seconds("no prompts"))
    assert seconds == pytest.approx(sum(singles))


def test_gaps_are_refused(parts, source, tmp_path):
    refused([parts[0], parts[2]], tmp_path / "merged", "Expected all 3 parts; missing: 2/3")
    with pytest.raises(DeadlineError):
        evaluate(FakeModel(until=2), source, tmp_path / "stopped", shard="2/3")
    refused(
        [parts[0], tmp_path / "stopped", parts[2]],
        tmp_path / "merged",
        "Expected part 2/3 to be finished; found 2 of 4 examples",
        str(tmp_path / "stopped"),
        "Run its command again",
    )


def test_overlaps_are_refused(parts, source, tmp_path):
    shutil.copytree(parts[0], tmp_path / "copy")
    refused([*parts, tmp_path / "copy"], tmp_path / "merged", "Expected each part once; found part 1/3 in", "copy")
    # Somebody has edited a manifest to pass a part off as another.
    shutil.copytree(parts[0], tmp_path / "forged")
    manifest = json.loads((tmp_path / "forged" / "manifest.json").read_text())
    manifest["data"]["shard"] = [2, 3]
    (tmp_path / "forged" / "manifest.json").write_text(json.dumps(manifest))
    refused(
        [parts[0], tmp_path / "forged", parts[2]], tmp_path / "merged", "Expected each example in one part; found '0'"
    )


def test_other_runs_are_refused_with_the_difference(parts, source, tmp_path):
    other = TASK.model_copy(update={"max_length": 7})
    evaluate(FakeModel(takes=8), source, tmp_path / "other", task=other, shard="2/3")
    refused(
        [parts[0], tmp_path / "other", parts[2]],
        tmp_path / "merged",
        f"{tmp_path / 'other'} is of another one than {parts[0]}",
        "task.max_length: was 512, now 7",
    )
    evaluate(FakeModel(takes=8), source, tmp_path / "halves", shard="2/2")
    refused([parts[0], tmp_path / "halves"], tmp_path / "merged", "data.shard: was (0, 3), now (0, 2)")
    evaluate(FakeModel(takes=8), source, tmp_path / "whole")
    refused([parts[0], tmp_path / "whole"], tmp_path / "merged", "found a run in one piece in", "whole")


def test_a_merge_that_was_interrupted_is_done_again(parts, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("petals_eval.evaluation.merge.finish", full)
        with pytest.raises(KeyboardInterrupt):
            petals_eval.merge(parts, out=tmp_path / "merged")
    assert petals_eval.merge(parts, out=tmp_path / "merged").first.n_examples == 11
    with RunFolder.open(tmp_path / "merged") as folder:
        assert len(list(folder.journal.keys("no prompts"))) == 11
    with pytest.raises(RunFolderError, match="found a run that was finished"):
        petals_eval.merge(parts, out=tmp_path / "merged")


def test_a_part_goes_on_as_that_part_only(source, tmp_path):
    with pytest.raises(DeadlineError):
        evaluate(FakeModel(until=1), source, tmp_path / "part", shard="1/2")
    with pytest.raises(RunFolderError, match=r"data\.shard: was \(1, 2\), now nothing"):
        evaluate(FakeModel(), source, tmp_path / "part")
    model = FakeModel()
    assert evaluate(model, source, tmp_path / "part", shard="1/2").first.n_examples == 6
    assert len(model.sent) == 5


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/", "a/b", "-1/3", "1/0", ""])
def test_parts_that_cannot_be(text):
    with pytest.raises(ConfigError, match="expected I/N with I from 1 to N"):
        Shard.parse(text)


def test_more_parts_than_rows(source, tmp_path):
    with pytest.raises(ConfigError, match="11 examples make 11 parts at most; found 12/12"):
        evaluate(FakeModel(), source, tmp_path / "part", shard="12/12")
