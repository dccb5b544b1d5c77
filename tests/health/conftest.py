"""A clean swarm over the real model, and a report full of strangers' words, that several tests look at."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from petals_eval.health import HealthReport
from petals_eval.health.live import RouteTimes
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
    swarm = FakeSwarm(4, a=FakeServer(0, 4, record=words), b=FakeServer(0, 4), bad=FakeServer(0, 3, answer=noisy))
    found = report_on(swarm, level="route", route=RouteTimes(0.25, 1234.0))
    model = found.models[0]
    return replace(found, models=(model, replace(model, name=EVIL, repository=EVIL, why=EVIL)), notes=(EVIL,))
