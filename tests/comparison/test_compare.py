"""Runs, results and other tools' predictions held against each other."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

import petals_eval
from petals_eval.errors import ConfigError, DataError, RunFolderError
from petals_eval.metrics.paired import mcnemar
from petals_eval.runs import WITHOUT_PROMPTS, AdapterRecord, RunFolder
from petals_eval.tasks.requests import Prediction
from tests.fake_model import FakeModel, evaluate, write_rows
from tests.runs.samples import LABELS, manifest

METRICS = ["accuracy", "majority_baseline", "f1_macro", "log_loss", "ece"]


def scored(key: int, skill: float, seed: int, content: str = "") -> Prediction:
    label = key % 3
    scores = np.random.default_rng([key, seed]).normal(size=3)
    scores[label] += skill
    values = tuple((each,) for each in scores.tolist())
    return Prediction(str(key), label, int(scores.argmax()), values, 7, row_hash=content or f"row {key}")


def run(path: Path, *names: str, n: int = 60, skip: tuple[int, ...] = (), content: str = "", **changes: object) -> Path:
    """A finished run folder of made-up answers; the later an adapter, the better."""
    settings = {"metrics": METRICS, "label_names": list(LABELS)} | changes.pop("run_settings", {})  # type: ignore[operator]
    adapters = [AdapterRecord(name=name, kind="ptune", sha256="bb" * 32) for name in names]
    with RunFolder.create(path, manifest(adapters=adapters, run_settings=settings, **changes), task="t") as folder:
        for seed, name in enumerate(names):
            for key in range(n):
                if key in skip:
                    folder.journal.add_failure(name, str(key), key % 3, "too long")
                else:
                    folder.journal.add(name, scored(key, 0.4 * (seed + 1), len(name) + seed, content))
        folder.finish(folder.result())
    return path


def test_adapters_of_one_folder_and_folders_are_compared_alike(tmp_path: Path) -> None:
    together = petals_eval.compare(run(tmp_path / "both", "a", "b"))
    assert together.sides == dict.fromkeys("ab", str(tmp_path / "both"))
    assert (together.rows, together.left_out) == (60, {})
    found = together.of("a", "b")
    assert list(found) == ["accuracy", "f1_macro", "log_loss"]
    accuracy = found["accuracy"]
    result = RunFolder.open(tmp_path / "both").result()
    assert accuracy.value == pytest.approx(
        result.adapters["a"].metrics["accuracy"].value - result.adapters["b"].metrics["accuracy"].value
    )
    assert accuracy.p_value == mcnemar(accuracy.only_first, accuracy.only_second)
    # What stands in metrics.json is the same, to the last digit.
    written = json.loads((tmp_path / "both" / "metrics.json").read_text())["differences"]
    assert written == [each.to_json() for each in together.differences]
    assert result.differences == together.differences


def test_names_that_are_shared_have_their_folder_before_them(tmp_path: Path) -> None:
    one, other = run(tmp_path / "one", "same"), run(tmp_path / "other", "same")
    found = petals_eval.compare(one, str(other))
    assert list(found.sides) == ["one/same", "other/same"]
    assert found.of("one/same", "other/same")["accuracy"].value == 0
    with pytest.raises(ConfigError, match=r"expected each side once; found .*one/same twice"):
        petals_eval.compare(one, one)


def test_a_run_is_shown_by_the_name_that_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(Path("one"), "same"), run(Path("two"), "same"), run(Path("several"), "a", "b"), run(Path("x=y"), "odd")
    found = petals_eval.compare("old=one", "new=two/", "many=several", "x=y", metrics=["accuracy"])
    assert found.sides == {"old": "one", "new": "two", "many/a": "several", "many/b": "several", "odd": "x=y"}
    rows = "".join(f"{key},{LABELS[key % 3]}\n" for key in range(60))
    Path("other.csv").write_text("key,prediction\n" + rows)
    assert list(petals_eval.compare("old=one", "tool=other.csv").sides) == ["old", "tool"]
    with pytest.raises(ConfigError, match="expected a name of its own for each run; found old for one and two"):
        petals_eval.compare("old=one", "old=two")
    for asked in ("=one", "old="):
        with pytest.raises(ConfigError, match=f"expected NAME=RUN, a name and a run folder or file; found '{asked}'"):
            petals_eval.compare(asked, "two")
    with pytest.raises(RunFolderError, match=r"there is no folder nowhere"):
        petals_eval.compare("old=nowhere", "two")


def test_one_is_held_against_all_by_its_folder_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(Path("one"), "same"), run(Path("two"), "same"), run(Path("several"), "a", "b")
    for asked in ("two", "two/", "two/same"):
        found = petals_eval.compare("one", "two", "several", against=asked, metrics=["accuracy"])
        assert [first for first, _ in found.pairs] == ["two/same"] * 3
    for asked in ("new", "new=two", "two"):
        assert petals_eval.compare("one", "new=two", against=asked).pairs == (("new", "same"),)
    with pytest.raises(ConfigError, match="against: several has several adapters: expected one of a, b"):
        petals_eval.compare("one", "several", against="several")
    with pytest.raises(ConfigError, match="against: expected one of same, a, b, or the folder of one; found 'nowhere'"):
        petals_eval.compare("one", "several", against="nowhere")


def test_rows_that_one_side_lacks_are_left_out_and_counted(tmp_path: Path) -> None:
    whole, part = run(tmp_path / "whole", "whole"), run(tmp_path / "part", "part", skip=(3, 17))
    found = petals_eval.compare(part, whole)
    assert (found.rows, found.left_out) == (58, {"whole": 2})
    assert {each.rows for each in found.differences} == {58}
    assert found.to_json()["left_out"] == {"whole": 2}


def test_rows_that_differ_under_one_key_are_refused_and_shown(tmp_path: Path) -> None:
    other = {"data": manifest().data.model_copy(update={"fingerprint": "ee" * 32})}
    one = run(tmp_path / "one", "one")
    with pytest.raises(DataError, match=r"60 keys of 60 stand for rows that differ: 0 .other content., 1 "):
        petals_eval.compare(one, run(tmp_path / "two", "two", content="changed", **other))
    # Of the same data, read by a task that needs other columns of it, a key stands for one row.
    assert petals_eval.compare(one, run(tmp_path / "three", "three", content="other columns")).rows == 60
    with RunFolder.create(tmp_path / "labels", manifest(run_settings={"metrics": METRICS, "label_names": list(LABELS)}),
                          task="t") as folder:  # fmt: skip
        for key in range(60):
            folder.journal.add("trec-ptune", scored(key + (key == 7), 1.0, 0, f"row {key}"))
            if key == 7:
                moved = scored(8, 1.0, 0, "row 7")
                folder.journal.add(
                    "trec-ptune", Prediction("7", 2, moved.prediction, moved.values, 7, row_hash="row 7")
                )
    with pytest.raises(DataError, match=r"1 key of 60 stand for rows that differ: 7 \(label 1 and 2\)"):
        petals_eval.compare(one, tmp_path / "labels")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"run_settings": {"label_names": ["yes", "maybe", "no"]}},
            "have other labels, or in another order: no, maybe",
        ),
        ({"run_settings": {"metrics": ["ece"]}}, "expected a metric with an interval that all sides have; found none"),
    ],
)
def test_sides_that_have_nothing_in_common_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        petals_eval.compare(run(tmp_path / "one", "one"), run(tmp_path / "two", "two", **changes))


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    one = run(tmp_path / "one", "one")
    with pytest.raises(ConfigError, match=r"expected two or more to compare: .*; found one: .*/one\."):
        petals_eval.compare(one)
    with pytest.raises(RunFolderError, match=r"there is no folder .*nowhere"):
        petals_eval.compare(one, tmp_path / "nowhere")
    both = run(tmp_path / "both", "a", "b")
    with pytest.raises(ConfigError, match="against: expected one of a, b, or the folder of one; found 'c'"):
        petals_eval.compare(both, against="c")
    with pytest.raises(ConfigError, match="Expected the name of a metric; found 'f1'"):
        petals_eval.compare(both, metrics=["f1"])
    with pytest.raises(ConfigError, match="found int"):
        petals_eval.compare(both, 3)  # type: ignore[arg-type]
    assert [each.metric for each in petals_eval.compare(both, metrics=["mcc"]).differences] == ["mcc"]


def test_one_against_all_and_what_was_without_prompts(tmp_path: Path) -> None:
    found = petals_eval.compare(run(tmp_path / "r", "a", "b", WITHOUT_PROMPTS), against="b")
    assert found.pairs == (("b", "a"), ("b", WITHOUT_PROMPTS))
    beside = petals_eval.compare(tmp_path / "r", run(tmp_path / "s", "c"))
    assert list(beside.sides) == ["a", "b", "c"]  # the prompts themselves are what several folders are compared for


def test_rows_that_changed_are_counted_and_named(tmp_path: Path) -> None:
    found = petals_eval.compare(run(tmp_path / "both", "a", "b"))
    rows = list(found.changed_rows("a", "b"))
    accuracy = found.of("a", "b")["accuracy"]
    assert len(rows) == found.changed["a", "b"]
    assert sum(each.change == "now wrong" for each in rows) == accuracy.only_first
    assert sum(each.change == "now right" for each in rows) == accuracy.only_second
    for each in rows:
        assert each.label == LABELS[int(each.key) % 3] and each.first != each.second
    report: dict = found.to_json(changed_rows=2)
    assert report["changed_rows"] == [{"first": "a", "second": "b", "rows": [each.to_json() for each in rows[:2]]}]
    assert {each["changed"] for each in report["differences"]} == {len(rows)}
    assert set(report["differences"][0]) >= {
        *("difference", "ci95", "p_value", "method", "rows", "discordant", "changed", "minimum_detectable_difference")
    }


def test_a_comparison_prints_itself_as_the_command_does(tmp_path: Path) -> None:
    found = petals_eval.compare(run(tmp_path / "both", "a", "b", "c"), metrics=["accuracy"])
    said = str(found).splitlines()
    assert said[0] == "60 rows compared" and [line.split(":")[0] for line in said[1:]] == ["a - b", "a - c", "b - c"]
    assert said[1].startswith("a - b: accuracy -0.") and ", p " in said[1] and repr(found) == str(found)
    assert found._repr_markdown_() == found.to_markdown()
    assert found.to_markdown().startswith("| metric | first | second | value of first | of second | first - second |")
    assert (
        found.to_csv().splitlines()[0].startswith("metric,first,second,first_value,second_value,difference,low,high,")
    )
    about, begin = found.to_latex().splitlines()[:2]
    assert about.startswith(
        r"% needs \usepackage{booktabs}; brackets: 95% intervals; these and p (corrected for all pairs "
    )
    assert about.endswith(": exact McNemar test, Newcombe interval (1998, method 10)")
    assert begin == r"\begin{tabular}{lllrrrr}" and " & $-$0." in found.to_latex()


def test_results_in_memory_are_compared_as_their_folders_are(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.csv", (1,) * 20)
    one = evaluate(FakeModel(), rows, tmp_path / "one")
    other = evaluate(FakeModel(), rows, None)
    found = petals_eval.compare(one, other)
    assert list(found.sides) == ["result 1/no prompts", "result 2/no prompts"]
    assert {each.value for each in found.differences} == {0}
    with pytest.raises(ConfigError, match=r"found one without. Give the path"):
        petals_eval.compare(one, RunFolder.open(tmp_path / "one").result())


@pytest.mark.parametrize("name", ["other.csv", "other.jsonl"])
def test_predictions_of_another_tool_beside_a_run(tmp_path: Path, name: str) -> None:
    one = run(tmp_path / "one", "one")
    rows = [{"key": key, "prediction": LABELS[(key + (key % 5 == 0)) % 3]} for key in range(2, 70)]
    path = tmp_path / name
    if name.endswith("csv"):
        path.write_text("\n".join(["key,prediction", *(f"{row['key']},{row['prediction']}" for row in rows)]) + "\n")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = petals_eval.compare(one, path)
    assert (found.rows, list(found.sides)) == (58, ["one", "other"])
    accuracy = found.of("one", "other")["accuracy"]
    assert accuracy.second_value == pytest.approx(sum(key % 5 != 0 for key in range(2, 60)) / 58)
    assert list(found.of("one", "other")) == ["accuracy", "f1_macro"]  # log loss needs more than predictions
    with pytest.raises(ConfigError, match="log_loss need more than another tool's predictions"):
        petals_eval.compare(one, path, metrics=["log_loss"])
    # With the labels in the file, no run is needed.
    labelled = tmp_path / "labelled.jsonl"
    labelled.write_text("".join(json.dumps({**row, "label": LABELS[row["key"] % 3]}) + "\n" for row in rows))
    alone = petals_eval.compare(labelled, _renamed(labelled, tmp_path / "again.jsonl"))
    assert alone.of("labelled", "again")["accuracy"].first_value == pytest.approx(55 / 68)


def test_predictions_beside_a_task_have_the_labels_of_its_rows(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"text {key},{LABELS[key % 3]}\n" for key in range(30)))
    task = {"text": "{text}", "label_column": "label", "label_names": list(LABELS)}
    first, second = tmp_path / "first.csv", tmp_path / "second.csv"
    first.write_text("key,prediction\n" + "".join(f"{key},{key % 3}\n" for key in range(30)))
    second.write_text("key,prediction\n" + "".join(f"{key},{min(key, 20) % 3}\n" for key in range(30)))
    found = petals_eval.compare(first, second, task=task, data=str(rows))
    accuracy = found.of("first", "second")["accuracy"]
    assert (accuracy.first_value, accuracy.second_value) == (1.0, pytest.approx(24 / 30))
    with pytest.raises(DataError, match=r"first.csv does not say what is right: give it a column label"):
        petals_eval.compare(first, second)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["key,answer", "0,no"], "has no column prediction, which task of predictions reads"),
        (
            ["key,prediction", "0,perhaps"],
            "the label in column prediction is 'perhaps'. Expected one of: 0 no, 1 maybe",
        ),
        (["key,prediction", "0,no", "0,yes"], "has the key '0' twice"),
        (["key,prediction", "900,no"], "has no row with a key of"),
    ],
)
def test_a_file_of_predictions_that_says_too_little_is_refused(tmp_path: Path, lines: list[str], message: str) -> None:
    path = tmp_path / "other.csv"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=message):
        petals_eval.compare(run(tmp_path / "one", "one"), path)


@pytest.mark.soak
def test_twenty_adapters_of_a_hundred_thousand_rows_take_half_a_minute_and_a_gigabyte(tmp_path: Path) -> None:
    import resource

    run(tmp_path / "big", *(f"adapter {index}" for index in range(20)), n=100_000)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    found = petals_eval.compare(tmp_path / "big")
    assert time.process_time() - started < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < max(before, 2**20)
    assert len(found.differences) == 190 * 3


def _renamed(path: Path, name: Path) -> Path:
    name.write_text(path.read_text())
    return name
