"""Servers whose blocks run in training mode: a run ends with the quiet run's numbers, or says that it does not."""

import json
import logging
from typing import Any

import pytest
import torch

import petals_eval
from petals_eval.errors import MissingBlocksError
from petals_eval.local_swarm import LocalSwarm
from petals_eval.local_swarm.handles import LocalServer, ThreadServer
from petals_eval.model.blocks import BlockSpan
from petals_eval.runs import RunFolder
from tests.support.real_swarm import ProgressLines, evaluate_trec, predictions, stories_swarm, trec_model
from tests.support.tensors import hidden_states
from tests.support.tiny_models import make_tiny

EXAMPLES = 300


@pytest.fixture(scope="module")
def quiet(realdata, tmp_path_factory):
    out = tmp_path_factory.mktemp("quiet") / "run"
    with stories_swarm(realdata, [(0, 3), (3, 5)]) as swarm, trec_model(realdata, swarm) as model:
        result = evaluate_trec(realdata, model, out, limit=EXAMPLES)
    assert result.noisy_servers == ()
    # A row in a micro-batch of another size may differ in its last bits: how many go together is found out on the way.
    # Measured: up to 1.02e-6 of a probability, between sizes of 240 and of 480 KiB.
    close = [pytest.approx(line["probabilities"], abs=3e-6) for line in predictions(out)]
    return [line | {"probabilities": each} for line, each in zip(predictions(out), close, strict=True)]


def blocks_of(server: LocalServer) -> BlockSpan:
    """The blocks that a server of this process computes with."""
    assert isinstance(server, ThreadServer) and server._server is not None
    return server._server.blocks


def test_a_replica_that_drops_out_a_hundredth_is_left_out_though_the_config_says_nothing(realdata, tmp_path, quiet):
    progress = ProgressLines()
    # In processes: the local part forks torch's generator, and a server that draws its dropout from the same one would
    # draw the same twice.
    with stories_swarm(realdata, [(0, 3), (3, 5), (3, 5)], mode="process") as swarm:
        dropping = swarm.add_server((0, 5), dropout=0.01)
        with trec_model(realdata, swarm) as model:
            result = evaluate_trec(realdata, model, tmp_path / "run", progress=progress, limit=EXAMPLES)
    assert predictions(tmp_path / "run") == quiet
    (noisy,) = result.noisy_servers
    assert (noisy.peer_id, noisy.first, noisy.end, noisy.is_used) == (dropping.peer_id, 0, 5, False)
    (warning,) = progress.lines
    assert warning.startswith(
        f"warning: server ...{dropping.peer_id[-6:]} (blocks 0:5, petals 2.3.0.dev2) gave two answers to one question "
        f"(difference {noisy.difference:.2g}): its blocks run in training mode. It is left out"
    )
    folder = RunFolder.open(tmp_path / "run")
    assert folder.manifest.noisy_servers == result.noisy_servers
    assert dropping.peer_id not in {server.peer_id for server in folder.manifest.servers}
    folder.close()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["noisy_servers"][0]["peer_id"] == dropping.peer_id
    assert "left out: nothing it computed is counted" in (tmp_path / "run" / "report.md").read_text()


def test_what_a_server_had_computed_before_it_was_caught_is_computed_again(realdata, tmp_path, quiet):
    """Its blocks go into training mode in mid-run."""
    progress = ProgressLines()
    spans = [(0, 3), (3, 5), (0, 5)]
    with stories_swarm(realdata, spans) as swarm, trec_model(realdata, swarm, recheck_share=0.2, window=3) as model:
        turned: Any = swarm.servers[2]

        def turn(done):
            if done >= 20:
                blocks_of(turned).drop_out(0.1)

        progress.on_update = turn
        result = evaluate_trec(realdata, model, tmp_path / "run", progress=progress, limit=EXAMPLES)
    assert {noisy.peer_id for noisy in result.noisy_servers} == {turned.peer_id}, progress.lines
    assert predictions(tmp_path / "run") == quiet
    assert result.first.n_scored == EXAMPLES
    folder = RunFolder.open(tmp_path / "run")
    withdrawn = folder.journal._select("SELECT count(*) FROM scored WHERE valid = 0")
    assert next(withdrawn)[0] > 0
    folder.close()


