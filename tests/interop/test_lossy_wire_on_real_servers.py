"""Hidden states in lossy codes to real Petals servers and back, and servers that do not take a code."""

import pytest
import torch

import petals_eval
from petals_eval.swarm import RemoteSequential
from tests.interop.conftest import BOUNDED, STORIES, in_one_call
from tests.interop.petals_folders import block_states
from tests.interop.real_petals import RealPetalsSwarm
from tests.support.real_swarm import connect

# Largest difference allowed, and mean, of the states after five blocks and three hops; in deviations of these states.
TOLERANCES = {"float16": (5e-3, 1e-3), "blockwise8": (0.4, 0.03), "uniform8": (5.0, 0.1)}


def takers(blocks: RemoteSequential) -> set[str]:
    """Who took the code."""
    return {peer.peer_id for peer in blocks.peers.values() if peer.has_taken_codec}


def refusals(blocks: RemoteSequential) -> dict[str, str]:
    """Who did not, and why."""
    return {peer.peer_id: peer.codec_refusal for peer in blocks.peers.values() if peer.codec_refusal is not None}


def some_tokens(rows: int, seq: int) -> torch.Tensor:
    return torch.randint(3, 320, (rows, seq), generator=torch.Generator().manual_seed(rows * seq))


@pytest.mark.parametrize("wire", TOLERANCES)
def test_each_code_there_and_back(stories, stories_dir, wire):
    entering, *_, leaving = block_states(stories_dir, some_tokens(8, 100))
    with connect(stories, wire=wire, **BOUNDED) as connection:
        blocks = connection.remote_sequential(STORIES, 5)
        moved = blocks(entering) - leaving
        peers = blocks.peers.values()
        sent, received = (sum(getattr(each, name) for each in peers) for name in ("bytes_sent", "bytes_received"))
        assert refusals(blocks) == {}
        assert takers(blocks) == {server.peer_id for server in stories.servers}
    largest, mean = TOLERANCES[wire]
    deviation = float(leaving.std())
    print(wire, float(moved.abs().max()) / deviation, float(moved.abs().mean()) / deviation)
    assert 0 < float(moved.abs().max()) <= largest * deviation
    assert float(moved.abs().mean()) <= mean * deviation
    per_value, besides = (2, 0) if wire == "float16" else (1, 8 + 1024)
    besides += (8 + 4 * 13) * (wire == "blockwise8")  # 12.5 blocks
    assert sent == received == 3 * (per_value * entering.numel() + besides)


def test_bfloat16_servers(stories_dir):
    """They take both 8-bit codes; float16 would save nothing, so it is not used. All of that is said."""
    entering, *_, leaving = block_states(stories_dir, some_tokens(36, 460))  # more than 1 MiB in 8 bits: it streams
    deviation = float(leaving.std())
    limits = {"max_batch_size": 20_000, "inference_max_length": 2048}
    with RealPetalsSwarm(stories_dir, [(0, 5)], dht_prefix=STORIES, dtype="bfloat16", **limits) as swarm:
        (peer_id,) = [server.peer_id for server in swarm.servers]
        for wire in TOLERANCES:
            with connect(swarm, wire=wire, max_tokens_per_call=20_000, **BOUNDED) as connection:
                blocks = connection.remote_sequential(STORIES, 5)
                moved = in_one_call(blocks, entering).float() - leaving
                if wire == "float16":
                    assert refusals(blocks) == {peer_id: "it computes in bfloat16: float16 saves nothing"}
                else:
                    assert takers(blocks) == {peer_id}
                    assert "rpc_forward_stream(" in swarm.servers[0].log()
            print(wire, float(moved.abs().mean()) / deviation)
            assert float(moved.abs().mean()) <= (TOLERANCES[wire][1] + 0.02) * deviation


def test_a_server_without_bitsandbytes_is_spoken_to_lossless_and_named(stories, stories_dir, realdata, monkeypatch):
    monkeypatch.setenv("WITHOUT_BITSANDBYTES", "1")
    with RealPetalsSwarm(stories_dir, [(0, 2), (2, 5)], dht_prefix=STORIES) as swarm:
        adapter = str(realdata / "adapters" / "trec-deep_ptune")
        data = realdata / "trec" / "TREC.test.all"
        connect = {"initial_peers": swarm.initial_peers, "dht_prefix": STORIES, "adapter": adapter, **BOUNDED}
        with petals_eval.RemoteModel.from_pretrained(str(stories_dir), wire="blockwise8", **connect) as model:
            result = petals_eval.evaluate(model, task="trec", data=data, limit=40)
    assert result.wire.taken_by == ()
    assert {each.peer_id for each in result.wire.lossless} == {server.peer_id for server in swarm.servers}
    assert all("bitsandbytes" in each.reason for each in result.wire.lossless)
    assert (result.wire.sample.largest, result.wire.sample.changed) == (pytest.approx(0, abs=1e-4), 0)
    assert result.retries == 0


@pytest.mark.parametrize(("wire", "largest"), [("float16", 0.05), ("blockwise8", 3.0)])
def test_an_evaluation_says_how_far_it_moved(stories, stories_dir, realdata, wire, largest):
    adapter = str(realdata / "adapters" / "trec-deep_ptune")
    settings = {"initial_peers": stories.initial_peers, "dht_prefix": STORIES, "adapter": adapter, **BOUNDED}
    with petals_eval.RemoteModel.from_pretrained(str(stories_dir), wire=wire, **settings) as model:
        result = petals_eval.evaluate(model, task="trec", data=realdata / "trec" / "TREC.test.all", limit=100)
    with petals_eval.RemoteModel.from_pretrained(str(stories_dir), **settings) as model:
        lossless = petals_eval.evaluate(model, task="trec", data=realdata / "trec" / "TREC.test.all", limit=100)
    sample = result.wire.sample
    print(sample, result.metrics["accuracy"].value, lossless.metrics["accuracy"].value)
    assert sample.examples == 16
    assert 0 < sample.mean < sample.largest < largest
    assert result.wire.lossless == ()
    assert set(result.wire.taken_by) <= {server.peer_id for server in stories.servers}
    assert abs(result.metrics["accuracy"].value - lossless.metrics["accuracy"].value) <= 0.05
    assert lossless.wire is None
