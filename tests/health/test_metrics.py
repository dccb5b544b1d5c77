"""A report as metrics of Prometheus."""

import re

from prometheus_client.parser import text_string_to_metric_families

from petals_eval.health import HealthReport
from petals_eval.health.metrics import Tally, exposition
from tests.support.fake_health import EVIL


def test_prometheus_reads_the_metrics_and_finds_their_names_in_order(report: HealthReport) -> None:
    text = exposition(report, Tally(looks=3, failures=1, calls=40, bytes_sent=5, up=True, changes={EVIL: 2})).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for name, family in families.items():
        assert re.fullmatch(r"petals_[a-z_]+", name) and family.documentation.endswith(".")
        assert not name.endswith(("_ms", "_milliseconds", "_kb", "_count", "_sum", "_total", "_gauge"))
        samples = {sample.name for sample in family.samples}
        assert samples <= ({f"{name}_total"} if family.type == "counter" else {name})
        labels = [(sample.name, tuple(sorted(sample.labels.items()))) for sample in family.samples]
        assert len(labels) == len(set(labels))
    covered = {s.labels["model"]: s.value for s in families["petals_model_blocks_covered"].samples}
    assert covered == {"tiny": 4.0, EVIL: 4.0}
    verdicts = [s for s in families["petals_model_verdict"].samples if s.labels["model"] == "tiny"]
    assert [s.labels["verdict"] for s in verdicts if s.value] == ["degraded"] and len(verdicts) == 4
    assert families["petals_health_looks"].samples[0].value == 3


def test_metrics_before_the_first_look() -> None:
    text = exposition(None, Tally()).decode()
    [up] = [family for family in text_string_to_metric_families(text) if family.name == "petals_swarm_up"]
    assert up.samples[0].value == 0
