"""One clean swarm over the real model that several tests look at."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from petals_eval.local_swarm import LocalSwarm

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
