"""What a report looks like: terminal, JSON, page, metrics, changes. Whatever peers say, it stays text."""

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from petals_eval.health import HealthReport, Verdict
from petals_eval.health.changes import changes
from petals_eval.health.history import Uptime
from petals_eval.health.live import RouteTimes
from petals_eval.health.metrics import Tally, exposition
from petals_eval.health.page import page
from petals_eval.health.terminal import print_report
from tests.support.fake_health import FakeServer, FakeSwarm, report_on

EVIL = "<script>alert(1)</script>\"'&\x1b[31m\u202e\n# HELP x"


def noisy(hidden: torch.Tensor) -> torch.Tensor:
    return hidden + 0.3 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def report() -> HealthReport:
    """A swarm whose peers put markup and escape codes into every word they can say."""
    words = {"public_name": EVIL, "version": EVIL, "quant_type": EVIL, "adapters": [EVIL]}
    swarm = FakeSwarm(4, a=FakeServer(0, 4, record=words), b=FakeServer(0, 4), bad=FakeServer(0, 3, answer=noisy))
    found = report_on(swarm, level="route", route=RouteTimes(0.25, 1234.0))
    model = found.models[0]
    return replace(found, models=(model, replace(model, name=EVIL, repository=EVIL, why=EVIL)), notes=(EVIL,))


def printed(report: HealthReport) -> str:
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=100, markup=False, highlight=False))
    return stream.getvalue()


def test_the_terminal_shows_a_line_a_bar_and_every_server(report: HealthReport) -> None:
    text = printed(report)
    assert "tiny   degraded   4/4 blocks, thinnest: block 0 (2 servers)" in text
    assert "a canary all the way: 250 ms, 1,234 tok/s" in text
    assert "0 ████  2 to 2 servers a block" in text
    assert re.search(r"disagrees-with-replica  blocks \d:\d: 2 of 3 servers agree on another answer", text)
    assert "degraded: 2 models, 6 servers, asked up to level route" in text


def test_missing_blocks_stand_out_in_the_bar() -> None:
    text = printed(report_on(FakeSwarm(4, a=FakeServer(0, 2), b=FakeServer(3, 4))))
    assert "0 ██✗█" in text and "broken" in text and "no usable server holds blocks 2:3" in text


def test_nothing_a_peer_says_moves_the_cursor(report: HealthReport) -> None:
    text = printed(report)
    assert "\x1b" not in text and "\u202e" not in text
    assert not any(line.startswith("# HELP") for line in text.splitlines())


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_one_file_and_says_only_what_it_means_to(report: HealthReport) -> None:
    uptime = Uptime(10, (1.0, 0.5, 1.0, 0.999), (None, *[Verdict.HEALTHY] * 46, Verdict.BROKEN))
    text = page(report, {"tiny": uptime}, error=EVIL, reload=60)
    parser = _Tags()
    parser.feed(text)
    assert parser.open == []
    names = {name for name, _ in parser.tags}
    assert names.isdisjoint({"script", "link", "img", "iframe", "object"})
    assert not any(key in attributes for _, attributes in parser.tags for key in ("src", "href", "onclick", "onerror"))
    assert "\x1b" not in text and "\u202e" not in text and "<script" not in text
    assert "url(" not in text and "@import" not in text
    assert "prefers-color-scheme:dark" in text and 'name="viewport"' in text
    assert "lowest 50% (block 1)" in text and "99.9%" in text
    assert "disagrees-with-replica" in text


def test_a_page_before_the_first_look() -> None:
    assert "under way" in page(None) and "unknown" in page(None)


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


def test_changes_between_two_looks() -> None:
    before = report_on(FakeSwarm(4, a=FakeServer(0, 4), b=FakeServer(0, 2), c=FakeServer(0, 4), d=FakeServer(0, 4)))
    servers = {"a": FakeServer(0, 4), "b": FakeServer(1, 4), "d": FakeServer(0, 4)}
    now = report_on(FakeSwarm(4, **servers, bad=FakeServer(0, 4, answer=noisy)))
    lines = changes(before, now)
    assert changes(now, now) == []
    assert any("healthy -> degraded" in line for line in lines)
    assert any("c left (blocks 0:4)" in line for line in lines)
    assert any("bad came (blocks 0:4), broken" in line for line in lines)
    assert any("b moved from blocks 0:2 to 1:4" in line for line in lines)
    assert any("bad disagrees-with-replica: " in line for line in lines)
    back = changes(now, before)
    assert any("degraded -> healthy" in line for line in back)
