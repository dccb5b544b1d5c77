"""The run folder: what it writes, what it takes up again and what it refuses."""

import json
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from petals_eval.errors import MachineError, RunFolderError
from petals_eval.runs import (
    WITHOUT_PROMPTS,
    AdapterRecord,
    Manifest,
    ModelRecord,
    NoisyServer,
    RunFolder,
    RunResult,
    summarise,
)
from tests.runs.samples import LABELS, SERVERS, manifest, prediction, reachable_folder, unprivileged

METRICS = ("accuracy", "f1_macro", "roc_auc", "recall_per_class", "confusion_matrix")


def score(folder: RunFolder, adapter: str = "trec-ptune", keys: range = range(20)) -> None:
    with folder.journal.session(adapter):
        for key in keys:
            folder.journal.add(adapter, prediction(key, key % 3), truncated=key < 2, servers=SERVERS[:2])


def result(folder: RunFolder, *adapters: str, without_prompts: bool = False) -> RunResult:
    found = {name: summarise(folder.journal, name, METRICS, LABELS) for name in adapters or ("trec-ptune",)}
    bare = summarise(folder.journal, WITHOUT_PROMPTS, METRICS, LABELS) if without_prompts else None
    return RunResult("trec", found, bare, retries=3, servers=2)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_finished_run_holds_everything(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "deep" / "run", manifest(), task="trec") as folder:
        assert not folder.resumed
        score(folder)
        folder.journal.add_failure("trec-ptune", "20", 1, "no server takes it")
        folder.finish(result(folder), report="# Report\n")
    path = tmp_path / "deep" / "run"
    names = {"manifest.json", "journal.sqlite", "predictions.jsonl", "failures.jsonl", "metrics.json", "report.md"}
    assert {each.name for each in path.iterdir()} == names

    lines = read(path / "predictions.jsonl")
    assert [line["key"] for line in lines] == [str(key) for key in range(20)]
    seven = prediction(7, 1)
    assert lines[7] == {
        "schema_version": 2,
        "kind": "classification",
        "key": "7",
        "row_hash": "",
        "label": 1,
        "prediction": seven.prediction,
        "probabilities": list(seven.probabilities),
        "n_requests": 1,
        "n_tokens": 7,
    }
    assert read(path / "failures.jsonl")[0]["reason"] == "no server takes it"

    metrics = json.loads((path / "metrics.json").read_text())
    right = sum(line["label"] == line["prediction"] for line in lines)
    assert metrics["schema_version"] == 2
    assert (metrics["n_examples"], metrics["n_scored"], metrics["n_failed"], metrics["n_truncated"]) == (21, 20, 1, 2)
    assert metrics["seconds"] > 0 and metrics["examples_per_second"] > 0 and metrics["tokens_per_second"] > 0
    assert metrics["metrics"]["accuracy"]["value"] == right / 20
    assert len(metrics["metrics"]["accuracy"]["ci95"]) == 2
    assert metrics["metrics"]["majority_baseline"]["value"] == 7 / 20
    assert {"recall[no]", "recall[maybe]", "recall[yes]"} <= set(metrics["metrics"])
    assert sum(map(sum, metrics["confusion_matrix"])) == 20
    assert "adapters" not in metrics

    stored = Manifest.read(path / "manifest.json")
    assert stored.finished is not None
    assert set(stored.servers) == set(SERVERS[:2])
    assert (path / "manifest.json").stat().st_mode & 0o777 != 0o600


def test_several_adapters_have_a_file_each_and_the_first_is_on_top(tmp_path: Path) -> None:
    adapters = [AdapterRecord(name=name, kind="ptune", sha256=name) for name in ("one", "two/three", "two three")]
    with RunFolder.create(tmp_path / "run", manifest(adapters=adapters), task="trec") as folder:
        names = [adapter.name for adapter in folder.manifest.adapters]
        for name in [*names, WITHOUT_PROMPTS]:
            score(folder, name)
        folder.finish(result(folder, *names, without_prompts=True))
    found = {each.name for each in (tmp_path / "run").glob("predictions*")}
    assert found == {
        "predictions.one.jsonl",
        "predictions.two-three.jsonl",
        "predictions.two-three-2.jsonl",
        "predictions.without-the-prompts.jsonl",
    }
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["adapter"] == "one"
    assert list(metrics["adapters"]) == names
    assert metrics["adapters"]["one"]["metrics"] == metrics["metrics"]
    assert metrics["without_prompts"]["metrics"]["accuracy"]["value"] == metrics["metrics"]["accuracy"]["value"]


