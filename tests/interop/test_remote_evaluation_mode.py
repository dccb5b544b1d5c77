"""Real Petals servers never call .eval(): those whose config has dropout are caught, and nobody else is."""

import json
import shutil

import pytest
import torch

import petals_eval
from petals_eval.errors import MissingBlocksError
from petals_eval.runs import RunFolder
from tests.cli.invoking import invoke
from tests.interop.conftest import BOUNDED, STORIES
from tests.interop.petals_folders import block_states, make_petals_tiny
from tests.interop.real_petals import RealPetalsSwarm, modes_line, run_petals_loop
from tests.support.real_swarm import connect

RUNS = 20
WORDS = ("good", "bad", "great", "the", "is", "it")


def hidden_states(folder, rows=4, seq=20) -> torch.Tensor:
    """Real embeddings, as they enter block 0."""
    ids = torch.randint(3, 320, (rows, seq), generator=torch.Generator().manual_seed(7))
    return block_states(folder, ids)[0]


def tiny_bloom(folder, dropout: float):
    return make_petals_tiny("bloom", folder, hidden=64, hidden_dropout=dropout)


def runs(swarm, blocks: int, hidden: torch.Tensor):
    """So many runs, each of which has seen no server before."""
    with connect(swarm, **BOUNDED) as connection:
        for _ in range(RUNS):
            yield connection.remote_sequential(swarm.dht_prefix, blocks), hidden


def accused(swarm, blocks: int, hidden: torch.Tensor) -> list:
    """Those whom each run accuses; an honest server gives every run the same bits."""
    answers, found = [], []
    for remote, states in runs(swarm, blocks, hidden):
        answers.append(remote(states))
        found += remote.status().findings
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    return found


@pytest.fixture(scope="module")
def dropping(tmp_path_factory):
    """A server whose model has dropout in its config, as Petals serves it."""
    folder = tiny_bloom(tmp_path_factory.mktemp("dropping") / "bloom", dropout=0.1)
    with RealPetalsSwarm(folder, [(0, 3)], dht_prefix="tiny-bloom") as swarm:
        yield swarm


def test_a_bloom_with_hidden_dropout_is_caught_in_every_run(dropping):
    for remote, hidden in runs(dropping, 3, hidden_states(dropping.model_dir)):
        with pytest.raises(MissingBlocksError, match=r"gave two answers to one question") as caught:
            remote(hidden)
        assert caught.value.missing == ((0, 3),)
        (finding,) = remote.status().findings
        assert finding.server.peer_id == dropping.servers[0].peer_id
        assert 0.2 < finding.difference < 1.4


def test_modes_names_the_server_and_in_a_live_petals_model_its_blocks(dropping, tmp_path):
    asked = invoke("modes", "--initial-peers", *dropping.initial_peers, "--json")
    assert asked.code == 1
    [server] = json.loads(asked.out)["models"][0]["servers"]
    assert server["peer_id"] == dropping.servers[0].peer_id
    assert "nondeterministic" in [each["name"] for each in server["findings"]]

    where = {"model": str(dropping.model_dir), "initial_peers": dropping.initial_peers, "dht_prefix": "tiny-bloom"}
    line = modes_line(tmp_path / "modes.json", {"input_ids": [[1, 5, 9, 2]]})
    run_petals_loop(where | {"generate": [1, 5], "max_new_tokens": 1, "save": [line]}, tmp_path)
    found = json.loads((tmp_path / "modes.json").read_text())
    assert found["differing"] == "transformer.h" and not found["is_deterministic"]
    assert found["evaluation"][1]["from_first"] > 0.001  # the client's model is in eval mode, and that does not help


def test_the_same_bloom_without_dropout_is_never_accused(tmp_path):
    folder = tiny_bloom(tmp_path / "bloom", dropout=0.0)
    with RealPetalsSwarm(folder, [(0, 3)], dht_prefix="tiny-bloom") as swarm:
        assert accused(swarm, 3, hidden_states(folder)) == []


def test_the_real_model_in_float32_is_never_accused(stories, stories_dir):
    assert accused(stories, 5, hidden_states(stories_dir)) == []


def test_the_real_model_in_bfloat16_is_never_accused(stories_dir):
    with RealPetalsSwarm(stories_dir, [(0, 3), (3, 5)], dht_prefix=STORIES, dtype="bfloat16") as swarm:
        assert accused(swarm, 5, hidden_states(stories_dir)) == []


def test_one_of_two_replicas_drops_out_a_hundredth_though_the_config_at_home_says_nothing(tmp_path):
    """Left out, and the predictions are those of a run without it. In bfloat16, whose rounding hides the most."""
    folder = tiny_bloom(tmp_path / "bloom", dropout=0.0)
    theirs = tmp_path / "theirs"
    shutil.copytree(folder, theirs)
    config = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps(config | {"hidden_dropout": 0.01}))
    data = tmp_path / "data.tsv"
    rows = [
        f"{first} {second} {third}\t{WORDS.index(first) % 2}" for first in WORDS for second in WORDS for third in WORDS
    ]
    data.write_text("\n".join(["text\tlabel", *rows]) + "\n")
    task = petals_eval.ClassificationTask(
        name="words",
        text="{text}",
        label_column="label",
        label_names=["no", "yes"],
        label_words=[" no", " yes"],
        max_length=16,
        metrics=["accuracy"],
    )

    def evaluate(out, initial_peers):
        with petals_eval.RemoteModel.from_pretrained(
            str(folder), initial_peers=initial_peers, dht_prefix="tiny-bloom", **BOUNDED
        ) as model:
            result = petals_eval.evaluate(model, task=task, data=data, out=out, tokens_per_micro_batch=64)
        return result, (out / "predictions.jsonl").read_text()

    with RealPetalsSwarm(folder, [(0, 3)], dht_prefix="tiny-bloom", dtype="bfloat16") as honest:
        quiet, expected = evaluate(tmp_path / "quiet", honest.initial_peers)
        with RealPetalsSwarm(
            theirs, [(0, 3)], dht_prefix="tiny-bloom", dtype="bfloat16", initial_peers=honest.initial_peers
        ) as dropping:
            result, found = evaluate(tmp_path / "run", honest.initial_peers)
            culprit = dropping.servers[0].peer_id
    assert quiet.noisy_servers == ()
    assert found == expected
    (noisy,) = result.noisy_servers
    assert (noisy.peer_id, noisy.first, noisy.end, noisy.version, noisy.is_used) == (
        culprit,
        0,
        3,
        honest.kind.version,
        False,
    )
    folder_of_run = RunFolder.open(tmp_path / "run")
    assert [server.peer_id for server in folder_of_run.manifest.servers] == [honest.servers[0].peer_id]
    folder_of_run.close()
