"""No activation is kept longer than its micro-batch needs it: hidden states counted from the embeddings to the head."""

import weakref

import numpy as np
import pytest
import torch

from petals_eval import RemoteModel
from petals_eval.local_swarm import LocalSwarm
from petals_eval.model import LocalModel
from petals_eval.swarm.wire import messages as wire
from petals_eval.tasks.requests import Request
from tests.support.tiny_models import make_tiny

BLOCKS, HOPS, BATCHES = 3, 3, 40


class Ledger:
    """Counts hidden states by their storage: a view or a detached copy of the handle keeps the same one alive."""

    def __init__(self):
        self.alive = 0
        self.most = 0
        self.made = 0

    def entered(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same values in a storage whose end is noticed."""
        values = np.array(tensor.numpy())
        weakref.finalize(values, self._left)
        self.made += 1
        self.alive += 1
        self.most = max(self.most, self.alive)
        return torch.from_numpy(values)

    def _left(self):
        self.alive -= 1


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = make_tiny("llama", tmp_path_factory.mktemp("models") / "tiny", blocks=BLOCKS)
    with (
        LocalSwarm(folder, servers=HOPS, mode="thread") as swarm,
        # Without checks elsewhere: they keep two micro-batches of every server, in case somebody comes to check them.
        RemoteModel.from_pretrained(
            str(folder), initial_peers=swarm.initial_peers, dht_prefix=swarm.dht_prefix, verify=0.0
        ) as remote,
    ):
        yield remote


@pytest.fixture
def ledger(monkeypatch):
    ledger = Ledger()
    embed, read_answer = LocalModel.embed, wire.read_answer
    monkeypatch.setattr(LocalModel, "embed", lambda *arguments: ledger.entered(embed(*arguments)))
    monkeypatch.setattr(wire, "read_answer", lambda *arguments: ledger.entered(read_answer(*arguments)))
    return ledger


def requests(count):
    return (Request(str(index), 0, tuple(range(1, 9)), ((7, 5),)) for index in range(count))


@pytest.mark.parametrize("window", [1, 4])
def test_an_activation_lives_from_one_hop_to_the_next(model, ledger, monkeypatch, window):
    """At any time a micro-batch in flight has what is being computed, and at most its answer beside it."""
    stream = model.blocks.stream
    monkeypatch.setattr(model.blocks, "stream", lambda work, **options: stream(work, window=window, **options))
    left_over = []
    answered = 0
    for _ in model.compute(requests(2 * BATCHES), tokens_per_micro_batch=16):
        answered += 1
        if window == 1:
            left_over.append(ledger.alive)
    assert answered == 2 * BATCHES
    # Embeddings, and the answer of each hop; a server is asked one question twice before its answers count.
    assert BATCHES * (1 + HOPS) <= ledger.made <= BATCHES * (1 + HOPS) + 2 * HOPS
    assert ledger.most <= 2 * window + HOPS
    assert max(left_over, default=0) == 0, "what a head has read is gone before its predictions are passed on"
    assert ledger.alive == 0