def test_one_adapter_with_its_comparison_keeps_the_plain_name(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", manifest(), task="trec") as folder:
        score(folder)
        score(folder, WITHOUT_PROMPTS)
        assert folder.prediction_files(result(folder, without_prompts=True)) == {
            "trec-ptune": "predictions.jsonl",
            WITHOUT_PROMPTS: "predictions.without-the-prompts.jsonl",
        }


def test_an_unfinished_run_goes_on_and_gives_the_numbers_of_a_quiet_one(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "quiet", manifest(), task="trec") as folder:
        score(folder)
        quiet = result(folder)
    with RunFolder.create(tmp_path / "run", manifest(), task="trec") as folder:
        score(folder, keys=range(13, 20))
        folder.write_results(result(folder))
        created = folder.manifest.created
    with RunFolder.create(tmp_path / "run", manifest(run_settings={"max_tokens": 1}), task="trec") as folder:
        assert folder.resumed
        assert folder.manifest.created == created
        assert folder.journal.done_keys("trec-ptune") == {str(key) for key in range(13, 20)}
        score(folder, keys=range(13))
        again = result(folder)
        folder.finish(again)
    assert again.metrics == quiet.metrics
    assert again.first.confusion == quiet.first.confusion


def test_what_may_be_set_anew_for_the_rest_of_a_run_is_what_its_manifest_says(tmp_path: Path) -> None:
    noisy = NoisyServer("12D3KooWAlpha", 0, 3, "2.2.0", 0.1, is_used=False)
    with RunFolder.create(tmp_path, manifest(), task="trec") as folder:
        score(folder, keys=range(3))
        folder.note_noisy([noisy])
        created = folder.manifest.created
    seeds, run_settings = {"sample": 7, "bootstrap": 7}, {"max_tokens": 1}
    with RunFolder.create(tmp_path, manifest(seeds=seeds, run_settings=run_settings), task="trec") as folder:
        assert folder.manifest == Manifest.read(tmp_path / "manifest.json")
        assert (folder.manifest.seeds, folder.manifest.run_settings) == (seeds, run_settings)
        assert (folder.manifest.created, folder.manifest.noisy_servers) == (created, (noisy,))


def test_a_run_with_other_answers_is_refused_with_the_difference(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, manifest(), task="trec").close()
    other = manifest(model=ModelRecord(name="llama", sha256="aa" * 32), answer_settings={"dtype": "bfloat16"})
    with pytest.raises(RunFolderError) as refused:
        RunFolder.create(tmp_path, other, task="trec")
    assert "model.name: was stories260K-hf, now llama" in str(refused.value)
    assert "setting.dtype: was float32, now bfloat16" in str(refused.value)
    assert "setting.compression: was none, now nothing" in str(refused.value)
    RunFolder.create(tmp_path, manifest(), task="trec").close()  # the refusal let go of the folder


def test_a_run_with_another_adapter_is_refused_in_a_line(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, manifest(), task="trec").close()
    first = manifest().adapters[0]
    with pytest.raises(RunFolderError) as refused:
        RunFolder.create(tmp_path, manifest(adapters=[first.model_copy(update={"name": "late"})]), task="trec")
    assert f"adapter: was {first.name}, now late" in str(refused.value)
    assert str(refused.value).count(": was ") == 1


def test_a_path_that_is_no_run_is_told_from_one_that_is_misspelt(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "late", manifest(), task="trec").close()
    (tmp_path / "model").mkdir()
    (tmp_path / "file").touch()
    for name, says in (
        ("latte", f"there is no folder {tmp_path / 'latte'}. Did you mean {tmp_path / 'late'}?"),
        ("model", "model is a folder, but not one of a run (no manifest.json)."),
        (".", f"(no manifest.json). Did you mean one of those in it, {tmp_path / 'late'}?"),
        ("file", "file is a file. Expected the folder of a run."),
    ):
        with pytest.raises(RunFolderError) as refused:
            RunFolder.open(tmp_path / name)
        assert says in str(refused.value)


def test_an_unfinished_run_of_another_version_is_refused_in_one_sentence(tmp_path: Path) -> None:
    ours = {"dtype": "float32", "compression": "none"}
    RunFolder.create(tmp_path, manifest(answer_settings=ours | {"code": "d" * 64}), task="trec").close()
    with pytest.raises(RunFolderError) as refused:
        RunFolder.create(tmp_path, manifest(answer_settings=ours | {"code": "e" * 64}), task="trec")
    assert str(refused.value) == (
        f"Expected the unfinished run in {tmp_path} to be of this version of petals-eval; found one of another, whose "
        "answers may differ. Finish it with the version it was begun with, or name another folder with --out."
    )


def test_a_run_that_failed_leaves_nothing_unless_something_was_scored(tmp_path: Path) -> None:
    """Rows that were withdrawn were scored: they stay for the record. Failures alone are tried again anyway."""
    with pytest.raises(ZeroDivisionError), RunFolder.create(tmp_path / "failed", manifest(), task="trec") as folder:
        folder.journal.add_failure("trec-ptune", "1", 0, "too long")
        raise ZeroDivisionError
    assert not (tmp_path / "failed").exists()
    with pytest.raises(ZeroDivisionError), RunFolder.create(tmp_path / "caught", manifest(), task="trec") as folder:
        score(folder, keys=range(3))
        assert folder.journal.withdraw([SERVERS[0].peer_id]) == 3
        raise ZeroDivisionError
    with RunFolder.open(tmp_path / "caught") as folder:
        assert folder.journal.counts("trec-ptune").scored == 0
    connection = sqlite3.connect(tmp_path / "caught" / "journal.sqlite")
    assert connection.execute("SELECT count(*), sum(valid) FROM scored").fetchone() == (3, 0)
    connection.close()


def test_finished_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "done", manifest(), task="trec") as folder:
        score(folder)
        folder.finish(result(folder))
    with pytest.raises(RunFolderError, match="found a run that was finished at"):
        RunFolder.create(tmp_path / "done", manifest(), task="trec")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").touch()
    with pytest.raises(RunFolderError, match=r"to be empty .*found chapter1\.tex"):
        RunFolder.create(tmp_path / "thesis", manifest(), task="trec")
    with pytest.raises(RunFolderError, match="found a file"):
        RunFolder.create(tmp_path / "thesis" / "chapter1.tex", manifest(), task="trec")
    with pytest.raises(RunFolderError, match=r"no manifest\.json"):
        RunFolder.open(tmp_path / "thesis")
    (tmp_path / "crashed").mkdir()
    (tmp_path / "crashed" / ".manifest.json.x.part").touch()
    RunFolder.create(tmp_path / "crashed", manifest(), task="trec").close()


