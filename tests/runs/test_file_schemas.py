"""The published JSON Schemas describe what is written: every file of a run's folder, and every key of it."""

import json
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from petals_eval.metrics import KINDS
from petals_eval.metrics.differences import Difference
from petals_eval.runs import (
    WITHOUT_PROMPTS,
    AdapterRecord,
    AdapterResult,
    ComputedIn,
    GroupResult,
    LosslessServer,
    Manifest,
    NoisyServer,
    RunFolder,
    RunResult,
    WireRecord,
    WireSample,
    run_result,
    summarise,
)
from petals_eval.tasks.requests import Prediction
from tests.fake_model import FakeModel, evaluate, write_rows
from tests.runs.samples import LABELS, SERVERS, manifest
from tests.support.json_schemas import closed

SCHEMAS = resources.files("petals_eval.runs") / "schemas"
HASH = "0123456789abcdef"

# Of each kind: its columns, the values of a row, its label and its prediction.
ROWS: dict[str, tuple[tuple[str, ...], tuple[tuple[float, ...], ...], float | None, float | None]] = {
    "classification": (("score",), ((0.1,), (0.5,), (-2.0,)), 2, 1),
    "regression": (("score",), ((3.25,),), 4.0, 3.25),
    "choice": (
        ("log_likelihood", "characters", "bytes", "tokens", "unconditioned"),
        ((-1.5, 4, 4, 1, float("nan")), (-2.5, 9, 10, 3, -7.5)),
        1,
        0,
    ),
    "continuation": (("log_likelihood", "is_greedy", "tokens", "characters"), ((-1.5, 1, 2, 7),), None, None),
    "perplexity": (("log_likelihood", "tokens", "words", "bytes"), ((-1234.5, 700, 410, 2000),), None, None),
    "generation": (("new_tokens", "stopped_by_length", "exact_match"), ((17, 0, float("nan")),), None, None),
}


def schema(name: str) -> dict[str, Any]:
    return json.loads((SCHEMAS / f"{name}.schema.json").read_text(encoding="utf-8"))


def check(name: str, value: dict[str, Any]) -> None:
    Draft202012Validator(schema(name)).validate(value)
    strict = closed(schema(name))
    if value.get("kind") not in ROWS or value["kind"] == "generation":  # its columns are those of its metrics
        strict.pop("unevaluatedProperties")
    Draft202012Validator(strict).validate(value)


def check_folder(folder: Path) -> set[str]:
    """Hold every file of a folder to its schema; returns the names of those that were there."""
    for name in ("manifest", "metrics"):
        check(name, json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))
    seen = {"manifest", "metrics"}
    for path in sorted(folder.glob("*.jsonl")):
        name = path.name.partition(".")[0]
        seen.add(name)
        for line in path.read_text(encoding="utf-8").splitlines():
            check(name, json.loads(line))
    return seen


@pytest.mark.parametrize("name", ["manifest", "metrics", "predictions", "failures", "texts", "group"])
def test_a_schema_is_one_and_takes_no_empty_object(name: str) -> None:
    Draft202012Validator.check_schema(schema(name))
    with pytest.raises(ValidationError):
        check(name, {})


def test_the_files_of_a_real_run_are_as_they_are_published(tmp_path: Path) -> None:
    model = FakeModel(takes=4)
    model.local.fingerprint["sha256"] = "a" * 64
    result = evaluate(model, write_rows(tmp_path / "rows.csv", (1, 2, 9, 3)), tmp_path / "run")
    assert check_folder(tmp_path / "run") == {"manifest", "metrics", "predictions", "failures"}
    check("metrics", result.to_json())
    [line] = (tmp_path / "run" / "failures.jsonl").read_text().splitlines()
    assert len(json.loads(line)["row_hash"]) == 16


@pytest.mark.parametrize("kind", KINDS)
def test_the_lines_of_every_kind_are_as_they_are_published(tmp_path: Path, kind: str) -> None:
    columns, values, label, prediction = ROWS[kind]
    labels = list(LABELS) if kind == "classification" else []
    settings = {"metrics": ["m"], "label_names": labels}
    texts = {"save_texts": True} if kind == "generation" else {}
    made = manifest(kind=kind, answer_columns=columns, run_settings=settings, answer_settings=texts)
    found = Prediction("0", label, prediction, values, 7, 2, HASH)
    with RunFolder.create(tmp_path / "run", made, task="t") as folder:
        folder.save_text("trec-ptune", replace(found, text="a text", finish="stop") if texts else found)
        folder.journal.add("trec-ptune", found, kind=kind)
        folder.journal.add_failure("trec-ptune", "1", label, "too long", kind=kind, row_hash=HASH)
        told = run_result(folder.manifest, folder.journal, task="t", metrics=[], label_names=labels, retries=0)
        folder.finish(told)
    files = {"manifest", "metrics", "predictions", "failures"}
    assert check_folder(tmp_path / "run") == (files | {"texts"} if texts else files)
    line = json.loads((tmp_path / "run" / "predictions.jsonl").read_text())
    assert (line["kind"], line["label"], line["prediction"]) == (kind, label, prediction)
    assert (line["n_requests"], line["row_hash"]) == (2, HASH)
    assert type(line["label"]) is type(label)


