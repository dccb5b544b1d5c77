"""`petals-eval errors` over the published prompts on TREC: what a person reads of it, and what a program."""

import json
from pathlib import Path

import pytest
from rich.cells import cell_len

from tests.cli.conftest import Stage
from tests.cli.invoking import invoke


@pytest.fixture(scope="module")
def trec(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("trec") / "run"
    assert invoke(*stage.run("--out", folder)).code == 0
    return folder


def test_a_person_reads_what_goes_wrong_and_where(stage: Stage, trec: Path) -> None:
    outcome = invoke("errors", trec, "--data", stage.trec, "--limit", 3)
    lines = outcome.out.splitlines()
    assert (outcome.code, outcome.err) == (0, f"reading {trec}\n")
    assert lines[0] == (
        "trec, trec-deep_ptune: 132 of 500 rows wrong (26.4%); confidence 0.81 where right, 0.49 where wrong"
    )
    assert lines[1] == "  - most common: entity taken for description, 19 of 132 wrong rows (20% of entity)"
    assert "  - label location: 43.2% wrong against 23.2% wrong of the other rows (p 0.002)" in lines
    assert "  - every row went through the same servers" in lines
    assert "by server" not in outcome.out  # a table of equal lines says nothing
    assert "  and 17 other pairs" in lines
    at = lines.index("the most confident wrong answers")
    assert lines[at + 1 : at + 3] == [
        "  row 454 · number 0.03, taken for description 0.97 · 21 tokens",
        "    How cold should a refrigerator be ?",
    ]
    assert not any(line.startswith("note:") for line in lines)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_no_text_is_wider_than_the_terminal(
    stage: Stage, trec: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setattr("petals_eval.text.PLAIN_WIDTH", width)
    lines = invoke("errors", trec, "--data", stage.trec, "--limit", 20).out.splitlines()
    assert max(map(cell_len, lines)) <= width


def test_json_has_all_of_it_and_the_texts_are_in_no_file(stage: Stage, trec: Path) -> None:
    outcome = invoke("errors", trec, "--data", stage.trec, "--json", "--limit", 2)
    found = json.loads(outcome.out)
    assert (found["wrong"], found["judged"], found["failed"], found["sure"]) == (132, 500, 0, 1)
    assert sum(each["rows"] for each in found["confusions"]) == 132
    assert [each["name"] for each in found["groups"]["label"]] == [
        *("description", "entity", "abbreviation", "human", "location", "number")
    ]
    assert {name: len(rows) for name, rows in found["lists"].items()} == {
        "most confident": 2,
        "worst": 2,
        "closest": 2,
    }
    first = found["lists"]["most confident"][0]
    assert (first["key"], first["text"], first["answers"]) == ("454", "How cold should a refrigerator be ?", [])
    assert len(first["servers"]) == 3
    for path in trec.iterdir():
        assert b"refrigerator" not in path.read_bytes(), path.name


def test_without_the_data_all_but_the_texts_is_shown(trec: Path) -> None:
    outcome = invoke("errors", trec)
    assert outcome.code == 0 and "How cold" not in outcome.out
    assert "row 454 · number 0.03, taken for description 0.97" in outcome.out
    assert "note: texts are not shown: say where TREC.test.all, which this run read, is, with --data" in outcome.out


def test_other_data_and_what_there_is_not_end_with_code_2(stage: Stage, trec: Path) -> None:
    rows = stage.trec.read_bytes().split(b"\n")
    Path("other.all").write_bytes(b"\n".join([*rows[1:], rows[0]]))
    moved = invoke("errors", trec, "--data", "other.all")
    assert moved.code == 2 and moved.out == ""
    assert "other.all does not hold the rows of this run: of 14 rows looked up 14 differ: " in moved.error
    assert invoke("errors", trec, "--adapter", "nobody").code == 2
    assert invoke("errors", "nowhere").code == 2
    assert invoke("errors", trec, "--data", "nowhere.csv").code == 2
    assert invoke("errors", trec, "--limit", -1).code == 2


def test_the_demo_knows_where_its_data_are() -> None:
    assert invoke("demo", "--servers", 1, "--out", "demo").code == 0
    outcome = invoke("errors", "demo", "--limit", 1)
    assert "note: texts" not in outcome.out and "i never loved the pie" in outcome.out
    assert "note: the others are shown with --adapter: without the prompts" in outcome.out