def test_a_folder_in_use_is_refused_and_free_again_when_its_process_dies(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", manifest(), task="trec"):
        with pytest.raises(RunFolderError, match="another process that writes a run there"):
            RunFolder.create(tmp_path / "run", manifest(), task="trec")
        with RunFolder.open(tmp_path / "run") as reader:  # reading is allowed
            assert reader.manifest.finished is None
    code = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 0), 2); print(flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    with pytest.raises(RunFolderError, match="another process"):
        RunFolder.create(tmp_path / "run", manifest(), task="trec")
    holder.kill()
    holder.communicate()
    RunFolder.create(tmp_path / "run", manifest(), task="trec").close()


def test_without_a_path_the_folder_is_named_by_task_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = []
    for _ in range(2):
        with RunFolder.create(None, manifest(), task="my task/2") as folder:
            paths.append(folder.path)
    assert all(re.fullmatch(r"runs/my-task-2-\d{4}-\d\d-\d\d-\d{4}(-2)?", str(path)) for path in paths)
    assert len(set(paths)) == 2
    assert all((tmp_path / path / "manifest.json").is_file() for path in paths)


def test_a_place_without_permission_is_the_machines_fault() -> None:
    with reachable_folder() as parent:
        parent.chmod(0o555)
        with unprivileged(), pytest.raises(MachineError, match="Permission denied") as refused:
            RunFolder.create(parent / "run", manifest(), task="trec")
        assert refused.value.exit_code == 4


def test_a_disk_that_fills_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunFolder.create(tmp_path, manifest(), task="trec") as folder:
        score(folder)
        folder.write_results(result(folder))
        before = (tmp_path / "metrics.json").read_text()

        def full(handle: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        score(folder, keys=range(20, 30))
        with pytest.raises(MachineError, match="The disk is full: free some space"):
            folder.write_results(result(folder))
    assert (tmp_path / "metrics.json").read_text() == before
    assert not list(tmp_path.glob(".*"))


def test_a_folder_computes_its_result_anew_whether_it_is_finished_or_not(tmp_path: Path) -> None:
    names: dict = {"metrics": list(METRICS), "label_names": list(LABELS)}
    with RunFolder.create(tmp_path / "run", manifest(run_settings=names), task="trec") as folder:
        score(folder, keys=range(7))
        folder.journal.flush()
        with RunFolder.open(tmp_path / "run") as reader:
            assert reader.result().metrics == result(folder).metrics
        score(folder, keys=range(7, 20))
        told = result(folder)
        folder.finish(told)
    with RunFolder.open(tmp_path / "run") as reader:
        assert reader.result().metrics == told.metrics
        assert (reader.result().first.confusion, reader.result().retries) == (told.first.confusion, 3)
    with RunFolder.create(tmp_path / "bare", manifest(), task="trec") as folder:
        score(folder)
        with pytest.raises(RunFolderError, match=r"Expected metrics in the manifest of .*bare; found none"):
            folder.result()


def test_a_result_prints_as_one_line_in_a_training_loop(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, manifest(), task="trec") as folder:
        score(folder)
        one = result(folder)
        score(folder, "other")
        two = result(folder, "trec-ptune", "other")
    assert re.fullmatch(
        r"accuracy 0\.\d{4} \(0\.\d{3} - 0\.\d{3}\), majority baseline 0\.3500, F1 \(macro\) .*, ROC AUC .*, n 20",
        str(one),
    )
    assert [line.split(":")[0] for line in str(two).splitlines()] == ["trec-ptune", "other"]
    assert two.metrics is two.first.metrics
