"""A benchmark beside an older one: what got slower beyond the spread, and what is no benchmark."""

import json
from pathlib import Path

import pytest

from petals_eval.bench.compared import Older
from petals_eval.bench.statistics import Spread
from petals_eval.errors import ConfigError
from tests.bench.test_schema import check, outcome
from tests.bench.test_simulate import SWARM, file_of
from tests.cli.invoking import invoke


def older(folder: Path, value: object) -> Older:
    path = folder / "old.json"
    path.write_text(json.dumps(value))
    return Older.read(path)


def paced(*shares: float) -> dict[str, object]:
    spread = {"least": min(shares), "median": sorted(shares)[len(shares) // 2], "greatest": max(shares)}
    regime = {"name": "link", "rows": 9, "first": spread, "warm": spread, "floor_seconds": 1.0, "busy": 0.2}
    return {
        "schema_version": 1,
        "benchmark": "paced",
        "regimes": [{**regime, "petals_ratio": None, "retries": 0}],
    }


@pytest.mark.parametrize(
    ("now", "slower"),
    [
        ((0.80, 0.82, 0.84), 0),
        ((0.70, 0.72, 0.81), 0),  # within the spread
        ((0.70, 0.72, 0.79), 2),
        ((0.90, 0.92, 0.94), 0),
    ],
)
def test_what_got_slower_is_what_lies_below_the_spread(tmp_path, now, slower):
    lines: list[str] = []
    found = paced(*now)
    assert older(tmp_path, paced(0.80, 0.82, 0.84)).compare(found, lines.append) == slower
    assert lines[0].startswith(f"{slower} of 2 measures got slower") and len(lines) == 1 + slower
    check(found)


def test_what_changes_by_next_to_nothing_is_the_same_where_nothing_spreads(tmp_path):
    assert older(tmp_path, paced(0.80)).compare(paced(0.79), lambda line: None) == 0
    assert older(tmp_path, paced(0.80)).compare(paced(0.78), lambda line: None) == 2


def test_cases_of_a_sweep_are_told_apart(tmp_path):
    before, now = outcome("forward"), outcome("forward")
    before.points[0] = type(before.points[0])(before.points[0].case, Spread(9, 9, 9), *_rest(before.points[0]))
    found = now.to_json()
    assert older(tmp_path, before.to_json()).compare(found, lambda line: None) == 1
    assert found["compared"]["slower"][0]["name"] == "length 4, batch 2, window auto, float16"
    check(found)


def _rest(point):
    return point.rows, point.latency, point.micro_batches, point.watched


def test_a_simulation_that_got_slower_ends_with_code_1(tmp_path):
    swarm = str(file_of(tmp_path, SWARM))
    first = invoke("bench", "simulate", swarm, "--json")
    old = tmp_path / "old.json"
    old.write_text(first.out)
    same = invoke("bench", "simulate", swarm, "--compare", str(old))
    assert same.code == 0 and "0 of 1 measure got slower" in same.out
    told = json.loads(first.out)
    told["scenarios"][0]["shares"][0] *= 1.1
    old.write_text(json.dumps(told))
    slower = invoke("bench", "simulate", swarm, "--compare", str(old), "--json")
    assert slower.code == 1 and len(json.loads(slower.out)["compared"]["slower"]) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "Expecting"), ("[]", "expected the JSON of a benchmark"), ('{"benchmark": "paced"}', "schema_version")],
)
def test_what_is_no_benchmark_is_refused(tmp_path, text, message):
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        Older.read(path)


def test_what_cannot_be_compared_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="'forward', found one of 'paced'"):
        older(tmp_path, paced(0.8)).compare(outcome("forward").to_json(), lambda line: None)
    other = paced(0.8)
    other["regimes"][0]["name"] = "server"
    with pytest.raises(ConfigError, match="expected measures of link"):
        older(tmp_path, other).compare(paced(0.8), lambda line: None)
    missing = invoke("bench", "simulate", "--random", "1", "--compare", str(tmp_path / "none.json"))
    assert missing.code == 2 and "none.json" in missing.err
