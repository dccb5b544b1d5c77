"""Runs over a real swarm: the real model on a local swarm in threads, and connections to any swarm."""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import petals_eval
from petals_eval.local_swarm import LocalSwarm
from petals_eval.swarm import SwarmConnection
from petals_eval.tasks import load_task, resolve_source

STORIES = "stories260K-hf"
ADAPTER = "trec-deep_ptune"


class HasPeers(Protocol):
    """A swarm, local or of real Petals servers."""

    initial_peers: list[str]


def connect(swarm: HasPeers, **settings: Any) -> SwarmConnection:
    """A connection to a swarm; settings: any of `SwarmSettings`."""
    return SwarmConnection.connect(petals_eval.SwarmSettings(initial_peers=tuple(swarm.initial_peers), **settings))


@contextlib.contextmanager
def stories_swarm(realdata: Path, spans: Sequence[tuple[int, int]], **options: Any) -> Iterator[LocalSwarm]:
    """The real model on servers of these spans, in threads unless told otherwise; options: any of `LocalSwarm`."""
    with LocalSwarm(realdata / STORIES, spans=spans, **{"mode": "thread", **options}) as swarm:
        yield swarm


@contextlib.contextmanager
def trec_model(realdata: Path, swarm: LocalSwarm, **settings: Any) -> Iterator[petals_eval.RemoteModel]:
    """The real model over a swarm of its blocks, with deep prompts and a head for TREC."""
    with petals_eval.RemoteModel.from_pretrained(
        str(realdata / STORIES),
        adapter=str(realdata / "adapters" / ADAPTER),
        initial_peers=swarm.initial_peers,
        dht_prefix=swarm.dht_prefix,
        **settings,
    ) as model:
        yield model


def evaluate_trec(realdata: Path, model: petals_eval.RemoteModel, out: Path, **options: Any) -> petals_eval.RunResult:
    """An evaluation of TREC's test set in small micro-batches, into the run folder `out`."""
    task = load_task("trec")
    source = resolve_source(task, realdata / "trec" / "TREC.test.all")
    return petals_eval.evaluate(model, task=task, data=source, out=out, **{"tokens_per_micro_batch": 128, **options})


def predictions(folder: Path) -> list[dict]:
    """Everything that a run scored, line by line."""
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


class ProgressLines:
    """A progress display that keeps its lines. on_update: called with the number of examples that are done."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.on_update: Callable[[int], None] | None = None

    def update(self, done: int, retries: int = 0, servers: int = 0, message: str | None = None) -> None:
        if message is not None:
            self.lines.append(message)
        if self.on_update is not None:
            self.on_update(done)

    def waiting(self, message: str) -> None:
        raise RuntimeError(message)
