"""Servers whose blocks run in training mode: a run ends with the quiet run's numbers, or says that it does not."""

import contextlib
import json
import logging

import pytest
import torch

import petals_eval
from petals_eval.errors import MissingBlocksError
from petals_eval.local_swarm import LocalSwarm
from petals_eval.runs import RunFolder
from petals_eval.tasks import load_task, resolve_source
from tests.tiny_models import make_tiny

EXAMPLES = 300


class Lines:
    """A progress display that keeps its lines."""

    def __init__(self):
        self.lines = []
        self.on_update = None

    def update(self, done, retries=0, servers=0, message=None):
        if message is not None:
            self.lines.append(message)
        if self.on_update is not None:
            self.on_update(done)

    def waiting(self, message):
        raise RuntimeError(message)


@contextlib.contextmanager
def swarm_of(realdata, spans, model=None, **options):
    with LocalSwarm(model or realdata / "stories260K-hf", spans=spans, mode="thread", **options) as swarm:
        yield swarm


@contextlib.contextmanager
def model_over(realdata, swarm, **settings):
    with petals_eval.RemoteModel.from_pretrained(
        str(realdata / "stories260K-hf"),
        adapter=str(realdata / "adapters" / "trec-deep_ptune"),
        initial_peers=swarm.initial_peers,
        dht_prefix=swarm.dht_prefix,
        **settings,
    ) as model:
        yield model


def evaluate(realdata, model, out, **options):
    task = load_task("trec")
    source = resolve_source(task, realdata / "trec" / "TREC.test.all")
    return petals_eval.evaluate(
        model, task=task, data=source, limit=EXAMPLES, tokens_per_micro_batch=128, out=out, **options
    )


def predictions(folder):
    """Everything scored, line by line."""
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def quiet(realdata, tmp_path_factory):
    out = tmp_path_factory.mktemp("quiet") / "run"
    with swarm_of(realdata, [(0, 3), (3, 5)]) as swarm, model_over(realdata, swarm) as model:
        result = evaluate(realdata, model, out)
    assert result.noisy_servers == ()
    # A row in a micro-batch of another size may differ in its last bits: how many go together is found out on the way.
    close = [pytest.approx(line["probabilities"], abs=1e-6) for line in predictions(out)]
    return [line | {"probabilities": each} for line, each in zip(predictions(out), close, strict=True)]


def test_a_replica_that_drops_out_a_hundredth_is_left_out_though_the_config_says_nothing(realdata, tmp_path, quiet):
    progress = Lines()
    with swarm_of(realdata, [(0, 3), (3, 5), (3, 5)]) as swarm:
        dropping = swarm.add_server((0, 5), dropout=0.01)
        with model_over(realdata, swarm) as model:
            result = evaluate(realdata, model, tmp_path / "run", progress=progress)
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
    progress = Lines()
    spans = [(0, 3), (3, 5), (0, 5)]
    with swarm_of(realdata, spans) as swarm, model_over(realdata, swarm, recheck_share=0.2, window=3) as model:
        turned = swarm.servers[2]

        def turn(done):
            if done >= 20:
                turned._server.span.drop_out(0.1)

        progress.on_update = turn
        result = evaluate(realdata, model, tmp_path / "run", progress=progress)
    (noisy,) = result.noisy_servers
    assert noisy.peer_id == turned.peer_id
    assert predictions(tmp_path / "run") == quiet
    assert result.first.n_scored == EXAMPLES
    folder = RunFolder.open(tmp_path / "run")
    withdrawn = folder.journal._select("SELECT count(*) FROM scored WHERE valid = 0")
    assert next(withdrawn)[0] > 0
    folder.close()


def test_the_only_server_of_a_block_stops_the_run_and_leaves_nothing_scored(realdata, tmp_path, quiet):
    with swarm_of(realdata, [(0, 3), (3, 5)]) as swarm:
        server = swarm.servers[1]
        progress = Lines()
        progress.on_update = lambda done: server._server.span.drop_out(0.1) if done >= 20 else None
        with (
            model_over(realdata, swarm, recheck_share=0.2, window=3) as model,
            pytest.raises(MissingBlocksError, match="no server in evaluation mode holds blocks 3:5") as caught,
        ):
            evaluate(realdata, model, tmp_path / "run", progress=progress)
        assert caught.value.exit_code == 3
        assert not hasattr(caught.value, "__notes__")  # "... are scored and kept": none is, for it took part in each

        # The operator sets it right, and the same command does it all.
        server._server.span.drop_out(0.0)
        with model_over(realdata, swarm) as model:
            evaluate(realdata, model, tmp_path / "run")
    assert predictions(tmp_path / "run") == quiet


def test_allowed_the_run_goes_on_and_says_what_it_is_worth(realdata, tmp_path, caplog):
    with (
        swarm_of(realdata, [(0, 3), (3, 5)], dropout=0.1) as swarm,
        model_over(realdata, swarm, allow_nondeterministic=True) as model,
        caplog.at_level(logging.WARNING, "petals_eval"),
    ):
        result = evaluate(realdata, model, tmp_path / "run")
        again = evaluate(realdata, model, tmp_path / "again")
    assert result.first.n_scored == EXAMPLES
    assert predictions(tmp_path / "run") != predictions(tmp_path / "again")
    for each in (result, again):
        assert {noisy.peer_id for noisy in each.noisy_servers} == {server.peer_id for server in swarm.servers}
        assert all(noisy.is_used and noisy.difference > 0.05 for noisy in each.noisy_servers)
    assert "used all the same" in (tmp_path / "run" / "report.md").read_text()
    assert len(caplog.records) == 4
    assert all("Nobody else holds these blocks" in record.getMessage() for record in caplog.records)


def test_sessions_ask_too(realdata):
    hidden = torch.randn(1, 24, 64, generator=torch.Generator().manual_seed(0))
    with swarm_of(realdata, [(0, 5)], max_batch_size=16, inference_max_length=32) as swarm:
        dropping = swarm.add_server((0, 5), dropout=0.1)
        with model_over(realdata, swarm) as model, model.blocks.inference_session(32) as session:
            answer = session.step(hidden)
            for _ in range(5):  # a row longer than a call may be
                assert torch.allclose(model.blocks(hidden), answer, atol=1e-5)
            assert {each.server.peer_id for each in model.blocks.status().unequal} <= {dropping.peer_id}
        swarm.servers[0].stop()
        with model_over(realdata, swarm) as model, model.blocks.inference_session(32) as session:
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
    progress = Lines()
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
