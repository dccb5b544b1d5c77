"""The published JSON Schemas describe all that health prints and serves, and nothing else."""

import json
from importlib import resources
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from referencing import Registry, Resource

from petals_eval.errors import SwarmUnreachableError
from petals_eval.health import HealthReport, HealthSettings
from petals_eval.health.history import History
from petals_eval.health.live import RouteTimes
from petals_eval.health.serving import Monitor
from tests.support.fake_health import FakeServer, FakeSwarm, clean_report, report_on
from tests.support.fake_swarm import PEER
from tests.support.json_schemas import closed

SCHEMAS = {
    name: json.loads((resources.files("petals_eval.health") / "schemas" / f"{name}.schema.json").read_text("utf-8"))
    for name in ("report", "state")
}


def check(name: str, value: object) -> None:
    """Hold it to the schema as it is published, and to one in which nothing is allowed that is not described."""
    value = json.loads(json.dumps(value, allow_nan=False))
    for schemas in (SCHEMAS, closed(SCHEMAS)):
        registry = Registry().with_resources((each["$id"], Resource.from_contents(each)) for each in schemas.values())
        Draft202012Validator(schemas[name], registry=registry).validate(value)


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_one_and_takes_no_empty_object(name: str) -> None:
    Draft202012Validator.check_schema(SCHEMAS[name])
    with pytest.raises(ValidationError):
        check(name, {})


def test_a_report_of_hostile_words_is_as_it_is_published(report: HealthReport) -> None:
    found = report.to_json()
    check("report", found)
    server = next(each for each in found["models"][0]["servers"] if each["peer_id"] == "a")
    assert server["next_pings"] == {"b": 0.012, "bad": None, "gone": 0.4}
    server["of_a_stranger"] = 1
    with pytest.raises(ValidationError, match="of_a_stranger"):
        check("report", found)


@pytest.mark.parametrize("level", ["record", "info", "forward", "route"])
def test_reports_of_every_level_are_as_they_are_published(level: str) -> None:
    servers = {"a": FakeServer(0, 4), "b": FakeServer(2, 9, state=1), "c": FakeServer(3, 3)}
    check("report", report_on(FakeSwarm(4, **servers), level=level, route=RouteTimes(0.1, 9.0)).to_json())
    check("report", report_on(FakeSwarm(4), level=level).to_json())


def test_the_state_is_as_it_is_published() -> None:
    outcomes = [clean_report(), SwarmUnreachableError("nobody")]

    def look(settings: HealthSettings) -> HealthReport:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monitor = Monitor(HealthSettings(initial_peers=(PEER,)), 60.0, History(None), lambda line: None, look)
    states: list[dict[str, Any]] = [monitor.state()]
    for _ in range(2):
        monitor.look()
        states.append(monitor.state())
    for state in states:
        check("state", state)
    assert [state["looks"] for state in states] == [0, 1, 2]
