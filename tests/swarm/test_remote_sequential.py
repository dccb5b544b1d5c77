"""RemoteSequential over a real swarm on loopback: exact, without gradients, and gone without a trace."""

import gc
import os
import subprocess
import sys
import threading
import weakref

import psutil
import pytest
import torch

from petals_eval.config import SwarmSettings
from petals_eval.errors import (
    CallerError,
    ConfigError,
    GradientError,
    MissingBlocksError,
    SwarmError,
    SwarmUnreachableError,
)
from petals_eval.local_swarm.launcher import LocalSwarm
from petals_eval.swarm import SwarmConnection, Work

BLOCKS, HIDDEN = 5, 64


@pytest.fixture(scope="module")
def swarm(realdata):
    with LocalSwarm(realdata / "stories260K-hf", spans=[(0, 3), (2, 5), (4, 5)], mode="thread") as running:
        yield running


@pytest.fixture(scope="module")
def connection(swarm):
    with SwarmConnection.connect(SwarmSettings(initial_peers=tuple(swarm.initial_peers), deadline=5.0)) as open_one:
        yield open_one


@pytest.fixture(scope="module")
def blocks(swarm, connection):
    return connection.remote_sequential(swarm.dht_prefix, BLOCKS)


@pytest.fixture(scope="module")
def reference(realdata):
    """Hugging Face's own blocks, without the final norm; deep prompts added before each."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(realdata / "stories260K-hf").eval()
    model.norm = torch.nn.Identity()

    def run(hidden, prompts=None, first=0, last=BLOCKS):
        def add(index):
            def hook(module, arguments, keywords):
                states = arguments[0].clone()
                states[:, : prompts.shape[2]] += prompts[index]
                return (states, *arguments[1:]), keywords

            return hook

        layers = model.layers
        model.layers = torch.nn.ModuleList(list(layers)[first:last])
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
    assert close(blocks[1:4](hidden), reference(hidden, first=1, last=4))
    assert close(blocks[3:](blocks[:3](hidden)), reference(hidden))
    assert close(blocks[1:][1](hidden), reference(hidden, first=2, last=3))
    assert torch.equal(blocks[2:2](hidden), hidden)
    prompts = torch.randn(2, 1, 3, HIDDEN)
    assert close(blocks[1:3](hidden, prompts), reference(hidden, prompts, first=1, last=3))


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
    settings = SwarmSettings(initial_peers=tuple(swarm.initial_peers), deadline=0.5)
    with SwarmConnection.connect(settings) as connection:
        blocks = connection.remote_sequential(swarm.dht_prefix, BLOCKS + 2)
        with pytest.raises(MissingBlocksError, match="no server holds blocks 5:7") as caught:
            blocks(hidden_states(1, 2))
        assert caught.value.missing == ((5, 7),)
        nobody = connection.remote_sequential("unknown-model", BLOCKS)
        with pytest.raises(MissingBlocksError, match="nobody announces 'unknown-model'"):
            nobody(hidden_states(1, 2))


def test_an_unknown_lora_adapter_has_no_servers(swarm):
    peers = tuple(swarm.initial_peers)
    settings = SwarmSettings(initial_peers=peers, deadline=0.3, active_adapter="nobody/has-this")
    with SwarmConnection.connect(settings) as connection:
        blocks = connection.remote_sequential(swarm.dht_prefix, BLOCKS)
        with pytest.raises(MissingBlocksError, match=r"blocks 0:5.*does not announce adapter nobody/has"):
            blocks(hidden_states(1, 2))


def test_an_unreachable_swarm_is_said_with_its_addresses():
    gone = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWP1bRyizj6yjYNioEgopT6Q5r7Vht1o5Qb2dMbiXJ9byx"
    with pytest.raises(SwarmUnreachableError, match=r"no initial peer answered:\s+/ip4/127.0.0.1/tcp/9/"):
        SwarmConnection.connect(SwarmSettings(initial_peers=(gone,), startup_timeout=5))
    assert not [
        child
        for child in psutil.Process().children(recursive=True)
        if child.name() == "p2pd" and gone in " ".join(child.cmdline())
    ]


@pytest.mark.parametrize("address", ["localhost:31337", "/ip4/1.2.3.4/tcp/1", "", "/ip4/1.2.3.4/tcp/1/p2p/nonsense"])
def test_a_wrong_address_is_the_callers_mistake(address):
    with pytest.raises(ConfigError, match="multiaddress"):
        SwarmSettings(initial_peers=(address,))


def test_a_closed_connection_says_so(swarm):
    connection = SwarmConnection.connect(SwarmSettings(initial_peers=tuple(swarm.initial_peers)))
    blocks = connection.remote_sequential(swarm.dht_prefix, BLOCKS)
    connection.close()
    connection.close()
    with pytest.raises(SwarmError, match="closed"):
        blocks(hidden_states(1, 2))


def test_the_loop_refuses_to_wait_for_itself(connection, blocks):
    async def inside():
        return connection.run(blocks._directory.refresh)

    with pytest.raises(RuntimeError, match="event loop thread"):
        connection.run(inside)


def test_leaving_without_close_leaves_no_daemon_and_no_traceback(swarm):
    """A script that forgets close(), or fails, ends at once all the same."""
    script = f"""
import torch
from petals_eval.config import SwarmSettings
from petals_eval.swarm import SwarmConnection
connection = SwarmConnection.connect(SwarmSettings(initial_peers={tuple(swarm.initial_peers)!r}))
blocks = connection.remote_sequential({swarm.dht_prefix!r}, {BLOCKS})
print(blocks(torch.zeros(1, 2, {HIDDEN})).shape)
print([child.pid for child in __import__("psutil").Process().children(recursive=True)])
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=os.environ)
    assert ended.returncode == 0
    assert "Traceback" not in ended.stderr, ended.stderr
    pids = eval(ended.stdout.splitlines()[-1])
    assert pids
    _, still = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=5)
    assert not still


def test_connections_end_their_threads_and_daemons(swarm):
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    threads = threading.active_count()
    for _ in range(3):
        with SwarmConnection.connect(SwarmSettings(initial_peers=tuple(swarm.initial_peers))) as connection:
            connection.remote_sequential(swarm.dht_prefix, BLOCKS)(hidden_states(1, 2))
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
    assert threading.active_count() <= threads
