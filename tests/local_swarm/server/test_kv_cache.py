"""Blocks computed step by step with a cache equal Hugging Face's one forward, for every family."""

import pytest
import torch

from petals_eval.local_swarm.server.kv_cache import SessionCache
from petals_eval.model.blocks import BlockSpan
from tests.support.hugging_face import Reference
from tests.support.tensors import distance, hidden_states
from tests.support.tiny_models import FAMILIES, make_tiny

BLOCKS = 4
STEPS = (5, 1, 1, 6, 1)
POSITIONS = sum(STEPS)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return make_tiny(request.param, tmp_path_factory.mktemp(request.param), blocks=BLOCKS)


@pytest.fixture
def hidden():
    return hidden_states(3, POSITIONS, seed=1)


def stepwise(span, hidden, steps=STEPS, *, start=None, stop=None, cache=None):
    start = span.start if start is None else start
    stop = span.stop if stop is None else stop
    cache = cache or SessionCache(stop - start, POSITIONS, start)
    outputs = []
    for part in hidden.split(steps, dim=1):
        outputs.append(span.forward(part, start=start, stop=stop, cache=cache))
    return torch.cat(outputs, dim=1)


def test_steps_equal_one_forward(folder, hidden):
    spans = [BlockSpan.load(str(folder), start, stop) for start, stop in ((0, 1), (1, 4))]
    output = hidden
    for span in spans:
        output = stepwise(span, output)
    assert distance(output, Reference(folder).forward(hidden)) < 1e-5


def test_steps_of_part_of_a_span(folder, hidden):
    span = BlockSpan.load(str(folder), 0, BLOCKS)
    output = stepwise(span, stepwise(span, hidden, stop=1), start=1)
    assert distance(output, Reference(folder).forward(hidden)) < 1e-5


def test_rolling_back(folder, hidden):
    span = BlockSpan.load(str(folder), 0, BLOCKS)
    cache = SessionCache(BLOCKS, POSITIONS)
    expected = span.forward(hidden)
    span.forward(hidden[:, :4], cache=cache)
    span.forward(torch.randn(3, 7, 32), cache=cache)
    cache.roll_back(4)
    assert distance(span.forward(hidden[:, 4:], cache=cache), expected[:, 4:]) < 1e-5
    cache.roll_back(0)
    assert distance(span.forward(hidden, cache=cache), expected) < 1e-5


def test_reordering_rows(folder, hidden):
    span = BlockSpan.load(str(folder), 0, BLOCKS)
    cache = SessionCache(BLOCKS, POSITIONS)
    rows = torch.tensor([2, 0, 0])
    span.forward(hidden[:, :6], cache=cache)
    cache.reorder(rows)
    reordered = torch.cat([hidden[rows, :6], hidden[:, 6:]], dim=1)
    assert distance(span.forward(hidden[:, 6:], cache=cache), span.forward(reordered)[:, 6:]) < 1e-5


@pytest.mark.parametrize(
    ("family", "window"),
    [
        ("mistral", {"sliding_window": 4}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
        ("falcon", {"alibi": True, "multi_query": False}),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ],
    ids=str,
)
def test_windows_and_alibi(family, window, hidden, tmp_path):
    make_tiny(family, tmp_path, blocks=BLOCKS, **window)
    expected = Reference(tmp_path).forward(hidden)
    span = BlockSpan.load(str(tmp_path), 0, BLOCKS)
    assert distance(stepwise(span, hidden), expected) < 1e-5
    # Back to where a window's own cache would have forgotten what it needs.
    cache = SessionCache(BLOCKS, POSITIONS)
    span.forward(hidden, cache=cache)
    cache.roll_back(6)
    assert distance(span.forward(hidden[:, 6:], cache=cache), expected[:, 6:]) < 1e-5


def test_bfloat16(folder, hidden):
    span = BlockSpan.load(str(folder), 0, BLOCKS, torch.bfloat16)
    assert distance(stepwise(span, hidden), span.forward(hidden)) < 3e-2
