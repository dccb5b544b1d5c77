"""The client is killed (SIGKILL) while texts grow, and resumed: every text whole, exactly once, and the same."""

import json
import os
import random
import subprocess
import sys
import time

import pytest

import petals_eval
from petals_eval.local_swarm import LocalSwarm
from petals_eval.local_swarm.faults.catalog import Slow
from petals_eval.runs import RunFolder
from tests.chaos.test_killed_client import SECONDS, kill, rows

ROWS, NEW, KILLS = 24, 12, 1
TASK = f"kind: generation\ntext: '{{begin}}'\nanswer_column: end\nmax_new_tokens: {NEW}\nmetrics: [token_f1]\n"


@pytest.fixture(scope="module")
def swarm(realdata):
    """Its servers take their time, so that a run has a middle on any machine."""
    slow = Slow(delay=0.03)
    with LocalSwarm(realdata / "stories260K-hf", spans=[(0, 3), (3, 5)], mode="process", faults=(slow,)) as running:
        yield running


@pytest.fixture(scope="module")
def files(realdata, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stories")
    (folder / "stories.yaml").write_text(TASK)
    stories = [each.split() for each in (realdata / "tinystories" / "validation.txt").read_text().split("\n\n")]
    made = [{"begin": " ".join(each[:4]), "end": " ".join(each[4:12])} for each in stories if len(each) > 12][:ROWS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return folder


@pytest.fixture(scope="module")
def quiet(realdata, swarm, files):
    """The folder of a run in which nothing happens."""
    with petals_eval.RemoteModel.from_pretrained(
        str(realdata / "stories260K-hf"), initial_peers=swarm.initial_peers, dht_prefix=swarm.dht_prefix
    ) as model:
        petals_eval.evaluate(
            model, task=files / "stories.yaml", data=files / "rows.jsonl", out=files / "quiet", save_texts=True
        )
    return files / "quiet"


def command(realdata, swarm, files, out):
    return [
        *(sys.executable, "-c", "from petals_eval.cli import main; main()", "run", "--out", str(out), "--save-texts"),
        *("--model", str(realdata / "stories260K-hf"), "--generation-rows", "2"),
        *("--task", str(files / "stories.yaml"), "--data", str(files / "rows.jsonl")),
        *("--initial-peers", swarm.initial_peers[0], "--dht-prefix", swarm.dht_prefix),
    ]


def test_a_client_killed_while_texts_grow_goes_on_with_whole_texts(realdata, swarm, files, quiet, tmp_path):
    dice, kept, out = random.Random(3), 0, tmp_path / "run"
    run = command(realdata, swarm, files, out)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(KILLS):
        process = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        try:
            give_up = time.monotonic() + SECONDS
            while len(rows(out / "journal.sqlite")[0]) <= kept:
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < give_up, "nothing was scored in time"
                time.sleep(0.01)
            time.sleep(dice.uniform(0.0, 0.5))
            kill(process)
        finally:
            process.kill()
        found, superseded = rows(out / "journal.sqlite")
        assert superseded == 0 and kept < len(found) < ROWS, "the run was over before it was killed"
        with RunFolder.open(out) as folder:
            assert found <= folder.texts("no prompts").keys(), "a row without its text"
        kept = len(found)
    ended = subprocess.run(run, capture_output=True, text=True, env=environment, timeout=SECONDS)
    assert ended.returncode == 0, ended.stderr
    assert f"{kept} of {ROWS} examples are scored, {ROWS - kept} are left" in ended.stderr
    assert rows(out / "journal.sqlite") == ({str(index) for index in range(ROWS)}, 0)
    for name in ("texts.jsonl", "predictions.jsonl"):
        assert (out / name).read_bytes() == (quiet / name).read_bytes(), name
    one, other = (json.loads((folder / "metrics.json").read_text())["metrics"] for folder in (out, quiet))
    assert one == other
