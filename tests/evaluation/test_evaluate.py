"""Evaluations over a model without a swarm: what a run may go on with, and what it says."""

import pytest

from petals_eval.errors import DeadlineError, RunFolderError
from petals_eval.swarm import SwarmStatus
from petals_eval.swarm.peers.finding import TrustFinding
from petals_eval.swarm.wire.span import Span
from tests.fake_model import ROWS, FakeModel, answers_of, fake_adapter, write_rows
from tests.fake_model import evaluate as evaluate_rows
from tests.support.fake_swarm import server


@pytest.fixture
def evaluate(tmp_path):
    source = write_rows(tmp_path / "rows.csv")
    return lambda model: evaluate_rows(model, source, tmp_path / "run")


def test_a_run_does_not_go_on_with_answers_of_servers_that_it_refuses_now(evaluate):
    with pytest.raises(DeadlineError):
        evaluate(FakeModel(until=2))
    with pytest.raises(RunFolderError) as refused:
        evaluate(FakeModel(require_dtype="float32", require_quant="none"))
    assert "setting.require_dtype: was nothing, now float32" in str(refused.value)
    assert "setting.require_quant: was nothing, now none" in str(refused.value)
    assert evaluate(FakeModel(deny_servers=("b",))).first.n_scored == ROWS


def test_a_run_does_not_go_on_with_another_bound_of_the_logits(evaluate):
    model = FakeModel(until=2)
    model.local.logit_cap = 30.0
    with pytest.raises(DeadlineError):
        evaluate(model)
    with pytest.raises(RunFolderError, match=r"logit_cap: was 30\.0"):
        evaluate(FakeModel())


def test_what_is_kept_counts_every_adapter_also_while_the_first_is_computed_again(evaluate):
    """A server is caught once both adapters are scored, and nobody else holds its blocks."""
    adapters = [fake_adapter("first"), fake_adapter("second")]
    model = FakeModel(adapters=adapters)
    caught = SwarmStatus(
        0, ("a",), None, findings=(TrustFinding(server("a", 0, 4), "nondeterministic", Span(0, 4), 0.1),)
    )
    compute = model.compute

    def compute_until_caught(requests, adapter, **options):
        if adapter is adapters[0]:
            yield from compute(requests, adapter, **options)
            model.until = 0
            return
        yield from answers_of("b", requests)
        model.blocks.status = lambda: caught

    model.compute = compute_until_caught
    with pytest.raises(DeadlineError) as error:
        evaluate(model)
    assert f"{ROWS} of {2 * ROWS} examples are scored and kept" in error.value.__notes__[0]
