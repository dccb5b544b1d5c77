"""The file of generated texts: a row that is committed has its text, whenever the process dies."""

import json

import pytest

from petals_eval.errors import MachineError, RunFolderError
from petals_eval.runs import RunFolder
from petals_eval.runs.texts import TextFile
from petals_eval.tasks.requests import Prediction
from tests.runs.samples import manifest

ADAPTER = "trec-ptune"


def prediction(key, text="a text", tokens=3.0):
    return Prediction(str(key), None, None, ((tokens, 0.0),), 5, row_hash=f"hash {key}", text=text, finish="end")


def of_texts(save=True):
    return manifest(
        kind="generation",
        answer_columns=("new_tokens", "stopped_by_length"),
        answer_settings={"save_texts": True} if save else {},
    )


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def score(folder, *predictions):
    for each in predictions:
        folder.save_text(ADAPTER, each)
        folder.journal.add(ADAPTER, each, kind="generation")


def test_a_text_is_on_the_disk_when_its_row_is(tmp_path, monkeypatch):
    with RunFolder.create(tmp_path / "run", of_texts(), task="mine") as folder:
        seen = []
        begin = folder.journal._transaction

        def transaction():
            seen.append([line["key"] for line in lines(tmp_path / "run" / "texts.jsonl")])
            return begin()

        monkeypatch.setattr(folder.journal, "_transaction", transaction)
        score(folder, prediction(2, "two\nlines"), prediction(1, "é"))
        folder.journal.flush()
        assert ["2", "1"] in seen
        assert folder.texts(ADAPTER) == {"2": "two\nlines", "1": "é"}
    assert lines(tmp_path / "run" / "texts.jsonl")[0] == {
        "schema_version": 2,
        "adapter": ADAPTER,
        "key": "2",
        "row_hash": "hash 2",
        "text": "two\nlines",
        "finish": "end",
    }


def test_without_being_asked_no_text_is_kept_anywhere(tmp_path):
    with RunFolder.create(tmp_path / "run", of_texts(save=False), task="mine") as folder:
        score(folder, prediction(1, "nobody may read this"))
        folder.journal.flush()
        assert folder.texts(ADAPTER) == {}
    assert not (tmp_path / "run" / "texts.jsonl").exists()
    assert not any(b"nobody may" in path.read_bytes() for path in (tmp_path / "run").iterdir())


def test_a_run_goes_on_after_a_line_that_was_not_finished_and_the_last_text_of_a_row_counts(tmp_path):
    with RunFolder.create(tmp_path / "run", of_texts(), task="mine") as folder:
        score(folder, prediction(1, "one"), prediction(2, "first try"))
    with (tmp_path / "run" / "texts.jsonl").open("ab") as file:
        file.write(b'{"schema_version": 2, "adapter": "trec-pt')  # killed in the middle of a word
    with RunFolder.create(tmp_path / "run", of_texts(), task="mine") as folder:
        assert folder.resumed
        assert folder.texts(ADAPTER) == {"1": "one", "2": "first try"}
        score(folder, prediction(2, "second try"), prediction(0, "zero"))
        folder._texts.add(ADAPTER, prediction(7, "its row was never committed"))
        folder.journal.add_failure(ADAPTER, "1", None, "withdrawn, and then it failed", kind="generation")
        folder.journal.flush()
        folder._texts.put_in_order((ADAPTER, key) for key in folder.journal.scored_keys(ADAPTER))
    assert [(line["key"], line["text"]) for line in lines(tmp_path / "run" / "texts.jsonl")] == [
        ("0", "zero"),
        ("2", "second try"),
    ]


def test_a_run_that_keeps_texts_does_not_go_on_with_one_that_did_not(tmp_path):
    with RunFolder.create(tmp_path / "run", of_texts(save=False), task="mine") as folder:
        score(folder, prediction(1))
    with pytest.raises(RunFolderError, match="save_texts: was nothing, now True"):
        RunFolder.create(tmp_path / "run", of_texts(), task="mine")


def test_a_run_that_scored_nothing_leaves_no_file_of_texts(tmp_path):
    with pytest.raises(ZeroDivisionError), RunFolder.create(tmp_path / "run", of_texts(), task="mine") as folder:
        folder._texts.add(ADAPTER, prediction(1))
        raise ZeroDivisionError
    assert not (tmp_path / "run").exists()


def test_what_is_no_text_is_told_with_its_file(tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"key": "1"}\n')
    with pytest.raises(RunFolderError, match=r"Expected a text a line in .*texts\.jsonl; found something else"):
        TextFile(tmp_path / "texts.jsonl").texts(ADAPTER)


def test_a_disk_that_takes_no_text_takes_no_row(tmp_path, monkeypatch):
    with RunFolder.create(tmp_path / "run", of_texts(), task="mine") as folder:
        score(folder, prediction(1))
        folder.journal.flush()

        def full(handle):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("petals_eval.runs.texts.os.fsync", full)
            score(folder, prediction(2))
            with pytest.raises(MachineError, match="The disk is full"):
                folder.journal.flush()
        assert folder.journal.committed() == 1
