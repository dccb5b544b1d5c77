"""What somebody types wrong who follows the README: the message shows what is wrong, and what may be meant."""

import json
import re
from pathlib import Path

import pytest

from petals_eval.demo import demo_paths
from petals_eval.text import console_for
from tests.cli.invoking import invoke

PATHS = demo_paths()
GIVEN = {"--model": PATHS.model, "--adapter": PATHS.prompts, "--task": PATHS.task, "--local-swarm": 3}


def run(**others: object) -> str:
    """What a run says with other values for some flags; with None the flag is left out."""
    flags = GIVEN | {f"--{name.replace('_', '-')}": value for name, value in others.items()}
    outcome = invoke("run", *(part for flag, value in flags.items() if value is not None for part in (flag, value)))
    assert outcome.code == 2
    return outcome.error


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("run --initial-peers --adapter ./prompts", "--initial-peers needs a value, and --adapter follows it."),
        ("health --initial-peers", "--initial-peers needs a value, and nothing follows it."),
        ("health --initial-peers --json", "--initial-peers needs a value, and --json follows it."),
        ("merge a b --out", "--out needs a value, and nothing follows it."),
    ],
)
def test_a_variable_of_the_shell_that_is_empty(command: str, says: str) -> None:
    """`--initial-peers $PEERS` leaves nothing behind the flag; the rest would be read one off."""
    outcome = invoke(*command.split())
    assert outcome.code == 2 and f"{says} Is a variable of the shell empty?" in outcome.error


def test_a_variable_in_quotation_marks_that_is_empty() -> None:
    for blank in ("", " "):
        said = run(initial_peers=blank, local_swarm=None, dht_prefix="x")
        assert "initial_peers: expected a multiaddress" in said and "is a variable of the shell empty?" in said


def test_a_value_may_look_like_a_flag_that_is_not_there() -> None:
    assert "no folder --nope" in run(adapter="--nope")


def test_an_address_without_an_identity() -> None:
    said = run(initial_peers="/ip4/127.0.0.1/tcp/39931", local_swarm=None, dht_prefix="x")
    assert "it has no /p2p/ with the identity of the peer behind it (found '/ip4/127.0.0.1/tcp/39931')" in said


def test_a_path_that_is_spelt_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("prompts", "my-llama"):
        (tmp_path / name).mkdir()
    for name in ("reviews.yaml", "data.jsonl"):
        (tmp_path / name).touch()
    assert "no folder ./promts, and that is not a hub name (owner/name) either. Did you mean prompts?" in run(
        adapter="./promts"
    )
    assert "Did you mean my-llama?" in run(model="./my-lama")
    assert "there is no task file ./reveiws.yaml" in (said := run(task="./reveiws.yaml"))
    assert "Did you mean reviews.yaml?" in said
    assert "Did you mean data.jsonl?" in run(data="dat.jsonl")
    assert "Did you mean" not in run(data="nowhere/at/all.csv")


@pytest.mark.parametrize("arguments", [("tasks",), ("tasks", "--metrics")])
def test_no_line_is_wider_than_the_terminal(arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    wide = invoke(*arguments).out
    monkeypatch.setattr("petals_eval.text.PLAIN_WIDTH", 80)
    assert console_for().width == 80
    narrow = invoke(*arguments).out
    assert max(map(len, narrow.splitlines())) <= 88  # only the name of a data set may be wider than its place
    assert max(map(len, wide.splitlines())) > 88
    assert re.sub(r"\s+", " ", narrow) == re.sub(r"\s+", " ", wide)


def test_a_folder_has_no_revision() -> None:
    assert "is a folder, and a folder has no revision: leave --revision out" in run(revision="v1")


def test_an_unknown_key_is_most_likely_meant_for_one_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text('name: x\ntext: "{text}"\nlabel_column: label\nlabels: [bad, good]\n')
    assert "labels: unknown key. Did you mean label_names?" in run(task=tmp_path / "task.yaml")


def test_label_names_in_the_wrong_order_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    task = PATHS.task.read_text().replace("[bad, good]", "[good, bad]").replace("data.jsonl", str(PATHS.data))
    Path("task.yaml").write_text(task)
    flags = GIVEN | {"--task": "task.yaml", "--out": "run"}
    outcome = invoke("run", *(part for pair in flags.items() for part in pair), "--limit", 60)
    asks = "Is label_names in the order of the head's outputs (output 0 = 'good')?"
    assert "accuracy: below the majority baseline; with the labels exchanged it would be" in outcome.out
    assert asks in outcome.out and "Is label\\_names in the order" in Path("run/report.md").read_text()
    assert asks in json.loads(Path("run/metrics.json").read_text())["metrics"]["accuracy"]["note"]


def test_the_useful_line_stands_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Path("prompts").mkdir()
    Path("my-llama").mkdir()
    Path("reviews.yaml").touch()
    assert "error: there is no promts on this machine. Did you mean prompts? cannot get" in run(adapter="promts")
    assert "error: there is no my-lama on this machine. Did you mean my-llama? cannot get" in run(model="my-lama")
    outcome = invoke("modes", "--model", "my-lama")
    assert outcome.code == 2 and "there is no my-lama on this machine. Did you mean my-llama?" in outcome.error
    assert "there is no task reviews. Did you mean the file reviews.yaml?" in run(task="reviews")
    assert "no --adapter was given, and model has no score.weight" in run(adapter=None)
    shown = invoke("show", "my-llama")
    assert shown.code == 2 and "my-llama is a folder, but not one of a run (no manifest.json)." in shown.error
    merged = invoke("merge", "my-lama", "x", "--out", "y")
    assert merged.code == 2 and "there is no folder my-lama. Did you mean my-llama?" in merged.error
