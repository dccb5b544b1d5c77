"""What a person reads: aligned, complete, and nothing a stranger wrote can forge it."""

import io
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from petals_eval.metrics import Metric
from petals_eval.report import ProgressDisplay, console_for, markdown_report, print_result
from petals_eval.runs import (
    WITHOUT_PROMPTS,
    AdapterRecord,
    AdapterResult,
    DataRecord,
    LosslessServer,
    Manifest,
    ModelRecord,
    NumericalNoise,
    Recomputed,
    RunResult,
    ServerUsed,
    WireRecord,
    WireSample,
    computed_in,
)

FORGERY = "\x1b[2J\x1b[31mevil [bold]x[/bold]\r\n| <b> `rm`\u202e"


def adapter_result(name: str = "trec-ptune", **changes: object) -> AdapterResult:
    given: dict = {
        "adapter": name,
        "n_examples": 500,
        "n_failed": 0,
        "n_truncated": 3,
        "n_tokens": 9000,
        "seconds": 2.0,
        "metrics": {
            "accuracy": Metric("accuracy", 0.736, (0.6957, 0.7727)),
            "majority_baseline": Metric("majority_baseline", 0.276, None, "always answering 'description'"),
            "f1_macro": Metric("f1_macro", 0.68411, (0.6349, 0.7301)),
            "roc_auc": Metric("roc_auc", None, None, "not defined: every example is 'number'"),
            "recall[human]": Metric("recall[human]", 0.8, (0.7, 0.9)),
        },
        "label_names": ("human", "number"),
        "confusion": ((300, 32), (100, 68)),
    }
    return AdapterResult(**(given | changes))


def run_result(*names: str, **changes: object) -> RunResult:
    return RunResult("trec", {name: adapter_result(name) for name in names or ("trec-ptune",)}, **changes)


def printed(result: RunResult, *, width: int | None = None, folder: Path | None = None) -> str:
    stream = io.StringIO()
    console = console_for(stream)
    if width is not None:
        console = Console(file=stream, force_terminal=True, width=width, markup=False, emoji=False, color_system=None)
    print_result(result, console, folder=folder)
    return stream.getvalue()


def test_one_adapter_without_a_terminal_is_plain_and_stable() -> None:
    bare = adapter_result(WITHOUT_PROMPTS, metrics={"accuracy": Metric("accuracy", 0.4975, (0.449, 0.546))})
    found = printed(run_result(without_prompts=bare, retries=1, servers=3), folder=Path("runs/trec"))
    assert found == (
        "                     value   95% interval\n"
        "  accuracy           0.7360  0.696 - 0.773\n"
        "  majority baseline  0.2760\n"
        "  F1 (macro)         0.6841  0.635 - 0.730\n"
        "  ROC AUC            -\n"
        "  recall [human]     0.8000  0.700 - 0.900\n"
        "  without the prompts: accuracy 0.4975 (0.449 - 0.546)\n"
        "  majority baseline: always answering 'description'\n"
        "  ROC AUC: not defined: every example is 'number'\n"
        "  500 examples · 0 failed · 3 truncated · 250 ex/s · 4,500 tok/s\n"
        "  1 retry · 3 servers\n"
        "run folder: runs/trec\n"
    )


def test_numerical_noise_stands_beside_the_interval_and_says_how_it_was_measured() -> None:
    again = Recomputed("batching", "margin", 64, 0.02, 0.11, 1)
    noise = NumericalNoise(0.03, 4, 0.008, {"accuracy": (0.73, 0.742), "f1_macro": (0.68411, 0.68411)}, (again,))
    unsure = adapter_result(noise=noise)
    lines = printed(RunResult("trec", {"trec-ptune": unsure})).splitlines()
    assert lines[0].endswith("  within noise")
    assert lines[1].endswith("0.696 - 0.773  0.7300 - 0.7420") and lines[3].endswith("0.635 - 0.730")
    assert (
        "  numerical noise: 4 of 500 predictions (0.8%) have a margin below 0.03, so that rounding may turn them "
        "(64 rows computed again in another batching; no second server to try)"
    ) in lines
    elsewhere = adapter_result(noise=replace(noise, recomputed=(again, replace(again, way="replica", changed=0))))
    unknown = adapter_result(noise=NumericalNoise(notes=("not measured: too slow",)))
    several = RunResult(
        "trec", {"a": elsewhere, "b": replace(elsewhere, adapter="b"), "c": replace(unknown, adapter="c")}
    )
    found = printed(
        replace(several, adapters={name: replace(each, adapter=name) for name, each in several.adapters.items()})
    )
    assert (
        "numerical noise (a, b): 4 of 500" in found
        and "accuracy 0.7300 - 0.7420 within that (64 rows computed again" in found
    )
    assert "again in another batching, on other servers)" in " ".join(found.split())
    assert "numerical noise (c): not measured: too slow" in found
    report = markdown_report(several, manifest())
    assert "64 rows computed again on other servers: margins moved by up to 0.11, 0.02 on average" in report
    assert "| accuracy | 0.7300 - 0.7420 | 0.7300 - 0.7420 | - |" in report
    perplexity = NumericalNoise(recomputed=(replace(again, number="log_likelihood", changed=None),))
    lines = printed(RunResult("stories", {"stories": perplexities(noise=perplexity)}, kind="perplexity")).splitlines()
    assert any(
        "64 rows computed again in another batching: log-likelihoods moved by up to 0.11" in line for line in lines
    )


