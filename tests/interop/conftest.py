"""Swarms of real Petals servers that several tests share: each takes seconds to start."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from petals_eval.swarm import RemoteSequential, Work
from tests.interop.lm_eval_tasks import ask_lm_eval, write_own_rows
from tests.interop.petals_folders import make_petals_tiny
from tests.interop.real_petals import RealPetalsSwarm
from tests.interop.server_kinds import chosen_kind

STORIES = "stories260K-hf"
BOUNDED = {"request_timeout": 30, "deadline": 60}
"""Seconds after which a test fails rather than waits on."""


@pytest.fixture(scope="session")
def stories_dir(realdata: Path) -> Path:
    return realdata / "stories260K-hf"


@pytest.fixture(scope="session")
def stories(stories_dir: Path) -> Iterator[RealPetalsSwarm]:
    """The real model on three real servers, float32."""
    with RealPetalsSwarm(stories_dir, [(0, 2), (2, 4), (4, 5)], dht_prefix=STORIES) as swarm:
        yield swarm


@pytest.fixture(scope="session")
def own_rows(
    request: pytest.FixtureRequest, realdata: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The rows of the tasks with templates of our own, by task."""
    # The first rows are enough for every digit, and all of them take as long as everything else.
    documents, questions = (None, None) if request.config.getoption("--soak") else (12, 100)
    return write_own_rows(realdata, tmp_path_factory.mktemp("rows"), documents=documents, questions=questions)


@pytest.fixture(scope="session")
def lm_eval(stories_dir: Path, own_rows: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What lm-evaluation-harness asks and computes of all tasks, by task: lm_eval_reference.py says how it looks."""
    return ask_lm_eval(stories_dir, own_rows, tmp_path_factory.mktemp("lm-eval"))


@pytest.fixture(scope="session", params=[each for each in chosen_kind().families if each != "llama"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealPetalsSwarm]:
    """A random model of the family on two real servers whose spans overlap. Wide, so that 1 MiB is 1,024 tokens."""
    folder = make_petals_tiny(request.param, tmp_path_factory.mktemp("tiny") / request.param, hidden=256)
    with RealPetalsSwarm(folder, [(0, 2), (1, 3)], dht_prefix=f"tiny-{request.param}") as swarm:
        yield swarm


def in_one_call(blocks: RemoteSequential, hidden: torch.Tensor, prompts: torch.Tensor | None = None) -> torch.Tensor:
    """As one micro-batch, where calling the module would send several."""
    (computed,) = blocks.stream([Work(0, hidden, prompts)])
    return computed.hidden
