"""`petals-eval report`: pages beside what they show."""

import json
from pathlib import Path

import pytest

from petals_eval.data import DataSource
from tests.cli.invoking import invoke
from tests.fake_model import FakeModel, answers_of, evaluate, fake_adapter
from tests.report.pages import HOSTILE, run_folder


def test_the_page_of_a_run_that_python_made(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", finished=False)
    outcome = invoke("report", folder)
    assert (outcome.code, outcome.out) == (0, f"report: {folder}/report.html\n")
    assert "Not finished" in (folder / "report.html").read_text()
    assert invoke("report", folder, "--out", tmp_path / "mine.html").out == f"report: {tmp_path}/mine.html\n"


def test_several_runs_are_compared(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [run_folder(tmp_path / name, adapters=(name,)) for name in ("a", "b")]
    outcome = invoke("report", *folders)
    assert (outcome.code, outcome.out) == (0, "report: comparison.html\n")
    assert "a and b compared" in Path("comparison.html").read_text()


def test_a_page_that_cannot_be_where_it_is_asked_for_ends_with_code_2(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [run_folder(Path(name), adapters=(name,)) for name in ("a", "b")]
    Path("prompts").mkdir()
    for asked, usual in ((folders, "comparison.html"), (folders[:1], "report.html")):
        refused = invoke("report", *asked, "--out", "prompts")
        assert refused.code == 2
        assert "--out: expected the name of an HTML file; prompts is a folder." in refused.error
        assert f"Write for example --out prompts/{usual}" in refused.error
        refused = invoke("report", *asked, "--out", "nodir/page.html")
        assert refused.code == 2
        assert "--out: there is no folder nodir: make it, or name another file." in refused.error


def test_what_is_no_run_is_said_so(tmp_path: Path) -> None:
    outcome = invoke("report", tmp_path)
    assert outcome.code == 2
    assert "is a folder, but not one of a run (no manifest.json)" in outcome.error


class Says(FakeModel):
    """A model that gives every row one answer."""

    def __init__(self, name: str, answer: tuple[float, float]):
        super().__init__(adapters=(fake_adapter(name),))
        self.answer = answer

    def compute(self, requests, adapter, *, on_tick, on_failed, **options):
        on_tick()
        for request in requests:
            yield from answers_of("a", [request], self.answer)


@pytest.fixture
def two_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Two runs that disagree in each of three rows; one text is hostile, and one is long."""
    monkeypatch.chdir(tmp_path)
    texts = ["the soup was fine", HOSTILE, "word " * 70]
    Path("reviews.jsonl").write_text("".join(json.dumps({"text": text, "label": "good"}) + "\n" for text in texts))
    for name, answer in (("early", (1.0, 0.0)), ("late", (0.0, 1.0))):
        evaluate(Says(name, answer), DataSource(path="reviews.jsonl"), name)
    return "early", "late"


def test_texts_are_in_a_comparison_only_where_they_are_asked_for(two_runs: tuple[str, str]) -> None:
    assert invoke("report", *two_runs).code == 0
    assert "soup" not in Path("comparison.html").read_text()
    assert "soup" not in invoke("compare", *two_runs).out + invoke("compare", *two_runs, "--json").out

    assert invoke("report", *two_runs, "--with-texts", "--data", "reviews.jsonl").code == 0
    page = Path("comparison.html").read_text()
    assert ">the soup was fine</td>" in page and "This page holds texts of the data" in page
    assert "<script" not in page and "<img" not in page and "&lt;script&gt;" in page and "\u202e" not in page
    assert "word " * 50 in page and "word " * 65 not in page

    shown = invoke("compare", *two_runs, "--with-texts", "--data", "reviews.jsonl", "--changed", 2).out
    assert "row 0: the soup was fine" in shown and "row 1: <script>" in shown and "row 2" not in shown
    found = invoke("compare", *two_runs, "--with-texts", "--data", "reviews.jsonl", "--json").out
    assert [row["text"][:8] for row in json.loads(found)["changed_rows"][0]["rows"]] == [
        "the soup",
        "<script>",
        "word wor",
    ]


def test_texts_that_cannot_be_read_or_are_others_end_with_code_2(two_runs: tuple[str, str]) -> None:
    asked = ("report", *two_runs, "--with-texts")
    assert "say where reviews.jsonl, which this run read, is, with --data" in invoke(*asked).error
    lines = Path("reviews.jsonl").read_text().splitlines(keepends=True)
    Path("other.jsonl").write_text("".join(reversed(lines)))
    moved = invoke(*asked, "--data", "other.jsonl")
    assert moved.code == 2 and "other.jsonl does not hold the rows of this run" in moved.error
    assert not Path("comparison.html").exists()
    assert "expected --with-texts beside --data" in invoke("report", *two_runs, "--data", "reviews.jsonl").error
    assert "expected several runs" in invoke("report", two_runs[0], "--with-texts").error
    for name in ("one", "other"):
        Path(f"{name}.csv").write_text(f"key,prediction,label\n0,{name},one\n1,one,other\n")
    assert "expected a run folder among" in invoke("compare", "one.csv", "other.csv", "--with-texts").error
