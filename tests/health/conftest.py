"""A clean swarm over the real model, and a report full of strangers' words, that several tests look at."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from petals_eval.health import HealthReport
from petals_eval.health.live import RouteTimes
from petals_eval.health.results import BootstrapPeer
from petals_eval.local_swarm import LocalSwarm
from tests.support.fake_health import EVIL, FakeServer, FakeSwarm, noisy, report_on

STORIES = "stories260K-hf"


@pytest.fixture(scope="session")
def stories_model(realdata: Path) -> Path:
    return realdata / "stories260K-hf"


@pytest.fixture(scope="session")
def clean_swarm(stories_model: Path) -> Iterator[LocalSwarm]:
    """Every block on two servers, of two dtypes."""
    spans = [(0, 3), (2, 5), (0, 5)]
    with LocalSwarm(stories_model, spans=spans, mode="thread", dht_prefix=STORIES) as swarm:
        swarm.add_server((1, 5), dtype="bfloat16")
        yield swarm


@pytest.fixture(scope="session")
def report() -> HealthReport:
    """A swarm whose peers put markup and escape codes into every word they can say."""
    words = {"public_name": EVIL, "version": EVIL, "quant_type": EVIL, "adapters": [EVIL]}
    rates = {"network_rps": 900.0, "forward_rps": 5000.0, "inference_rps": 200}
    pings = {EVIL: 0.1, "b": 0.012, "bad": math.inf, "wrong": "0.1", "gone": 0.4}
    swarm = FakeSwarm(
        4,
        a=FakeServer(0, 4, record={**words, **rates, "next_pings": pings, "using_relay": True}),
        b=FakeServer(0, 4, record={"next_pings": {}, "network_rps": 100.0}),
        bad=FakeServer(0, 3, answer=noisy),
    )
    found = report_on(swarm, level="route", route=RouteTimes(0.25, 1234.0))
    model = found.models[0]
    bootstrap = (
        BootstrapPeer("/ip4/203.0.113.5/tcp/1/p2p/a", "reachable", seconds=0.02),
        BootstrapPeer("/ip4/203.0.113.6/tcp/1/p2p/a", "unreachable", EVIL),
    )
    models = (model, replace(model, name=EVIL, repository=EVIL, why=EVIL))
    return replace(found, models=models, notes=(EVIL,), bootstrap=bootstrap)
