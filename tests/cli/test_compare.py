"""`petals-eval compare` over the published prompts on TREC."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Stage
from tests.cli.invoking import invoke


@pytest.fixture(scope="module")
def trec(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of both published prompts on TREC: what their README says of them is what they reach."""
    folder: Path = tmp_path_factory.mktemp("trec") / "both"
    command = stage.run("--out", folder, "--json")
    at = command.index("--adapter")
    outcome = invoke(*command[: at + 2], stage.adapter("trec-ptune"), *command[at + 2 :])
    assert outcome.code == 0
    adapters = json.loads(outcome.out)["adapters"]
    assert [each["metrics"]["accuracy"]["value"] for each in adapters.values()] == [0.7360, 0.7180]
    return folder


def test_the_two_runs_of_trec_differ_by_what_was_computed_elsewhere(trec: Path) -> None:
    outcome = invoke("compare", trec, "--metrics", "accuracy", "--json", "--changed", 3)
    assert (outcome.code, outcome.err) == (0, f"comparing {trec}\n")
    found = json.loads(outcome.out)
    [accuracy] = found["differences"]
    assert accuracy["difference"] == pytest.approx(0.018)
    assert accuracy["discordant"] == {"only_first": 48, "only_second": 39}
    assert round(accuracy["p_value"], 3) == 0.391
    assert [round(bound, 3) for bound in accuracy["ci95"]] == [-0.019, 0.055]
    assert (accuracy["rows"], found["rows"], accuracy["changed"]) == (500, 500, 117)
    assert len(found["changed_rows"][0]["rows"]) == 3


def test_a_person_reads_what_differs_and_how_sure_it_is(trec: Path) -> None:
    outcome = invoke("compare", trec, "--changed", 2)
    lines, pair = outcome.out.splitlines(), ["trec-deep_ptune", "-", "trec-ptune"]
    assert lines[0].split() == ["trec-deep_ptune", "trec-ptune", *pair, "95%", "interval", "p", "detectable"]
    assert lines[1].split() == ["accuracy", "0.7360", "0.7180", "+0.0180", "-0.019", "to", "+0.055", "0.391", "0.054"]
    assert "  500 rows, matched by key and content" in lines
    assert "accuracy: only trec-deep_ptune is right in 48 rows, only trec-ptune in 39" in outcome.out
    assert lines[-3].split() == ["row", "(first", "2", "of", "117)", "label", "trec-deep_ptune", "trec-ptune", "change"]
    assert {" ".join(line.split()[-2:]) for line in lines[-2:]} <= {"now right", "now wrong", "wrong otherwise"}
    shown = invoke("show", trec).out.splitlines()
    assert shown[0].split() == ["trec-deep_ptune", "trec-ptune", *pair]
    assert shown[1].endswith("+0.0180 (-0.019 to +0.055, p 0.391)")
    report = (trec / "report.md").read_text()
    assert "## Differences" in report and "+0.0180 | -0.019 to +0.055 | 0.391" in report


def test_what_cannot_be_compared_ends_with_code_2(trec: Path) -> None:
    alone = invoke("compare", "--metrics", "perplexity", trec)
    assert alone.code == 2 and "found 'perplexity'" in alone.err
    assert invoke("compare", "nowhere", trec).code == 2
    assert invoke("compare").code == 2


def test_show_prints_tables_of_one_and_of_many(trec: Path) -> None:
    assert invoke("show", trec, "--csv").out.startswith("run,task,kind,adapter,rows,failed,")
    latex = invoke("show", trec, "--latex").out
    assert "trec-deep\\_ptune & 0.7360 [0.696, 0.773]" in latex
    assert invoke("show", trec, "--markdown").out.splitlines()[2].startswith("| trec-deep\\_ptune | 0.7360")
    several = invoke("show", trec, trec, "--markdown").out
    assert several.count("0.7180 \\[") == 2
    plain = invoke("show", trec, trec).out.splitlines()
    assert plain[0].split() == ["adapter", *["trec-deep_ptune", "trec-ptune"] * 2]
    assert plain[1].split()[:7] == ["accuracy", "0.7360", "[0.696,", "0.773]", "0.7180", "[0.677,", "0.756]"]
    refused = invoke("show", trec, "--csv", "--json")
    assert refused.code == 2 and "expected --csv alone" in refused.err


def test_a_comparison_is_a_table_for_a_paper(trec: Path) -> None:
    lines = invoke("compare", trec, "--metrics", "accuracy", "--latex").out.splitlines()
    about = "brackets: 95% intervals; these and p: exact McNemar test, Newcombe interval (1998, method 10)"
    assert lines[:2] == [rf"% needs \usepackage{{booktabs}}; {about}", r"\begin{tabular}{lrrrr}"]
    assert lines[3] == r"metric & trec-deep\_ptune & trec-ptune & trec-deep\_ptune $-$ trec-ptune & p \\"
    assert lines[5] == r"accuracy & 0.7360 & 0.7180 & $+$0.0180 [$-$0.019, $+$0.055] & 0.391 \\"
    table = invoke("compare", trec, "--metrics", "accuracy", "--csv").out.splitlines()
    found = dict(zip(table[0].split(","), table[1].split(","), strict=False))
    assert (found["metric"], found["rows"]) == ("accuracy", "500") and found["p_holm"] == found["p_value"]
    assert float(found["difference"]) == pytest.approx(0.018)
    assert (
        invoke("compare", trec, "--markdown").out.splitlines()[2].startswith("| accuracy | 0.7360 | 0.7180 | +0.0180")
    )
    refused = invoke("compare", trec, "--csv", "--json")
    assert refused.code == 2 and "expected --csv without --json" in refused.error


def test_several_pairs_are_named_in_each_line(tmp_path: Path) -> None:
    for name, predictions in (("a", "xxyy"), ("b", "xyyy"), ("c", "yyyy")):
        rows = "".join(f"{key},{said},x\n" for key, said in enumerate(predictions))
        (tmp_path / f"{name}.csv").write_text("key,prediction,label\n" + rows)
    said = invoke("compare", *(tmp_path / f"{name}.csv" for name in "abc"), "--latex").out.splitlines()
    assert said[1] == r"\begin{tabular}{lllrrrr}"
    assert said[3].split(" & ")[:3] == ["metric", "first", "second"]
    assert [line.split(" & ")[1:3] for line in said[5:8]] == [["a", "b"], ["a", "c"], ["b", "c"]]
