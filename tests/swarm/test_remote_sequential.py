"""RemoteSequential over a real swarm on loopback: exact and without gradients."""

import gc
import weakref

import pytest
import torch

from petals_eval.errors import CallerError, GradientError, MissingBlocksError
from petals_eval.swarm import Work
from tests.support.real_swarm import connect, stories_swarm

BLOCKS, HIDDEN = 5, 64


@pytest.fixture(scope="module")
def swarm(realdata):
    with stories_swarm(realdata, [(0, 3), (2, 5), (4, 5)]) as running:
        yield running


@pytest.fixture(scope="module")
def blocks(swarm):
    with connect(swarm, deadline=5.0) as connection:
        yield connection.remote_sequential(swarm.dht_prefix, BLOCKS)


@pytest.fixture(scope="module")
def reference(realdata):
    """Hugging Face's own blocks, without the final norm; deep prompts added before each."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(realdata / "stories260K-hf").eval()
    model.norm = torch.nn.Identity()

    def run(hidden, prompts=None, start=0, stop=BLOCKS):
        def add(index):
            def hook(module, arguments, keywords):
                states = arguments[0].clone()
                states[:, : prompts.shape[2]] += prompts[index]
                return (states, *arguments[1:]), keywords

            return hook

        layers = model.layers
        model.layers = torch.nn.ModuleList(list(layers)[start:stop])
        hooks = []
        if prompts is not None:
            hooks = [
                layer.register_forward_pre_hook(add(index), with_kwargs=True)
                for index, layer in enumerate(model.layers)
            ]
        try:
            with torch.inference_mode():
                return model(inputs_embeds=hidden).last_hidden_state
        finally:
            model.layers = layers
            for hook in hooks:
                hook.remove()

    return run


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


def hidden_states(batch: int, seq: int) -> torch.Tensor:
    return torch.randn(batch, seq, HIDDEN, generator=torch.Generator().manual_seed(batch * 1000 + seq))


def test_unary_and_stream_calls_equal_the_local_blocks(blocks, reference):
    for batch, seq in [(1, 1), (3, 7), (60, 100)]:  # the last is 1.5 MB: it streams
        hidden = hidden_states(batch, seq)
        assert close(blocks(hidden), reference(hidden))


def test_batches_above_the_token_limit_are_split_and_come_back_in_order(blocks, reference):
    hidden = hidden_states(300, 20)  # 6,000 tokens
    assert close(blocks(hidden), reference(hidden))


def test_deep_prompts_shared_and_per_row(blocks, reference):
    hidden = hidden_states(30, 90)
    for rows in (1, 30):
        prompts = torch.randn(BLOCKS, rows, 4, HIDDEN, generator=torch.Generator().manual_seed(rows))
        assert close(blocks(hidden, prompts), reference(hidden, prompts))


def test_slices(blocks, reference):
    hidden = hidden_states(2, 5)
    assert (len(blocks), len(blocks[1:4]), len(blocks[-1]), len(blocks[2:2])) == (5, 3, 1, 0)
    assert close(blocks[1:4](hidden), reference(hidden, start=1, stop=4))
    assert close(blocks[3:](blocks[:3](hidden)), reference(hidden))
    assert close(blocks[1:][1](hidden), reference(hidden, start=2, stop=3))
    assert torch.equal(blocks[2:2](hidden), hidden)
    prompts = torch.randn(2, 1, 3, HIDDEN)
    assert close(blocks[1:3](hidden, prompts), reference(hidden, prompts, start=1, stop=3))


def test_dtype_and_shape_come_back_as_they_went(blocks):
    hidden = hidden_states(2, 5).bfloat16()
    answer = blocks(hidden)
    assert (answer.dtype, answer.shape) == (hidden.dtype, hidden.shape)
    assert blocks(hidden[:0]).shape == (0, 5, HIDDEN)


def test_gradients_are_refused_and_never_made(blocks):
    hidden = hidden_states(2, 5).requires_grad_()
    with pytest.raises(GradientError, match=r"computes no gradients.*no_grad"):
        blocks(hidden)
    prompts = torch.zeros(BLOCKS, 1, 2, HIDDEN, requires_grad=True)
    with pytest.raises(GradientError):
        blocks(hidden.detach(), prompts)
    with torch.no_grad():
        assert not blocks(hidden, prompts).requires_grad
    assert not blocks(hidden.detach()).requires_grad


@pytest.mark.parametrize(
    "shape",
    [
        (BLOCKS - 1, 1, 2, HIDDEN),
        (BLOCKS, 3, 2, HIDDEN),
        (BLOCKS, 1, 6, HIDDEN),
        (BLOCKS, 1, 2, 3),
        (BLOCKS, 2, HIDDEN),
    ],
)
def test_misshapen_prompts_are_refused_for_servers_would_skip_blocks_silently(blocks, shape):
    with pytest.raises(CallerError, match=r"expected deep prompts \(5, 1 or 2, at most 5, 64\), found"):
        blocks(hidden_states(2, 5), torch.zeros(shape))


def test_misshapen_hidden_states_are_refused(blocks):
    with pytest.raises(CallerError, match=r"\(batch, seq, hidden\)"):
        blocks(torch.zeros(5, HIDDEN))
    with pytest.raises(CallerError, match="float"):
        blocks(torch.zeros(1, 5, HIDDEN, dtype=torch.int64))
    with pytest.raises(CallerError, match="step 2"):
        blocks[::2]
    with pytest.raises(IndexError):
        blocks[5]


def test_micro_batches_are_in_flight_together_and_bounded(blocks):
    taken = []

    def work():
        for index in range(12):
            taken.append(index)
            yield Work(index, hidden_states(1, 4), None)

    stream = blocks.stream(work(), window=3)
    first = next(stream)
    assert len(taken) == 3  # nothing more is taken until one has been consumed
    assert {first.tag, *(computed.tag for computed in stream)} == set(range(12))
    assert [hop.peer_id for hop in first.hops]


def test_no_activation_outlives_its_micro_batch(blocks):
    """Of a hundred micro-batches, only those in flight are alive at any time."""
    alive: list[weakref.ref] = []
    most = 0

    def work():
        nonlocal most
        for index in range(100):
            hidden = hidden_states(1, 4)
            alive.append(weakref.ref(hidden))
            most = max(most, sum(ref() is not None for ref in alive))
            yield Work(index, hidden, None)

    for computed in blocks.stream(work(), window=4):
        del computed
    gc.collect()
    assert most <= 4 + 2
    assert sum(ref() is not None for ref in alive) <= 1


def test_missing_blocks_end_at_the_deadline(swarm):
    with connect(swarm, deadline=0.5) as connection:
        blocks = connection.remote_sequential(swarm.dht_prefix, BLOCKS + 2)
        with pytest.raises(MissingBlocksError, match="no server holds blocks 5:7") as caught:
            blocks(hidden_states(1, 2))
        assert caught.value.missing == ((5, 7),)


def test_an_unknown_lora_adapter_has_no_servers(swarm):
    with connect(swarm, deadline=0.3, active_adapter="nobody/has-this") as connection:
        blocks = connection.remote_sequential(swarm.dht_prefix, BLOCKS)
        with pytest.raises(MissingBlocksError, match=r"blocks 0:5.*does not announce adapter nobody/has"):
            blocks(hidden_states(1, 2))
