"""`petals-eval report`: pages beside what they show."""

from pathlib import Path

from tests.cli.invoking import invoke
from tests.report.pages import run_folder


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


def test_what_is_no_run_is_said_so(tmp_path: Path) -> None:
    outcome = invoke("report", tmp_path)
    assert outcome.code == 2
    assert "found no manifest.json there" in outcome.error
