"""Folders of schema 1: finished ones are shown and merged to the numbers that they say of themselves, others refused.

`tests/runs/schema1/` holds folders that the last version with schema 1 wrote of the demo's model and prompts: a run in
one piece, and the same run in two parts. Each journal lies there as the SQL that SQLite's own dump makes of it.
"""

import json
import shutil
import sqlite3
from pathlib import Path

import pytest

import petals_eval
from petals_eval.errors import RunFolderError
from petals_eval.runs import WITHOUT_PROMPTS, Journal, Manifest, RunFolder
from petals_eval.runs.analysed_runs import errors_of
from petals_eval.runs.schema import APPLICATION_ID
from tests.cli.invoking import invoke
from tests.runs.samples import manifest

FOLDERS = Path(__file__).parent / "schema1"
ADAPTER = "prompts"


@pytest.fixture
def folder(tmp_path: Path):
    """A folder of schema 1 as it was written, by its name."""

    def made(name: str) -> Path:
        shutil.copytree(FOLDERS / name, tmp_path / name)
        dump = tmp_path / name / "journal.sql"
        connection = sqlite3.connect(tmp_path / name / "journal.sqlite")
        connection.executescript(
            f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = 1; PRAGMA journal_mode = WAL;"
            + dump.read_text(encoding="utf-8")
        )
        connection.close()
        dump.unlink()
        return tmp_path / name

    return made


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def numbers(metrics: dict) -> dict:
    """What the metrics file says of one adapter, without what it took."""
    names = ("adapter", "n_examples", "n_scored", "n_failed", "n_truncated", "n_tokens", "label_names")
    return {name: metrics[name] for name in (*names, "confusion_matrix")}


def same_metrics(found: dict, stored: dict) -> bool:
    """The scores are kept and not the probabilities, which may differ in their last digit.

    Intervals are today's: accuracy's alone is as it was."""
    assert found.keys() == stored.keys()
    for name, metric in stored.items():
        assert found[name]["value"] == pytest.approx(metric["value"], rel=1e-12, abs=1e-15), name
        if name == "accuracy":
            assert found[name]["ci95"] == pytest.approx(metric["ci95"], rel=1e-12, abs=1e-15), name
    return True


def test_a_folder_is_opened_and_has_the_numbers_that_it_says_it_has(folder) -> None:
    path = folder("whole")
    stored = json.loads((path / "metrics.json").read_text())
    with RunFolder.open(path) as opened:
        assert (opened.manifest.schema_version, opened.manifest.kind) == (1, "classification")
        result = opened.result().to_json()
        found = list(opened.journal.predictions(ADAPTER))
        failures = list(opened.journal.failures(ADAPTER))
        with pytest.raises(sqlite3.OperationalError):
            opened.journal._connection.execute("DELETE FROM main.scored")
    assert numbers(result) == numbers(stored)
    assert same_metrics(result["metrics"], stored["metrics"])
    bare = result["without_prompts"], stored["without_prompts"]
    assert numbers(bare[0]) == numbers(bare[1]) and same_metrics(bare[0]["metrics"], bare[1]["metrics"])
    assert [(each.key, each.reason) for each in failures] == [
        (line["key"], line["reason"]) for line in lines(path / "failures.jsonl") if line["adapter"] == ADAPTER
    ]
    for each, line in zip(found, lines(path / "predictions.jsonl"), strict=True):
        assert (each.key, each.label, each.prediction) == (line["key"], line["label"], line["prediction"])
        assert each.probabilities == pytest.approx(line["probabilities"], rel=1e-12)
        assert (each.n_tokens, each.n_requests, each.row_hash) == (line["n_tokens"], 1, "")


def test_a_folder_is_shown(folder) -> None:
    path = folder("whole")
    before = {each.name: each.read_bytes() for each in path.iterdir()}
    stored = json.loads(before["metrics.json"])
    outcome = invoke("show", path)
    assert outcome.code == 1  # for the example that failed
    assert f"accuracy              {stored['metrics']['accuracy']['value']:.4f}" in outcome.out
    assert "without the prompts: accuracy" in outcome.out
    shown = json.loads(invoke("show", path, "--json", "--max-failed", 1).out)
    assert numbers(shown) == numbers(stored) and same_metrics(shown["metrics"], stored["metrics"])
    assert {each.name: each.read_bytes() for each in path.iterdir()} == before


def test_parts_are_merged_to_the_run_in_one_piece(folder, tmp_path: Path) -> None:
    parts, whole = [folder("part-1"), folder("part-2")], folder("whole")
    stored = json.loads((whole / "metrics.json").read_text())
    merged = petals_eval.merge(parts, out=tmp_path / "merged").to_json()
    assert numbers(merged) == numbers(stored)
    assert same_metrics(merged["metrics"], stored["metrics"])
    assert same_metrics(merged["without_prompts"]["metrics"], stored["without_prompts"]["metrics"])
    assert Manifest.read(tmp_path / "merged" / "manifest.json").schema_version == 2
    before, after = lines(whole / "predictions.jsonl"), lines(tmp_path / "merged" / "predictions.jsonl")
    for was, line in zip(before, after, strict=True):
        assert (line["schema_version"], line["kind"], line["row_hash"]) == (2, "classification", "")
        for name in ("key", "label", "prediction", "n_tokens"):
            assert line[name] == was[name]
        assert line["probabilities"] == pytest.approx(was["probabilities"], rel=1e-12)
    # What was merged is of today's schema in every way.
    with RunFolder.open(tmp_path / "merged") as opened:
        assert same_metrics(opened.result().to_json()["metrics"], stored["metrics"])
        assert len(list(opened.journal.predictions(WITHOUT_PROMPTS))) == len(before)


def test_parts_of_both_schemas_are_not_merged(folder, tmp_path: Path) -> None:
    one, other = folder("part-1"), folder("part-2")
    stored = json.loads((other / "manifest.json").read_text())
    stored["answer_settings"]["code"] = "e" * 64
    (other / "manifest.json").write_text(json.dumps(stored))
    with pytest.raises(RunFolderError, match=r"is of another one than .*\n  setting\.code: was"):
        petals_eval.merge([one, other], out=tmp_path / "merged")


def test_an_unfinished_one_is_refused_in_one_sentence_and_left_as_it_is(folder) -> None:
    path = folder("part-1")
    stored = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(stored | {"finished": None}))
    before = {each.name: each.read_bytes() for each in path.iterdir()}
    # Of the very same settings, so that nothing but the schema speaks against it.
    same = manifest(answer_settings=stored["answer_settings"])
    with pytest.raises(RunFolderError) as refused:
        RunFolder.create(path, same, task="demo")
    assert str(refused.value) == (
        f"Expected the unfinished run in {path} to be of this version of petals-eval; found one of another, whose "
        "answers may differ. Finish it with the version it was begun with, or name another folder with --out."
    )
    assert {each.name: each.read_bytes() for each in path.iterdir()} == before
    with pytest.raises(RunFolderError, match="which can be read and not gone on with"):
        Journal(path / "journal.sqlite")
    assert "\nnote: this run is not finished; " in invoke("show", path).err


def test_its_errors_are_analysed_and_without_hashes_no_texts_are_shown(folder) -> None:
    path = folder("whole")
    found = errors_of(path, data=[{"text": "anything", "label": "good"}])
    stored = json.loads((path / "metrics.json").read_text())
    assert found.wrong == stored["n_scored"] - sum(stored["confusion_matrix"][at][at] for at in range(2))
    assert found.groups["label"] and all(row.text is None for rows in found.lists.values() for row in rows)
    assert "texts are not shown: this run did not note what its rows say" in found.notes
