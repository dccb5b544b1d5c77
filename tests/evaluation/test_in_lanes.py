"""Runs in lanes are those by forward calls: trained prompts, few-shot text, choices; and a resumed run must agree."""

import numpy as np
import pytest

import petals_eval
from petals_eval.errors import RunFolderError
from petals_eval.local_swarm.faults.catalog import WrongRollBack
from petals_eval.tasks import ChoiceTask
from tests.support.real_swarm import STORIES, evaluate_trec, predictions, stories_swarm, trec_model


@pytest.fixture(scope="module")
def swarm(realdata):
    with stories_swarm(realdata, [(0, 3), (3, 5)], attn_cache_tokens=1 << 14) as started:
        yield started


def in_session(model) -> int:
    """Steps in lanes that went back so far."""
    return model.blocks._pipeline.lanes._reused


def numbers(folder, name) -> np.ndarray:
    """What was predicted of each row, in order: (rows, columns)."""
    return np.array([row[name] for row in sorted(predictions(folder), key=lambda row: int(row["key"]))])


def test_deep_prompts_are_sent_once_a_lane_and_trec_is_what_it_is(realdata, swarm, tmp_path):
    options = {"no_noise": True, "limit": 120}
    with trec_model(realdata, swarm, verify=0) as model:
        plain = evaluate_trec(realdata, model, tmp_path / "calls", **options)
        by_calls = sum(peer.bytes_sent for peer in model.blocks.peers.values())
    with trec_model(realdata, swarm, verify=0, lanes="always") as model:
        laned = evaluate_trec(realdata, model, tmp_path / "lanes", **options)
        in_lanes = sum(peer.bytes_sent for peer in model.blocks.peers.values())
        assert in_session(model) > 5
    assert laned.metrics["accuracy"].value == plain.metrics["accuracy"].value
    found, wanted = (numbers(tmp_path / name, "probabilities") for name in ("lanes", "calls"))
    assert np.abs(found - wanted).max() <= 1e-5
    assert in_lanes < by_calls
    with trec_model(realdata, swarm) as model, pytest.raises(RunFolderError, match="lanes"):
        evaluate_trec(realdata, model, tmp_path / "lanes", **options)


def test_choices_after_shots_are_what_they_are_by_calls(realdata, swarm, tmp_path):
    choices = ("{choice1}", "{choice2}")
    task = ChoiceTask(name="copa", text="{premise}", choices=choices, label_column="label", shots=2, metrics=("acc",))
    data = {"data": str(realdata / "copa" / "dev.jsonl"), "shots_data": str(realdata / "copa" / "test.jsonl")}
    for lanes in ("never", "always"):
        peers = {"initial_peers": swarm.initial_peers, "dht_prefix": swarm.dht_prefix}
        with petals_eval.RemoteModel.from_pretrained(str(realdata / STORIES), **peers, verify=0, lanes=lanes) as model:
            petals_eval.evaluate(model, task=task, out=tmp_path / lanes, no_noise=True, limit=24, **data)
            assert (in_session(model) > 3) == (lanes == "always")
    found, wanted = (numbers(tmp_path / lanes, "log_likelihood") for lanes in ("always", "never"))
    assert found.shape == wanted.shape == (24, 2)
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.soak
def test_what_a_server_scored_whose_roll_back_lies_is_computed_again(realdata, tmp_path):
    """It is found out in the run, named, and every row is there once, with the number that it has by forward calls."""
    options = {"no_noise": True, "limit": 200}
    with stories_swarm(realdata, [(0, 3), (3, 5), (3, 5)], attn_cache_tokens=1 << 14) as swarm:
        with trec_model(realdata, swarm, verify=0) as model:
            evaluate_trec(realdata, model, tmp_path / "calls", **options)
        liar = swarm.servers[1]
        liar.switch(WrongRollBack(after=6))
        with trec_model(realdata, swarm, verify=0.5, lanes="always") as model:
            result = evaluate_trec(realdata, model, tmp_path / "lanes", **options)
    assert [(each.peer_id, each.verdict) for each in result.noisy_servers] == [(liar.peer_id, "liar")]
    found, wanted = (numbers(tmp_path / name, "probabilities") for name in ("lanes", "calls"))
    assert len(found) == 200 and np.abs(found - wanted).max() <= 1e-5
    keys = [row["key"] for row in predictions(tmp_path / "lanes")]
    assert len(keys) == len(set(keys)) == 200
