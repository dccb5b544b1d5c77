"""A live Petals model under `petals_eval.evaluate`: its own predictions, and training as if nothing had happened."""

import json

import pytest
import torch

import petals_eval
from petals_eval.errors import ConfigError
from petals_eval.model import LocalModel, load_adapter
from tests.interop.conftest import STORIES
from tests.interop.petals_folders import petals_copy
from tests.interop.real_petals import run_petals_loop


def run_script(what, swarm, folder, **settings):
    settings |= {"what": what, "initial_peers": swarm.initial_peers, "dht_prefix": swarm.dht_prefix}
    return run_petals_loop(
        {"folder": str(folder), **settings}, folder, timeout=85, script="live_model_script.py", kind=swarm.kind
    )


@pytest.mark.sample(1)
@pytest.mark.parametrize("mode", ["deep_ptune", "ptune"])
def test_training_goes_on_as_if_nothing_had_been_evaluated(mode, stories, stories_dir, realdata, tmp_path):
    adapter_dir = realdata / "adapters" / f"trec-{mode}"
    found = run_script(
        "training",
        stories,
        tmp_path,
        model=str(petals_copy(stories_dir, tmp_path / STORIES)),
        adapter=str(adapter_dir / "petals_state_dict.pt"),
        tuning_mode=mode,
        data=str(realdata / "trec" / "TREC.test.all"),
    )
    assert found["disturbed"] == []
    # The losses, the draws from three random generators, the parameters and the optimizer's state, to the last bit.
    assert found["watched"] == found["quiet"]
    assert found["same_end"]

    assert found["after"]["predictions"] == found["own"]["predictions"]
    assert len(set(found["own"]["predictions"])) > 2
    ours, own = (torch.tensor(found[whose]["probabilities"]) for whose in ("after", "own"))
    torch.testing.assert_close(ours, own, rtol=0, atol=1e-5)

    # Before the first step it is what the checkpoints on the disk are, and after two steps it is not.
    local = LocalModel.from_pretrained(str(stories_dir))
    adapter = load_adapter(str(adapter_dir), family=local.family, config=local.config)
    before, after = found["before"]["manifest"], found["after"]["manifest"]
    assert before["model"] == {"name": STORIES, "revision": None, "sha256": local.fingerprint["sha256"]}
    [used] = before["adapters"]
    assert (used["name"], used["kind"], used["sha256"]) == ("live prompts", mode, adapter.sha256)
    assert after["model"] == before["model"] and after["adapters"] != before["adapters"]
    assert found["before"]["probabilities"] != found["after"]["probabilities"]

    # One connection serves every evaluation, until one fails; the last ends with the model.
    assert found["connections"] == 1
    assert found["broken"] == "raised"
    assert (found["open_after_error"], found["open_again"], found["left_open"]) == (0, 1, 0)


@pytest.mark.sample(1)
def test_other_families_and_label_words(tiny, tmp_path):
    rows = [{"text": text, "label": row % 3} for row, text in enumerate(["is it good", "bad", "no, the great yes"] * 4)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    found = run_script("answers", tiny, tmp_path, model=str(tiny.model_dir), data=str(data))
    for head in ("classes", "words"):
        ours, own = torch.tensor(found[head]["ours"]), torch.tensor(found[head]["own"])
        assert ours.argmax(-1).tolist() == own.argmax(-1).tolist()
        torch.testing.assert_close(ours, own, rtol=0, atol=1e-5)
    assert found["batches"] == {"accuracy": 1.0, "f1": 1.0, "n": 12} and found["still training"]
    assert found["token batches"]["loss"] == pytest.approx(found["own loss"], rel=1e-5)
    assert found["window"] == 3
    alone, evaluated = found["session"]
    assert evaluated == alone, "an open session goes on where it was"
    assert found["refused"].startswith("AdapterError: class logits were asked for, but a Distributed")


def test_what_is_no_petals_model_is_refused(realdata):
    with pytest.raises(ConfigError, match=r"a Petals model with a head, such as .*; found torch\.nn\..*Linear\."):
        petals_eval.evaluate(torch.nn.Linear(2, 2), task="trec", data=realdata / "trec" / "TREC.test.all")