@pytest.mark.parametrize(
    "names", [("a", "b"), tuple("abcdef"), ("a-name-of-an-adapter-that-is-long", "another-long-one")]
)
@pytest.mark.parametrize("width", [60, 80, 120])
def test_several_adapters_stand_side_by_side_in_any_width(names: tuple[str, ...], width: int) -> None:
    found = printed(run_result(*names), width=width)
    lines = found.splitlines()
    assert max(map(len, lines)) <= width
    assert found.count("0.7360") == len(names)
    assert found.count("0.696 - 0.773") == len(names)
    assert all(name[:20] in found for name in names)
    assert "0.6841" in next(line for line in lines if "F1 (macro)" in line)


def perplexities(name: str = "stories", **changes: object) -> AdapterResult:
    """Of a kind of task whose rows have no labels and whose metrics are no shares."""
    metrics = {
        "token_perplexity": Metric("token_perplexity", 12.345678, (11.98765, 12.71234)),
        "word_perplexity": Metric("word_perplexity", 12345.6789, (9876.54321, 15432.1)),
        "bits_per_byte": Metric("bits_per_byte", 0.000123456, (0.000111, 0.000133)),
        "match[strict]": Metric("match[strict]", 0.25, (0.2, 0.3)),
    }
    bare: dict = {"metrics": metrics, "label_names": (), "confusion": ()}
    return adapter_result(name, **(bare | changes))


def test_numbers_that_are_no_shares_keep_their_digits_and_rows_without_labels_have_no_confusion_matrix() -> None:
    result = RunResult("stories", {"stories": perplexities(n_unlabelled=12)}, kind="perplexity")
    found = printed(result)
    assert [re.split("  +", line)[-2:] for line in found.splitlines()[1:5]] == [
        ["12.3457", "11.988 - 12.712"],
        ["12,345.7", "9,877 - 15,432"],
        ["0.000123", "0.00011 - 0.00013"],
        ["0.2500", "0.200 - 0.300"],
    ]
    assert "  500 examples · 0 failed · 12 without a label · 3 truncated ·" in found
    report = markdown_report(result, manifest())
    assert "12,345.7 (9,877 - 15,432)" in report and "Confusion" not in report
    assert "12.3457 (11.988 - 12.712)" in str(result) and "match [strict] 0.2500" in str(result)
    assert str(result).endswith("n 500, without a label 12")
    told = result.to_json()
    assert told["kind"] == "perplexity" and "label_names" not in told and told["n_unlabelled"] == 12


@pytest.mark.parametrize("width", [60, 80, 120])
def test_large_numbers_stand_side_by_side_in_any_width(width: int) -> None:
    found = printed(RunResult("t", {name: perplexities(name) for name in "abcd"}), width=width)
    assert max(map(len, found.splitlines())) <= width
    assert found.count("9,877 - 15,432") == 4


def test_two_adapters_fit_eighty_columns_in_one_table() -> None:
    lines = printed(run_result("trec-deep_ptune", "trec-ptune"), width=80).splitlines()
    assert lines[0].split() == ["trec-deep_ptune", "trec-ptune"]
    assert lines[1].split() == ["accuracy", *["0.7360", "(0.696", "-", "0.773)"] * 2]
    assert any(line.split() == ["failed", "0", "0"] for line in lines)


def test_a_note_says_whose_it_is() -> None:
    result = run_result("a", "b")
    result.adapters["b"].metrics["f1_macro"] = Metric("f1_macro", 0.5, None, "interval from 100 resamples")  # type: ignore[index]
    assert "  F1 (macro) (b): interval from 100 resamples\n" in printed(result)


def test_a_run_that_scored_nothing_can_be_printed() -> None:
    empty = adapter_result(
        n_examples=0,
        n_truncated=0,
        n_tokens=0,
        seconds=0.0,
        metrics={"accuracy": Metric("accuracy", None, None, "nothing")},
    )
    assert "0 examples · 0 failed\n" in printed(RunResult("t", {"a": empty}))


