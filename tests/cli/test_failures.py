"""Examples that fail, bars, parts and merging, through the command and over real servers."""

import json
from pathlib import Path

import pytest

from petals_eval.local_swarm import LocalSwarm
from tests.cli.conftest import SPANS, Stage
from tests.cli.invoking import Outcome, invoke
from tests.cli.test_run import NOBODY, read_json, read_lines

SMALL = 32  # tokens that the servers of these tests take, in one call and in a session


@pytest.fixture(scope="module")
def small_servers(realdata: Path):
    options = {"max_batch_size": SMALL, "inference_max_length": SMALL}
    with LocalSwarm(realdata / "stories260K-hf", spans=SPANS, mode="thread", **options) as swarm:
        yield swarm


def on(swarm: LocalSwarm, stage: Stage, data: object) -> list[object]:
    command = [*stage.on_task("trec", data), "--adapter", stage.adapter()]
    return [*command, "--initial-peers", swarm.initial_peers[0], "--dht-prefix", swarm.dht_prefix]


def refused(outcome: Outcome, *expected: str, code: int = 2) -> None:
    assert outcome.code == code
    assert outcome.out == ""
    for text in expected:
        assert text in outcome.error


def test_rows_that_no_server_takes_are_failures(stage: Stage, small_servers: LocalSwarm) -> None:
    """Of micro-batches of several rows the shorter ones are computed all the same, and as anywhere else."""
    limited = [*on(small_servers, stage, stage.trec), "--limit", 150]
    assert invoke(*stage.run("--limit", 150, "--out", "quiet")).code == 0
    quiet = {line["key"]: line for line in read_lines(Path("quiet/predictions.jsonl"))}
    too_long = {key for key, line in quiet.items() if line["n_tokens"] + 8 > SMALL}
    assert 5 < len(too_long) < 100

    outcome = invoke(*limited, "--out", "r")
    assert outcome.code == 1
    assert (
        f"below the bar: {len(too_long)} of 150 examples failed, --max-failed allows 0; failures.jsonl says why"
        in outcome.err
    )
    assert f"150 examples · {len(too_long)} failed" in outcome.out
    failed = read_lines(Path("r/failures.jsonl"))
    assert {line["key"] for line in failed} == too_long
    assert all("an input holds" in line["reason"] and "set a smaller max_length" in line["reason"] for line in failed)
    found = {line["key"]: line for line in read_lines(Path("r/predictions.jsonl"))}
    assert found.keys() == quiet.keys() - too_long
    assert all(line["prediction"] == quiet[key]["prediction"] for key, line in found.items())
    right = sum(line["prediction"] == line["label"] for line in found.values())
    metrics = read_json(Path("r/metrics.json"))
    assert metrics["metrics"]["accuracy"]["value"] == pytest.approx(right / len(found))
    assert (metrics["n_failed"], metrics["n_scored"]) == (len(too_long), len(found))

    outcome = invoke(*limited, "--out", "allowed", "--max-failed", len(too_long))
    assert outcome.code == 0
    assert "below the bar" not in outcome.err


def test_where_no_row_fits_the_command_says_so(stage: Stage, small_servers: LocalSwarm) -> None:
    Path("long.txt").write_text("".join(f"HUM:ind {'who was it then ? ' * 12}\n" for _ in range(30)))
    outcome = invoke(*on(small_servers, stage, "long.txt"), "--out", "r")
    refused(outcome, "none of the first 30 examples can be computed. The first of them: an input holds")
    assert not Path("r").exists()


def test_a_metric_below_its_bar_is_exit_code_1(stage: Stage) -> None:
    bars = ["--fail-under", "accuracy=0.9", "--fail-under", "recall[human]=0.0", "mcc=0.99"]
    outcome = invoke(*stage.run("--limit", 60, "--out", "r", "--json", *bars))
    assert outcome.code == 1
    metrics = json.loads(outcome.out)["metrics"]
    values = {name: metrics[name]["value"] for name in ("accuracy", "mcc")}
    assert [line for line in outcome.err.splitlines() if line.startswith("below")] == [
        f"below the bar: accuracy is {values['accuracy']:.4f}, --fail-under asks for 0.9",
        f"below the bar: mcc is {values['mcc']:.4f}, --fail-under asks for 0.99",
    ]
    assert "recall[human]" in metrics, "computed because a bar was set, whatever the task lists"
    outcome = invoke(*stage.run("--limit", 60, "--out", "s", "--fail-under", f"accuracy={values['accuracy']}"))
    assert outcome.code == 0
    assert "below" not in outcome.err