def test_the_only_server_of_a_block_stops_the_run_and_leaves_nothing_scored(realdata, tmp_path, quiet):
    with stories_swarm(realdata, [(0, 3), (3, 5)]) as swarm:
        server: Any = swarm.servers[1]
        progress = ProgressLines()
        progress.on_update = lambda done: blocks_of(server).drop_out(0.1) if done >= 20 else None
        with (
            trec_model(realdata, swarm, recheck_share=0.2, window=3) as model,
            pytest.raises(MissingBlocksError, match="no server in evaluation mode holds blocks 3:5") as caught,
        ):
            evaluate_trec(realdata, model, tmp_path / "run", progress=progress, limit=EXAMPLES)
        assert caught.value.exit_code == 3
        assert not hasattr(caught.value, "__notes__")  # "... are scored and kept": none is, for it took part in each

        # The operator sets it right, and the same command does it all.
        blocks_of(server).drop_out(0.0)
        with trec_model(realdata, swarm) as model:
            evaluate_trec(realdata, model, tmp_path / "run", limit=EXAMPLES)
    assert predictions(tmp_path / "run") == quiet


def test_allowed_the_run_goes_on_and_says_what_it_is_worth(realdata, tmp_path, caplog):
    with (
        stories_swarm(realdata, [(0, 3), (3, 5)], dropout=0.1) as swarm,
        trec_model(realdata, swarm, allow_nondeterministic=True) as model,
        caplog.at_level(logging.WARNING, "petals_eval"),
    ):
        result = evaluate_trec(realdata, model, tmp_path / "run", limit=EXAMPLES)
        again = evaluate_trec(realdata, model, tmp_path / "again", limit=EXAMPLES)
    assert result.first.n_scored == EXAMPLES
    assert predictions(tmp_path / "run") != predictions(tmp_path / "again")
    for each in (result, again):
        assert {noisy.peer_id for noisy in each.noisy_servers} == {server.peer_id for server in swarm.servers}
        assert all(noisy.is_used and noisy.difference > 0.05 for noisy in each.noisy_servers)
    assert "used all the same" in (tmp_path / "run" / "report.md").read_text()
    assert len(caplog.records) == 4
    assert all("Nobody else holds these blocks" in record.getMessage() for record in caplog.records)


def test_sessions_ask_too(realdata):
    hidden = hidden_states(1, 24, 64)
    with stories_swarm(realdata, [(0, 5)], max_batch_size=16, inference_max_length=32) as swarm:
        dropping = swarm.add_server((0, 5), dropout=0.1)
        with trec_model(realdata, swarm) as model, model.blocks.inference_session(32) as session:
            answer = session.step(hidden)
            for _ in range(5):  # a row longer than a call may be
                assert torch.allclose(model.blocks(hidden), answer, atol=1e-5)
            assert {each.server.peer_id for each in model.blocks.status().findings} <= {dropping.peer_id}
        swarm.servers[0].stop()
        with trec_model(realdata, swarm) as model, model.blocks.inference_session(32) as session:
            for compute in (session.step, model.blocks):
                with pytest.raises(MissingBlocksError, match="training mode"):
                    compute(hidden)


def test_dropout_in_the_config_is_said_before_the_run(tmp_path):
    folder = make_tiny("bloom", tmp_path / "bloom", labels=3, hidden_dropout=0.1)
    data = tmp_path / "data.tsv"
    data.write_text("text\tlabel\ngood\t0\nbad\t1\n")
    task = petals_eval.ClassificationTask(
        name="tiny",
        text="{text}",
        label_column="label",
        label_names=["a", "b", "c"],
        max_length=16,
        metrics=["accuracy"],
    )
    progress = ProgressLines()
    with LocalSwarm(folder, spans=[(0, 3)], mode="thread", dropout=0.1) as swarm:
        model = petals_eval.RemoteModel.from_pretrained(
            str(folder), initial_peers=swarm.initial_peers, dht_prefix=swarm.dht_prefix
        )
        with model, pytest.raises(MissingBlocksError) as caught:
            petals_eval.evaluate(model, task=task, data=data, progress=progress)
    assert "training mode (this model's config has hidden_dropout 0.1)" in str(caught.value)
    assert progress.lines[0] == (
        "note: this model's config has hidden_dropout 0.1, and Petals servers leave dropout on: each is asked one "
        "question twice before it is used"
    )
