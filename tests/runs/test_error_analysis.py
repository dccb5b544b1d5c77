"""The analysis of errors of a run: from its folder and from a result, with the texts of the data or without."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import petals_eval
from petals_eval.data import rows_of
from petals_eval.errors import ConfigError, DataError, RunFolderError
from petals_eval.metrics import KINDS
from petals_eval.runs import AdapterRecord, RunFolder, ServerUsed
from petals_eval.runs.analysed_runs import errors_of
from petals_eval.runs.row_texts import RowSource, source_of_run
from petals_eval.tasks import load_task, task_of_fingerprint
from petals_eval.tasks.requests import Prediction
from tests.fake_model import FakeModel, evaluate, fake_adapter
from tests.runs.samples import LABELS, manifest
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.task_definitions import DEFINITIONS

GOOD, BAD = (ServerUsed(f"12D3KooW{name}", 2, 5, "2.2.0", "float32") for name in ("good", "bad"))
FIRST = ServerUsed("12D3KooWfirst", 0, 2, "2.2.0", "float32")
SETTINGS = {"metrics": ["accuracy"], "label_names": list(LABELS)}
TASK = {"text": "{text}", "label_column": "label", "label_names": ["bad", "good"]}


def run(path: Path, *, n: int = 120, adapters: tuple[AdapterRecord, ...] = (), **changes: object) -> Path:
    """A folder of three labels; rows 0, 4, 8, ... went through a server after which half of the answers are wrong."""
    about = {"run_settings": SETTINGS, **({"adapters": adapters} if adapters else {}), **changes}
    with RunFolder.create(path, manifest(**about), task="t") as folder:
        for record in folder.manifest.adapters:
            for key in range(n):
                label, is_bad = key % 3, key % 4 == 0
                wrong = key % 8 == 0 or key % 20 == 1
                predicted = (label + 1) % 3 if wrong else label
                scores = [(2.0 + key / 1000 if place == predicted else float(place == label),) for place in range(3)]
                folder.journal.add(
                    record.name,
                    Prediction(str(key), label, predicted, tuple(scores), 10 + key % 40, row_hash=f"row {key}"),
                    truncated=key % 30 == 0,
                    servers=(FIRST, BAD if is_bad else GOOD),
                )
            folder.journal.add_failure(record.name, str(n), 0, "too long")
        folder.finish(folder.result())
    return path


def test_a_server_whose_rows_go_wrong_stands_out_and_labels_and_lengths_do_not(tmp_path: Path) -> None:
    found = errors_of(run(tmp_path / "run"))
    wrong = [key for key in range(120) if key % 8 == 0 or key % 20 == 1]
    assert (found.rows, found.judged, found.wrong, found.failed) == (120, 120, len(wrong), 1)
    by_server = {group.name: group for group in found.groups["server"]}
    assert set(by_server) == {"...Wfirst 0:2", "...ooWbad 2:5", "...oWgood 2:5"}
    bad = next(group for name, group in by_server.items() if "bad" in name)
    assert (bad.rows, bad.wrong) == (30, 15) and bad.differs and bad.p_value < 0.001
    assert next(group for name, group in by_server.items() if "first" in name).p_value is None
    assert not any(group.differs for what in ("label", "length") for group in found.groups[what])
    assert any(said.startswith(f"server {bad.name}: 50.0% wrong against") for said in found.findings)
    assert "no more than chance: the differences by label, length, cut" in found.findings
    cut, whole = found.groups["cut"]
    assert (cut.name, cut.rows, whole.rows) == ("cut", 4, 116)
    assert sum(group.rows for group in found.groups["length"]) == 120


def test_confusions_and_lists_are_those_of_the_rows(tmp_path: Path) -> None:
    found = errors_of(run(tmp_path / "run"), limit=3)
    assert sum(each.rows for each in found.confusions) == found.wrong
    assert [each.rows for each in found.confusions] == sorted((each.rows for each in found.confusions), reverse=True)
    assert {(each.label, each.prediction) for each in found.confusions} <= {
        (LABELS[at], LABELS[(at + 1) % 3]) for at in range(3)
    }
    confident = found.lists["most confident"]
    assert [row.key for row in confident] == ["112", "104", "101"]  # the later a row, the surer is its answer
    first = confident[0]
    assert (first.label, first.prediction, first.is_wrong) == (LABELS[1], LABELS[2], True)
    assert (first.n_tokens, first.is_truncated, first.servers) == (10 + 112 % 40, False, (FIRST.peer_id, BAD.peer_id))
    assert first.confidence == pytest.approx(np.exp(2.112) / (np.exp(2.112) + np.e + 1))
    assert first.margin == pytest.approx(first.confidence - first.of_label) and first.text is None
    assert [row.key for row in found.lists["worst"]] == ["112", "104", "101"]
    # Of a right answer nothing but the two zeros is below it, so that the wrong ones are the close ones.
    assert [row.key for row in found.lists["closest"]] == ["0", "1", "8"]
    printed = found.to_json()
    assert json.loads(json.dumps(printed, allow_nan=False)) == printed
    assert printed["lists"]["closest"][0]["is_wrong"] is True
    assert errors_of(tmp_path / "run", limit=0).lists == {}


def test_adapters_and_draws_are_chosen_by_name(tmp_path: Path) -> None:
    records = tuple(
        AdapterRecord(name=name, kind="ptune", sha256="bb" * 32, adapter=adapter, draw=draw)
        for name, adapter, draw in (("a", None, None), ("b, draw 1", "b", 1), ("b, draw 2", "b", 2))
    )
    path = run(tmp_path / "run", n=24, adapters=records)
    found = errors_of(path)
    assert found.adapter == "a"
    assert found.notes[0] == "the others are shown with --adapter: b, draw 1, b, draw 2"
    assert errors_of(path, adapter="b").adapter == "b, draw 1"
    assert errors_of(path, adapter="b, draw 2").adapter == "b, draw 2"
    with pytest.raises(ConfigError, match=r"adapter: expected one of a, b, draw 1, b, draw 2; found 'c'"):
        errors_of(path, adapter="c")
    with pytest.raises(ConfigError, match="limit: expected 0 rows or more, found -1"):
        errors_of(path, limit=-1)


def test_a_folder_that_has_no_errors_or_no_rows_or_is_none(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "empty", manifest(run_settings=SETTINGS), task="t") as folder:
        folder.journal.add_failure(folder.manifest.adapters[0].name, "0", 0, "too long")
    found = errors_of(tmp_path / "empty")
    assert (found.rows, found.lists, found.groups, found.findings) == (0, {}, {}, ())
    assert "this run is not finished" in found.notes
    (tmp_path / "group" / "one").mkdir(parents=True)
    (tmp_path / "group" / "group.json").write_text("{}")
    (tmp_path / "group" / "one" / "manifest.json").write_text("{}")
    with pytest.raises(RunFolderError, match=r"holds a group of tasks: name the folder of one, one\."):
        errors_of(tmp_path / "group")
    with pytest.raises(RunFolderError, match="Expected the folder of a run"):
        errors_of(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_of_a_row_of_every_kind_comes_with_the_hash_of_the_run(kind: str) -> None:
    definition, values = DEFINITIONS[kind]
    task: Any = load_task(definition)
    rows = rows_of(values)
    # What the manifest says of a task is enough to read its rows.
    again: Any = task_of_fingerprint(json.loads(json.dumps({"name": "mine", **task.fingerprint()})))
    examples = list(task.examples(rows, byte_tokenizer()))
    for reader in (task, again):
        found = [reader.row_text(rows, row) for row in rows]
        assert [each.row_hash for each in found] == [each.row_hash for each in examples]
        assert all(value["text"] in each.text for value, each in zip(values, found, strict=True))
    second = task.row_text(rows, list(rows)[1])
    expected = {"choice": ("yes 1", "no 1"), "continuation": ("home1",), "generation": ("yes 1", "no")}
    assert second.answers == expected.get(kind, ())
    assert second.text == ("a dog ran off\nnot a dog ran off" if kind == "regression" else "a dog ran off")


def test_texts_are_those_of_rows_that_say_what_they_said(tmp_path: Path) -> None:
    values = [{"text": f"a review of {at}", "label": at % 2, "other": at} for at in range(8)]
    task: Any = load_task(TASK)
    rows = rows_of(values)
    source = RowSource(task, rows)
    hashes = {str(row.index): task.row_text(rows, row).row_hash for row in rows}
    assert source.texts({"3": hashes["3"]})["3"].text == "a review of 3"
    assert source.texts({"3": ""}) == {}  # folders of schema 1 say nothing
    changed = [{**row, "text": "another one"} if at == 5 else row for at, row in enumerate(values)]
    other = RowSource(task, rows_of(changed[:6]))
    assert other.texts({"3": hashes["3"]})["3"].text == "a review of 3"
    with pytest.raises(DataError, match=r"of 3 rows looked up 2 differ: 7 is not there, 5 says 'another one'"):
        other.texts({key: hashes[key] for key in ("3", "5", "7")})
    # A label that was corrected since makes it another row; a column that the task does not read does not.
    relabelled = [{**row, "label": 1 - row["label"], "other": 0} for row in values]
    with pytest.raises(DataError, match="8 differ"):
        RowSource(task, rows_of(relabelled)).texts(hashes)
    assert len(RowSource(task, rows_of([{**row, "other": 0} for row in values])).texts(hashes)) == 8


def test_a_result_shows_the_texts_of_rows_in_memory_and_a_folder_asks_for_them(tmp_path: Path) -> None:
    rows = [{"text": f"fine {at}", "label": ("bad", "good")[at % 2]} for at in range(10)]
    model = FakeModel(adapters=(fake_adapter("mine"),))
    result = evaluate(model, rows, tmp_path / "run", task=TASK, without_prompts=False)
    found = result.errors(limit=2)
    assert (found.wrong, found.adapter) == (5, "mine")
    assert [row.text.text for row in found.lists["most confident"]] == ["fine 0", "fine 2"]
    assert found.groups["server"][0].rows == 10
    assert petals_eval.errors_of(result, limit=2).to_json() == found.to_json()
    with pytest.raises(ConfigError, match="a result knows its own"):
        petals_eval.errors_of(result, data=rows)
    bare = petals_eval.errors_of(tmp_path / "run")
    assert bare.lists["most confident"][0].text is None
    assert bare.notes == ("texts are not shown: say where rows in memory, which this run read, is, with --data",)
    again = petals_eval.errors_of(tmp_path / "run", data=rows, limit=2)
    assert again.to_json() == found.to_json()
    with pytest.raises(DataError, match="does not hold the rows of this run"):
        petals_eval.errors_of(tmp_path / "run", data=rows[1:])
    with pytest.raises(ConfigError, match="expected a result with its predictions"):
        RunFolder.open(tmp_path / "run").result().errors()
    # Nothing of the texts is in a file of the run.
    for path in (tmp_path / "run").iterdir():
        assert b"fine 0" not in path.read_bytes(), path.name


def test_the_data_of_a_shipped_task_are_read_where_the_run_read_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = load_task("sst2")
    of_task = {"name": "sst2", **shipped.fingerprint(), "max_length": 7}
    hub = manifest(task=of_task, data=manifest().data.model_copy(update={"name": "nyu-mll/glue sst2 validation"}))
    asked: list[Any] = []

    def loaded(source: object) -> object:
        asked.append(source)
        return rows_of([{"sentence": "fine", "label": 1}])

    monkeypatch.setattr("petals_eval.runs.row_texts.load_rows", loaded)
    source, advice = source_of_run(hub)
    assert source is not None and advice == "" and [each.path for each in asked] == ["nyu-mll/glue"]
    # Of a file nobody knows where it lies; and of a task of the same name that reads otherwise neither how.
    other, advice = source_of_run(hub.model_copy(update={"data": hub.data.model_copy(update={"name": "dev.tsv"})}))
    assert other is None and "say where dev.tsv, which this run read, is, with --data" in advice
    mine = manifest(task={**of_task, "text": "{mine}"}, data=hub.data)
    assert source_of_run(mine)[0] is None and len(asked) == 1

    def unreachable(source: object) -> object:
        raise DataError("the hub cannot be reached")

    monkeypatch.setattr("petals_eval.runs.row_texts.load_rows", unreachable)
    source, advice = source_of_run(hub)
    assert source is None and "the hub cannot be reached" in advice
    with pytest.raises(DataError, match="cannot be reached"):
        source_of_run(hub, task="sst2")