def before_any_swarm(stage: Stage, *more: object, data: object = None) -> Outcome:
    """A command whose swarm would not answer for 30 seconds, and then end it with code 3."""
    command = [*stage.on_task("trec", data or stage.trec), "--adapter", stage.adapter(), "--dht-prefix", "x"]
    return invoke(*command, "--initial-peers", NOBODY, *more)


def test_mistakes_show_before_the_swarm_is_asked(stage: Stage) -> None:
    refused(before_any_swarm(stage, "--fail-under", "acuracy=0.5"), "Did you mean accuracy")
    refused(before_any_swarm(stage, "--fail-under", "brier=0.5"), "better when it is lower")
    refused(before_any_swarm(stage, "--shard", "4/3"), "shard: expected I/N with I from 1 to N", "found '4/3'")
    refused(before_any_swarm(stage, "--max-failed", "-1"), "max_failed: expected 0 or more")
    Path("data.csv").write_text("text,kind\nwho,human\n")
    refused(before_any_swarm(stage, data="data.csv"), "data.csv has no column coarse_label")
    Path("data.csv").write_text("text,coarse_label\nwho,human\nwhat,7\n")
    expected = "data.csv, row 1 (line 3): the label in column coarse_label is '7'"
    refused(before_any_swarm(stage, data="data.csv"), expected)


def test_a_misspelt_adapter_does_not_wait_for_a_hub_that_cannot_be_reached(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    knocks: list[object] = []

    def nobody(address: object, timeout: float) -> None:
        knocks.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr("petals_eval.model.sources.socket.create_connection", nobody)
    monkeypatch.setattr("petals_eval.model.sources.getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    Path("my-prompts").mkdir()
    command = [*stage.on_task("trec", stage.trec), *stage.swarm]
    refused(
        invoke(*command, "--adapter", "my-promts"),
        "it cannot be reached, and the cache of an earlier download does not have it",
        "There is no my-promts on this machine. Did you mean my-prompts?",
    )
    assert knocks


def test_parts_made_by_the_command_are_merged_to_the_numbers_of_the_whole(stage: Stage) -> None:
    for index in (1, 2, 3):
        outcome = invoke(*stage.run("--shard", f"{index}/3", "--out", f"part-{index}"))
        assert outcome.code == 0
    assert "166 examples" in outcome.err and "166/166" in outcome.err
    outcome = invoke("merge", "part-1", "part-2", "--out", "whole")
    refused(outcome, "Expected all 3 parts; missing: 3/3")
    outcome = invoke("merge", "part-1", "part-2", "part-3", "--out", "whole", "--fail-under", "accuracy=0.74")
    assert outcome.code == 1
    assert "0.7360" in outcome.out and outcome.out.endswith("run folder: whole\nreport: whole/report.html\n")
    assert "below the bar: accuracy is 0.7360, --fail-under asks for 0.74" in outcome.err
    metrics = read_json(Path("whole/metrics.json"))
    assert (metrics["n_examples"], metrics["metrics"]["accuracy"]["value"]) == (500, 0.7360)
    assert len(read_lines(Path("whole/predictions.jsonl"))) == 500
    refused(invoke("merge", "part-1", "--out", "part-2"), "missing: 2/3, 3/3")
    refused(invoke("merge", "nothing", "--out", "w"), "Expected to use nothing", code=4)


def test_a_resumed_run_says_so(stage: Stage) -> None:
    assert invoke(*stage.run("--limit", 40, "--out", "r")).code == 0
    manifest = read_json(Path("r/manifest.json"))
    Path("r/manifest.json").write_text(json.dumps(manifest | {"finished": None}))
    outcome = invoke(*stage.run("--limit", 40, "--out", "r"))
    assert outcome.code == 0
    assert "going on with the run in r: 40 of 40 examples are scored, 0 are left" in outcome.err
