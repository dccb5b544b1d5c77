"""`petals-eval bench` on a local swarm: rates, shares and costs that add up, and sweeps that outlive a failed case."""

import json
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from petals_eval.bench.settings import ForwardSettings, InferenceSettings
from petals_eval.bench.sweep import bench_forward, bench_inference
from petals_eval.cli import main
from petals_eval.errors import ConfigError, SwarmError
from petals_eval.local_swarm import LocalSwarm
from tests.support.tiny_models import make_tiny

HIDDEN = 32
PEER = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWDieLmgBmL5ZSzsSJE9P1FpPDHGsiVJdpjLxeituzSc2P"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("bench") / "tiny", blocks=3, hidden=HIDDEN)


@pytest.fixture(scope="module")
def swarm(model: Path) -> Iterator[LocalSwarm]:
    with LocalSwarm(model, servers=2, mode="thread", inference_max_length=64) as running:
        yield running


def told(swarm: LocalSwarm) -> dict[str, object]:
    return {"model": swarm.model, "initial_peers": tuple(swarm.initial_peers), "dht_prefix": swarm.dht_prefix}


def test_forward_measures_every_combination(swarm: LocalSwarm):
    lines: list[str] = []
    settings = ForwardSettings(
        **told(swarm), lengths="4,16", batches=(2,), windows="auto,3", seconds=0.3, warm_up=0.1, repeats=2, prompts=2
    )
    found = bench_forward(settings, lines.append)
    assert [(point.case.length, point.case.window) for point in found.points] == [
        (4, None),
        (4, 3),
        (16, None),
        (16, 3),
    ]
    for point in found.points:
        assert 0 < point.tokens.least <= point.tokens.median <= point.tokens.greatest
        assert point.tokens.median == pytest.approx(point.case.length * point.rows.median)
        assert 0 < point.latency[0] <= point.latency[1] <= point.latency[2]
        assert point.watched.link_use is None
        assert point.watched.client_memory > 2**20
        assert sum(server.share for server in point.watched.servers.values()) == pytest.approx(1)
        for server in point.watched.servers.values():
            moved = server.tokens * HIDDEN * 4
            assert server.bytes_received == moved
            assert server.bytes_sent > moved  # prompts travel as well
    assert set(found.servers.values()) == {"0:2", "2:3"}
    assert len([line for line in lines if line.strip().startswith(("4 ", "16 "))]) == 4
    told_again = json.dumps(found.to_json())
    assert str(swarm.model) not in told_again
    assert swarm.initial_peers[0] not in told_again


def test_forward_measures_each_wire_and_says_who_does_not_take_one(swarm: LocalSwarm):
    lines: list[str] = []
    quick = {"lengths": (16,), "batches": (4,), "windows": "2", "seconds": 0.3, "warm_up": 0.1, "repeats": 1}
    settings = ForwardSettings(**told(swarm), wires="lossless,float16,uniform8", **quick)
    found = bench_forward(settings, lines.append)
    assert [point.case.wire for point in found.points] == ["lossless", "float16", "uniform8"]
    moved = [
        {server.bytes_received / (server.tokens * HIDDEN) for server in point.watched.servers.values()}
        for point in found.points
    ]
    # A codebook of 1 KiB goes with each 2,048 values of so small a message.
    assert moved == [{4.0}, {2.0}, {1 + 1032 / 2048}]
    assert [line.split()[3] for line in lines if line.strip().startswith("16 ")] == ["lossless", "float16", "uniform8"]

    with LocalSwarm(swarm.model, servers=1, mode="thread", has_bitsandbytes=False) as without:
        found = bench_forward(ForwardSettings(**told(without), wires="lossless,blockwise8", **quick), lines.append)
    assert [point.case.wire for point in found.points] == ["lossless"]
    (failure,) = found.failures
    assert failure.case.wire == "blockwise8" and "bitsandbytes" in failure.reason


def test_inference_measures_sessions_side_by_side(swarm: LocalSwarm):
    lines: list[str] = []
    settings = InferenceSettings(**told(swarm), lengths=(8, 4096), batches=(1,), windows="1,2", new_tokens=3, repeats=2)
    found = bench_inference(settings, lines.append)
    assert [(point.case.length, point.case.window) for point in found.points] == [(8, 1), (8, 2)]
    for point in found.points:
        assert point.tokens.median > 0
        assert point.prompt_tokens.median > 0
        assert 0 < point.step[0] <= point.step[2]
        assert point.first_step[0] > 0
    # A session that no cache holds is said, and the sweep goes on.
    assert [failure.case.window for failure in found.failures] == [1, 2]
    assert any("4096" in line and "not measured" in line for line in lines)
    assert ElementTree.fromstring(found.plot()) is not None


def test_a_sweep_of_nothing_but_failures_is_an_error(swarm: LocalSwarm):
    settings = InferenceSettings(**told(swarm), lengths=(4096,), batches=(1,))
    with pytest.raises(SwarmError, match="no case could be measured"):
        bench_inference(settings, lambda line: None)


def test_the_command_measures_an_embedded_swarm_behind_links(model: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    flags = ["--delay", "5", "--rate", "50", "--lengths", "8", "--batches", "2", "--seconds", "0.3", "--repeats", "1"]
    command = ["bench", "forward", "--model", str(model), "--local-swarm", "2", *flags, "--out", str(out), "--json"]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "bench.json").read_text())
    (point,) = printed["points"]
    assert printed["settings"]["delay"] == 5
    assert 0 < point["watched"]["link_use"] < 1
    assert all(server["processor"] > 0 for server in point["watched"]["servers"].values())
    assert point["latency"][0] >= 2 * 2 * 0.005 - 0.01  # two hops, there and back
    assert "tokens/s" in (out / "bench.txt").read_text()
    assert ElementTree.fromstring((out / "bench.svg").read_text()) is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one swarm"),
        ({"local_swarm": 2, "public_swarm": True}, "exactly one swarm"),
        ({"initial_peers": (PEER,), "delay": 5}, "--local-swarm"),
        ({"local_swarm": 2, "lengths": "8,no"}, "lengths"),
        ({"local_swarm": 2, "windows": "0"}, "windows"),
        ({"local_swarm": 2, "wires": "uniform3"}, "wires"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        ForwardSettings(model="tiny", **settings)


@pytest.mark.parametrize(
    ("settings", "longest"),
    (({"lengths": (33,)}, 33), ({"lengths": (20, 30), "new_tokens": 3}, 33)),
)
def test_lengths_that_a_server_would_remember_are_refused(settings: dict, longest: int, tmp_path: Path):
    scaling = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    folder = make_tiny("llama", tmp_path, max_position_embeddings=32, rope_parameters=scaling)
    kind, measure = (
        (InferenceSettings, bench_inference) if "new_tokens" in settings else (ForwardSettings, bench_forward)
    )
    with pytest.raises(ConfigError, match=f"at most 32 positions, found {longest}.*answers everybody otherwise"):
        measure(kind(model=str(folder), local_swarm=1, **settings), print)


def test_sessions_are_lossless():
    with pytest.raises(ConfigError, match="wires"):
        InferenceSettings(model="tiny", local_swarm=2, wires="float16")
