"""Results as tables: in a paper, in a spreadsheet, in pandas."""

import csv
from pathlib import Path

import pytest

import petals_eval
from petals_eval.errors import RunFolderError
from petals_eval.runs import RunFolder
from petals_eval.runs.tables import latex_table
from tests.comparison.test_compare import run


def test_many_runs_are_one_table(tmp_path: Path) -> None:
    run(tmp_path / "runs" / "one", "a_1", "b")
    run(tmp_path / "runs" / "deep" / "two", "c", skip=(3,))
    frame = petals_eval.load_runs(tmp_path / "runs")
    assert frame["run"].tolist() == ["deep/two", "one", "one"]
    assert frame["adapter"].tolist() == ["c", "a_1", "b"]
    assert frame["rows"].tolist() == [59, 60, 60] and frame["failed"].tolist() == [1, 0, 0]
    result = RunFolder.open(tmp_path / "runs" / "one").result()
    accuracy = result.metrics["accuracy"]
    assert frame["accuracy"][1] == accuracy.value
    assert (frame["accuracy_low"][1], frame["accuracy_high"][1]) == accuracy.ci95
    with pytest.raises(RunFolderError, match="Expected the folders of runs below"):
        petals_eval.load_runs(tmp_path / "nowhere")


def test_signs_and_exponents_of_a_latex_table_are_set_as_mathematics() -> None:
    table = latex_table([["run-1", "a - b"], ["x-2", "-0.0475 [-1.2e-05, +0.1]"], ["e-3", "-"]], left=1, about="none")
    assert table.splitlines()[3] == r"run-1 & a $-$ b \\"
    assert table.splitlines()[5] == r"x-2 & $-$0.0475 [$-$1.2$\times 10^{-5}$, $+$0.1] \\"
    assert table.splitlines()[6] == r"e-3 & - \\"


def test_a_result_prints_itself_as_the_command_does(tmp_path: Path) -> None:
    result = RunFolder.open(run(tmp_path / "one", "a_1", "b")).result()
    lines = list(csv.DictReader(result.to_csv().splitlines()))
    assert [line["adapter"] for line in lines] == ["a_1", "b"]
    assert float(lines[0]["accuracy"]) == result.metrics["accuracy"].value
    assert lines[0]["ece_low"] == ""
    assert result.to_markdown().splitlines()[0].startswith("| adapter | accuracy | majority baseline |")
    latex = result.to_latex()
    about, table = latex.split("\n", 1)
    assert about == "% needs \\usepackage{booktabs}; brackets: 95% intervals"
    assert table.startswith("\\begin{tabular}{lrrrrr}\n\\toprule\nadapter & accuracy") and "a\\_1 & 0." in latex
    assert latex.endswith("\\bottomrule\n\\end{tabular}\n")
