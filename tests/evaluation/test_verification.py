"""Runs over servers that lie: they end with the quiet run's predictions, or say that nobody could settle it."""

import contextlib
import json

import pytest

from petals_eval.errors import MissingBlocksError
from petals_eval.local_swarm.faults.catalog import FlippedBit, Noise, OtherWeights, Swapped
from petals_eval.runs import RunFolder
from tests.evaluation.test_remote_evaluation_mode import EXAMPLES, quiet
from tests.support.real_swarm import ProgressLines, evaluate_trec, predictions, stories_swarm, trec_model

__all__ = ["quiet"]

SPANS = [(0, 3), (3, 5)]


def folder_of(path):
    return contextlib.closing(RunFolder.open(path))


@pytest.mark.parametrize(
    "fault", [Noise(size=0.01), FlippedBit(), OtherWeights(), Swapped(), Noise(size=0.01, repeats=False, after=6)]
)
def test_a_server_that_lies_is_named_and_nothing_of_its_is_counted(realdata, tmp_path, quiet, fault):
    progress = ProgressLines()
    with stories_swarm(realdata, [*SPANS, *SPANS]) as swarm:
        liar = swarm.add_server((0, 5), faults=(fault,))
        with trec_model(realdata, swarm) as model:
            result = evaluate_trec(realdata, model, tmp_path / "run", progress=progress, limit=EXAMPLES)
            audits = model.blocks.audit_progress()
        assert liar.fault_counts()[fault.name].in_flight > 0
    assert predictions(tmp_path / "run") == quiet
    (found,) = result.noisy_servers
    assert (found.peer_id, found.is_used) == (liar.peer_id, False)
    assert found.verdict == "liar" or not getattr(fault, "repeats", True)
    assert audits.done >= 2
    assert len(progress.lines) == 1, progress.lines
    (warning,) = progress.lines
    assert liar.peer_id[-6:] in warning
    with folder_of(tmp_path / "run") as folder:
        assert liar.peer_id not in {server.peer_id for server in folder.manifest.servers}
        assert next(folder.journal._select("SELECT count(*) FROM scored WHERE valid = 0"))[0] >= 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["noisy_servers"][0]["verdict"] == found.verdict
    if found.verdict == "liar":
        assert "its answers are wrong" in warning
        assert "wrong, left out: nothing it computed is counted" in (tmp_path / "run" / "report.md").read_text()


def test_two_replicas_that_disagree_are_marked_until_blocks_at_home_settle_it(realdata, tmp_path, quiet):
    progress = ProgressLines()
    with stories_swarm(realdata, [(0, 3), (3, 5)]) as swarm:
        liar = swarm.add_server((3, 5), faults=(Noise(size=0.01),))
        honest = swarm.servers[1]
        with trec_model(realdata, swarm) as model:
            result = evaluate_trec(realdata, model, tmp_path / "run", progress=progress, limit=EXAMPLES)
        assert {(each.peer_id, each.verdict, each.is_used) for each in result.noisy_servers} == {
            (liar.peer_id, "disputed", True),
            (honest.peer_id, "disputed", True),
        }
        (warning,) = progress.lines
        assert "do not agree on blocks 3:5" in warning and "--verify-local 3:5" in warning
        lines = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
        assert len(lines) == EXAMPLES and all(line["disputed"] for line in lines)
        assert "do not agree" in (tmp_path / "run" / "report.md").read_text()

        with trec_model(realdata, swarm, verify_local=(3, 5)) as model:
            result = evaluate_trec(realdata, model, tmp_path / "settled", progress=progress, limit=EXAMPLES)
    assert [(each.peer_id, each.verdict) for each in result.noisy_servers] == [(liar.peer_id, "liar")]
    assert predictions(tmp_path / "settled") == quiet
    assert "than the same blocks at home" in progress.lines[-1]


def test_honest_servers_of_any_dtype_accuse_nobody(realdata, tmp_path):
    with stories_swarm(realdata, [*SPANS, (0, 5)]) as swarm:
        for span in [*SPANS, (0, 5)]:
            swarm.add_server(span, dtype="bfloat16")
        swarm.add_server((0, 5), dtype="float16")
        with trec_model(realdata, swarm, verify=0.5, verify_local=(1, 4)) as model:
            result = evaluate_trec(realdata, model, tmp_path / "run", limit=EXAMPLES)
            audits = model.blocks.audit_progress()
    assert result.noisy_servers == ()
    assert audits.done > 0.3 * audits.computed
    assert "disputed" not in predictions(tmp_path / "run")


def test_the_only_server_of_some_blocks_that_lies_stops_the_run(realdata, tmp_path):
    with (
        stories_swarm(realdata, SPANS, faults=(Noise(size=0.01),)) as swarm,
        trec_model(realdata, swarm, verify_local=(4, 5)) as model,
        pytest.raises(MissingBlocksError, match="no server that is trusted holds blocks 3:5") as stopped,
    ):
        evaluate_trec(realdata, model, tmp_path / "run", limit=EXAMPLES)
    assert stopped.value.exit_code == 3
    assert not hasattr(stopped.value, "__notes__")  # "... are scored and kept": none is