def test_a_line_without_what_its_kind_has_is_refused() -> None:
    line = {"schema_version": 2, "key": "0", "row_hash": HASH, "label": None, "prediction": None}
    line |= {"n_requests": 1, "n_tokens": 3, "log_likelihood": -1.5, "tokens": 2.0, "bytes": 3.0}
    with pytest.raises(ValidationError, match="'words' is a required property"):
        check("predictions", line | {"kind": "perplexity"})
    check("predictions", line | {"kind": "perplexity", "words": 2.0})
    check("predictions", line | {"kind": "a kind of later", "in_a_later_release": 1})


def test_every_kind_of_task_is_described() -> None:
    assert set(KINDS) <= set(ROWS)
    described = schema("predictions")
    assert {name for columns, *_ in ROWS.values() for name in columns} - {"exact_match"} <= set(described["properties"])


def test_all_that_a_run_may_know_is_described(tmp_path: Path) -> None:
    """Everything that is rare: several adapters, servers in doubt, a lossy wire, rows without labels."""
    sample = WireSample("trec-ptune", 16, None, None, 3, "not measured: too long")
    wire = WireRecord("float16", sample, ("12D3KooWNew",), (LosslessServer("12D3KooWOld", "it is old"),))
    noisy = NoisyServer("12D3KooWAlpha", 0, 3, None, 0.1, is_used=True, verdict="disputed")
    made = manifest(run_settings={"metrics": ["accuracy", "f1_per_class"], "label_names": list(LABELS)})
    with RunFolder.create(tmp_path / "run", made, task="t") as folder:
        for adapter in ("trec-ptune", "other", WITHOUT_PROMPTS):
            for key in range(3):
                scores = tuple((score,) for score in (0.0, 1.0, key))
                found = Prediction(str(key), None if key == 0 else 1, 1, scores, 7, 1, HASH)
                folder.journal.add(adapter, found, servers=SERVERS[:1])
        folder.note_noisy([noisy])
        folder.note_wire(wire)
        first = _summary(folder, "trec-ptune")
        bare = _summary(folder, WITHOUT_PROMPTS)
        told = RunResult(
            "t",
            {"trec-ptune": first, "other": replace(first, adapter="other")},
            bare,
            1,
            2,
            (ComputedIn(None, None, None, 1),),
            (noisy,),
            wire,
            differences=(
                Difference("accuracy", "trec-ptune", "other", 0.5, 0.5, 2, "exact", (-0.1, 0.1), 1.0, 1.0, 0, 1, 0.2),
                Difference("f1[no]", "trec-ptune", WITHOUT_PROMPTS, None, 0.5, 2, "bootstrap", note="not defined"),
            ),
        )
        folder.finish(told)
    assert check_folder(tmp_path / "run") == {"manifest", "metrics", "predictions"}
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["n_unlabelled"] == 1 and "wire" in metrics and "adapters" in metrics and "without_prompts" in metrics
    assert "differences" in metrics
    lines = (tmp_path / "run" / "predictions.other.jsonl").read_text().splitlines()
    assert all(json.loads(line)["disputed"] for line in lines)
    # Whoever validates strictly learns nothing of a field of a later release, and an open schema takes it.
    Draft202012Validator(schema("metrics")).validate(metrics | {"in_a_later_release": 1})
    Draft202012Validator(schema("manifest")).validate(
        json.loads((tmp_path / "run" / "manifest.json").read_text()) | {"in_a_later_release": 1}
    )


def test_several_draws_of_shots_and_groups_of_tasks_are_described(tmp_path: Path) -> None:
    drawn = [
        AdapterRecord(name=f"prompts, draw {draw}", kind="ptune", sha256="bb", adapter="prompts", draw=draw)
        for draw in (1, 2)
    ]
    names = {"metrics": ["accuracy", "f1_per_class"], "label_names": list(LABELS)}
    with RunFolder.create(tmp_path / "run", manifest(adapters=drawn, run_settings=names), task="t") as folder:
        for draw in drawn:
            for key in range(4):
                scores = tuple((score,) for score in (0.0, 1.0, key))
                folder.journal.add(draw.name, Prediction(str(key), key % 3, 1, scores, 7, 1, HASH))
        told = folder.result()
        folder.finish(told)
    assert check_folder(tmp_path / "run") == {"manifest", "metrics", "predictions"}
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert len(metrics["draws"]) == len(metrics["metrics"]["accuracy"]["draws"]["values"]) == 2
    check("group", GroupResult("g", {"run": told}).to_json())


def test_both_files_say_the_same_of_what_both_have() -> None:
    ours, theirs = schema("metrics")["$defs"], schema("manifest")["$defs"]
    both = ("noisy_server", "recomputed", "wire", "wire_sample")
    assert {name: ours[name] for name in both} == {name: theirs[name] for name in both}
    written = Manifest.model_json_schema(mode="serialization")
    assert set(written["properties"]) == set(schema("manifest")["properties"])
    for name, definition in (
        ("ServerUsed", "server"),
        ("NoisyServer", "noisy_server"),
        ("Recomputed", "recomputed"),
        ("WireSample", "wire_sample"),
    ):
        assert set(written["$defs"][name]["properties"]) == set(theirs[definition]["properties"])


def _summary(folder: RunFolder, adapter: str) -> AdapterResult:
    return summarise(folder.journal, adapter, ["accuracy", "f1_per_class", "roc_auc"], LABELS)
