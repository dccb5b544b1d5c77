"""The thread of a server's arithmetic: long steps in chunks."""

import asyncio

import pytest
import torch

from petals_eval.local_swarm.server.compute import SpanThread
from petals_eval.local_swarm.server.kv_cache import SessionCache
from petals_eval.local_swarm.work import Work
from petals_eval.model.blocks import BlockSpan
from petals_eval.swarm.wire.span import Span
from tests.support.hugging_face import Reference
from tests.support.tensors import distance, hidden_states
from tests.support.tiny_models import FAMILIES, make_tiny

BLOCKS = 4
POSITIONS = 14


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return make_tiny(request.param, tmp_path_factory.mktemp(request.param), blocks=BLOCKS)


def test_long_steps_are_computed_in_chunks(folder):
    span = BlockSpan.load(str(folder), 0, BLOCKS)
    hidden = hidden_states(3, POSITIONS, seed=1)
    prompts = torch.randn(BLOCKS, 1, 5, 32)
    per_position = span.attention_heads * 3 * 4 * POSITIONS
    lengths = []

    class Watched(BlockSpan):
        def forward(self, hidden, *args, **kwargs):
            lengths.append(hidden.shape[1])
            return super().forward(hidden, *args, **kwargs)

    span.__class__ = Watched
    thread = SpanThread(span, max_batch_size=1000, max_chunk_bytes=4 * per_position)
    try:
        work = Work("rpc_inference", Span(0, BLOCKS), hidden, prompts, "", "", SessionCache(BLOCKS, POSITIONS))
        output = asyncio.run(thread(work))
    finally:
        thread.close()
    assert lengths == [4, 4, 4, 2], "the deep prompts reach into the second chunk"
    assert distance(output, Reference(folder).forward(hidden, prompts)) < 1e-5
