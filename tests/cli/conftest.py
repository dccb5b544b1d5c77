"""What the tests of the command share: one swarm over the real model, and the flags that name it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from petals_eval.local_swarm import LocalSwarm
from petals_eval.local_swarm.faults.catalog import Slow
from petals_eval.local_swarm.handles import LocalServer

SPANS = ((0, 2), (2, 4), (4, 5))


@dataclass(frozen=True)
class Stage:
    """The real data, and a swarm over its model."""

    realdata: Path
    peer: str
    servers: tuple[LocalServer, ...]

    @property
    def model(self) -> Path:
        return self.realdata / "stories260K-hf"

    @property
    def trec(self) -> Path:
        return self.realdata / "trec" / "TREC.test.all"

    def adapter(self, name: str = "trec-deep_ptune") -> Path:
        return self.realdata / "adapters" / name

    @property
    def swarm(self) -> tuple[str, ...]:
        """The flags that name the swarm."""
        return "--initial-peers", self.peer, "--dht-prefix", "stories260K-hf"

    def run(self, *more: object, adapter: object = "trec-deep_ptune", data: object = None) -> list[object]:
        """A whole command: `petals-eval run` of the real prompts on TREC, or with another adapter or data."""
        chosen = (
            [] if adapter is None else ["--adapter", self.adapter(adapter) if isinstance(adapter, str) else adapter]
        )
        return [*self.on_task("trec", data or self.trec), *chosen, *self.swarm, *more]

    def on_task(self, task: object, data: object) -> list[object]:
        return ["run", "--model", self.model, "--task", task, "--data", data]


@pytest.fixture(scope="session")
def stage(realdata: Path) -> Iterator[Stage]:
    with LocalSwarm(realdata / "stories260K-hf", spans=SPANS, mode="thread") as swarm:
        yield Stage(realdata, swarm.initial_peers[0], tuple(swarm.servers))


@pytest.fixture
def unhurried(stage: Stage) -> Iterator[Stage]:
    """Servers that take their time, so that a run has a middle on any machine."""
    for server in stage.servers:
        server.switch(Slow(delay=0.03))
    yield stage
    for server in stage.servers:
        server.switch()


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in a folder of its own: the command makes runs/ where it is started."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
