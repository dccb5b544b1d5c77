"""`petals-eval bench simulate`: what is told of a swarm that is described or drawn."""

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from petals_eval.bench.simulate import bench_simulate, drawn, read_scenario
from petals_eval.errors import ConfigError
from petals_eval.simulator.draws import draw_scenario
from petals_eval.simulator.floor import run_floor
from petals_eval.simulator.regimes import regime
from petals_eval.simulator.simulation import simulate
from tests.cli.invoking import invoke

SWARM = """
blocks: 4
hidden_size: 64
rows: 40
tokens: [20, 60]
settings: {push: never}
servers:
  - {blocks: 0:2, link: {delay: 0.02, up_mbps: 20, down_mbps: 20}, tokens_per_second: 2000}
  - {blocks: 2:4, tokens_per_second: 1000}
"""


def file_of(folder: Path, text: str) -> Path:
    path = folder / "swarm.yaml"
    path.write_text(text)
    return path


def test_a_swarm_in_a_file_is_told_of_with_all_its_parts(tmp_path):
    outcome = invoke("bench", "simulate", str(file_of(tmp_path, SWARM)), "--evaluations", "2")
    assert outcome.code == 0, outcome
    for words in (
        "4 blocks on 2 servers, 40 rows",
        "floor 1.",
        "evaluation 2:",
        "computing",
        "the client's link up 0%",
    ):
        assert words in outcome.out


def test_a_swarm_with_a_name_needs_no_file():
    assert read_scenario("mixed") == ("mixed", regime("mixed"))
    with pytest.raises(ConfigError, match="one of link, link16"):
        read_scenario("mixd")


def test_a_picture_shows_what_is_busy_and_when(tmp_path):
    picture = tmp_path / "swarm.svg"
    outcome = invoke("bench", "simulate", str(file_of(tmp_path, SWARM)), "--plot", str(picture))
    assert outcome.code == 0, outcome
    words = [each.text for each in ElementTree.parse(picture).iter() if each.text and each.text.strip()]
    assert {"server 0 (0:2) computing", "server 0 (0:2) link up", "server 1 (2:4) computing"} <= set(words)
    assert "server 1 (2:4) link up" not in words, "it is free"
    assert invoke("bench", "simulate", "--random", "1", "--plot", str(picture)).code == 2


def test_looking_changes_nothing_and_adds_up():
    scenario = regime("near", rows=40)
    looked_at, not_looked_at = simulate(scenario, looks=20), simulate(scenario)
    assert looked_at.evaluations == not_looked_at.evaluations and not_looked_at.timeline is None
    timeline = looked_at.timeline
    computing = (timeline.busy["server 0 (0:4) computing"] * np.diff(timeline.at)).sum()
    each = looked_at.evaluations[0]
    assert computing == pytest.approx(each.busy[0] * timeline.at[-1], rel=0.02)


def test_what_is_drawn_is_told_of_as_json(tmp_path):
    outcome = invoke("bench", "simulate", str(file_of(tmp_path, SWARM)), "--json")
    told = json.loads(outcome.out)
    assert (told["lost"], told["doubled"], told["different"]) == (0, 0, 0)
    assert 0.3 < told["median_share"] == told["tenth_percentile_share"] == told["scenarios"][0]["shares"][0] < 1


def test_several_are_summed_up(tmp_path):
    lines = []
    _, scenario = read_scenario(str(file_of(tmp_path, SWARM)))
    found = bench_simulate([("one", scenario), ("other", scenario)], 1, lines.append)
    assert "median" in lines[-1] and len(found.to_json()["scenarios"]) == 2


@pytest.mark.parametrize("seed", range(20))
def test_drawn_swarms_are_what_they_should_be(seed):
    ((_, found),) = drawn(1, seed)
    assert found == draw_scenario(seed)
    assert 8 <= found.blocks <= 80 and 5 <= len(found.servers) <= 40
    assert 19 < run_floor(found).flow < 130


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n- 2", "expected keys and values"),
        ("blocks: [", "not valid YAML"),
        (SWARM.replace("2:4", "2:5"), "expected blocks of 0:4"),
        (SWARM.replace("rows: 40", "rows: many"), "rows"),
        (SWARM.replace("push: never", "push: perhaps"), "push"),
        (SWARM.replace("push: never", "gpus: 8"), "gpus"),
        (SWARM.replace("up_mbps: 20", "up_mbps: 0"), "rates above 0"),
        (SWARM.replace("delay: 0.02", "delay: -1"), "a delay"),
        (SWARM + "faults: [{at: 1, server: 7, fault: {name: crash}}]", "expected a server below 2"),
        (SWARM + "faults: [{at: 1, server: 0, fault: {name: meteor}}]", "meteor"),
        (SWARM.replace("tokens_per_second: 1000", "tokens_per_second: 1000, returns: 3"), "to leave before it returns"),
        (SWARM.replace("tokens_per_second: 1000", "tokens_per_second: 9, moves: [{at: 1, blocks: 0:9}]"), "0:4"),
    ],
)
def test_a_file_that_describes_none_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_scenario(str(file_of(tmp_path, text)))


def test_schedules_of_faults_are_told_of(tmp_path):
    outcome = invoke("bench", "simulate", "--faults", "3", "--seed", "10", "--json")
    told = json.loads(outcome.out)
    assert (outcome.code, told["schedules"], told["failed"]) == (0, 3, [])
    assert [told[name] for name in ("lost", "doubled", "different", "late")] == [0] * 4 and told["in_flight"] >= 3
    assert "3 schedules of faults: 3 as they must be, 0 not" in outcome.err


def test_a_swarm_that_loses_rows_ends_with_code_1(tmp_path):
    faults = "faults: [{at: 0.1, server: 0, fault: {name: crash}}]\n"
    swarm = SWARM.replace("settings: {push: never}", "settings: {push: never, deadline: 5}") + faults
    outcome = invoke("bench", "simulate", str(file_of(tmp_path, swarm)))
    assert outcome.code == 1 and "rows lost" in outcome.out and "stopped at the deadline" in outcome.out


@pytest.mark.parametrize("arguments", [(), ("swarm.yaml", "--random", "2"), ("--faults", "1", "--random", "2")])
def test_a_file_or_a_number_is_needed(arguments):
    outcome = invoke("bench", "simulate", *arguments)
    assert outcome.code == 2 and "--random N" in outcome.err