def test_text_of_strangers_cannot_forge_the_terminal() -> None:
    forged = adapter_result(
        FORGERY, metrics={f"recall[{FORGERY}]": Metric(f"recall[{FORGERY}]", 0.5, None, f"note {FORGERY}")}
    )
    for result in (RunResult("t", {FORGERY: forged}), RunResult("t", {FORGERY: forged, "b": adapter_result("b")})):
        found = printed(result, folder=Path(FORGERY))
        assert "[bold]x[/bold]" in found
        assert not {"\x1b", "\r", "\u202e"} & set(found)


def manifest() -> Manifest:
    return Manifest.new(
        model=ModelRecord(name="stories260K-hf", sha256="a" * 64, revision="abc"),
        adapters=[AdapterRecord(name="trec-ptune", kind="ptune", sha256="b" * 64)],
        data=DataRecord(name="TREC_10.label", fingerprint="c" * 64, limit=100, seed=4),
        task={"name": "trec"},
        answer_settings={"dtype": "float32", "code": "d" * 64, "wire": None},
    )


def test_the_markdown_report_says_what_and_how() -> None:
    bare = adapter_result(WITHOUT_PROMPTS)
    servers = [(ServerUsed("12D3KooWAlpha", 0, 5, "2.2.0", "float32"), 500)]
    text = markdown_report(run_result(without_prompts=bare, servers=1), manifest(), servers)
    for line in (
        "# trec with stories260K-hf",
        "|  | trec-ptune | without the prompts |",
        "| accuracy | 0.7360 (0.696 - 0.773) | 0.7360 (0.696 - 0.773) |",
        "| ROC AUC | - | - |",
        "- trec-ptune: 500 examples · 0 failed · 3 truncated · 250 ex/s · 4,500 tok/s",
        "- 0 retries · 1 server",
        "| human | 300 | 32 |",
        "| model | stories260K-hf at abc, sha256 aaaaaaaaaaaaaaaa… |",
        "| data | TREC\\_10.label, 100 examples, seed 4, fingerprint cccccccccccccccc… |",
        "| setting dtype | float32 |",
        "| setting code | sha256 dddddddddddddddd… |",
        "| 12D3KooWAlpha | 0:5 | 2.2.0 | float32 | none said | 500 |",
    ):
        assert line in text.splitlines(), line
    assert "None" not in text


def test_what_a_lossy_wire_did_is_said() -> None:
    why = "ImportError: no bitsandbytes"
    lossless = (LosslessServer("12D3KooWOld", why), LosslessServer("12D3KooWOlder", why))
    record = WireRecord("uniform8", WireSample("trec-ptune", 16, 0.1234, 0.0432, 1), ("12D3KooWNew",), lossless)
    result = run_result(wire=record)
    moved = "wire uniform8: moved the answers to 16 examples by up to 0.12, 0.043 on average; 1 prediction changed"
    left = f"lossless to and from 2 servers, which did not take it: {why}"
    text, report = printed(result), markdown_report(result, manifest())
    for line in (moved, left):
        assert f"  {line}\n" in text
        assert f"- {line}\n" in report
    assert f"| 12D3KooWNew | took it |\n| 12D3KooWOld | {why} |\n" in report
    note = WireSample("trec-ptune", 0, None, None, 0, "not measured: an input is too long")
    assert "how far it moved answers was not measured: an input" in printed(
        run_result(wire=WireRecord("float16", note))
    )
    documents = WireSample("trec-ptune", 1, 0.5, 0.25, None)
    assert "to 1 example by up to 0.5, 0.25 on average\n" in printed(run_result(wire=WireRecord("float16", documents)))
    assert "wire" not in printed(run_result()) + markdown_report(run_result(), manifest())
    forged = WireRecord("float16", None, (), (LosslessServer("peer", FORGERY),))
    for text in (printed(run_result(wire=forged)), markdown_report(run_result(wire=forged), manifest())):
        assert "\x1b" not in text and "\u202e" not in text


def test_text_of_strangers_cannot_forge_the_markdown_report() -> None:
    text = markdown_report(run_result(), manifest(), [(ServerUsed("peer", 0, 5, FORGERY, "|"), 1)])
    row = next(line for line in text.splitlines() if line.startswith("| peer"))
    assert row.replace("\\|", "").count("|") == 7
    assert "\\<b\\>" in row and "\\`rm\\`" in row and "\x1b" not in text and "\u202e" not in text


