"""The command of a run that is finished: it shows the result, and ends as the run ended. So does `show`."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Stage
from tests.cli.invoking import Outcome, invoke


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on nothing is connected to."""

    def refuse(*arguments: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("petals_eval.cli.evaluation.open_model", refuse)


def result_of(outcome: Outcome) -> list[str]:
    return [line for line in outcome.out.splitlines() if "retries" not in line and "report: " not in line]


@pytest.mark.parametrize("bar", ["accuracy=0.1", "accuracy=0.99"])
def test_the_same_command_shows_a_finished_run_and_ends_with_its_code(
    stage: Stage, request: pytest.FixtureRequest, bar: str
) -> None:
    command = stage.run("--limit", 20, "--out", "done", "--fail-under", bar)
    first = invoke(*command)
    assert first.code == (bar == "accuracy=0.99")
    request.getfixturevalue("offline")
    before = {path.name: path.read_bytes() for path in Path("done").iterdir()}
    again = invoke(*command)
    assert (again.code, result_of(again)) == (first.code, result_of(first))
    assert "this run is finished in done: nothing is sent, its result is shown" in again.err
    assert ("below the bar" in again.err) == (first.code == 1)
    assert {path.name: path.read_bytes() for path in Path("done").iterdir()} == before
    # `show` holds the run's own bars against it, unless it is given others.
    shown = invoke("show", "done")
    assert (shown.code, "below the bar" in shown.err) == (first.code, first.code == 1)
    assert invoke("show", "done", "--fail-under", "accuracy=0.01").code == 0
    assert invoke("show", "done", "--json", "--fail-under", "f1_macro=0.999").code == 1
    assert invoke(*stage.run("--limit", 20, "--out", "done", "--fail-under", "mcc=-1")).code == 0
    other = invoke(*stage.run("--limit", 21, "--out", "done"))
    assert other.code == 2 and "Expected the finished run in done to be this one; found another" in other.err
    assert "data.limit: was 20, now 21" in other.err


def test_failures_count_for_a_finished_run_as_they_did(stage: Stage, request: pytest.FixtureRequest) -> None:
    Path("task.yaml").write_text(
        'text: "{question}"\nlabel_column: label\nlabel_names: ["0", "1", "2", "3", "4", "5"]\nmax_length: 4000\n'
    )
    rows = [{"question": "who was it ?", "label": "3"}, {"question": "who was it then ? " * 200, "label": "3"}]
    Path("rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    command = [*stage.on_task("task.yaml", "rows.jsonl"), "--adapter", stage.adapter(), *stage.swarm, "--out", "r"]
    codes = [invoke(*command).code]
    request.getfixturevalue("offline")
    codes += [invoke(*command).code, invoke("show", "r").code, invoke("show", "r", "--max-failed", 1).code]
    assert codes == [1, 1, 1, 0]


def test_a_finished_group_is_shown(stage: Stage, request: pytest.FixtureRequest) -> None:
    rows = stage.trec.read_text(encoding="latin-1").splitlines()[:20]
    written = [{"coarse_label": row[0], "text": row[2:]} for row in rows]
    Path("rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in written))
    task = "{task: trec, name: NAME, data: {path: rows.jsonl}}"
    Path("group.yaml").write_text(
        f"group: both\ntasks: [{task.replace('NAME', 'one')}, {task.replace('NAME', 'two')}]\n"
    )
    command = ["run", "--model", stage.model, "--task", "group.yaml", "--adapter", stage.adapter(), *stage.swarm]
    command += ["--out", "g", "--fail-under", "accuracy=1"]
    first = invoke(*command)
    assert first.code == 1
    request.getfixturevalue("offline")
    again = invoke(*command)
    assert (again.code, result_of(again)) == (first.code, result_of(first))
    assert "this run is finished in g" in again.err
    assert invoke("show", "g").code == 1
