"""Health judges two servers by the table that runs go by: rounding is no lie there, and none is taken for rounding."""

from functools import partial

import pytest
import torch

from petals_eval.health import Verdict
from petals_eval.model.blocks import BlockSpan
from petals_eval.swarm.activations import Activations
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.wire.server_info import ServerInfo
from tests.support.fake_health import FakeServer, FakeSwarm, findings, report_on, server_of
from tests.support.fake_swarm import FakeDirectory, FakeTransport, noise, pipeline, run_all, server
from tests.support.tensors import tf32
from tests.support.tiny_models import make_tiny

BLOCKS, HIDDEN = 8, 64


class Llama:
    """Blocks of random weights, which amplify any difference as those of no trained model do.

    exact computes in float32. rounded imitates a GPU that does so in TF32: weights and inputs of matrices are rounded
    to its 10 bits of mantissa.
    """

    def __init__(self, exact: BlockSpan):
        self.exact = exact
        self.rounded = exact.copied()
        for module in self.rounded._model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = tf32(module.weight.data)
                module.register_forward_pre_hook(lambda _, args: (tf32(args[0]),))

    def servers(self, **spans: BlockSpan) -> dict[str, FakeServer]:
        return {name: _server(partial(_compute, span)) for name, span in spans.items()}

    def forward(self, hop: Hop, activations: Activations) -> torch.Tensor:
        """Compute for a run: server "rounded" in TF32, others exactly, "noisy" with noise of one per cent."""
        span = self.rounded if hop.peer_id == "rounded" else self.exact
        hidden = _compute(span, activations.hidden, hop.span.start, hop.span.stop)
        return noise(0.01)(hidden, activations.hidden) if hop.peer_id == "noisy" else hidden


def _compute(span: BlockSpan, hidden: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return span.forward(hidden, start=start, stop=stop)


def _server(compute, **fields: object) -> FakeServer:
    info = ServerInfo("2.2.0", torch.float32, torch.float32, 100, HIDDEN, 3)
    return FakeServer(0, BLOCKS, info=lambda block: info, compute=compute, **fields)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    folder = make_tiny("llama", tmp_path_factory.mktemp("model") / "llama", hidden=HIDDEN, blocks=BLOCKS)
    return Llama(BlockSpan.load(str(folder), 0, BLOCKS, torch.float32))


def test_health_accuses_nobody_of_computing_float32_in_tf32(llama: Llama) -> None:
    """The largest difference that was measured of two honest servers of one dtype: 0.0038, on such weights."""
    report = report_on(FakeSwarm(BLOCKS, **llama.servers(exact=llama.exact, rounded=llama.rounded)))
    assert findings(report) == set() and report.verdict is Verdict.HEALTHY
    assert {each.compared for each in report.models[0].servers} == {BLOCKS}

    servers = llama.servers(one=llama.exact, other=llama.exact, rounded=llama.rounded)
    assert findings(report_on(FakeSwarm(BLOCKS, **servers))) == set()


def test_blocks_at_home_accuse_nobody_of_computing_float32_in_tf32(llama: Llama) -> None:
    swarm = FakeSwarm(BLOCKS, **llama.servers(rounded=llama.rounded))
    assert findings(report_on(swarm, home=llama.exact, hidden_size=HIDDEN)) == set()


def test_a_run_accuses_nobody_of_computing_float32_in_tf32(llama: Llama) -> None:
    assert _caught_by_a_run(llama, "exact", "rounded") == set()


def test_health_and_a_run_find_who_differs_by_more_than_rounding(llama: Llama) -> None:
    """Noise of one per cent of the answer, with others in TF32 beside it."""

    def noisy(hidden: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        return noise(0.01)(_compute(llama.exact, hidden, start, stop), hidden)

    others = llama.servers(exact=llama.exact, rounded=llama.rounded)
    report = report_on(FakeSwarm(BLOCKS, **others, noisy=_server(noisy)))
    assert findings(report) == findings(report, "noisy") == {"disagrees-with-replica"}
    assert server_of(report, "noisy").verdict is Verdict.BROKEN
    alone = report_on(FakeSwarm(BLOCKS, noisy=_server(noisy)), home=llama.exact, hidden_size=HIDDEN)
    assert findings(alone, "noisy") == {"disagrees-with-home"}
    assert _caught_by_a_run(llama, "exact", "rounded", "noisy") == {("noisy", "wrong")}


def _caught_by_a_run(llama: Llama, *names: str) -> set[tuple[str, str]]:
    directory = FakeDirectory(BLOCKS, *(server(name, 0, BLOCKS, torch_dtype="float32") for name in names))
    pipe = pipeline(directory, FakeTransport(llama), verify=1.0, deadline=30.0)
    draws = torch.Generator().manual_seed(0)
    run_all(pipe, [torch.randn(4, 16, HIDDEN, generator=draws) for _ in range(12)], stop=BLOCKS)
    assert pipe.audit.progress().done > 0
    return {(peer.peer_id, peer.finding.status) for peer in pipe.peers.values() if peer.finding is not None}
