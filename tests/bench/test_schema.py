"""The published JSON Schema describes all that benchmarks print, and nothing else."""

import json
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from petals_eval.bench.forward import ForwardCase, ForwardPoint
from petals_eval.bench.inference import InferenceCase, InferencePoint
from petals_eval.bench.monitor import ResourceUse, ServerShare
from petals_eval.bench.outcome import Failure, Outcome
from petals_eval.bench.simulate import FaultsOutcome, bench_simulate
from petals_eval.bench.statistics import Spread
from petals_eval.simulator.scenario import Scenario, Server
from petals_eval.simulator.schedules import run_schedule
from petals_eval.swarm.wire.span import Span
from tests.support.json_schemas import closed

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = json.loads((resources.files("petals_eval.bench") / "schemas" / "bench.schema.json").read_text("utf-8"))
WATCHED = ResourceUse(1.0, {"a": ServerShare(1, 2, 1.0, 3, 4, None, 0.5)}, None, 0.1, 1 << 20, 0)
RATES = Spread(1.0, 2.0, 3.0)


def check(value: object) -> None:
    """Hold it to the schema as it is published, and to one in which nothing is allowed that is not described."""
    value = json.loads(json.dumps(value, allow_nan=False))
    for schema in (SCHEMA, _closed_parts()):
        Draft202012Validator(schema).validate(value)


def _closed_parts() -> object:
    """Close what stands for itself: a case and a sweep are parts of something larger."""
    parts = {name: part if name in ("case", "sweep") else closed(part) for name, part in SCHEMA["$defs"].items()}
    return SCHEMA | {"$defs": parts}


def outcome(kind: str) -> Outcome:
    found = Outcome(kind, "llama", {"a": "0:2"}, {"lengths": [4]})
    latency = 0.1, 0.2, 0.3
    if kind == "forward":
        found.points.append(ForwardPoint(ForwardCase(4, 2, None, "float16"), RATES, RATES, latency, 9, WATCHED))
    else:
        found.points.append(InferencePoint(InferenceCase(4, 2, 1, "lossless"), latency, latency, RATES, RATES, WATCHED))
    found.failures.append(Failure(ForwardCase(9, 1, 2, "lossless"), "too long"))
    return found


def test_the_schema_is_one_and_takes_no_empty_object() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    with pytest.raises(ValidationError):
        check({})


@pytest.mark.parametrize("kind", ["forward", "inference"])
def test_sweeps_are_as_they_are_published(kind: str) -> None:
    found = outcome(kind).to_json()
    check(found)
    found["points"][0]["temperature"] = 1
    with pytest.raises(ValidationError):
        check(found)


def test_simulations_are_as_they_are_published() -> None:
    server = Server(blocks=Span(0, 2), tokens_per_second=1000)
    scenario = Scenario(blocks=2, hidden_size=8, rows=8, tokens=(8, 8), servers=(server,))
    found = bench_simulate([("one", scenario)], 2, lambda line: None).to_json()
    check(found)
    found["scenarios"][0]["evaluations"][0]["temperature"] = 1
    with pytest.raises(ValidationError):
        check(found)


@pytest.mark.soak
def test_the_script_for_paced_servers_prints_what_is_published() -> None:
    script = ROOT / "scripts" / "bench_paced.py"
    arguments = ["near", "--rows", "20", "--pairs", "1", "--simulated", "--json"]
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    check(told)
    assert [each["name"] for each in told["regimes"]] == ["near"] and told["regimes"][0]["retries"] == 0


def test_schedules_of_faults_are_as_they_are_published() -> None:
    found, run = FaultsOutcome(), run_schedule(3)
    found.add(run)
    found.failed.append(run)
    check(found.to_json())