def test_a_wide_confusion_matrix_is_left_to_the_json() -> None:
    labels = tuple(map(str, range(30)))
    wide = adapter_result(label_names=labels, confusion=tuple((0,) * 30 for _ in labels))
    assert "30 labels: see `confusion_matrix` in metrics.json." in markdown_report(
        RunResult("t", {"a": wide}), manifest()
    )


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_progress_without_a_terminal_is_a_line_now_and_then() -> None:
    stream, clock = io.StringIO(), Clock()
    with ProgressDisplay(400, stream, every=10.0, clock=clock) as progress:
        for done in range(0, 300, 10):
            progress.update(done, retries=1, servers=3)
            clock.now += 1.0
        progress.update(300, message="warning: server ...nWMaU gave two answers")
        for _ in range(25):
            progress.waiting("waiting for the swarm: no server holds blocks 24:30")
            clock.now += 1.0
        progress.update(400, retries=2, servers=1)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "100/400 · 10 ex/s · 0:30 left · 1 retry · 3 servers"
    assert lines.count("waiting for the swarm: no server holds blocks 24:30") == 3
    assert "warning: server ...nWMaU gave two answers" in lines
    assert lines[-1].startswith("400/400 · ") and lines[-1].endswith(" · 2 retries · 1 server")
    assert len(lines) <= 9


def test_speed_is_that_of_this_session_and_of_late() -> None:
    clock = Clock()
    progress = ProgressDisplay(1000, io.StringIO(), done=600, clock=clock)
    assert progress.status() == "600/1,000 · 0 retries · 0 servers"
    for second in range(1, 101):
        clock.now += 1.0
        progress.update(600 + second)
    assert "· 1 ex/s · 5:00 left ·" in progress.status()
    for second in range(1, 32):
        clock.now += 1.0
        progress.update(700 + 2 * second)
    assert "· 2 ex/s ·" in progress.status()


def test_an_unknown_total_has_no_time_left() -> None:
    clock = Clock()
    progress = ProgressDisplay(None, io.StringIO(), clock=clock)
    clock.now += 2.0
    progress.update(50, 0, 2)
    assert progress.status() == "50 · 25 ex/s · 0 retries · 2 servers"


def test_progress_on_a_terminal_leaves_stdout_alone(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    with ProgressDisplay(400, stream) as progress:
        progress.update(200, 1, 3, message=f"warning: {FORGERY}")
        print('{"metrics": {}}')
        progress.waiting(f"waiting for the swarm: {FORGERY}")
        time.sleep(0.5)
        progress.update(400, 1, 3)
    shown = stream.getvalue()
    assert capsys.readouterr().out == '{"metrics": {}}\n'
    assert "400/400" in shown and "━" in shown and "waiting for the swarm" in shown
    assert "\x1b[2J" not in shown and "\u202e" not in shown and "evil [bold]x[/bold]" in shown


def test_progress_gives_the_terminal_back_after_an_exception() -> None:
    stream = io.StringIO()
    with pytest.raises(ZeroDivisionError), ProgressDisplay(3, stream) as progress:
        progress.update(1)
        raise ZeroDivisionError
    assert stream.getvalue().startswith("1/3")


def test_what_servers_computed_in_is_said_for_it_changes_numbers():
    used = [
        (ServerUsed("a", 0, 2, "2.2.0", "bfloat16", "nf4"), 100),
        (ServerUsed("b", 2, 4, "2.2.0", "float32", "none"), 60),
        (ServerUsed("c", 2, 3, "2.2.0", "float32", "none"), 40),
        (ServerUsed("c", 3, 4, "2.2.0", "float32", "none"), 40),
        (ServerUsed("d", 2, 4, None, FORGERY, None), 40),
    ]
    kinds = computed_in(used)
    assert [(kind.dtype, kind.quant, kind.servers) for kind in kinds[:1]] == [("float32", "none", 2)]
    text = " ".join(printed(run_result(retries=0, servers=4, computed_in=kinds)).split())
    assert "2 x float32, petals 2.2.0; " in text
    assert "1 x bfloat16 quantised to nf4, petals 2.2.0" in text
    assert "petals of unknown version, not tested: relied on for the forward path alone" in text
    newer = computed_in([(ServerUsed("e", 0, 4, "9.0.0", "float32", "none"), 1)])
    assert "petals 9.0.0, not tested: relied on" in printed(run_result(servers=1, computed_in=newer))
    assert "\x1b" not in text
    alone = run_result(servers=1, computed_in=computed_in(used[:1]))
    assert "1 server (bfloat16 quantised to nf4, petals 2.2.0)" in printed(alone)
    assert alone.to_json()["computed_in"] == [{"dtype": "bfloat16", "quant": "nf4", "version": "2.2.0", "servers": 1}]
