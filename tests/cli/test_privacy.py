"""Nothing of the user's in any file of a run folder: it can be shared as it is."""

import getpass
import logging
import shutil
import socket
from pathlib import Path

import pytest
import yaml

from petals_eval.local_swarm import LocalSwarm
from tests.cli.conftest import Stage
from tests.cli.invoking import invoke

TOKEN = "hf_" + "Zx9" * 12
PASSWORD = "correct-horse-battery"


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "stopped"])
def test_no_token_and_no_path_is_in_any_file_of_a_run(
    stage: Stage, own_folder: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    """With a token and local paths in every setting that takes one, failures and the adapter's comparison included."""
    home = own_folder / "mallorys-home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("SECRET_PASSWORD", PASSWORD)
    shutil.copytree(stage.model, home / "models" / "stories260K-hf")
    shutil.copytree(stage.adapter(), home / "prompts" / "mine")
    rows = stage.trec.read_text(encoding="latin-1").splitlines()[:30]
    (home / "questions.txt").write_text("\n".join([*rows, "HUM:ind " + "who was it then ? " * 200]) + "\n")
    shipped = Path(__file__).resolve().parents[2] / "petals_eval" / "tasks" / "builtin" / "trec.yaml"
    task = yaml.safe_load(shipped.read_text())
    task |= {"max_length": 4000, "data": {"path": str(home / "questions.txt"), "token": TOKEN}}
    task["label_map"] = {**task.get("label_map", {}), "token": "human", str(home / "x"): "human"}
    (home / "my-task.yaml").write_text(yaml.safe_dump(task))
    settings = {
        "model": str(home / "models" / "stories260K-hf"),
        "adapter": [str(home / "prompts" / "mine")],
        "task": str(home / "my-task.yaml"),
        "data": str(home / "questions.txt"),
        "token": TOKEN,
        "initial-peers": stage.peer,
        "dht-prefix": "stories260K-hf",
        "without-prompts": True,
        "max-failed": 2,
        "out": str(home / "runs" / "first"),
    }
    (home / "run.yaml").write_text(yaml.safe_dump(settings))
    if finished:
        assert invoke("run", "--config", home / "run.yaml", "--token", TOKEN).code == 0
    else:
        with LocalSwarm(stage.model, spans=[(0, 4), (4, 5)], dht_prefix="stories260K-hf", mode="thread") as swarm:
            _kill_after_some(swarm, monkeypatch)
            flags = ["--initial-peers", swarm.initial_peers[0], "--deadline", 1, "--tokens-per-micro-batch", 200]
            assert invoke("run", "--config", home / "run.yaml", *flags, "--window", 1).code == 3
    files = {path.name: path.read_bytes() for path in (home / "runs" / "first").iterdir()}
    assert {"manifest.json", "journal.sqlite"} <= files.keys()
    if finished:
        assert {"metrics.json", "report.md", "failures.jsonl", "predictions.jsonl"} <= files.keys()
    secrets = {TOKEN, PASSWORD, "mallorys-home", str(own_folder), str(stage.realdata)}
    # "root" and the like are parts of honest words.
    secrets |= {name for name in (getpass.getuser(), socket.gethostname()) if len(name) > 4}
    for name, content in files.items():
        for secret in secrets:
            assert secret.encode() not in content, (name, secret)
    # What may be known is there, so the search looks at the right files.
    assert b"stories260K-hf" in files["manifest.json"] and b"questions.txt" in files["manifest.json"]
    assert b"mine" in files["journal.sqlite"]


def test_no_text_and_no_token_is_in_any_event_of_the_log(
    stage: Stage, own_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At the finest level, with a server that fails on the way."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    caplog.set_level(logging.DEBUG, "petals_eval")
    rows = stage.trec.read_text(encoding="latin-1").splitlines()[:40]
    (own_folder / "questions.txt").write_text("\n".join(rows) + "\n")
    with LocalSwarm(stage.model, spans=[(0, 4), (4, 5), (4, 5)], dht_prefix="stories260K-hf", mode="thread") as swarm:
        _kill_after_some(swarm, monkeypatch)
        command = stage.run("--tokens-per-micro-batch", 200, "--token", TOKEN, data=own_folder / "questions.txt")
        command[command.index(stage.peer)] = swarm.initial_peers[0]
        assert invoke(*command).code == 0
    events = caplog.text
    assert "blocks 0:4 to ..." in events and "asked twice" in events  # the search looks at the right events
    assert TOKEN not in events
    for row in rows:
        question = row.split(" ", 1)[1]
        assert question not in events
        assert not any(word in events for word in question.split() if len(word) > 9)


def _kill_after_some(swarm: LocalSwarm, monkeypatch: pytest.MonkeyPatch) -> None:
    from petals_eval.runs import Journal

    add = Journal.add
    added: list[object] = []

    def counted(self: Journal, *arguments: object, **options: object) -> None:
        added.append(arguments)
        if len(added) == 5:
            swarm.servers[-1].kill()
        add(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Journal, "add", counted)
