"""Shots, chats, draws and groups through the command and over real servers."""

import json
from pathlib import Path

import pytest
from pydantic import JsonValue

from petals_eval.runs import RunFolder
from tests.cli.conftest import Stage
from tests.cli.invoking import invoke
from tests.runs.samples import manifest

COPA = """text: "{premise}"
choices: ["{choice1}", "{choice2}"]
label_column: label
metrics: [acc, acc_norm]
shots: 2
"""


@pytest.fixture
def copa(own_folder: Path) -> Path:
    rows = [
        {"premise": f"Lily saw {what}.", "choice1": f"She liked {what}.", "choice2": "It ran.", "label": index % 2}
        for index, what in enumerate(["a dog", "a cat", "the sun", "a car", "her mom", "a big tree"] * 3)
    ]
    (own_folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (own_folder / "copa.yaml").write_text(COPA.replace("text:", "kind: choice\ntext:", 1))
    return own_folder


def command(stage: Stage, *more: object) -> list[object]:
    return [*stage.on_task("copa.yaml", "rows.jsonl"), *stage.swarm, *more]


def test_a_dry_run_shows_the_whole_prompt(stage: Stage, copa: Path) -> None:
    outcome = invoke(*command(stage, "--dry-run", "--shots-seed", 3))
    assert outcome.code == 0
    shown = outcome.out.partition("would send")[0]
    assert shown.count("  | Lily saw ") == 6  # two examples, each with two shots before its question
    # Both shots are copies of one row, which is there three times.
    assert "note: 3 rows of rows.jsonl equal shots and are left out of the evaluation" in outcome.out


def test_draws_are_shown_by_their_mean_and_spread(stage: Stage, copa: Path) -> None:
    outcome = invoke(*command(stage, "--draws", 3, "--out", "run"))
    assert outcome.code == 0, outcome.err
    [head] = [line for line in outcome.out.splitlines() if "over 3 draws" in line]
    assert "mean" in head
    line = next(line for line in outcome.out.splitlines() if line.startswith("  acc "))
    saved = json.loads(Path("run/metrics.json").read_text())["metrics"]["acc"]
    low, high, deviation = (saved["draws"][name] for name in ("min", "max", "standard_deviation"))
    assert f"{saved['value']:.4f}" in line
    assert f"{low:.3f} - {high:.3f}, sd {deviation:.3f}" in line
    assert sorted(path.name for path in Path("run").glob("predictions*")) == [
        f"predictions.no-prompts-draw-{number}.jsonl" for number in (1, 2, 3)
    ]


def test_a_chat_needs_a_template(stage: Stage, copa: Path) -> None:
    outcome = invoke(*command(stage, "--chat", "--out", "run"))
    assert outcome.code == 2
    assert "error: chat: this model's tokenizer has no chat template" in outcome.err
    assert not Path("run").exists()


def test_a_bar_for_a_number_in_parts_names_one_of_them_in_a_group_too(own_folder: Path) -> None:
    columns = ("new_tokens", "stopped_by_length", "exact_match[strict]")
    settings: dict[str, JsonValue] = {"metrics": ["exact_match"], "label_names": []}
    of_task = manifest(kind="generation", answer_columns=columns, run_settings=settings)
    RunFolder.create("out/one", of_task, task="one").close()
    Path("out/group.json").write_text(json.dumps({"group": "mine", "tasks": {"one": {}}, "means": {}}))
    refused = invoke("show", "out", "--fail-under", "exact_match=0.5")
    assert refused.code == 2
    assert "no number of the name exact_match. Expected one of exact_match[strict]" in refused.err


def test_a_group_of_tasks(stage: Stage, copa: Path) -> None:
    Path("group.yaml").write_text(
        "group: mine\ntasks:\n"
        "- {task: copa.yaml, name: with shots, data: {path: rows.jsonl}}\n"
        "- {task: copa.yaml, name: without, shots: 0, data: {path: rows.jsonl}}\n"
    )
    base = ["run", "--model", stage.model, "--task", "group.yaml", *stage.swarm]
    dry = invoke(*base, "--dry-run")
    assert dry.code == 0
    assert "=== task with shots" in dry.out and "=== task without" in dry.out
    plans = json.loads(invoke(*base, "--dry-run", "--json").out)
    assert (plans["group"], [task["task"] for task in plans["tasks"]]) == ("mine", ["with shots", "without"])
    assert [task["adapters"][0]["n_examples"] for task in plans["tasks"]] == [12, 18]  # each row is there three times

    outcome = invoke(*base, "--out", "out", "--fail-under", "acc=1")
    assert outcome.code == 1
    assert "with shots: below the bar: acc is" in outcome.err
    rows = {line[:18].strip(): line.split() for line in outcome.out.splitlines()}
    saved = json.loads(Path("out/group.json").read_text())
    mean = saved["means"]["no prompts"]["acc"]
    assert f"{mean['over_tasks']:.4f}" in rows["mean over tasks"]
    assert f"{mean['over_rows']:.4f}" in rows["mean over rows"]
    assert "12" in rows["with shots"] and "18" in rows["without"]
    assert outcome.out.splitlines()[-2:] == ["run folders: out", "report: out/*/report.html"]

    again = invoke(*base, "--out", "out", "--json")
    assert again.code == 0
    assert json.loads(again.out) == saved
    assert "this run is finished in out: nothing is sent" in again.err

    shown = invoke("show", "out", "--fail-under", "acc=1")
    assert shown.code == 1 and shown.out == outcome.out.removesuffix("report: out/*/report.html\n")
    assert json.loads(invoke("show", "out", "--json").out) == saved
