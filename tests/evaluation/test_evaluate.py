"""The evaluator and the model by themselves: what a run may go on with, says and sends. No swarm."""

from types import SimpleNamespace

import pytest
import torch

from petals_eval.errors import DeadlineError, RunFolderError
from petals_eval.model import Adapter
from petals_eval.model.rotary import RotaryScaling
from petals_eval.remote_model import RemoteModel
from petals_eval.swarm import SwarmStatus
from petals_eval.swarm.trust.unequal import UnequalServer
from petals_eval.tasks.requests import Request
from tests.fake_model import ROWS, FakeModel, answers_of, write_rows
from tests.fake_model import evaluate as evaluate_rows
from tests.swarm.fakes import server


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


def test_what_is_kept_counts_every_adapter_also_while_the_first_is_computed_again(evaluate):
    """A server is caught once both adapters are scored, and nobody else holds its blocks."""
    adapters = [SimpleNamespace(name=name, kind="ptune", sha256=name, prefix_length=0) for name in ("first", "second")]
    model = FakeModel(adapters=adapters)
    caught = SwarmStatus(0, ("a",), None, unequal=(UnequalServer(server("a", 0, 4), 0.1),))
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


def test_deep_prompts_are_rounded_to_the_dtype_at_home_as_petals_does():
    """Also for servers of a wider one, or the same prompts would score otherwise in the training loop."""

    class Local(torch.nn.Module):
        dtype = torch.bfloat16
        hidden_size = 2
        config = SimpleNamespace(to_dict=dict)
        rotary = RotaryScaling()

        def check_length(self, tokens, prefix):
            pass

        def embed(self, input_ids, adapter):
            return torch.zeros(*input_ids.shape, 2, dtype=self.dtype)

    sent = []
    blocks = SimpleNamespace(
        stream=lambda work, **options: iter(sent.extend(work) or ()),
        warn_of_dropout=lambda found: 0,
        limit_steps=lambda positions: 0,
        positions_at_once=lambda hidden_size, dtype: 100,
        micro_batch_bytes=1000,
    )
    adapter = Adapter("a", "deep_ptune", torch.rand(1, 2), torch.rand(4, 1, 1, 2))
    assert list(RemoteModel(Local(), blocks).compute([Request("0", 0, (1, 2))], adapter)) == []
    assert torch.equal(sent[0].prompts, adapter.deep_prompts.bfloat16())
    assert sent[0].prompts.dtype is torch.bfloat16
