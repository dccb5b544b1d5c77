"""A report as JSON."""

import json

from petals_eval.health import HealthReport


def test_the_json_is_versioned_and_plain(report: HealthReport) -> None:
    found = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert found["schema_version"] == 1 and found["verdict"] == "degraded" and found["level"] == "route"
    model = found["models"][0]
    assert (model["blocks_covered"], model["thinnest"]) == (4, {"block": 0, "servers": 2})
    bad = next(server for server in model["servers"] if server["peer_id"] == "bad")
    assert bad["findings"][0]["name"] == "disagrees-with-replica" and bad["findings"][0]["level"] == "forward"
    assert bad["probes"] == {"record": "passed", "info": "passed", "forward": "failed"}
    assert {"round_trip", "throughput", "tokens_per_second", "record_age", "cache_tokens_seen", "quant_type"} <= set(
        bad
    )
